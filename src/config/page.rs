//! A configuration as TOML text: the documented default file and the effective dump.

use std::fmt::Write;

use super::schema::join;

/// One table of the output.
#[derive(Debug, Default)]
pub(crate) struct Page {
    /// The dotted path of the table; empty for the top level. Items of a list have their number in it.
    pub path: String,
    /// The path as TOML has it between brackets, which knows no numbers.
    pub head: String,
    /// Whether it is one of a list: `[[head]]`.
    pub is_item: bool,
    /// What the table is for.
    pub doc: &'static str,
    /// Of something that is not configured: the default file shows it commented out.
    pub is_example: bool,
    pub lines: Vec<Line>,
    pub pages: Vec<Page>,
}

/// One key of a table.
#[derive(Debug)]
pub(crate) struct Line {
    pub key: &'static str,
    pub doc: &'static str,
    /// The TOML value; none when the key is not set.
    pub toml: Option<String>,
    /// The raw text of the value, as an environment variable holds it.
    pub text: String,
    /// What the default file shows, commented out, in place of a value.
    pub example: Option<String>,
    pub secret: bool,
}

impl Page {
    /// The table `key` below this one.
    pub fn below(&self, key: &str, doc: &'static str) -> Page {
        Page {
            path: join(&self.path, key),
            head: join(&self.head, key),
            doc,
            ..Page::default()
        }
    }

    /// An item of the list that this is; `number` counts from 1.
    pub fn item(&self, number: usize) -> Page {
        Page {
            path: join(&self.path, &number.to_string()),
            head: self.head.clone(),
            is_item: true,
            ..Page::default()
        }
    }

    fn brackets(&self) -> String {
        match self.is_item {
            true => format!("[[{}]]", self.head),
            false => format!("[{}]", self.head),
        }
    }

    /// The default file: every key with its documentation.
    pub fn documented(&self) -> String {
        let mut out = String::new();
        self.write_documented(&mut out, false);
        out
    }

    /// Values alone.
    pub fn plain(&self) -> String {
        let mut out = String::new();
        self.write_plain(&mut out);
        out
    }

    /// Every key with the dotted path of its table, depth first.
    pub fn walk<'p>(&'p self, visit: &mut impl FnMut(&'p str, &'p Line)) {
        for line in &self.lines {
            visit(&self.path, line);
        }
        for page in &self.pages {
            page.walk(visit);
        }
    }

    // Writing to a `String` cannot fail, so the results of `write!` are dropped.
    fn write_documented(&self, out: &mut String, within_example: bool) {
        let is_example = within_example || self.is_example;
        let off = if is_example { "#" } else { "" };
        write_comment(out, self.doc);
        let has_head = !self.lines.is_empty() && !self.path.is_empty();
        if has_head {
            let _ = writeln!(out, "{off}{}", self.brackets());
        }
        if has_head || !self.doc.is_empty() {
            out.push('\n');
        }
        for line in &self.lines {
            write_comment(out, line.doc);
            match (&line.example, &line.toml) {
                (Some(example), _) => {
                    let _ = writeln!(out, "# {} = {example}\n", line.key);
                }
                (None, Some(toml)) => {
                    let _ = writeln!(out, "{off}{} = {toml}\n", line.key);
                }
                (None, None) => {}
            }
        }
        for page in &self.pages {
            page.write_documented(out, is_example);
        }
    }

    fn write_plain(&self, out: &mut String) {
        if self.is_example {
            return;
        }
        if !self.lines.is_empty() && !self.path.is_empty() {
            let _ = writeln!(out, "\n{}", self.brackets());
        }
        for line in &self.lines {
            if let Some(toml) = &line.toml {
                let _ = writeln!(out, "{} = {toml}", line.key);
            }
        }
        for page in &self.pages {
            page.write_plain(out);
        }
    }
}

/// `doc` holds the lines of a doc comment, each with the blank that follows `///`.
fn write_comment(out: &mut String, doc: &str) {
    // The back-ticks are for rustdoc.
    let lines = doc.lines().filter(|line| !line.trim().starts_with("```"));
    for line in lines {
        let _ = writeln!(out, "#{}", line.replace('`', ""));
    }
}
