//! Topics, filters and mountpoints, and the tree of filters.

use std::collections::HashMap;

use crate::broker::topic::{Mountpoint, TopicFilter, TopicName};
use crate::broker::trie::Trie;

/// Five lines: a mountpoint's template, client id, user name, topic, filter. What comes
/// from a device never leads out of its mountpoint.
pub fn topics(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let mut lines = text.split('\n');
    let mut line = || lines.next().unwrap_or_default();
    let (template, clientid, username) = (line(), line(), line());
    let mount = Mountpoint::resolve(template, clientid, username);
    let (name, filter) = (TopicName::parse(line()), TopicFilter::parse(line()));
    if let Ok(name) = &name {
        let itself = TopicFilter::parse(name.as_str());
        if !name.as_str().starts_with("$share") {
            assert!(itself.is_ok_and(|itself| itself.matches(name.as_str())));
        }
    }
    if let Ok(filter) = &filter {
        assert_eq!(TopicFilter::parse(filter.as_str()).as_ref(), Ok(filter));
        assert!(filter.as_str().ends_with(filter.filter()));
    }
    let Ok(mount) = mount else { return };
    let prefix = mount.prefix();
    if prefix.starts_with('$') {
        // The template's own, which no other name would change.
        let others = Mountpoint::resolve(template, "x", "y");
        assert!(
            others.is_ok_and(|others| others.prefix().starts_with('$')) || template.len() > 60_000
        );
    }
    let mounted_name = name.clone().ok().and_then(|name| mount.mount(name).ok());
    let mounted_filter = filter.as_ref().ok();
    let mounted_filter = mounted_filter.and_then(|filter| mount.mount_filter(filter).ok());
    if let (Ok(name), Some(mounted)) = (&name, &mounted_name) {
        assert_eq!(mount.unmount(mounted.as_str()), name.as_str());
        assert_eq!(TopicName::parse(mounted.as_str()).as_ref(), Ok(mounted));
        assert!(mounted.as_str().starts_with(prefix));
    }
    if let (Ok(filter), Some(mounted)) = (&filter, &mounted_filter) {
        assert!(mounted.filter().starts_with(prefix), "{mounted} {prefix}");
        assert_eq!(mounted.is_shared(), filter.is_shared(), "{mounted}");
    }
    if let (Ok(name), Ok(filter), Some(there), Some(asked)) =
        (name, filter, mounted_name, mounted_filter)
    {
        // The other way round `$` and the parent of `#` make a difference.
        if filter.matches(name.as_str()) {
            assert!(asked.matches(there.as_str()), "{asked} {there}");
        }
    }
}

/// Lines that put filters into a tree (`+`), take them out (`-`) and ask for topics
/// (`?`): the tree finds what a scan finds.
pub fn topic_trie(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let mut trie = Trie::default();
    let mut scan: HashMap<String, (TopicFilter, usize)> = HashMap::new();
    let mut asked = Vec::new();
    // A few hundred show all there is; a scan for each line takes the square of them.
    for (number, line) in text.split('\n').take(300).enumerate() {
        let Some((kind, rest)) = line.split_at_checked(1) else {
            continue;
        };
        match (kind, TopicFilter::parse(rest), TopicName::parse(rest)) {
            ("+", Ok(filter), _) => {
                let key = filter.filter().to_owned();
                let old = scan.insert(key, (filter.clone(), number));
                assert_eq!(trie.insert(&filter, number), old.map(|(_, old)| old));
                relations(&trie, &filter, &scan, &asked);
            }
            ("-", Ok(filter), _) => {
                let old = scan.remove(filter.filter());
                assert_eq!(trie.remove(&filter), old.map(|(_, old)| old));
                relations(&trie, &filter, &scan, &asked);
            }
            ("?", _, Ok(topic)) => {
                let mut found = Vec::new();
                trie.matches(topic.as_str(), |value| found.push(*value));
                let matching = scan.values().filter(|(f, _)| f.matches(topic.as_str()));
                let mut expected: Vec<usize> = matching.map(|(_, number)| *number).collect();
                found.sort_unstable();
                expected.sort_unstable();
                assert_eq!(found, expected, "{topic}");
                asked.push(topic);
            }
            _ => {}
        }
        assert_eq!(trie.len(), scan.len());
    }
    for (filter, number) in scan.values() {
        assert_eq!(trie.get(filter), Some(number));
        assert_eq!(trie.remove(filter), Some(*number));
    }
    assert!(trie.is_empty());
}

/// What the tree says of how a filter lies to its own is true of every topic that was
/// asked for.
fn relations(
    trie: &Trie<usize>,
    filter: &TopicFilter,
    scan: &HashMap<String, (TopicFilter, usize)>,
    asked: &[TopicName],
) {
    let covering = trie.covering(filter, |_| true).copied();
    assert!(covering.is_none() || trie.overlaps(filter), "{filter}");
    for topic in asked {
        let topic = topic.as_str();
        if !filter.matches(topic) {
            continue;
        }
        let mut matching = scan.values().filter(|(f, _)| f.matches(topic));
        if let Some(number) = covering {
            assert!(matching.any(|(_, n)| *n == number), "{filter}: {topic}");
        } else if matching.next().is_some() {
            assert!(trie.overlaps(filter), "{filter}: {topic}");
        }
    }
}
