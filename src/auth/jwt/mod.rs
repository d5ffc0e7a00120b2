//! JSON Web Tokens (RFC 7519) as passwords: signed by somebody who is trusted, checked here.

mod jwks;
mod key;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;

use super::acl::Rules;
use super::fill::Values;
use super::http::{self, epoch, truth};
use super::{Attempt, Decision, Fault, Grant};
use crate::config::{Secret, Template};
use crate::metrics::AuthMetrics;
use jwks::Endpoint;
use key::Key;

use crate::reload::{Current, Watch};

/// The largest token in bytes; what is larger is not looked at.
const MAX_TOKEN: usize = 16 * 1024;

/// Where the keys come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A secret, and whether it is written in base64.
    Secret(Secret, bool),
    /// A file with a public key in PEM.
    PublicKey(PathBuf),
    /// A file with a set of keys.
    JwksFile(PathBuf),
    /// A service that gives a set of keys, asked again and again.
    Endpoint(Box<http::Options>, Duration),
}

/// How tokens are checked.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the keys come from.
    pub source: Source,
    /// Whether the user name is the token, and not the password.
    pub from_username: bool,
    /// What claims must be.
    pub verify_claims: Vec<(String, Template)>,
    /// Whether the end of the token is the connection's.
    pub disconnect_after_expire: bool,
    /// The claim with rules of access.
    pub acl_claim_name: String,
    /// How much the clocks may differ.
    pub leeway: Duration,
}

/// Keys in use.
type Keys = Vec<Key>;

enum Ring {
    Fixed(Arc<Keys>),
    File(PathBuf, Watch, Arc<Current<Keys>>),
    Endpoint(Endpoint),
}

/// See the module.
pub struct JwtAuthenticator {
    options: Options,
    ring: Ring,
}

fn read(source: &Source, path: &PathBuf) -> Result<Arc<Keys>, String> {
    let named = |problem: String| format!("{}: {problem}", path.display());
    let text = std::fs::read(path).map_err(|error| named(error.to_string()))?;
    let keys = match source {
        Source::PublicKey(_) => Key::pem(&text).map(|key| vec![key]),
        _ => key::jwks(&text),
    };
    keys.map(Arc::new).map_err(named)
}

impl JwtAuthenticator {
    /// Reads the keys, unless a service gives them.
    ///
    /// # Errors
    /// The key of the configuration that is at fault, and what is wrong.
    pub fn new(options: &Options) -> Result<Self, (&'static str, String)> {
        let source = &options.source;
        let file = |key, path: &PathBuf| {
            let watch = Watch::new(vec![path.clone()]);
            let keys = read(source, path).map_err(|problem| (key, problem))?;
            Ok(Ring::File(path.clone(), watch, Current::new(keys)))
        };
        let ring = match source {
            Source::Secret(secret, is_base64) => {
                let text = secret.expose();
                let bytes = match is_base64 {
                    true => STANDARD
                        .decode(text.trim())
                        .map_err(|_| "it is no base64".to_owned()),
                    false => Ok(text.as_bytes().to_vec()),
                };
                let key = bytes.and_then(|bytes| Key::secret(&bytes));
                let key = key.map_err(|problem| ("secret", problem))?;
                Ring::Fixed(Arc::new(vec![key]))
            }
            Source::PublicKey(path) => file("public_key", path)?,
            Source::JwksFile(path) => file("jwks_file", path)?,
            Source::Endpoint(request, interval) => {
                Ring::Endpoint(Endpoint::new(request, *interval))
            }
        };
        Ok(Self {
            options: options.clone(),
            ring,
        })
    }

    /// Whether user names are tokens, which nobody is to see.
    pub fn is_from_username(&self) -> bool {
        self.options.from_username
    }

    /// Follows changes of the keys until `stop` is cancelled.
    pub fn follow(&self, key: &str, metrics: &AuthMetrics, stop: &CancellationToken) {
        match &self.ring {
            Ring::Fixed(_) => {}
            Ring::File(path, watch, current) => {
                let (source, path) = (self.options.source.clone(), path.clone());
                let make = move || read(&source, &path);
                let told = super::told(key, metrics);
                tokio::spawn(watch.clone().run(current.clone(), make, told, stop.clone()));
            }
            Ring::Endpoint(endpoint) => endpoint.follow(key, metrics, stop),
        }
    }

    /// Whether the token is valid; `Err` where it cannot be said that anybody trusted has signed it.
    /// Where its key is not there yet, it `waits` for it, or says [`Fault::Later`].
    pub async fn ask(&self, attempt: &Attempt, waits: bool) -> Result<Decision, Fault> {
        let token = match self.options.from_username {
            true => attempt.username.as_str(),
            false => attempt.password.expose(),
        };
        let token = Token::parse(token).map_err(Fault::OfDevice)?;
        let keys = match &self.ring {
            Ring::Fixed(keys) => keys.clone(),
            Ring::File(_, _, current) => current.get(),
            Ring::Endpoint(endpoint) => endpoint.keys(token.kid.as_deref(), waits).await?,
        };
        let mut named = keys.iter().filter(|key| key.is_named(token.kid.as_deref()));
        if !named.any(|key| key.verify(&token.algorithm, token.message, &token.signature)) {
            let why = "none of the keys has signed the token";
            return Err(Fault::OfDevice(why.to_owned()));
        }
        Ok(self.judge(&token.claims, attempt, SystemTime::now()))
    }

