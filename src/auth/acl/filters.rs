//! Topic filters, one beside another.

/// Whether a filter that begins with a wildcard meets topics that begin with `$`, which it does not
/// match (MQTT 5, 4.7.2).
fn is_apart(one: &str, other: &str) -> bool {
    let [wild, dollar] =
        [one, other].map(|text| (text.starts_with(['+', '#']), text.starts_with('$')));
    (wild.0 && dollar.1) || (dollar.0 && wild.1)
}

/// Whether `filter` matches every topic that `other` matches, which may be a topic itself.
pub fn covers(filter: &str, other: &str) -> bool {
    if is_apart(filter, other) {
        return false;
    }
    let mut levels = other.split('/');
    for level in filter.split('/') {
        match (level, levels.next()) {
            // Also the level above, where the other has ended.
            ("#", _) => return true,
            ("+", Some(level)) if level != "#" => {}
            (level, Some(other)) if level == other => {}
            _ => return false,
        }
    }
    levels.next().is_none()
}

/// Whether there is a topic that both match.
pub fn overlap(one: &str, other: &str) -> bool {
    if is_apart(one, other) {
        return false;
    }
    let (mut one, mut other) = (one.split('/'), other.split('/'));
    // Where all that both have so far is nothing, which is no topic (MQTT 5, 4.7.3).
    let mut is_nothing = false;
    for level in 0.. {
        match (one.next(), other.next()) {
            // Also the level above.
            (Some("#"), None) | (None, Some("#")) => return !is_nothing,
            (Some("#"), _) | (_, Some("#")) | (None, None) => return true,
            (Some(a), Some(b)) if a == "+" || b == "+" || a == b => {
                is_nothing = level == 0 && (a.is_empty() || b.is_empty());
            }
            _ => break,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::broker::topic::TopicFilter;

    #[test]
    fn a_wider_filter_covers_a_narrower_one() {
        for (filter, other) in [
            ("#", "a"),
            ("#", "a/+/#"),
            ("a/#", "a"),
            ("a/#", "a/#"),
            ("a/+", "a/b"),
            ("a/+", "a/+"),
            ("$SYS/#", "$SYS/+"),
        ] {
            assert!(covers(filter, other), "{filter} {other}");
        }
        for (filter, other) in [
            ("a/+", "a/#"),
            ("a", "a/#"),
            ("+", "#"),
            ("#", "$SYS/x"),
            ("a/b", "a/+"),
            ("a/+", "a"),
            ("a", "A"),
        ] {
            assert!(!covers(filter, other), "{filter} {other}");
        }
    }

    #[test]
    fn filters_that_meet_overlap() {
        for (one, other) in [
            ("a/#", "+/b"),
            ("a/#", "a"),
            ("#", "a/b"),
            ("+/b", "a/+"),
            ("+/", "/#"),
        ] {
            assert!(overlap(one, other) && overlap(other, one), "{one} {other}");
        }
        for (one, other) in [
            ("#", "$SYS/#"),
            ("a/+", "a"),
            ("a/b/#", "a/c"),
            ("+", "a/b"),
            ("+", "/#"),
        ] {
            assert!(
                !overlap(one, other) && !overlap(other, one),
                "{one} {other}"
            );
        }
    }

    fn filters() -> impl Strategy<Value = String> {
        let level = prop_oneof![Just("a"), Just("b"), Just("+"), Just("$x"), Just("")];
        let levels = prop::collection::vec(level, 1..4);
        (levels, any::<bool>()).prop_map(|(mut levels, open)| {
            if open {
                levels.push("#");
            }
            levels.join("/")
        })
    }

    /// All topics of up to four levels of what filters are made of, and one level more.
    fn topics() -> Vec<String> {
        let names = ["a", "b", "$x", "", "c"];
        let mut all: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut last = all.clone();
        for _ in 0..3 {
            last = last
                .iter()
                .flat_map(|topic| names.iter().map(move |name| format!("{topic}/{name}")))
                .collect();
            all.extend(last.clone());
        }
        all.retain(|topic| !topic.is_empty());
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Both say what going through all topics says.
        #[test]
        fn what_they_say_holds_for_every_topic(one in filters(), other in filters()) {
            prop_assume!(!one.is_empty() && !other.is_empty());
            let (first, second) = (TopicFilter::parse(&one).unwrap(), TopicFilter::parse(&other).unwrap());
            let topics = topics();
            let both = topics.iter().any(|topic| first.matches(topic) && second.matches(topic));
            prop_assert_eq!(overlap(&one, &other), both, "overlap {} {}", one, other);
            let all = topics.iter().all(|topic| !second.matches(topic) || first.matches(topic));
            prop_assert!(!covers(&one, &other) || all, "covers {} {}", one, other);
        }
    }
}
