//! The topic trie with 1,000,000 subscriptions: what a match costs, and the memory.
//!
//! `cargo bench --bench trie`. The goal: at most 2 us for a match of up to 10 hits.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

use std::hint::black_box;
use std::sync::atomic::Ordering;

use criterion::{BatchSize, Criterion};
use exproto_sidecar::broker::topic::TopicFilter;
use exproto_sidecar::broker::trie::Trie;

mod counting;

use counting::ALLOCATED;

const SUBSCRIPTIONS: usize = 1_000_000;
const SITES: usize = 200;

/// Devices with two filters each, and some that look at many: of a million, 0.2 in a
/// hundred have a wildcard before the device.
fn filter(number: usize) -> String {
    let device = number / 2;
    let site = device % SITES;
    match number % 1000 {
        998 => format!("meters/site-{site}/+/alarm/level-{}", number / 1000),
        999 => format!("meters/+/device-{device}/#"),
        n if n % 2 == 0 => format!("meters/site-{site}/device-{device}/cmd/set"),
        _ => format!("meters/site-{site}/device-{device}/config/#"),
    }
}

fn topic(device: usize, end: &str) -> String {
    format!("meters/site-{}/device-{device}/{end}", device % SITES)
}

/// Topics in an order that no cache likes.
fn topics(end: impl Fn(usize) -> String) -> Vec<String> {
    let devices = SUBSCRIPTIONS / 2;
    let mut all: Vec<_> = (0..4096)
        .map(|n| (n * 7919 * 61) % devices)
        .map(|device| topic(device, &end(device)))
        .collect();
    all.dedup();
    all
}

fn main() {
    let mut trie = Trie::default();
    // Eight more that match every command of a device, so that there are ten hits.
    let wide = [
        "#",
        "meters/#",
        "meters/+/#",
        "meters/+/+/#",
        "meters/+/+/cmd/#",
        "meters/+/+/cmd/+",
        "meters/+/+/cmd/set",
        "meters/+/+/+/set",
        "+/+/+/cmd/set",
    ];
    let filters: Vec<TopicFilter> = (0..SUBSCRIPTIONS - wide.len())
        .map(filter)
        .map(|text| TopicFilter::parse(&text).unwrap())
        .collect();
    let text: usize = filters.iter().map(|filter| filter.as_str().len()).sum();
    let before = ALLOCATED.load(Ordering::Relaxed);
    for (number, filter) in filters.iter().enumerate() {
        trie.insert(filter, number as u32);
    }
    let bytes = ALLOCATED.load(Ordering::Relaxed) - before;
    println!(
        "{} subscriptions: {bytes} bytes, {:.0} for each (its text alone has {:.0})",
        trie.len(),
        bytes as f64 / trie.len() as f64,
        text as f64 / trie.len() as f64,
    );

    let mut criterion = Criterion::default().configure_from_args();
    let cases = [
        ("1 hit", topics(|_| "cmd/set".to_owned()), 0),
        ("10 hits", topics(|_| "cmd/set".to_owned()), wide.len()),
        ("no hit", topics(|_| "unheard/of".to_owned()), 0),
    ];
    let mut group = criterion.benchmark_group("match among 1,000,000");
    for (name, topics, wide_ones) in cases {
        for (number, text) in wide.iter().take(wide_ones).enumerate() {
            trie.insert(&TopicFilter::parse(text).unwrap(), number as u32);
        }
        let mut hits = 0;
        trie.matches(&topics[5], |_| hits += 1);
        println!("{name}: {} hits on {}", hits, topics[5]);
        let mut at = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                at = (at + 1) % topics.len();
                let mut sum = 0;
                trie.matches(black_box(&topics[at]), |value| sum ^= *value);
                sum
            });
        });
        for text in wide.iter().take(wide_ones) {
            trie.remove(&TopicFilter::parse(text).unwrap());
        }
    }
    let mut at = 0;
    group.bench_function("insert and remove", |bencher| {
        bencher.iter_batched(
            || {
                at += 1;
                TopicFilter::parse(&topic(at % SUBSCRIPTIONS, "new/#")).unwrap()
            },
            |filter| {
                trie.insert(&filter, 0);
                trie.remove(&filter)
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
    criterion.final_summary();
}