    /// What the claims of a token say that somebody trusted has signed.
    fn judge(&self, claims: &Map<String, Value>, attempt: &Attempt, now: SystemTime) -> Decision {
        let deny = |why: &str| Decision::Deny(why.to_owned());
        let time = |name: &str| match claims.get(name) {
            None => Ok(None),
            Some(value) => epoch(value).map(Some).ok_or(()),
        };
        let (Ok(expires), Ok(begins)) = (time("exp"), time("nbf")) else {
            return deny("the token's exp or nbf is no time");
        };
        let leeway = self.options.leeway;
        if expires.is_some_and(|expires| now.checked_sub(leeway).is_some_and(|now| now >= expires))
        {
            return deny("the token has expired");
        }
        if begins.is_some_and(|begins| now + leeway < begins) {
            return deny("the token is not valid yet");
        }
        let values = Values {
            attempt,
            wish: None,
        };
        for (name, template) in &self.options.verify_claims {
            let wanted = values.plain(template);
            let is_so = match claims.get(name) {
                Some(Value::String(text)) => *text == wanted,
                Some(Value::Number(number)) => number.to_string() == wanted,
                Some(Value::Bool(value)) => value.to_string() == wanted,
                _ => false,
            };
            if !is_so {
                return Decision::Deny(format!("the token's claim {name} is not the device's"));
            }
        }
        let rules = claims.get(&self.options.acl_claim_name).map(Rules::parse);
        let rules = match rules.transpose() {
            Ok(rules) => rules,
            Err(problem) => {
                let claim = &self.options.acl_claim_name;
                let why = format!("the token's claim {claim} holds no rules of access: {problem}");
                return Decision::Deny(why);
            }
        };
        let expires = expires.map(|expires| expires + leeway);
        Decision::Allow(Grant {
            clientid: None,
            rules,
            rules_until: expires,
            is_superuser: claims.get("is_superuser").and_then(truth) == Some(true),
            expire_at: expires.filter(|_| self.options.disconnect_after_expire),
        })
    }
}

/// A token, taken apart and not yet believed.
struct Token<'a> {
    algorithm: String,
    kid: Option<String>,
    /// What is signed.
    message: &'a [u8],
    signature: Vec<u8>,
    claims: Map<String, Value>,
}

impl<'a> Token<'a> {
    fn parse(token: &'a str) -> Result<Self, String> {
        let none = || "it is no token".to_owned();
        if token.len() > MAX_TOKEN {
            return Err(format!("the token has more than {MAX_TOKEN} bytes"));
        }
        let (message, signature) = token.rsplit_once('.').ok_or_else(none)?;
        let (header, claims) = message.split_once('.').ok_or_else(none)?;
        let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).map_err(|_| none());
        let object = |text| match serde_json::from_slice(&decode(text)?) {
            Ok(Value::Object(members)) => Ok::<Map<String, Value>, String>(members),
            _ => Err(none()),
        };
        let header = object(header)?;
        // Who marks a header as critical wants it understood (RFC 7515, 4.1.11).
        if header.contains_key("crit") {
            return Err("the token's header has extensions that are not known".to_owned());
        }
        let text = |name| header.get(name).and_then(Value::as_str).map(str::to_owned);
        let algorithm = text("alg").ok_or_else(none)?;
        if algorithm.eq_ignore_ascii_case("none") {
            return Err("the token is not signed".to_owned());
        }
        Ok(Self {
            algorithm,
            kid: text("kid"),
            message: message.as_bytes(),
            signature: decode(signature)?,
            claims: object(claims)?,
        })
    }
}

#[cfg(test)]
mod tests;

/// See [`crate::fuzzing`].
pub(super) mod fuzzing {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    pub fn token(text: &str) {
        let authenticator = JwtAuthenticator::new(&Options {
            source: Source::Secret(Secret::new("a secret of thirty-two bytes...."), false),
            from_username: false,
            verify_claims: vec![("sub".to_owned(), Template::parse("${clientid}").unwrap())],
            acl_claim_name: "acl".to_owned(),
            disconnect_after_expire: true,
            leeway: Duration::ZERO,
        });
        let Ok(token) = Token::parse(text) else {
            return;
        };
        let signature = URL_SAFE_NO_PAD.encode(&token.signature);
        let message = std::str::from_utf8(token.message).unwrap();
        assert_eq!(format!("{message}.{signature}"), text);
        assert!(!token.algorithm.eq_ignore_ascii_case("none"));
        let mut attempt = Attempt::nobody();
        attempt.clientid = "c1".to_owned();
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let said = authenticator.unwrap().judge(&token.claims, &attempt, now);
        if let Decision::Allow(grant) = said {
            assert_eq!(token.claims.get("sub").and_then(Value::as_str), Some("c1"));
            assert!(grant.expire_at.is_none_or(|at| at > now));
        }
    }
}
