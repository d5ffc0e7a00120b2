//! How one value is read and written: the trait, the primitives and lists.
//!
//! Environment variables and `--set` hand over raw text, files hand over typed values. Every type
//! reads both, so that no layer has to guess types (a password `007` stays `007`).

use std::path::PathBuf;

use figment::providers::{Format, Toml};
use figment::value::{Dict, Num, Value};

/// Why a value was refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Rejected {
    /// What is allowed instead, worded to follow "allowed: ".
    pub allowed: String,
    /// The item of a list that was refused, when that says more than the whole list.
    pub item: Option<String>,
}

impl Rejected {
    pub fn new(allowed: impl Into<String>) -> Rejected {
        Rejected {
            allowed: allowed.into(),
            item: None,
        }
    }
}

/// A type that a configuration key can have.
pub(crate) trait ConfigValue: Sized {
    /// Secret values are masked wherever they would be shown.
    const SECRET: bool = false;

    /// What is allowed, worded to follow "allowed: ".
    fn allowed() -> String;

    /// Reads the raw text of an environment variable, of `--set`, or a string in a file.
    fn from_text(text: &str) -> Result<Self, Rejected>;

    /// Reads a value of any layer. Types with a native form in files override this.
    fn from_value(value: &Value) -> Result<Self, Rejected> {
        match value {
            Value::String(_, text) => Self::from_text(text),
            _ => Err(Rejected::new(Self::allowed())),
        }
    }

    /// The raw text: what an environment variable would hold. A secret writes its mask.
    fn to_text(&self) -> String;

    /// The TOML value. A secret writes its mask.
    fn to_toml(&self) -> String {
        quote(&self.to_text())
    }
}

/// `text` as a TOML basic string.
pub(crate) fn quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// `value` as a fault shows it: short, and without user info that a URL may carry.
pub(crate) fn show(value: &Value) -> String {
    let shown = match value {
        Value::String(_, text) => format!("{:?}", redact(text)),
        Value::Char(_, c) => format!("{c:?}"),
        Value::Bool(_, b) => b.to_string(),
        Value::Num(_, n) => number_text(n),
        Value::Array(_, items) => {
            format!(
                "[{}]",
                items.iter().map(show).collect::<Vec<_>>().join(", ")
            )
        }
        Value::Dict(..) | Value::Empty(..) => kind(value).to_owned(),
    };
    shorten(shown)
}

/// What sort of thing `value` is; says nothing of its content.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(..) | Value::Char(..) => "text",
        Value::Bool(..) => "true or false",
        Value::Num(..) => "a number",
        Value::Empty(..) => "nothing",
        Value::Dict(..) => "a table",
        Value::Array(..) => "a list",
    }
}

/// Long values bury the message, and nobody needs all of one to find it.
fn shorten(shown: String) -> String {
    const LONGEST: usize = 120;
    match shown.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", shown.get(..end).unwrap_or_default()),
        None => shown,
    }
}

/// Replaces the user info of URLs. The last `@` counts: a password may hold `@` or `/` unescaped.
fn redact(text: &str) -> String {
    match (text.find("//"), text.rfind('@')) {
        (Some(start), Some(at)) if start < at => {
            let head = text.get(..start + 2).unwrap_or_default();
            let tail = text.get(at..).unwrap_or_default();
            format!("{head}***{tail}")
        }
        _ => text.to_owned(),
    }
}

fn number_text(number: &Num) -> String {
    if let Some(n) = number.to_i128() {
        n.to_string()
    } else if let Some(n) = number.to_u128() {
        n.to_string()
    } else {
        number.to_f64().map(|n| n.to_string()).unwrap_or_default()
    }
}

macro_rules! whole_number {
    ($($type:ty)*) => {$(
        impl ConfigValue for $type {
            fn allowed() -> String {
                "a whole number".to_owned()
            }

            fn from_text(text: &str) -> Result<Self, Rejected> {
                text.trim().parse().map_err(|_| Rejected::new(Self::allowed()))
            }

            fn from_value(value: &Value) -> Result<Self, Rejected> {
                match value {
                    Value::String(_, text) => Self::from_text(text),
                    Value::Num(_, n) => whole(n).and_then(|n| n.try_into().ok()).ok_or_else(|| Rejected::new(Self::allowed())),
                    _ => Err(Rejected::new(Self::allowed())),
                }
            }

            fn to_text(&self) -> String {
                self.to_string()
            }

            fn to_toml(&self) -> String {
                self.to_string()
            }
        }
    )*};
}

whole_number!(u16 u32 usize);

/// The number, when it was written as an integer.
pub(crate) fn whole(number: &Num) -> Option<i128> {
    number
        .to_i128()
        .or_else(|| number.to_u128().and_then(|n| n.try_into().ok()))
}

