//! Topic names, topic filters and mountpoints (MQTT 5, section 4.7).

use std::fmt;
use std::sync::Arc;

/// Longest topic name or filter, in bytes of UTF-8 (MQTT 5, 1.5.4).
pub const MAX_TOPIC_BYTES: usize = 65_535;

/// Why a text is not a topic name or topic filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// No characters at all.
    #[error("a topic must not be empty")]
    Empty,
    /// More than [`MAX_TOPIC_BYTES`], with the mountpoint.
    #[error("a topic has at most 65535 bytes, the mountpoint included")]
    TooLong,
    /// Holds a control character, U+0000 among them, or a non-character.
    #[error("a topic must not contain control characters")]
    Control,
    /// `+` or `#` in a topic name.
    #[error("a topic to publish to must not contain the wildcards + and #")]
    Wildcard,
    /// `+` beside other characters in one level.
    #[error("in a topic filter + must stand alone between slashes")]
    Plus,
    /// `#` not alone in the last level.
    #[error("in a topic filter # must stand alone after the last slash")]
    Hash,
    /// `$share` without a group name or without a filter.
    #[error("a shared subscription is $share/<group>/<filter>, the group without + and #")]
    Share,
    /// A client id or user name made the mountpoint begin with `$`.
    #[error("a client id or user name that begins with $ must not begin the mountpoint")]
    Dollar,
}

fn check_text(topic: &str) -> Result<(), TopicError> {
    if topic.is_empty() {
        Err(TopicError::Empty)
    } else if topic.len() > MAX_TOPIC_BYTES {
        Err(TopicError::TooLong)
    } else if !is_mqtt_text(topic) {
        Err(TopicError::Control)
    } else {
        Ok(())
    }
}

/// Whether a broker must take `text` as an MQTT string. U+0000 is forbidden; other
/// control characters and non-characters are discouraged and a reason for some
/// brokers to end the connection (MQTT 5, 1.5.4), which here many devices share.
pub fn is_mqtt_text(text: &str) -> bool {
    let code = |c: char| u32::from(c);
    // Most are ASCII, in which there is less to look for.
    if text.is_ascii() {
        return text.len() <= MAX_TOPIC_BYTES && !text.bytes().any(|byte| byte.is_ascii_control());
    }
    text.len() <= MAX_TOPIC_BYTES
        && !text.chars().any(|c| {
            c.is_control() || code(c) & 0xFFFE == 0xFFFE || (0xFDD0..=0xFDEF).contains(&code(c))
        })
}

/// A topic to which a message can be published.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TopicName(String);

