use proptest::prelude::*;

use super::*;

fn filter(text: &str) -> TopicFilter {
    TopicFilter::parse(text).unwrap()
}

fn matched(trie: &mut Trie<usize>, topic: &str) -> Vec<usize> {
    let mut found = Vec::new();
    trie.matches(topic, |value| found.push(*value));
    found.sort_unstable();
    found
}

/// Levels that meet often.
fn level() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["a", "b", "", "$x", "a$"])
}

fn topic() -> impl Strategy<Value = String> {
    prop::collection::vec(level(), 1..5)
        .prop_map(|levels| levels.join("/"))
        .prop_filter("not empty", |topic| !topic.is_empty())
}

fn some_filter() -> impl Strategy<Value = TopicFilter> {
    let level = prop_oneof![3 => level(), 2 => Just("+")];
    (prop::collection::vec(level, 0..5), any::<bool>())
        .prop_map(|(mut levels, hash)| {
            if hash {
                levels.push("#");
            }
            levels.join("/")
        })
        .prop_filter_map("not empty", |text| TopicFilter::parse(&text).ok())
}

/// All topics of up to five of the levels; longer ones show nothing new for filters
/// of up to five. Also the empty one, which is none: that `+` and `/#` have no other in
/// common is not noticed.
fn every_topic() -> Vec<String> {
    let levels = ["a", "b", "", "$x", "a$", "z"];
    let mut all = Vec::new();
    let mut longest: Vec<String> = levels.iter().map(|l| (*l).to_owned()).collect();
    for _ in 0..5 {
        all.extend(longest.iter().cloned());
        let longer = |t: &String| levels.map(|l| format!("{t}/{l}"));
        longest = longest.iter().flat_map(longer).collect();
    }
    all.extend(longest.into_iter().step_by(7));
    all
}

#[test]
fn filters_are_found_replaced_and_removed() {
    let mut trie = Trie::default();
    assert_eq!(trie.insert(&filter("a/+/c"), 1), None);
    assert_eq!(trie.insert(&filter("a/#"), 2), None);
    assert_eq!(trie.insert(&filter("a/+/c"), 3), Some(1));
    assert_eq!(trie.len(), 2);
    assert_eq!(matched(&mut trie, "a/b/c"), [2, 3]);
    assert_eq!(matched(&mut trie, "a"), [2]);
    assert_eq!(trie.remove(&filter("a/+")), None);
    assert_eq!(trie.remove(&filter("a/#")), Some(2));
    assert_eq!(trie.get(&filter("a/+/c")), Some(&3));
    assert!(matched(&mut trie, "a").is_empty());
    assert_eq!(trie.remove(&filter("a/+/c")), Some(3));
    assert!(trie.is_empty() && trie.levels.is_empty() && trie.children.is_empty());
    assert_eq!(trie.free_nodes.len() + 1, trie.nodes.len());
}

#[test]
fn a_shared_subscription_is_found_by_its_filter() {
    let mut trie = Trie::default();
    trie.insert(&filter("$share/g/a/+"), 1);
    assert_eq!(matched(&mut trie, "a/b"), [1]);
    assert!(trie.overlaps(&filter("a/#")));
}

/// Children are found by list while they are few and by map when they are many, and
/// when they are few again.
#[test]
fn many_children_are_found_like_few() {
    let mut trie = Trie::default();
    for round in 0..2 {
        for number in 0..50 {
            trie.insert(&filter(&format!("a/{number}")), number);
            for found in 0..50 {
                let expected = if found <= number { vec![found] } else { vec![] };
                assert_eq!(matched(&mut trie, &format!("a/{found}")), expected);
            }
        }
        for number in (0..50).rev() {
            let filter = filter(&format!("a/{number}"));
            // From both ends, so that the map and the links shrink differently.
            let filter = if round == 0 {
                filter
            } else {
                self::filter(&format!("a/{}", 49 - number))
            };
            assert!(trie.remove(&filter).is_some());
            assert!(!trie.overlaps(&filter));
        }
        assert!(trie.is_empty() && trie.children.is_empty() && trie.levels.is_empty());
    }
}