impl ConfigValue for bool {
    fn allowed() -> String {
        "true or false".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        // Templating tools written in Python print `True`.
        match text.trim().to_ascii_lowercase().as_str() {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(Rejected::new(Self::allowed())),
        }
    }

    fn from_value(value: &Value) -> Result<Self, Rejected> {
        match value {
            Value::Bool(_, b) => Ok(*b),
            Value::String(_, text) => Self::from_text(text),
            _ => Err(Rejected::new(Self::allowed())),
        }
    }

    fn to_text(&self) -> String {
        self.to_string()
    }

    fn to_toml(&self) -> String {
        self.to_string()
    }
}

impl ConfigValue for String {
    fn allowed() -> String {
        "text (in quotes), at most 65535 bytes and without NUL".to_owned()
    }

    // MQTT carries strings with a 16-bit length and forbids NUL (MQTT 5, section 1.5.4).
    fn from_text(text: &str) -> Result<Self, Rejected> {
        if text.len() > usize::from(u16::MAX) || text.contains('\0') {
            return Err(Rejected::new(Self::allowed()));
        }
        Ok(text.to_owned())
    }

    fn to_text(&self) -> String {
        self.clone()
    }
}

impl ConfigValue for PathBuf {
    fn allowed() -> String {
        "the path of a file (in quotes)".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        Ok(PathBuf::from(text))
    }

    fn to_text(&self) -> String {
        self.to_string_lossy().into_owned()
    }
}

/// `""` stands for none.
impl<T: ConfigValue> ConfigValue for Option<T> {
    const SECRET: bool = T::SECRET;

    fn allowed() -> String {
        format!("{}; \"\" for none", T::allowed())
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        match text {
            "" => Ok(None),
            text => T::from_text(text).map(Some).map_err(or_none),
        }
    }

    fn from_value(value: &Value) -> Result<Self, Rejected> {
        match value {
            Value::String(_, text) => Self::from_text(text),
            value => T::from_value(value).map(Some).map_err(or_none),
        }
    }

    fn to_text(&self) -> String {
        self.as_ref().map(T::to_text).unwrap_or_default()
    }

    fn to_toml(&self) -> String {
        self.as_ref().map_or_else(|| quote(""), T::to_toml)
    }
}

fn or_none(rejected: Rejected) -> Rejected {
    Rejected {
        allowed: format!("{}; \"\" for none", rejected.allowed),
        ..rejected
    }
}

/// One or more: a list in a file, or comma-separated text, or the text of a TOML array.
impl<T: ConfigValue> ConfigValue for Vec<T> {
    fn allowed() -> String {
        format!("one or a list of: {}", T::allowed())
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        not_empty(list_from_text(text)?)
    }

    fn from_value(value: &Value) -> Result<Self, Rejected> {
        not_empty(list_from_value(value)?)
    }

    fn to_text(&self) -> String {
        list_to_text(self)
    }

    fn to_toml(&self) -> String {
        match self.as_slice() {
            [one] => one.to_toml(),
            several => list_to_toml(several),
        }
    }
}

fn not_empty<T: ConfigValue>(items: Vec<T>) -> Result<Vec<T>, Rejected> {
    if items.is_empty() {
        return Err(Rejected::new(Vec::<T>::allowed()));
    }
    Ok(items)
}

/// Reads a list that may be empty.
pub(crate) fn list_from_value<T: ConfigValue>(value: &Value) -> Result<Vec<T>, Rejected> {
    match value {
        Value::String(_, text) => list_from_text(text),
        Value::Array(_, items) => items
            .iter()
            .map(|item| {
                T::from_value(item).map_err(|rejected| Rejected {
                    item: Some(show(item)),
                    ..rejected
                })
            })
            .collect(),
        _ => Err(Rejected::new(Vec::<T>::allowed())),
    }
}

/// Reads comma-separated text or the text of a TOML array.
pub(crate) fn list_from_text<T: ConfigValue>(text: &str) -> Result<Vec<T>, Rejected> {
    let text = text.trim();
    if text.starts_with('[') {
        let parsed = Toml::from_str::<Dict>(&format!("list = {text}")).ok();
        return match parsed.as_ref().and_then(|dict| dict.get("list")) {
            Some(list @ Value::Array(..)) => list_from_value(list),
            _ => Err(Rejected::new(format!(
                "{}, comma-separated or as a TOML array",
                Vec::<T>::allowed()
            ))),
        };
    }
    text.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .map(|item| {
            T::from_text(item).map_err(|rejected| Rejected {
                item: Some(format!("{:?}", redact(item))),
                ..rejected
            })
        })
        .collect()
}

pub(crate) fn list_to_text<T: ConfigValue>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(T::to_text).collect();
    items.join(",")
}

pub(crate) fn list_to_toml<T: ConfigValue>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(T::to_toml).collect();
    format!("[{}]", items.join(", "))
}
