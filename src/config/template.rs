//! Texts with placeholders, URLs with them, and tables of them.

use figment::providers::{Format, Toml};
use figment::value::{Dict, Value};

use super::placeholders::{self, Placeholder};
use super::value::{ConfigValue, Rejected, quote};
use super::values::Secret;

/// A part of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// As it is.
    Text(String),
    /// To be filled in.
    Fill(Placeholder),
}

/// A text with placeholders such as `${clientid}`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Template(Vec<Piece>);

impl Template {
    /// Reads one; none where a placeholder is unknown.
    pub fn parse(text: &str) -> Option<Self> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some(at) = rest.find("${") {
            let (before, tail) = rest.split_at(at);
            let (name, after) = tail.get(2..)?.split_once('}')?;
            let placeholder = Placeholder::named(name)?;
            if !before.is_empty() {
                pieces.push(Piece::Text(before.to_owned()));
            }
            pieces.push(Piece::Fill(placeholder));
            rest = after;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Some(Self(pieces))
    }

    /// Its parts, in order.
    pub fn pieces(&self) -> &[Piece] {
        &self.0
    }

    /// Whether nothing but a placeholder is in it, so that it can be no secret.
    fn is_bare(&self) -> bool {
        matches!(self.0.as_slice(), [] | [Piece::Fill(_)])
    }

    /// As it is shown where it could be secret.
    fn masked(&self) -> String {
        match self.is_bare() {
            true => self.to_text(),
            false => Secret::MASK.to_owned(),
        }
    }
}

impl ConfigValue for Template {
    fn allowed() -> String {
        format!("text; {}", placeholders::allowed())
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        Self::parse(text).ok_or_else(|| Rejected::new(Self::allowed()))
    }

    fn to_text(&self) -> String {
        let mut text = String::new();
        for piece in &self.0 {
            match piece {
                Piece::Text(part) => text.push_str(part),
                Piece::Fill(placeholder) => text.push_str(&placeholder.to_string()),
            }
        }
        text
    }
}

/// A template whose text could be secret, and is not shown then.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SecretTemplate(Template);

impl SecretTemplate {
    /// The template itself. The caller keeps it out of logs.
    pub fn expose(&self) -> &Template {
        &self.0
    }
}

impl std::fmt::Debug for SecretTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.to_text())
    }
}

impl ConfigValue for SecretTemplate {
    const SECRET: bool = true;

    fn allowed() -> String {
        Template::allowed()
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        Template::from_text(text).map(Self)
    }

    fn to_text(&self) -> String {
        self.0.masked()
    }
}

/// Names and templates: a table of a file, or the text of a TOML inline table. Values are not shown
/// where they could be secret.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TemplateTable(Vec<(String, Template)>);

impl TemplateTable {
    /// In the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Template)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    fn read(table: &Dict) -> Result<Self, Rejected> {
        let entries = table.iter().map(|(name, value)| match value {
            Value::String(_, text) => Ok((name.clone(), Template::from_text(text)?)),
            _ => Err(Rejected::new(Self::allowed())),
        });
        entries.collect::<Result<_, _>>().map(Self)
    }
}

impl ConfigValue for TemplateTable {
    const SECRET: bool = true;

    fn allowed() -> String {
        format!(
            "a table such as {{ name = \"value\" }}; a value is {}",
            Template::allowed()
        )
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let parsed = Toml::from_str::<Dict>(&format!("table = {}", text.trim())).ok();
        match parsed.as_ref().and_then(|dict| dict.get("table")) {
            Some(Value::Dict(_, table)) => Self::read(table),
            _ => Err(Rejected::new(Self::allowed())),
        }
    }

    fn from_value(value: &Value) -> Result<Self, Rejected> {
        match value {
            Value::String(_, text) => Self::from_text(text),
            Value::Dict(_, table) => Self::read(table),
            _ => Err(Rejected::new(Self::allowed())),
        }
    }

    fn to_text(&self) -> String {
        self.to_toml()
    }

