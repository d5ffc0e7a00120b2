//! The layers file, environment and command line, merged by figment, which remembers where each
//! value came from. (Defaults are not a layer: a section supplies its own for what no layer sets.)

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use figment::providers::{Format, Json, Toml};
use figment::value::{Dict, Map, Tag, Value};
use figment::{Error, Figment, Metadata, Profile, Provider};

use super::report::{Fault, Origin};

/// Where a configuration comes from. Reads nothing of the process by itself, see
/// [`process_environment`].
#[derive(Clone, Default)]
pub struct Sources {
    /// The file named with `--config`; `EXPROTO_CONFIG` in `env` names one too, this one wins.
    pub file: Option<PathBuf>,
    /// Environment variables; those without the prefix `EXPROTO_` are ignored.
    pub env: Vec<(String, String)>,
    /// `--set KEY=VALUE`, in order; a later one wins.
    pub set: Vec<(String, String)>,
}

/// Names only: any value may be a secret.
impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |list: &[(String, String)]| -> Vec<String> {
            list.iter().map(|(name, _)| name.clone()).collect()
        };
        f.debug_struct("Sources")
            .field("file", &self.file)
            .field("env", &names(&self.env))
            .field("set", &names(&self.set))
            .finish()
    }
}

const PREFIX: &str = "EXPROTO_";

/// The variables of this process that may belong to the configuration.
///
/// Bytes that are not UTF-8 become U+FFFD, so that a bad value is refused, not a panic.
pub fn process_environment() -> Vec<(String, String)> {
    std::env::vars_os()
        .map(|(name, value)| {
            (
                name.to_string_lossy().into_owned(),
                value.to_string_lossy().into_owned(),
            )
        })
        .filter(|(name, _)| unprefixed(name).is_some())
        .collect()
}

/// The environment variable that sets the key `path`.
pub(crate) fn variable_of(path: &str) -> String {
    format!("{PREFIX}{}", path.replace('.', "__").to_ascii_uppercase())
}

fn unprefixed(variable: &str) -> Option<&str> {
    let (prefix, rest) = variable.split_at_checked(PREFIX.len())?;
    prefix.eq_ignore_ascii_case(PREFIX).then_some(rest)
}

/// The merged layers.
pub(crate) struct Layers {
    figment: Figment,
    root: Dict,
    complete: bool,
}

impl Layers {
    /// Merges what `sources` hold. A layer at fault is left out.
    pub fn merge(sources: &Sources, faults: &mut Vec<Fault>) -> Layers {
        let mut layers: Vec<Layer> = Vec::new();
        let before = faults.len();
        if let Some((path, named_by)) = file_of(sources) {
            match read_file(&path, &named_by) {
                Ok(table) => layers.push(Layer {
                    origin: Origin::File(path.display().to_string()),
                    table: numbered(table),
                }),
                Err(fault) => faults.push(fault),
            }
        }
        let complete = faults.len() == before;
        layers.extend(environment(&sources.env, faults));
        layers.extend(sources.set.iter().map(|(key, value)| {
            let path: Vec<&str> = key.split('.').collect();
            Layer::of_value(Origin::CommandLine(key.clone()), &path, value)
        }));

        // One provider for each variable: figment then knows the variable of each value.
        let figment = layers.into_iter().fold(Figment::new(), Figment::merge);
        let root = figment
            .data()
            .ok()
            .and_then(|mut profiles| profiles.remove(&Profile::Default))
            .unwrap_or_default();
        Layers {
            figment,
            root,
            complete,
        }
    }

    /// All that is configured.
    pub fn root(&self) -> &Dict {
        &self.root
    }

    /// Whether every layer was read; with a broken file, nothing can be said to be missing.
    pub fn complete(&self) -> bool {
        self.complete
    }

    /// Where `value` was written.
    pub fn origin(&self, value: &Value) -> Origin {
        Origin::from_metadata(self.figment.get_metadata(value.tag()))
    }

