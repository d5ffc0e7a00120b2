//! What a device may do: rules that came with its authentication, then the sources in order, then
//! `no_match`.

mod filters;
mod rules;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use figment::providers::{Format, Toml};
use http::StatusCode;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::fill::Values;
pub use super::fill::Wish;
use super::http::{self as service, Asker};
use super::{Attempt, Error, Grant, Secret, Trouble, number_of, told};
use crate::config::OnError;
use crate::metrics::{AuthMetrics, SourceMetrics};
use crate::reload::{Current, Watch};
pub use rules::{Permission, Rules};

/// A source of rules.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its table in the configuration.
    pub key: String,
    /// What it is.
    pub kind: SourceKind,
}

/// What a source is.
#[derive(Debug, Clone)]
pub enum SourceKind {
    /// A file of rules.
    File(PathBuf),
    /// A service that is asked each time.
    Http(Box<service::Options>, OnError),
}

/// How devices are authorized.
#[derive(Debug, Clone)]
pub struct Options {
    /// Asked in order.
    pub sources: Vec<Source>,
    /// What it means when nothing fits.
    pub no_match: Permission,
    /// Decisions of services that are remembered for each connection, at most.
    pub cache_size: usize,
    /// How long they are.
    pub cache_ttl: Duration,
}

enum Asked {
    File(PathBuf, Watch, Arc<Current<Rules>>),
    Http(Box<Service>),
}

/// A service that is asked each time.
struct Service {
    asker: Asker,
    on_error: OnError,
    trouble: Trouble,
    asked: SourceMetrics,
}

/// See the module.
pub struct Acl {
    options: Options,
    sources: Vec<(String, Asked)>,
    metrics: AuthMetrics,
}

/// Decisions, and when they were made.
type Cache = HashMap<(&'static str, u32, String), (Permission, Instant)>;

/// A device whose wishes are checked.
pub struct Person {
    attempt: Attempt,
    rules: Option<Rules>,
    rules_until: Option<SystemTime>,
    cache: Mutex<Cache>,
}

impl std::fmt::Debug for Person {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Person").finish_non_exhaustive()
    }
}

impl Person {
    /// Whether the rules that came with its authentication count no more.
    fn has_lapsed(&self, now: SystemTime) -> bool {
        self.rules.is_some() && self.rules_until.is_some_and(|until| until <= now)
    }
}

/// The rules in the text of a file, or all that is wrong with them.
fn parse(text: &str) -> Result<Rules, Vec<String>> {
    let file: Value = Toml::from_str(text).map_err(|error| vec![error.to_string()])?;
    let members = file.as_object().into_iter().flatten();
    if let Some((unknown, _)) = members.clone().find(|(key, _)| *key != "rules") {
        return Err(vec![format!("unknown key {unknown:?}; allowed: rules")]);
    }
    let items = match file.get("rules") {
        None => return Ok(Rules::default()),
        Some(Value::Array(items)) => items,
        Some(_) => return Err(vec!["rules is no list: write [[rules]]".to_owned()]),
    };
    // A rule has a line where each begins with one.
    let lines = (1..).zip(text.lines().map(str::trim_start));
    let heads = lines.filter(|(_, line)| line.starts_with("[[rules]]"));
    let lines: Vec<u32> = heads.map(|(number, _)| number).collect();
    let place = |index: usize| match lines.get(index) {
        Some(line) if lines.len() == items.len() => format!("line {line}, rule {}", index + 1),
        _ => format!("rule {}", index + 1),
    };
    Rules::list(items).map_err(|problems| {
        let problems = problems.into_iter();
        problems
            .map(|(index, problem)| format!("{}: {problem}", place(index)))
            .collect()
    })
}

