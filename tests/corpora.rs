//! The fuzz targets on what their corpora hold, and on many small changes of it: what
//! the fuzzer has found once stays found, without the fuzzer.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use exproto_sidecar::fuzzing::{TARGETS, Target};

/// Of each target.
const MUTATIONS: u32 = 2_000;

/// A target that is slow on a slow machine makes fewer of them. All run side by side.
const LONGEST: Duration = Duration::from_secs(5);

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz")
        .join(name)
}

/// Names in a folder without their extension.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect()
}

/// The corpus in the order of its names, so that a run is like the last.
fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(folder("corpus").join(target)).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let read = |path: PathBuf| (path.clone(), fs::read(path).unwrap());
    paths.into_iter().map(read).collect()
}

#[test]
fn every_target_has_its_file_and_its_corpus() {
    let targets: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(&folder("fuzz_targets")), targets);
    assert_eq!(names(&folder("corpus")), targets);
    let manifest = fs::read_to_string(folder("Cargo.toml")).unwrap();
    for target in &targets {
        assert!(!corpus(target).is_empty(), "{target}");
        assert!(manifest.contains(&format!("name = \"{target}\"")));
        let file = folder("fuzz_targets").join(format!("{target}.rs"));
        let text = fs::read_to_string(file).unwrap();
        assert!(text.contains(&format!("fuzzing::{target}(bytes)")));
    }
}

#[test]
fn every_corpus_passes() {
    for (name, target) in TARGETS {
        for (path, bytes) in corpus(name) {
            run(*target, &bytes, &path.display().to_string());
        }
    }
}

#[test]
fn changes_of_every_corpus_pass() {
    std::thread::scope(|scope| {
        for (name, target) in TARGETS {
            scope.spawn(|| mutate(name, *target));
        }
    });
}

fn mutate(name: &str, target: Target) {
    let corpus: Vec<Vec<u8>> = corpus(name).into_iter().map(|(_, bytes)| bytes).collect();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let start = Instant::now();
    for _ in 0..MUTATIONS {
        let mut bytes = corpus[random.below(corpus.len())].clone();
        for _ in 0..=random.below(4) {
            change(&mut bytes, &corpus, &mut random);
        }
        run(target, &bytes, name);
        if start.elapsed() > LONGEST {
            break;
        }
    }
}

/// Runs a target, and shows its bytes if it fails: written into a file of the corpus
/// they are the regression test.
fn run(target: Target, bytes: &[u8], what: &str) {
    let outcome = catch_unwind(AssertUnwindSafe(|| target(bytes)));
    assert!(outcome.is_ok(), "{what}: b\"{}\"", bytes.escape_ascii());
}

/// One of the changes that fuzzers make.
fn change(bytes: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut Random) {
    const TELLING: [u8; 10] = [0, 1, 0x7f, 0x80, 0xff, b'/', b'+', b'#', b'$', b'\n'];
    let at = random.below(bytes.len() + 1);
    let value = match random.below(2) {
        0 => TELLING[random.below(TELLING.len())],
        _ => random.next() as u8,
    };
    match (random.below(6), bytes.get_mut(at)) {
        (0, Some(byte)) => *byte = value,
        (1, Some(byte)) => *byte ^= 1 << random.below(8),
        (2, Some(_)) => drop(bytes.remove(at)),
        (3, _) => bytes.truncate(at),
        (4, _) => {
            let other = &corpus[random.below(corpus.len())];
            let from = random.below(other.len() + 1);
            bytes.splice(at.., other[from..].iter().copied());
        }
        _ => bytes.insert(at, value),
    }
}

/// Xorshift: the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}