    /// Where the value of the dotted key `path` was written.
    pub fn origin_of(&self, path: &str) -> Origin {
        let mut keys = path.split('.');
        let first = keys.next().and_then(|key| self.root.get(key));
        keys.fold(first, |value, key| value?.as_dict()?.get(key))
            .map_or(Origin::Default, |value| self.origin(value))
    }
}

/// One layer, or one variable of it, for figment.
struct Layer {
    origin: Origin,
    table: Dict,
}

impl Layer {
    /// The table that holds nothing but `text` at `path`. The text stays text: see [`super::value`].
    fn of_value(origin: Origin, path: &[&str], text: &str) -> Layer {
        let leaf = Value::String(Tag::Default, text.to_owned());
        let table = path.iter().rev().fold(leaf, |value, key| {
            Value::Dict(Tag::Default, Dict::from([((*key).to_owned(), value)]))
        });
        Layer {
            origin,
            table: table.into_dict().unwrap_or_default(),
        }
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        self.origin.metadata()
    }

    fn data(&self) -> Result<Map<Profile, Dict>, Error> {
        Ok(Map::from([(Profile::Default, self.table.clone())]))
    }
}

/// The configuration file, and what named it.
fn file_of(sources: &Sources) -> Option<(PathBuf, String)> {
    if let Some(path) = &sources.file {
        return Some((path.clone(), "--config".to_owned()));
    }
    sources
        .env
        .iter()
        // Compose files pass on a variable that is not set as an empty one.
        .find(|(name, value)| is_file_name(name) && !value.is_empty())
        .map(|(name, value)| (PathBuf::from(value), name.clone()))
}

/// `table` with the lists of tables in it as tables whose keys are their numbers, from 1 on: a variable
/// can then add to one of them.
fn numbered(table: Dict) -> Dict {
    let items = table.into_iter();
    items
        .map(|(key, value)| (key, with_numbers(value)))
        .collect()
}

fn with_numbers(value: Value) -> Value {
    match value {
        Value::Dict(tag, table) => Value::Dict(tag, numbered(table)),
        Value::Array(tag, items)
            if !items.is_empty() && items.iter().all(|item| item.as_dict().is_some()) =>
        {
            let items = items.into_iter().enumerate();
            let table = items.map(|(index, item)| ((index + 1).to_string(), with_numbers(item)));
            Value::Dict(tag, table.collect())
        }
        value => value,
    }
}

fn is_file_name(variable: &str) -> bool {
    unprefixed(variable).is_some_and(|rest| rest.eq_ignore_ascii_case("CONFIG"))
}

fn read_file(path: &Path, named_by: &str) -> Result<Dict, Fault> {
    let fault = |problem: String| Fault::new(Origin::File(path.display().to_string()), "", problem);
    let extension = path
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or_default();
    let parse = match extension.to_ascii_lowercase().as_str() {
        "toml" => parse_toml,
        "yaml" | "yml" => parse_yaml,
        "json" => parse_json,
        _ => {
            let problem = "found an unknown extension; allowed: .toml, .yaml, .yml, .json";
            return Err(fault(format!("{problem} (named by {named_by})")));
        }
    };
    let text = fs::read_to_string(path)
        .map_err(|error| fault(format!("cannot be read: {error} (named by {named_by})")))?;
    // Editors on Windows begin a file with a byte order mark; JSON and TOML do not know it.
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    parse(text).map_err(fault)
}

// The parsers' own displays quote the line at fault, which may hold a password: only their message
// and position are used.

fn parse_toml(text: &str) -> Result<Dict, String> {
    Toml::from_str(text).map_err(|error| {
        let offset = error.span().map_or(0, |span| span.start);
        let before = text.get(..offset).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let column = before
            .rsplit('\n')
            .next()
            .unwrap_or_default()
            .chars()
            .count()
            + 1;
        syntax_error(line, column, error.message())
    })
}

fn parse_json(text: &str) -> Result<Dict, String> {
    Json::from_str(text).map_err(|error| {
        let message = error.to_string();
        let message = message.split(" at line ").next().unwrap_or_default();
        syntax_error(error.line(), error.column(), message)
    })
}

