//! Text of a certain form (names, mountpoints), and words to choose from.

use std::fmt;
use std::ops::Deref;

use super::value::{ConfigValue, Rejected};

macro_rules! text_newtype {
    ($($(#[$attribute:meta])* $name:ident: $allowed:expr, $accepts:expr;)*) => {$(
        $(#[$attribute])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub struct $name(String);

        impl Deref for $name {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl ConfigValue for $name {
            fn allowed() -> String {
                $allowed.to_owned()
            }

            fn from_text(text: &str) -> Result<Self, Rejected> {
                let accepts: fn(&str) -> bool = $accepts;
                if accepts(text) {
                    Ok($name(text.to_owned()))
                } else {
                    Err(Rejected::new(Self::allowed()))
                }
            }

            fn to_text(&self) -> String {
                self.0.clone()
            }
        }
    )*};
}

text_newtype! {
    /// The gateway's name in `Message.node`.
    NodeName: "1 to 255 bytes of text without control characters",
        |text| (1..=255).contains(&text.len()) && !text.contains(char::is_control);

    /// The prefix of every topic, with its placeholders not yet filled in.
    Mountpoint: "the beginning of a topic, such as \"meters/${clientid}/\"; placeholders are ${clientid} and ${username}; no +, # or NUL, at most 65535 bytes",
        is_mountpoint;

    /// What the client ids of the gateway's broker connections begin with.
    // The rest of the client id is the gateway's; MQTT servers commonly cap ids at 64 or more.
    ClientIdPrefix: "1 to 32 characters without /, +, #, white space and control characters",
        |text| (1..=32).contains(&text.chars().count())
            && !text.contains(|c: char| matches!(c, '/' | '+' | '#') || c.is_whitespace() || c.is_control());

    /// The name of an MQTT 5 user property.
    PropertyName: "the name of a user property: 1 to 255 bytes of text without control characters",
        |text| (1..=255).contains(&text.len()) && !text.contains(char::is_control);

    /// The name of a handler or listener: the NAME in `[handlers.NAME]` and `[listeners.tcp.NAME]`.
    Name: "1 to 64 of the characters a-z, 0-9, _ and -", is_name;
}

/// Whether `text` can name a handler or a listener.
pub(crate) fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-')
}

fn is_mountpoint(text: &str) -> bool {
    let literal = text.replace("${clientid}", "").replace("${username}", "");
    text.len() <= usize::from(u16::MAX)
        && !literal.contains("${")
        && !literal.contains(['+', '#', '\0'])
}

macro_rules! words {
    ($($(#[$attribute:meta])* pub enum $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)* })*) => {$(
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[$doc])* $variant,)*
        }

        impl $crate::config::value::ConfigValue for $name {
            fn allowed() -> String {
                [$(concat!("\"", $word, "\"")),*].join(" or ")
            }

            fn from_text(text: &str) -> Result<Self, $crate::config::value::Rejected> {
                match text.trim() {
                    $($word => Ok($name::$variant),)*
                    _ => Err($crate::config::value::Rejected::new(Self::allowed())),
                }
            }

            fn to_text(&self) -> String {
                match self {
                    $($name::$variant => $word.to_owned(),)*
                }
            }
        }
    )*};
}
pub(crate) use words;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountpoints_know_two_placeholders() {
        for good in ["", "a/b/", "${clientid}/${username}/", "$x{y}"] {
            assert!(Mountpoint::from_text(good).is_ok(), "{good:?}");
        }
        for bad in ["${client}", "a/+/", "#", "a\0", "${"] {
            assert!(Mountpoint::from_text(bad).is_err(), "{bad:?}");
        }
    }
}