impl TopicName {
    /// Checks a topic name (MQTT 5, 4.7.1 and 4.7.3).
    pub fn parse(topic: impl Into<String>) -> Result<Self, TopicError> {
        let topic = topic.into();
        check_text(&topic)?;
        if topic.contains(['+', '#']) {
            return Err(TopicError::Wildcard);
        }
        Ok(Self(topic))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TopicName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A topic filter, shared or not. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TopicFilter {
    text: Arc<str>,
    /// Where the filter proper begins; 0 unless it is a shared subscription.
    start: usize,
}

const SHARE: &str = "$share/";

impl TopicFilter {
    /// Checks a topic filter or shared subscription (MQTT 5, 4.7 and 4.8.2).
    pub fn parse(text: &str) -> Result<Self, TopicError> {
        check_text(text)?;
        let start = match text.strip_prefix(SHARE) {
            None if text == "$share" => return Err(TopicError::Share),
            None => 0,
            Some(rest) => match rest.split_once('/') {
                Some((group, filter))
                    if !group.is_empty() && !group.contains(['+', '#']) && !filter.is_empty() =>
                {
                    SHARE.len() + group.len() + 1
                }
                _ => return Err(TopicError::Share),
            },
        };
        let filter = text.get(start..).unwrap_or_default();
        let mut levels = filter.split('/').peekable();
        while let Some(level) = levels.next() {
            if level.contains('#') && (level != "#" || levels.peek().is_some()) {
                return Err(TopicError::Hash);
            }
            if level.contains('+') && level != "+" {
                return Err(TopicError::Plus);
            }
        }
        Ok(Self {
            text: text.into(),
            start,
        })
    }

    /// The whole text, `$share/<group>/` included.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The filter proper, behind `$share/<group>/`.
    pub fn filter(&self) -> &str {
        self.text.get(self.start..).unwrap_or_default()
    }

    /// Whether each message goes to one member of a group only.
    pub fn is_shared(&self) -> bool {
        self.start > 0
    }

    /// Whether a message on `topic` belongs to this filter.
    pub fn matches(&self, topic: &str) -> bool {
        matches(self.filter(), topic)
    }
}

impl fmt::Display for TopicFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Whether a valid filter matches a valid topic name. A wildcard in the first
/// level does not match a topic that begins with `$` (MQTT 5, 4.7.2).
fn matches(filter: &str, topic: &str) -> bool {
    if topic.starts_with('$') && filter.starts_with(['+', '#']) {
        return false;
    }
    let mut topic_levels = topic.split('/');
    for level in filter.split('/') {
        match (level, topic_levels.next()) {
            // Also matches the parent level itself, where the topic has ended.
            ("#", _) => return true,
            ("+", Some(_)) => {}
            (level, Some(topic_level)) if level == topic_level => {}
            _ => return false,
        }
    }
    topic_levels.next().is_none()
}

/// A prefix that a connection's topics carry on the broker and not at the handler.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Mountpoint(Arc<str>);

impl Mountpoint {
    /// Fills `${clientid}` and `${username}` into a template.
    ///
    /// # Errors
    /// A result that could not begin a topic name is refused: a client id such
    /// as `+` must not turn a subscription into one on everybody's topics. Neither must
    /// one such as `$SYS` lead to what is the broker's own ([`TopicError::Dollar`]); a
    /// template that begins with `$` itself is the wish of whoever wrote it.
    pub fn resolve(template: &str, clientid: &str, username: &str) -> Result<Self, TopicError> {
        if template.is_empty() {
            return Ok(Self::default());
        }
        // One pass: a user name that reads `${clientid}` stays as it is.
        let mut prefix = String::with_capacity(template.len() + clientid.len());
        let mut rest = template;
        while let Some(at) = rest.find("${") {
            let (before, tail) = rest.split_at(at);
            prefix.push_str(before);
            if let Some(after) = tail.strip_prefix("${clientid}") {
                prefix.push_str(clientid);
                rest = after;
            } else if let Some(after) = tail.strip_prefix("${username}") {
                prefix.push_str(username);
                rest = after;
            } else {
                prefix.push_str("${");
                rest = tail.get(2..).unwrap_or_default();
            }
        }
        prefix.push_str(rest);
        if prefix.is_empty() {
            return Ok(Self::default());
        }
        if prefix.starts_with('$') && !is_literal_dollar(template) {
            return Err(TopicError::Dollar);
        }
        TopicName::parse(prefix).map(|name| Self(name.0.into()))
    }

    /// What topics on the broker begin with; empty without a mountpoint.
    pub fn prefix(&self) -> &str {
        &self.0
    }

    /// The topic on the broker.
    pub fn mount(&self, topic: TopicName) -> Result<TopicName, TopicError> {
        if self.0.is_empty() {
            return Ok(topic);
        }
        // Both were checked, and together they can be nothing else than too long.
        let length = self.0.len() + topic.0.len();
        if length > MAX_TOPIC_BYTES {
            return Err(TopicError::TooLong);
        }
        let mut mounted = String::with_capacity(length);
        mounted.push_str(&self.0);
        mounted.push_str(&topic.0);
        Ok(TopicName(mounted))
    }

    /// The filter on the broker; the group of a shared subscription stays in front.
    ///
    /// # Errors
    /// A mountpoint and a filter that only together read `$share/<group>/` are refused:
    /// a client id such as `$share` must not lead to topics outside of the mountpoint.
    pub fn mount_filter(&self, filter: &TopicFilter) -> Result<TopicFilter, TopicError> {
        if self.0.is_empty() {
            return Ok(filter.clone());
        }
        let (share, rest) = filter.text.split_at(filter.start);
        let mounted = TopicFilter::parse(&format!("{share}{}{rest}", self.0))?;
        if mounted.start != filter.start {
            return Err(TopicError::Share);
        }
        Ok(mounted)
    }

    /// The topic as the handler knows it.
    pub fn unmount<'a>(&self, topic: &'a str) -> &'a str {
        topic.strip_prefix(&*self.0).unwrap_or(topic)
    }
}