fn parse_yaml(text: &str) -> Result<Dict, String> {
    // An empty document is YAML's null, and a file of comments alone is empty.
    let options = serde_saphyr::options! { with_snippet: false };
    serde_saphyr::from_str_with_options::<Option<Dict>>(text, options)
        .map(Option::unwrap_or_default)
        .map_err(|error| {
            let (line, column) = error
                .location()
                .map_or((1, 1), |at| (at.line(), at.column()));
            let message = error.to_string();
            // Behind these come the position once more, and advice for programmers.
            let message = message.split(" at line ").next().unwrap_or_default();
            let message = message.split(", set ").next().unwrap_or_default();
            syntax_error(line, column, message)
        })
}

fn syntax_error(line: impl fmt::Display, column: impl fmt::Display, message: &str) -> String {
    // Only a file that is no table at all gets here with a type error, and its text quotes the value.
    let message = match message.trim() {
        text if text.starts_with("invalid type") => "found no table of keys".to_owned(),
        text => text.replace('\n', "; "),
    };
    format!("line {line}, column {column}: {message}")
}

/// The layers of the variables, one each, in the order of their names.
fn environment(variables: &[(String, String)], faults: &mut Vec<Fault>) -> Vec<Layer> {
    let mut by_key: BTreeMap<String, (&str, &str)> = BTreeMap::new();
    for (name, value) in variables {
        let Some(rest) = unprefixed(name) else {
            continue;
        };
        if is_file_name(name) || is_service_link(rest) {
            continue;
        }
        let key = rest.to_ascii_lowercase().replace("__", ".");
        if let Some((other, _)) = by_key.insert(key.clone(), (name, value)) {
            let problem = format!("{other} sets this key too; allowed: one of them");
            faults.push(Fault::new(Origin::Environment(name.clone()), key, problem));
        }
    }
    by_key
        .iter()
        .map(|(key, (name, value))| {
            let path: Vec<&str> = key.split('.').collect();
            Layer::of_value(Origin::Environment((*name).to_owned()), &path, value)
        })
        .collect()
}

/// Whether Kubernetes made this variable for a Service whose name begins with `exproto`.
///
/// It adds `EXPROTO_SIDECAR_SERVICE_HOST`, `EXPROTO_SIDECAR_PORT_9100_TCP_ADDR` and the like to every
/// pod of the namespace unless `enableServiceLinks` is off. `rest` lacks the prefix. None of our
/// keys has such a name: one with a port would be in a table and so have `__`.
fn is_service_link(rest: &str) -> bool {
    if rest.contains("__") {
        return false;
    }
    let words: Vec<&str> = rest.split('_').collect();
    let number = |word: &str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit());
    (0..words.len()).any(|start| match words.get(start..).unwrap_or_default() {
        ["SERVICE", "HOST"] | ["SERVICE", "PORT", ..] | ["PORT"] => true,
        ["PORT", port, "TCP" | "UDP"]
        | ["PORT", port, "TCP" | "UDP", "PROTO" | "PORT" | "ADDR"] => number(port),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_links_are_told_from_keys() {
        for link in [
            "SERVICE_HOST",
            "SIDECAR_SERVICE_HOST",
            "SIDECAR_SERVICE_PORT",
            "SIDECAR_SERVICE_PORT_ADAPTER",
            "PORT",
            "SIDECAR_PORT",
            "SIDECAR_PORT_9100_TCP",
            "PORT_7993_UDP_ADDR",
            "A_B_PORT_1_TCP_PROTO",
        ] {
            assert!(is_service_link(link), "{link}");
        }
        for key in [
            "BROKER__URL",
            "NODE_NAME",
            "BROKER__SERVICE_HOST",
            "PORT_X_TCP",
            "PORTS",
            "SIDECAR_HOST",
            "service_host",
        ] {
            assert!(!is_service_link(key), "{key}");
        }
    }

    #[test]
    fn the_prefix_has_any_case() {
        assert_eq!(unprefixed("exproto_Log__Level"), Some("Log__Level"));
        assert_eq!(unprefixed("EXPROTO"), None);
        assert_eq!(unprefixed("EXPROTÖ_X"), None);
    }
}