/// Reads a file; or all that is wrong with it.
fn read_all(path: &Path) -> Result<Rules, Vec<String>> {
    let named = |problem: String| format!("{}: {problem}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| vec![named(error.to_string())])?;
    parse(&text).map_err(|problems| problems.into_iter().map(named).collect())
}

fn read(path: &Path) -> Result<Arc<Rules>, String> {
    read_all(path)
        .map(Arc::new)
        .map_err(|problems| problems.join("; "))
}

impl Acl {
    /// Reads the files.
    pub fn new(options: &Options, metrics: &AuthMetrics) -> Result<Self, Error> {
        let source = |source: &Source| {
            let asked = match &source.kind {
                SourceKind::File(path) => {
                    let watch = Watch::new(vec![path.clone()]);
                    let rules = read(path).map_err(|problem| Error {
                        key: format!("{}.path", source.key),
                        problem,
                    })?;
                    Asked::File(path.clone(), watch, Current::new(rules))
                }
                SourceKind::Http(request, on_error) => {
                    let (key, url) = (&source.key, request.url.without_query());
                    Asked::Http(Box::new(Service {
                        asker: Asker::new(request),
                        on_error: *on_error,
                        trouble: Trouble::new("source of rules", key, "http", url),
                        asked: metrics.source(number_of(key)),
                    }))
                }
            };
            Ok((source.key.clone(), asked))
        };
        Ok(Self {
            sources: options
                .sources
                .iter()
                .map(source)
                .collect::<Result<_, Error>>()?,
            options: options.clone(),
            metrics: metrics.clone(),
        })
    }

    /// What is wrong with the source.
    pub fn check(source: &Source) -> Vec<Error> {
        let problems = match &source.kind {
            SourceKind::Http(..) => Vec::new(),
            SourceKind::File(path) => read_all(path).err().unwrap_or_default(),
        };
        let error = |problem| Error {
            key: format!("{}.path", source.key),
            problem,
        };
        problems.into_iter().map(error).collect()
    }

    /// Follows changes of files until `stop` is cancelled.
    pub fn follow(&self, metrics: &AuthMetrics, stop: &CancellationToken) {
        for (key, source) in &self.sources {
            if let Asked::File(path, watch, current) = source {
                let path = path.clone();
                let make = move || read(&path);
                let told = told(key, metrics);
                tokio::spawn(watch.clone().run(current.clone(), make, told, stop.clone()));
            }
        }
    }

    /// What is to be kept of a device to check its wishes; none where it may do everything.
    pub fn person(&self, attempt: &Attempt, grant: Grant) -> Option<Box<Person>> {
        let is_open = self.sources.is_empty() && self.options.no_match == Permission::Allow;
        if grant.is_superuser || (is_open && grant.rules.is_none()) {
            return None;
        }
        Some(Box::new(Person {
            attempt: Attempt {
                // It has done its service.
                password: Secret::new(""),
                ..attempt.clone()
            },
            rules: grant.rules,
            rules_until: grant.rules_until,
            cache: Mutex::default(),
        }))
    }

    /// Whether the device may. Cancel safe.
    pub async fn decide(&self, person: &Person, wish: Wish<'_>) -> Permission {
        let values = Values {
            attempt: &person.attempt,
            wish: Some(wish),
        };
        let rules = person.rules.as_ref();
        let decided = match rules.and_then(|rules| rules.decide(&values, wish)) {
            // Who vouched for it does not any more.
            _ if person.has_lapsed(SystemTime::now()) => Permission::Deny,
            Some(permission) => permission,
            None => self.ask(person, &values, wish).await,
        };
        self.metrics.authorized(decided == Permission::Allow);
        decided
    }

    async fn ask(&self, person: &Person, values: &Values<'_>, wish: Wish<'_>) -> Permission {
        for (place, (key, source)) in self.sources.iter().enumerate() {
            let decided = match source {
                Asked::File(_, _, current) => current.get().decide(values, wish),
                // From here on services are asked: what they decide together is remembered.
                Asked::Http(..) => {
                    let known = (wish.action, wish.qos, wish.topic.to_owned());
                    if let Some(permission) = self.remembered(person, &known) {
                        return permission;
                    }
                    let asked = self.ask_services(place, values, wish).await;
                    if let Ok(permission) = asked {
                        self.remember(person, known, permission);
                    }
                    let (Ok(permission) | Err(permission)) = asked;
                    return permission;
                }
            };
            if let Some(permission) = decided {
                tracing::trace!(key, topic = wish.topic, ?permission, "a rule fits");
                return permission;
            }
        }
        self.options.no_match
    }

    /// Asks the sources from this one on. `Err` where one has not answered: that is not remembered.
    async fn ask_services(
        &self,
        from: usize,
        values: &Values<'_>,
        wish: Wish<'_>,
    ) -> Result<Permission, Permission> {
        let mut is_sound = true;
        let sound = |permission, is_sound| {
            if is_sound {
                Ok(permission)
            } else {
                Err(permission)
            }
        };
        for (_, source) in self.sources.iter().skip(from) {
            let decided = match source {
                Asked::File(_, _, current) => current.get().decide(values, wish),
                Asked::Http(service) => {
                    let said = answer(&service.asker, values).await;
                    service.asked.count(match &said {
                        Ok(Some(Permission::Allow)) => "allow",
                        Ok(Some(Permission::Deny)) => "deny",
                        Ok(None) => "ignore",
                        Err(_) => "error",
                    });
                    match said {
                        Ok(decided) => {
                            service.trouble.is_over();
                            decided
                        }
                        Err(error) => {
                            service.trouble.is(&error);
                            is_sound = false;
                            (service.on_error == OnError::Deny).then_some(Permission::Deny)
                        }
                    }
                }
            };
            if let Some(permission) = decided {
                return sound(permission, is_sound);
            }
        }
        sound(self.options.no_match, is_sound)
    }

    fn remembered(
        &self,
        person: &Person,
        known: &(&'static str, u32, String),
    ) -> Option<Permission> {
        let cache = person.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let (permission, since) = cache.get(known)?;
        (since.elapsed() < self.options.cache_ttl).then_some(*permission)
    }

    fn remember(
        &self,
        person: &Person,
        known: (&'static str, u32, String),
        permission: Permission,
    ) {
        if self.options.cache_size == 0 {
            return;
        }
        let mut cache = person.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= self.options.cache_size && !cache.contains_key(&known) {
            let ttl = self.options.cache_ttl;
            cache.retain(|_, (_, since)| since.elapsed() < ttl);
            if cache.len() >= self.options.cache_size {
                let oldest = cache.iter().min_by_key(|(_, (_, since))| *since);
                if let Some(oldest) = oldest.map(|(known, _)| known.clone()) {
                    cache.remove(&oldest);
                }
            }
        }
        cache.insert(known, (permission, Instant::now()));
    }
}

/// What a service says: EMQX's answers. None where it leaves it to others.
async fn answer(asker: &Asker, values: &Values<'_>) -> Result<Option<Permission>, String> {
    let answer = asker.ask(values).await.map_err(|error| error.to_string())?;
    match answer.status {
        StatusCode::NO_CONTENT => Ok(Some(Permission::Allow)),
        StatusCode::OK => match service::object(&answer)?
            .get("result")
            .and_then(Value::as_str)
        {
            Some("allow") => Ok(Some(Permission::Allow)),
            Some("deny") => Ok(Some(Permission::Deny)),
            Some("ignore") => Ok(None),
            _ => Err("its result is none of allow, deny and ignore".to_owned()),
        },
        status => Err(format!("it answers with status {}", status.as_u16())),
    }
}

/// See [`crate::fuzzing`].
pub(super) mod fuzzing {
    use super::*;

    /// The rules of a file's text, together and each alone.
    pub fn parse(text: &str) -> Result<(Rules, Vec<Rules>), String> {
        let rules = super::parse(text).map_err(|problems| problems.join("; "))?;
        let alone = rules.each();
        Ok((rules, alone))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::attempt;
    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn all_faults_of_a_file_are_told_with_their_lines() {
        let text = "# two\n[[rules]]\npermission = 'maybe'\n\n[[rules]]\npermission = 'allow'\n\n  \
                    [[rules]]\npermission = 'deny'\nqos = 3\n";
        let problems = parse(text).unwrap_err();
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].starts_with("line 2, rule 1: permission"));
        assert!(problems[1].starts_with("line 8, rule 3: qos"));
        let inline = "rules = [{ permission = 'maybe' }]";
        assert!(parse(inline).unwrap_err()[0].starts_with("rule 1: permission"));
        assert!(parse("[[rules]]\npermission = allow").unwrap_err()[0].contains("line 2"));
    }

    #[tokio::test]
    async fn rules_of_a_token_lapse_with_it() {
        let options = Options {
            sources: Vec::new(),
            no_match: Permission::Allow,
            cache_size: 1,
            cache_ttl: Duration::ZERO,
        };
        let metrics = AuthMetrics::new(&Metrics::new().unwrap());
        let acl = Acl::new(&options, &metrics).unwrap();
        let wish = Wish {
            action: "publish",
            topic: "a",
            qos: 0,
        };
        let now = SystemTime::now();
        let hour = Duration::from_secs(3600);
        for (until, rules, expected) in [
            (None, true, Permission::Allow),
            (Some(now + hour), true, Permission::Allow),
            (Some(now - hour), true, Permission::Deny),
            // There is nothing that could lapse.
            (Some(now - hour), false, Permission::Allow),
        ] {
            let rules = rules.then(|| Rules::parse(&serde_json::json!({"pub": ["a"]})).unwrap());
            let grant = Grant {
                rules,
                rules_until: until,
                ..Grant::default()
            };
            let decided = match acl.person(&attempt("c", ""), grant) {
                Some(person) => acl.decide(&person, wish).await,
                None => Permission::Allow,
            };
            assert_eq!(decided, expected, "{until:?}");
        }
    }
}