/// Whether a template begins with a `$` that is not a placeholder's.
fn is_literal_dollar(template: &str) -> bool {
    let placeholder = ["${clientid}", "${username}"];
    template.starts_with('$') && !placeholder.iter().any(|name| template.starts_with(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn topic_names_follow_mqtt() {
        for good in ["a", "/", "a//b", "$SYS/x", "a b", "é/ü"] {
            assert!(TopicName::parse(good).is_ok(), "{good:?}");
        }
        assert_eq!(TopicName::parse(""), Err(TopicError::Empty));
        assert_eq!(TopicName::parse("a\0b"), Err(TopicError::Control));
        assert_eq!(TopicName::parse("a/+"), Err(TopicError::Wildcard));
        assert_eq!(TopicName::parse("a#"), Err(TopicError::Wildcard));
        assert!(TopicName::parse("x".repeat(MAX_TOPIC_BYTES)).is_ok());
        assert_eq!(
            TopicName::parse("x".repeat(MAX_TOPIC_BYTES + 1)),
            Err(TopicError::TooLong)
        );
    }

    #[test]
    fn topic_filters_follow_mqtt() {
        for good in [
            "a",
            "#",
            "+",
            "a/#",
            "+/+",
            "/+",
            "a/+/b/#",
            "$share/g/a/#",
            "$share/g//",
        ] {
            assert!(TopicFilter::parse(good).is_ok(), "{good:?}");
        }
        for (bad, error) in [
            ("", TopicError::Empty),
            ("a\0", TopicError::Control),
            ("a/#/b", TopicError::Hash),
            ("a#", TopicError::Hash),
            ("##", TopicError::Hash),
            ("a+", TopicError::Plus),
            ("a/b+/c", TopicError::Plus),
            ("$share", TopicError::Share),
            ("$share/g", TopicError::Share),
            ("$share/g/", TopicError::Share),
            ("$share//a", TopicError::Share),
            ("$share/+/a", TopicError::Share),
        ] {
            assert_eq!(TopicFilter::parse(bad), Err(error), "{bad:?}");
        }
    }

    #[test]
    fn matching_follows_the_examples_of_the_standard() {
        let matching =
            |filter: &str, topic: &str| TopicFilter::parse(filter).unwrap().matches(topic);
        for (filter, topic) in [
            ("sport/tennis/player1/#", "sport/tennis/player1"),
            (
                "sport/tennis/player1/#",
                "sport/tennis/player1/score/wimbledon",
            ),
            ("sport/#", "sport"),
            ("sport/tennis/+", "sport/tennis/player1"),
            ("sport/+", "sport/"),
            ("+/+", "/finance"),
            ("/+", "/finance"),
            ("#", "a/b"),
            ("$SYS/#", "$SYS/x"),
            ("$share/g/a/+", "a/b"),
        ] {
            assert!(matching(filter, topic), "{filter} {topic}");
        }
        for (filter, topic) in [
            ("sport/tennis/+", "sport/tennis/player1/ranking"),
            ("sport/+", "sport"),
            ("+", "/finance"),
            ("#", "$SYS/x"),
            ("+/monitor", "$SYS/monitor"),
            ("a/b", "a"),
            ("a", "a/b"),
        ] {
            assert!(!matching(filter, topic), "{filter} {topic}");
        }
    }

    #[test]
    fn mountpoints_are_put_on_and_taken_off() {
        let mount = Mountpoint::resolve("t/${clientid}/${username}/", "c1", "${clientid}").unwrap();
        let topic = TopicName::parse("up").unwrap();
        let mounted = mount.mount(topic).unwrap();
        assert_eq!(mounted.as_str(), "t/c1/${clientid}/up");
        assert_eq!(mount.unmount(mounted.as_str()), "up");
        let filter = TopicFilter::parse("$share/g/down/#").unwrap();
        let mounted = mount.mount_filter(&filter).unwrap();
        assert_eq!(mounted.as_str(), "$share/g/t/c1/${clientid}/down/#");
        assert!(mounted.is_shared());
    }

    #[test]
    fn a_client_id_cannot_widen_its_mountpoint() {
        for clientid in ["+", "#", "a/#", "a\0"] {
            assert!(Mountpoint::resolve("t/${clientid}/", clientid, "").is_err());
        }
        assert!(Mountpoint::resolve("t/", "+", "").is_ok());
        for (template, clientid, filter) in [
            ("$share/${clientid}/", "g", "victim/#"),
            ("$sha", "c", "re/g/victim/#"),
        ] {
            let mount = Mountpoint::resolve(template, clientid, "").unwrap();
            let filter = TopicFilter::parse(filter).unwrap();
            assert_eq!(mount.mount_filter(&filter), Err(TopicError::Share));
        }
    }

    #[test]
    fn a_name_cannot_begin_a_topic_with_a_dollar() {
        for (template, clientid, username) in [
            ("${clientid}/", "$SYS", ""),
            ("${clientid}", "$sha", ""),
            ("${clientid}", "$", ""),
            ("${username}/${clientid}/", "c", "$SYS"),
            ("${username}${clientid}/", "$SYS", ""),
            ("${username}$SYS/", "c", ""),
        ] {
            let resolved = Mountpoint::resolve(template, clientid, username);
            assert_eq!(resolved, Err(TopicError::Dollar), "{template}");
        }
        for (template, clientid, expected) in [
            ("t/${clientid}/", "$SYS", "t/$SYS/"),
            ("$devices/${clientid}/", "c", "$devices/c/"),
            ("${other}/", "c", "${other}/"),
        ] {
            let resolved = Mountpoint::resolve(template, clientid, "").unwrap();
            assert_eq!(resolved.prefix(), expected);
        }
    }

    proptest! {
        #[test]
        fn every_topic_matches_itself_and_its_wildcards(
            levels in prop::collection::vec("[a-z]{0,3}", 1..6),
            plus in 0usize..6,
        ) {
            let topic = levels.join("/");
            prop_assume!(!topic.is_empty());
            let mut wild = levels.clone();
            let at = plus % levels.len();
            wild[at] = "+".into();
            for filter in [topic.clone(), wild.join("/"), "#".into(), format!("{topic}/#")] {
                prop_assert!(TopicFilter::parse(&filter).unwrap().matches(&topic));
            }
            let longer = format!("{topic}/x");
            prop_assert!(!matches(&longer, &topic));
        }

        #[test]
        fn parsing_never_panics(text in "\\PC{0,20}|[+#/$a\\x00]{0,12}") {
            let _ = TopicName::parse(text.as_str());
            if let Ok(filter) = TopicFilter::parse(&text) {
                filter.matches("a/b");
            }
        }
    }
}
