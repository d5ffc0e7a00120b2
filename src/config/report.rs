//! What is wrong with a configuration: every fault at once, each with the place it was written.

use std::fmt;

use figment::{Metadata, Source};

/// The layer, and the place in it, that a value came from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// A configuration file, named as the user named it.
    File(String),
    /// An environment variable, spelled as the user spelled it.
    Environment(String),
    /// A `--set KEY=VALUE` of the command line; holds the key.
    CommandLine(String),
    /// No layer: the value is the built-in default.
    Default,
}

const FILE: &str = "file";
const ENVIRONMENT: &str = "environment variable";
const COMMAND_LINE: &str = "command line --set";

impl Origin {
    /// The figment metadata that carries this origin through a merge.
    pub(crate) fn metadata(&self) -> Metadata {
        let (name, place) = match self {
            Origin::File(path) => (FILE, path),
            Origin::Environment(variable) => (ENVIRONMENT, variable),
            Origin::CommandLine(key) => (COMMAND_LINE, key),
            Origin::Default => return Metadata::default(),
        };
        Metadata::named(name).source(Source::Custom(place.clone()))
    }

    /// The reverse of [`Origin::metadata`].
    pub(crate) fn from_metadata(metadata: Option<&Metadata>) -> Origin {
        let Some((metadata, place)) =
            metadata.and_then(|m| Some((m, m.source.as_ref()?.custom()?)))
        else {
            return Origin::Default;
        };
        let place = place.to_owned();
        match metadata.name.as_ref() {
            FILE => Origin::File(place),
            ENVIRONMENT => Origin::Environment(place),
            COMMAND_LINE => Origin::CommandLine(place),
            _ => Origin::Default,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File(path) => write!(f, "{FILE} {path}"),
            Origin::Environment(variable) => write!(f, "{ENVIRONMENT} {variable}"),
            Origin::CommandLine(key) => write!(f, "{COMMAND_LINE} {key}"),
            Origin::Default => f.write_str("built-in default"),
        }
    }
}

/// One thing that is wrong. Never holds the value of a secret key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    origin: Origin,
    key: String,
    problem: String,
}

impl Fault {
    /// `key` is the dotted key, or empty when the fault concerns a whole file or argument.
    pub(crate) fn new(origin: Origin, key: impl Into<String>, problem: impl Into<String>) -> Fault {
        Fault {
            origin,
            key: key.into(),
            problem: problem.into(),
        }
    }

    /// Where the value was written.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The dotted key, such as `broker.url`; empty for a fault of a whole file.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// What was found and what is allowed.
    pub fn problem(&self) -> &str {
        &self.problem
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.origin)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.problem)
    }
}

/// Every fault of a configuration; what start-up prints before it exits with code 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    faults: Vec<Fault>,
}

impl Report {
    pub(crate) fn new(faults: Vec<Fault>) -> Report {
        Report { faults }
    }

    /// The faults, in the order files, then keys, then cross-checks.
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.faults.len() {
            1 => f.write_str("the configuration has 1 fault:")?,
            n => write!(f, "the configuration has {n} faults:")?,
        }
        for fault in &self.faults {
            write!(f, "\n  {fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Report {}
