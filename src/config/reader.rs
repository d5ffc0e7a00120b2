//! Reads the merged layers key by key and collects what is wrong.

use std::collections::BTreeSet;

use figment::value::{Dict, Value};

use super::layers::{Layers, variable_of};
use super::names::Name;
use super::placeholders;
use super::report::{Fault, Origin};
use super::schema::{join, leaves};
use super::suggest;
use super::value::{ConfigValue, Rejected, kind, show};
use super::values::Secret;

/// One table being read; without a table when nothing of it is configured.
pub(crate) struct Scope<'a> {
    path: String,
    table: Option<&'a Dict>,
}

impl<'a> Scope<'a> {
    /// A table of which nothing is configured.
    pub fn empty(path: String) -> Scope<'a> {
        Scope { path, table: None }
    }

    /// The whole configuration.
    pub fn root(table: &'a Dict) -> Scope<'a> {
        Scope {
            path: String::new(),
            table: Some(table),
        }
    }

    /// The dotted path of a key of this table.
    pub fn path_of(&self, key: &str) -> String {
        join(&self.path, key)
    }

    /// What is configured.
    pub fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> + use<'a> {
        self.table.into_iter().flatten()
    }

    /// Whether `key` is a list with nothing in it.
    pub fn is_empty_list(&self, key: &str) -> bool {
        matches!(self.get(key), Some(Value::Array(_, items)) if items.is_empty())
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.table.and_then(|table| table.get(key))
    }
}

/// Collects faults while the sections read themselves.
pub(crate) struct Reader<'a> {
    layers: &'a Layers,
    /// Every key there is, for suggestions.
    known: &'a [String],
    faults: Vec<Fault>,
}

impl<'a> Reader<'a> {
    pub fn new(layers: &'a Layers, known: &'a [String]) -> Reader<'a> {
        Reader {
            layers,
            known,
            faults: Vec::new(),
        }
    }

    pub fn into_faults(self) -> Vec<Fault> {
        self.faults
    }

    /// Notes what is wrong with `value`.
    pub fn fault(&mut self, value: &Value, key: String, problem: String) {
        self.faults
            .push(Fault::new(self.layers.origin(value), key, problem));
    }

    /// Reads a value. None when it is not configured or at fault.
    pub fn value<T: ConfigValue>(
        &mut self,
        scope: &Scope<'_>,
        key: &str,
        check: impl FnOnce(Result<T, Rejected>) -> Result<T, Rejected>,
    ) -> Option<T> {
        let value = scope.get(key)?;
        match check(T::from_value(value)) {
            Ok(read) => Some(read),
            Err(Rejected { allowed, item }) => {
                let found = match (T::SECRET, item) {
                    (true, _) => Secret::MASK.to_owned(),
                    (false, Some(item)) => item,
                    (false, None) => show(value),
                };
                let path = scope.path_of(key);
                let allowed = placeholders::narrow(&allowed, &path);
                let text = value.as_str().filter(|_| !T::SECRET).unwrap_or_default();
                let emqx = suggest::emqx_value(key, text)
                    .map(|here| format!("; as in EMQX? {here}"))
                    .unwrap_or_default();
                let problem = format!("found {found}{emqx}; allowed: {allowed}");
                self.fault(value, path, problem);
                None
            }
        }
    }

    /// Enters a table. YAML writes an empty one as nothing.
    pub fn table<'t>(&mut self, scope: &Scope<'t>, key: &str, keys: &[&str]) -> Scope<'t> {
        let path = scope.path_of(key);
        let table = match scope.get(key) {
            None | Some(Value::Empty(..)) => None,
            Some(Value::Dict(_, table)) => Some(table),
            Some(value) => {
                // The value is not shown: whoever puts it here may have meant a secret below.
                let allowed = keys.join(", ");
                let problem = format!(
                    "found {}; allowed: a table with the keys {allowed}",
                    kind(value)
                );
                let problem = match self.layers.origin(value) {
                    Origin::Environment(_) => {
                        format!("{problem}, each in a variable {}__KEY", variable_of(&path))
                    }
                    _ => problem,
                };
                self.fault(value, path.clone(), problem);
                None
            }
        };
        Scope { path, table }
    }

    /// Notes every key of `scope` that is not one of `keys`.
    pub fn refuse_unknown(&mut self, scope: &Scope<'_>, keys: &[&str]) {
        for (key, value) in scope.entries() {
            if keys.contains(&key.as_str()) {
                continue;
            }
            let path = scope.path_of(key);
            let allowed = keys.join(", ");
            let emqx = suggest::emqx_key(&path).map(|here| format!("; as in EMQX? {here}"));
            for origin in self.origins(value) {
                if let Some(emqx) = &emqx {
                    let problem = format!("unknown key{emqx}; allowed: {allowed}");
                    self.faults.push(Fault::new(origin, path.clone(), problem));
                    continue;
                }
                let hint = suggest::key(&path, key, keys, self.known)
                    .map(|known| match origin {
                        Origin::Environment(_) => {
                            format!("; did you mean {}?", variable_of(&known))
                        }
                        _ => format!("; did you mean {known}?"),
                    })
                    .unwrap_or_default();
                let problem = format!("unknown key{hint}; allowed: {allowed}");
                self.faults.push(Fault::new(origin, path.clone(), problem));
            }
        }
    }

    /// Notes a table whose name is not one.
    pub fn refuse_name(&mut self, scope: &Scope<'_>, name: &str, value: &Value) {
        for origin in self.origins(value) {
            let problem = format!("found the name {name:?}; allowed: {}", Name::allowed());
            self.faults
                .push(Fault::new(origin, scope.path_of(name), problem));
        }
    }

    /// Notes that there is one table where a list of them has to be; `value` is of the key `name` in it.
    pub fn refuse_table(&mut self, scope: &Scope<'_>, name: &str, value: &Value) {
        let list = &scope.path;
        let variable = variable_of(&format!("{list}.1.{name}"));
        let problem = format!(
            "found one table; allowed: a list of tables, [[{list}]] in place of [{list}] in TOML, {variable} as a \
             variable"
        );
        self.fault(value, list.clone(), problem);
    }

    /// Notes an item of a list whose number is none.
    pub fn refuse_number(&mut self, scope: &Scope<'_>, number: &str, value: &Value) {
        for origin in self.origins(value) {
            let problem = format!(
                "found the number {number:?}; allowed: the numbers of a list's tables, from 1 on"
            );
            self.faults
                .push(Fault::new(origin, scope.path_of(number), problem));
        }
    }

    /// Notes that `key` is missing from a table that must have it; `table` is where it should be.
    pub fn require(&mut self, scope: &Scope<'_>, key: &str, table: &Value) {
        // What a broken file holds cannot be known, so nothing can be said to be missing.
        if scope.get(key).is_none() && self.layers.complete() {
            let problem = "found nothing; this key is required".to_owned();
            let origin = self
                .origins(table)
                .into_iter()
                .next()
                .unwrap_or(Origin::Default);
            self.faults
                .push(Fault::new(origin, scope.path_of(key), problem));
        }
    }

    /// The places that `value` was written: a table may come together from several.
    fn origins(&self, value: &Value) -> BTreeSet<Origin> {
        match value.as_dict() {
            Some(table) if !table.is_empty() => leaves(table)
                .into_iter()
                .map(|leaf| self.layers.origin(leaf))
                .collect(),
            _ => BTreeSet::from([self.layers.origin(value)]),
        }
    }
}