    fn to_toml(&self) -> String {
        let entries = self.iter().map(|(name, value)| {
            let value = value.masked();
            let is_bare = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
            let name = match !name.is_empty() && name.bytes().all(is_bare) {
                true => name.to_owned(),
                false => quote(name),
            };
            format!("{name} = {}", quote(&value))
        });
        let entries: Vec<String> = entries.collect();
        match entries.is_empty() {
            true => "{}".to_owned(),
            false => format!("{{ {} }}", entries.join(", ")),
        }
    }
}

/// An address of HTTP, with placeholders behind the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpUrl {
    /// Whether it is https.
    pub tls: bool,
    /// `HOST` or `HOST:PORT`.
    pub authority: String,
    /// What is behind it, from the `/` on.
    pub path: Template,
}

impl HttpUrl {
    /// For the log: without the query, which may hold a key.
    pub fn without_query(&self) -> String {
        let text = self.to_text();
        match text.split_once('?') {
            Some((before, _)) => before.to_owned(),
            None => text,
        }
    }
}

impl ConfigValue for HttpUrl {
    fn allowed() -> String {
        format!(
            "http://HOST:PORT/PATH or https://..., without user info; in the path and the query: {}",
            Template::allowed()
        )
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        let rejected = || Rejected::new(Self::allowed());
        let (tls, rest) = match (text.strip_prefix("http://"), text.strip_prefix("https://")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return Err(rejected()),
        };
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let valid = authority.parse::<http::uri::Authority>();
        let is_valid =
            valid.is_ok_and(|valid| !valid.host().is_empty()) && !authority.contains('@');
        let path = match path.starts_with('?') || path.is_empty() {
            true => format!("/{path}"),
            false => path.to_owned(),
        };
        let is_plain = path.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
        let path = Template::parse(&path).filter(|_| is_valid && is_plain);
        Ok(Self {
            tls,
            authority: authority.to_owned(),
            path: path.ok_or_else(rejected)?,
        })
    }

    fn to_text(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}{}", self.authority, self.path.to_text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_come_back_from_their_text_and_unknown_placeholders_are_refused() {
        for text in ["", "a", "${clientid}", "a${username}b${peerhost}", "$x{y}"] {
            assert_eq!(Template::from_text(text).unwrap().to_text(), text);
        }
        for bad in ["${client}", "${", "a${clientid", "${}"] {
            assert!(Template::from_text(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn tables_mask_what_could_be_secret() {
        let table = TemplateTable::from_text(r#"{ u = "${username}", "x-key" = "hunter2" }"#);
        let table = table.unwrap();
        assert_eq!(table.iter().count(), 2);
        assert_eq!(table.to_toml(), r#"{ u = "${username}", x-key = "***" }"#);
        assert!(TemplateTable::from_text("{ a = 1 }").is_err());
        assert!(TemplateTable::from_text("{ a = \"${b}\" }").is_err());
    }

    #[test]
    fn a_secret_template_shows_nothing_but_a_placeholder() {
        for (text, shown) in [
            ("", ""),
            ("${username}", "${username}"),
            ("hunter2", "***"),
            ("${clientid}:hunter2", "***"),
        ] {
            let template = SecretTemplate::from_text(text).unwrap();
            assert_eq!(template.to_text(), shown);
            assert_eq!(format!("{template:?}"), shown);
            assert_eq!(template.expose().to_text(), text);
        }
    }

    #[test]
    fn urls_have_placeholders_behind_the_host_only() {
        let url = HttpUrl::from_text("https://h:1?u=${username}").unwrap();
        assert_eq!(url.to_text(), "https://h:1/?u=${username}");
        assert_eq!(url.without_query(), "https://h:1/");
        for bad in [
            "h",
            "ftp://h",
            "http://",
            "http://u:p@h/",
            "http://${clientid}/",
            "http://h/a b",
            "http://h/#x",
            "http://h/${x}",
        ] {
            assert!(HttpUrl::from_text(bad).is_err(), "{bad}");
        }
    }
}
