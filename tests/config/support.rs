//! Sources for a test, and a look at the faults.

use std::fs;
use std::path::{Path, PathBuf};

use exproto_sidecar::config::{self, Config, Origin, Report, Sources};
use tempfile::TempDir;

pub fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect()
}

pub fn env(list: &[(&str, &str)]) -> Result<Config, Report> {
    config::load(&Sources {
        env: pairs(list),
        ..Sources::default()
    })
}

pub fn set(list: &[(&str, &str)]) -> Result<Config, Report> {
    config::load(&Sources {
        set: pairs(list),
        ..Sources::default()
    })
}

/// A file that lives as long as the returned directory.
pub fn file(name: &str, text: &str) -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, text).unwrap();
    (dir, path)
}

pub fn load_file(path: &Path) -> Result<Config, Report> {
    config::load(&Sources {
        file: Some(path.to_owned()),
        ..Sources::default()
    })
}

pub fn toml(text: &str) -> Result<Config, Report> {
    let (_dir, path) = file("config.toml", text);
    load_file(&path)
}

/// The report, with the directory of the test's file left out.
#[track_caller]
pub fn faults(result: Result<Config, Report>) -> Vec<String> {
    let report = result.expect_err("faults");
    report
        .faults()
        .iter()
        .map(|fault| {
            let line = fault.to_string();
            match (fault.origin(), line.find("/config.")) {
                (Origin::File(_), Some(at)) if line.starts_with("file /") => {
                    let end = line[at..].find(": ").unwrap() + at;
                    format!("file {}{}", &line[at + 1..end], &line[end..])
                }
                _ => line,
            }
        })
        .collect()
}

/// Asserts that the TOML text has one fault with all of `parts` in it.
#[track_caller]
pub fn one_fault(result: Result<Config, Report>, parts: &[&str]) {
    let faults = faults(result);
    assert_eq!(faults.len(), 1, "{faults:#?}");
    for part in parts {
        assert!(
            faults[0].contains(part),
            "{part:?} is not in {:?}",
            faults[0]
        );
    }
}
