//! The layers of `src/lib.rs`, read from the code: imports point one way.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A file's text with comments and its tests left out, and its path below `src`.
struct Source {
    path: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    let sources: Vec<Source> = files
        .into_iter()
        .filter(|file| !file.ends_with("tests.rs"))
        // Programs of their own, which see of the library what anybody sees.
        .filter(|file| !file.starts_with(root.join("bin")))
        .map(|file| Source {
            path: file.strip_prefix(&root).unwrap().display().to_string(),
            text: code(&fs::read_to_string(&file).unwrap()),
        })
        .collect();
    assert!(sources.len() > 20, "the sources were not found");
    sources
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

/// Without comments, and without the tests that end a file.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    text.lines()
        .map(|line| line.split("//").next().unwrap())
        .collect::<Vec<_>>()
        .join("\n")
}

/// The top-level module of a file: `broker/wire.rs` and `broker.rs` are `broker`.
fn module(path: &str) -> &str {
    let first = path.split('/').next().unwrap();
    first.strip_suffix(".rs").unwrap_or(first)
}

/// The top-level modules that a text names behind `crate::`, also in a list.
fn imports(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for rest in text.split("crate::").skip(1) {
        if let Some(list) = rest.strip_prefix('{') {
            let end = closing(list);
            for part in top_level_parts(&list[..end]) {
                found.extend(name(part));
            }
        } else {
            found.extend(name(rest));
        }
    }
    found
}

/// The name at the start.
fn name(text: &str) -> Option<String> {
    let text = text.trim_start();
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    let name = text[..end.unwrap_or(text.len())].to_owned();
    (!name.is_empty()).then_some(name)
}

/// Where the brace that is open closes.
fn closing(text: &str) -> usize {
    let mut depth = 1;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

/// `a::{b, c}, d` in two.
fn top_level_parts(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

/// Who imports whom, top-level modules of the library.
fn graph() -> BTreeMap<String, BTreeSet<String>> {
    let sources = sources();
    let modules: BTreeSet<String> = sources.iter().map(|s| module(&s.path).to_owned()).collect();
    let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in &sources {
        let from = module(&source.path);
        let into = graph.entry(from.to_owned()).or_default();
        let named = imports(&source.text).into_iter();
        into.extend(named.filter(|to| to != from && modules.contains(to)));
    }
    graph
}

/// The reader itself: it must see what it is meant to see.
#[test]
fn imports_are_read_from_lines_and_lists() {
    let text = code(
        "use crate::broker::{Broker, QoS};\nuse crate::{\n    config::{a, b}, id,\n};\n\
         fn f() { crate::metrics::x() } // crate::comment::no\n#[cfg(test)]\nmod tests {\n\
         use crate::tests_only::x;\n}",
    );
    let found: Vec<String> = imports(&text).into_iter().collect();
    assert_eq!(found, ["broker", "config", "id", "metrics"]);
    let graph = graph();
    assert!(graph["connection"].contains("broker"), "{graph:#?}");
    assert!(graph["gateway"].contains("listener"), "{graph:#?}");
}

/// No circles between the modules.
#[test]
fn imports_have_no_circles() {
    let mut graph = graph();
    // Takes away, again and again, what imports nothing that is left.
    while !graph.is_empty() {
        let leaves: Vec<String> = graph
            .iter()
            .filter(|(_, imports)| imports.is_empty())
            .map(|(name, _)| name.clone())
            .collect();
        assert!(!leaves.is_empty(), "these import each other: {graph:#?}");
        for leaf in &leaves {
            graph.remove(leaf);
        }
        for imports in graph.values_mut() {
            imports.retain(|name| !leaves.contains(name));
        }
    }
}

/// The layers of `lib.rs`: each module may import those of lower layers only. A
/// module that is not listed fails: it must be given its place.
#[test]
fn imports_point_down_the_layers() {
    const LAYERS: &[&[&str]] = &[
        &["main"],
        &["quickstart", "passwd"],
        &["gateway", "fuzzing", "hot"],
        &["options", "shard"],
        &["listener", "adapter", "admin"],
        &["connection"],
        &["auth"],
        &["transport", "handler", "broker"],
        &[
            "admission",
            "config",
            "greeted",
            "id",
            "memory",
            "metrics",
            "numbers",
            "pace",
            "rate",
            "reload",
            "proto",
            "tls",
            "telemetry",
            "trace",
            "shutdown",
        ],
        &["lib"],
    ];
    const BOTTOM: usize = LAYERS.len() - 2;
    let layer_of = |name: &str| {
        let layer = LAYERS.iter().position(|layer| layer.contains(&name));
        layer.unwrap_or_else(|| panic!("{name} has no layer: give it one here and in src/lib.rs"))
    };
    let mut wrong = Vec::new();
    for (from, imports) in graph() {
        for to in imports {
            let same_bottom = layer_of(&from) == BOTTOM && layer_of(&to) == BOTTOM;
            let shard = to == "shard" && from == "listener";
            if layer_of(&to) <= layer_of(&from) && !same_bottom && !shard {
                wrong.push(format!("{from} imports {to}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// `transport`, `broker` and `handler` know nothing of connections or of each other.
#[test]
fn the_edges_know_nothing_of_connections() {
    let graph = graph();
    let edges = ["transport", "broker", "handler"];
    for from in edges {
        for to in edges
            .iter()
            .filter(|to| **to != from)
            .chain(&["connection", "auth"])
        {
            assert!(!graph[from].contains(*to), "{from} imports {to}");
        }
    }
}

/// One file for each version knows the crate that speaks MQTT, so that it can be
/// exchanged.
#[test]
fn only_the_wire_names_rumqttc() {
    let all = sources();
    let mut naming: Vec<&str> = all
        .iter()
        .filter(|source| source.text.contains("rumqttc"))
        .map(|source| source.path.as_str())
        .filter(|path| !path.starts_with("quickstart/"))
        .collect();
    naming.sort_unstable();
    assert_eq!(naming, ["broker/wire/v4.rs", "broker/wire/v5.rs"]);
}

/// The machine that decides has no clock and no IO: time comes in with each input.
#[test]
fn the_state_machine_does_no_io() {
    let all = sources();
    let machine = all
        .iter()
        .find(|s| s.path == "connection/machine.rs")
        .unwrap();
    for word in ["tokio", "Instant::now", "std::net", "std::io", "async "] {
        assert!(
            !machine.text.contains(word),
            "{word} in connection/machine.rs"
        );
    }
}

/// The load generator measures any gateway: of the library it takes what has nothing to
/// do with ours.
#[test]
fn the_bench_knows_nothing_of_the_gateway() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/bin/exproto-bench");
    let mut files = Vec::new();
    collect(&root, &mut files);
    let texts = files
        .iter()
        .map(|file| code(&fs::read_to_string(file).unwrap()));
    let mut named: BTreeSet<String> = BTreeSet::new();
    for text in texts {
        for rest in text.split("exproto_sidecar::").skip(1) {
            named.extend(name(rest));
        }
    }
    let named: Vec<String> = named.into_iter().collect();
    assert_eq!(named, ["proto", "shutdown", "tls"]);
}
