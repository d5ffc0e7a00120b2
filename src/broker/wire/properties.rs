//! The properties of a PUBLISH of MQTT 5 (3.3.2.3), read where they lie.

use std::fmt;

use bytes::Bytes;

use super::WireError;
use super::fit::variable;

pub(super) fn truncated() -> WireError {
    WireError::Invalid("5", "a truncated packet".to_owned())
}

/// A property that is of use.
pub(super) enum Property<'a> {
    /// 3.3.2.3.8
    SubscriptionId(u32),
    /// 3.3.2.3.7
    User(&'a [u8], &'a [u8]),
    /// Any other that a PUBLISH may have.
    Other,
}

/// The properties one after another. Ends behind the first that is none.
#[derive(Clone)]
pub(super) struct Properties<'a> {
    left: &'a [u8],
}

impl<'a> Properties<'a> {
    /// Those in a PUBLISH, without their length.
    pub(super) fn of(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let (taken, left) = self.left.split_at_checked(count).ok_or_else(truncated)?;
        self.left = left;
        Ok(taken)
    }

    /// Two bytes of length and so many bytes (1.5.4 and 1.5.6).
    fn text(&mut self) -> Result<&'a [u8], WireError> {
        let length = self.left.first_chunk().ok_or_else(truncated)?;
        let length = usize::from(u16::from_be_bytes(*length));
        Ok(self.take(2 + length)?.get(2..).unwrap_or_default())
    }

    fn property(&mut self, kind: u8) -> Result<Property<'a>, WireError> {
        match kind {
            // Payload format, message expiry, topic alias.
            0x01 => self.take(1)?,
            0x02 => self.take(4)?,
            0x23 => self.take(2)?,
            // Content type, response topic, correlation data.
            0x03 | 0x08 | 0x09 => self.text()?,
            0x0B => {
                let (id, size) = variable(self.left)?.ok_or_else(truncated)?;
                self.take(size)?;
                // It has 28 bits.
                return Ok(Property::SubscriptionId(id as u32));
            }
            0x26 => return Ok(Property::User(self.text()?, self.text()?)),
            other => {
                let problem = format!("a PUBLISH with property {other}");
                return Err(WireError::Invalid("5", problem));
            }
        };
        Ok(Property::Other)
    }
}

impl<'a> Iterator for Properties<'a> {
    type Item = Result<Property<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        let kind = *self.take(1).ok()?.first()?;
        let property = self.property(kind);
        if property.is_err() {
            self.left = &[];
        }
        Some(property)
    }
}

/// What others have told with a message: read when somebody asks for it.
#[derive(Clone, Default)]
pub(in crate::broker) struct UserProperties(Bytes);

impl UserProperties {
    /// Those among the properties of a PUBLISH.
    pub(super) fn of(properties: Bytes) -> Self {
        Self(properties)
    }

    fn pairs(&self) -> impl Iterator<Item = (&[u8], &[u8])> + Clone {
        let properties = Properties::of(&self.0);
        properties.filter_map(|property| match property {
            Ok(Property::User(name, value)) => Some((name, value)),
            _ => None,
        })
    }

    /// All of them. Not every broker looks at what its clients write: one that is no UTF-8
    /// is left out, for the link would break upon the message again and again.
    pub(in crate::broker) fn iter(&self) -> impl Iterator<Item = (&str, &str)> + Clone {
        let text = |(name, value)| Some((str::from_utf8(name).ok()?, str::from_utf8(value).ok()?));
        self.pairs().filter_map(text)
    }

    /// The first of this name that is UTF-8.
    pub(in crate::broker) fn get(&self, name: &str) -> Option<&str> {
        let mut named = self.pairs().filter(|(other, _)| *other == name.as_bytes());
        named.find_map(|(_, value)| str::from_utf8(value).ok())
    }
}

impl fmt::Debug for UserProperties {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl PartialEq for UserProperties {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for UserProperties {}