/// As deep as a topic can be: 65,535 bytes, all slashes.
#[test]
fn the_deepest_topic_needs_no_stack() {
    let mut trie = Trie::default();
    let deep = "/".repeat(65_535);
    let wild = format!("{}+", "+/".repeat(32_767));
    trie.insert(&filter(&deep), 1);
    trie.insert(&filter(&wild), 2);
    assert_eq!(matched(&mut trie, &deep), [1]);
    assert!(trie.covering(&filter(&deep), |_| true).is_some());
    assert!(trie.overlaps(&filter(&wild)));
    assert_eq!(trie.remove(&filter(&deep)), Some(1));
}

#[test]
fn examples_of_cover_and_overlap() {
    for (inside, question, covered, overlapping) in [
        ("a/#", "a", true, true),
        ("a/#", "a/+/b", true, true),
        ("a/+", "a/b", true, true),
        ("a/b", "a/+", false, true),
        ("a/+", "+/b", false, true),
        ("a/+/c", "a/b/#", false, true),
        ("a", "a/#", false, true),
        ("a/b", "a/c", false, false),
        ("a/+", "a", false, false),
        ("#", "$SYS/x", false, false),
        ("$SYS/#", "#", false, false),
        ("$SYS/#", "+/x", false, false),
        ("$SYS/#", "$SYS/+/x", true, true),
        ("+/x", "$SYS/x", false, false),
        ("#", "+/x", true, true),
        ("#", "#", true, true),
    ] {
        let mut trie = Trie::default();
        trie.insert(&filter(inside), 0);
        let question = filter(question);
        let found = trie.covering(&question, |_| true).is_some();
        assert_eq!(found, covered, "{inside} covers {question}");
        assert_eq!(trie.overlaps(&question), overlapping, "{inside} {question}");
    }
}

#[test]
fn cover_and_overlap_are_what_topics_say() {
    let topics = every_topic();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(300));
    let filters = prop::collection::vec(some_filter(), 1..4);
    runner
        .run(&(filters, some_filter()), |(inside, question)| {
            let mut trie = Trie::default();
            for (number, filter) in inside.iter().enumerate() {
                trie.insert(filter, number);
            }
            let asked: Vec<&String> = topics.iter().filter(|t| question.matches(t)).collect();
            let both = |filter: &TopicFilter| asked.iter().any(|t| filter.matches(t));
            prop_assert_eq!(trie.overlaps(&question), inside.iter().any(both));
            if let Some(number) = trie.covering(&question, |_| true) {
                prop_assert!(asked.iter().all(|t| inside[*number].matches(t)));
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn every_cover_is_found() {
    let topics = every_topic();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(300));
    runner
        .run(&(some_filter(), some_filter()), |(inside, question)| {
            let mut trie = Trie::default();
            trie.insert(&inside, 0);
            let mut asked = topics.iter().filter(|t| question.matches(t));
            let covers = asked.all(|t| inside.matches(t));
            // The one exception.
            prop_assume!((inside.as_str(), question.as_str()) != ("+/#", "#"));
            prop_assert_eq!(trie.covering(&question, |_| true).is_some(), covers);
            Ok(())
        })
        .unwrap();
}

proptest! {
    /// Whatever was put in and taken out, a topic finds what a scan finds.
    #[test]
    fn a_match_is_what_a_scan_finds(
        filters in prop::collection::vec((some_filter(), any::<bool>()), 0..40),
        topics in prop::collection::vec(topic(), 1..20),
    ) {
        let mut trie = Trie::default();
        let mut naive: HashMap<TopicFilter, usize> = HashMap::new();
        for (number, (filter, stays)) in filters.iter().enumerate() {
            prop_assert_eq!(trie.insert(filter, number), naive.insert(filter.clone(), number));
            if !stays {
                let (out, _) = &filters[number / 2];
                prop_assert_eq!(trie.remove(out), naive.remove(out));
            }
        }
        prop_assert_eq!(trie.len(), naive.len());
        for topic in &topics {
            let found = naive.iter().filter(|(filter, _)| filter.matches(topic));
            let mut expected: Vec<usize> = found.map(|(_, number)| *number).collect();
            expected.sort_unstable();
            prop_assert_eq!(matched(&mut trie, topic), expected);
        }
        for filter in naive.keys() {
            prop_assert!(trie.remove(filter).is_some());
        }
        prop_assert!(trie.is_empty() && trie.levels.is_empty());
        prop_assert_eq!(trie.free_nodes.len() + 1, trie.nodes.len());
    }
}
