//! A service that decides, asked over HTTP: what EMQX's HTTP authenticator asks and understands.
//!
//! 200 with JSON: `result` is `allow`, `deny` or `ignore`; `is_superuser`, `expire_at` (seconds since
//! the epoch), `clientid_override`, `acl`. 204 allows. Everything else is no decision, and neither is no answer.

pub mod client;

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use http::{HeaderMap, Method, StatusCode};
use serde_json::{Map, Value};

use super::acl::Rules;
use super::fill::{Values, percent};
use super::{Attempt, Decision, Grant};
use crate::config::{HttpUrl, Template};
use client::{Answer, Error, HttpClient};

/// The largest answer in bytes: rules of access for one device, with room.
pub const MAX_BODY: usize = 64 * 1024;

/// Seconds since the epoch beyond which a moment is taken for one in milliseconds, which all since
/// September 2001 are: as seconds it is the year 33658. Who means "never" may say the year 9999.
const FAR_AWAY: Duration = Duration::from_secs(1_000_000_000_000);

/// What is asked, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// POST or GET.
    pub method: Method,
    /// Whom.
    pub url: HttpUrl,
    /// Beside those that every request has.
    pub headers: Vec<(HeaderName, Template)>,
    /// A member of the JSON, or of the form, or of a GET's query, each.
    pub body: Vec<(String, Template)>,
    /// How it is reached.
    pub client: client::Options,
}

/// A request that is made again and again.
pub struct Asker {
    options: Options,
    client: HttpClient,
}

impl Asker {
    /// Connects with the first request.
    pub fn new(options: &Options) -> Self {
        Self {
            client: HttpClient::new(options.client.clone()),
            options: options.clone(),
        }
    }

    /// Asks with these values.
    pub async fn ask(&self, values: &Values<'_>) -> Result<Answer, Error> {
        let options = &self.options;
        let mut headers = HeaderMap::new();
        for (name, template) in &options.headers {
            let text = values.plain(template);
            let unfit = |_| Error::Request("a header has control characters");
            let mut value = HeaderValue::from_bytes(text.as_bytes()).map_err(unfit)?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        let scheme = if options.url.tls { "https" } else { "http" };
        let path = values.fill(&options.url.path, percent);
        let mut uri = format!("{scheme}://{}{path}", options.url.authority);
        let mut body = Bytes::new();
        if options.method == Method::GET {
            if !options.body.is_empty() {
                uri.push(if path.contains('?') { '&' } else { '?' });
                uri.push_str(&self.form(values));
            }
        } else {
            let json = HeaderValue::from_static("application/json");
            let kind = headers.entry(CONTENT_TYPE).or_insert(json);
            let is_form = kind
                .as_bytes()
                .starts_with(b"application/x-www-form-urlencoded");
            body = match is_form {
                true => self.form(values).into(),
                false => {
                    let members = options.body.iter();
                    let members = members
                        .map(|(name, value)| (name.clone(), Value::String(values.plain(value))));
                    Value::Object(members.collect()).to_string().into()
                }
            };
        }
        self.client
            .ask(options.method.clone(), &uri, headers, body)
            .await
    }

    fn form(&self, values: &Values<'_>) -> String {
        let members =
            self.options.body.iter().map(|(name, value)| {
                format!("{}={}", percent(name), percent(&values.plain(value)))
            });
        members.collect::<Vec<_>>().join("&")
    }
}

/// The object in an answer of status 200.
pub fn object(answer: &Answer) -> Result<Map<String, Value>, String> {
    let kind = answer.headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let is = |wanted: &[u8]| {
        kind.is_none_or(|kind| {
            let start = kind.get(..wanted.len()).unwrap_or_default();
            start.eq_ignore_ascii_case(wanted)
        })
    };
    if !is(b"application/json") {
        let is_form = is(b"application/x-www-form-urlencoded");
        let form = is_form.then(|| form(&answer.body)).flatten();
        return form.ok_or_else(|| "its answer is no JSON and no form".to_owned());
    }
    match serde_json::from_slice(&answer.body) {
        Ok(Value::Object(members)) => Ok(members),
        // What is in it is not said: it may be secret.
        _ => Err("its answer is no JSON object".to_owned()),
    }
}

/// The members of a form, the last of a name counts. All of them are texts; the one that is
/// a number in JSON becomes that.
fn form(body: &[u8]) -> Option<Map<String, Value>> {
    let mut members = Map::new();
    let pairs = body.split(|byte| *byte == b'&').filter(|p| !p.is_empty());
    for pair in pairs {
        let at = pair.iter().position(|byte| *byte == b'=');
        let (name, value) = pair.split_at(at.unwrap_or(pair.len()));
        let name = decoded(name)?;
        let value = decoded(value.get(1..).unwrap_or_default())?;
        let value = match (&*name, &*value) {
            ("expire_at", seconds) => seconds.parse::<u64>().map_or(value.into(), Value::from),
            _ => Value::String(value),
        };
        members.insert(name, value);
    }
    Some(members)
}

/// A name or value of a form, with its escapes resolved.
fn decoded(text: &[u8]) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, behind)) = rest.split_first() {
        rest = behind;
        bytes.push(match first {
            b'+' => b' ',
            b'%' => {
                let (digits, behind) = rest.split_at_checked(2)?;
                rest = behind;
                let digit = |byte: &u8| char::from(*byte).to_digit(16);
                let [high, low] = digits else { return None };
                u8::try_from(digit(high)? * 16 + digit(low)?).ok()?
            }
            byte => *byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// What an answer means; `Err` where it is none.
fn decide(answer: &Answer, now: SystemTime) -> Result<Decision, String> {
    match answer.status {
        StatusCode::NO_CONTENT => Ok(Decision::Allow(Grant::default())),
        StatusCode::OK => {
            let members = object(answer)?;
            match members.get("result").and_then(Value::as_str) {
                Some("allow") => granted(&members, now),
                Some("deny") => Ok(Decision::Deny("the service denies it".to_owned())),
                Some("ignore") | None => Ok(Decision::Ignore("the service ignores it".to_owned())),
                Some(_) => Err("its result is none of allow, deny and ignore".to_owned()),
            }
        }
        status => Err(format!("it answers with status {}", status.as_u16())),
    }
}

/// True or false as services write it: EMQX takes 0, 1 and texts, too.
pub(super) fn truth(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(truth) => Some(*truth),
        Value::Number(number) => match number.as_u64() {
            Some(0) => Some(false),
            Some(1) => Some(true),
            _ => None,
        },
        Value::String(text) => match &**text {
            "true" | "1" => Some(true),
            "false" | "0" | "" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

fn granted(members: &Map<String, Value>, now: SystemTime) -> Result<Decision, String> {
    let expire_at = match members.get("expire_at") {
        None | Some(Value::Null) => None,
        Some(value) => Some(epoch(value).ok_or("its expire_at is no number of seconds")?),
    };
    let is_far = |time: SystemTime| {
        time.duration_since(SystemTime::UNIX_EPOCH)
            .is_ok_and(|since| since >= FAR_AWAY)
    };
    if expire_at.is_some_and(is_far) {
        return Err("its expire_at is in milliseconds, and not in seconds".to_owned());
    }
    if expire_at.is_some_and(|time| time <= now) {
        return Ok(Decision::Deny("its expire_at has passed".to_owned()));
    }
    let is_superuser = match members.get("is_superuser") {
        None | Some(Value::Null) => false,
        Some(value) => truth(value).ok_or("its is_superuser is not true or false")?,
    };
    let clientid = match members.get("clientid_override") {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some(text.clone()).filter(|text| !text.is_empty()),
        Some(_) => return Err("its clientid_override is no text".to_owned()),
    };
    let acl = members.get("acl").filter(|acl| !acl.is_null());
    let rules = acl.map(Rules::parse).transpose();
    Ok(Decision::Allow(Grant {
        clientid,
        is_superuser,
        expire_at,
        rules: rules.map_err(|problem| format!("its acl: {problem}"))?,
        rules_until: None,
    }))
}

/// A moment as seconds since the epoch.
pub fn epoch(value: &Value) -> Option<SystemTime> {
    let seconds = value.as_f64().filter(|seconds| *seconds >= 0.0)?;
    let since = Duration::try_from_secs_f64(seconds).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(since)
}

/// An authenticator.
pub struct HttpAuthenticator {
    asker: Asker,
    /// The service, for the log: what is behind it may hold what devices say.
    pub authority: String,
}

impl HttpAuthenticator {
    /// Connects with the first request.
    pub fn new(options: &Options) -> Self {
        Self {
            asker: Asker::new(options),
            authority: options.url.authority.clone(),
        }
    }

    /// What the service says; `Err` where it says nothing that can be used.
    pub async fn ask(&self, attempt: &Attempt) -> Result<Decision, String> {
        let values = Values {
            attempt,
            wish: None,
        };
        let answer = self
            .asker
            .ask(&values)
            .await
            .map_err(|error| error.to_string())?;
        decide(&answer, SystemTime::now())
    }
}

/// See [`crate::fuzzing`].
pub(super) mod fuzzing {
    #![allow(clippy::panic, clippy::indexing_slicing)]

    use super::*;

    /// Nobody is let in who has expired, or by what is no answer; a form says nothing that
    /// JSON could not say.
    pub fn answer(kind: u8, body: &[u8]) {
        let kinds = [
            "application/json",
            "application/x-www-form-urlencoded",
            "text/html",
        ];
        let kind = kinds[usize::from(kind) % kinds.len()];
        let answer = |kind, body: &[u8]| Answer {
            status: StatusCode::OK,
            headers: HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))]),
            body: Bytes::copy_from_slice(body),
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let said = decide(&answer(kind, body), now);
        if let Ok(Decision::Allow(grant)) = &said {
            assert_ne!(kind, kinds[2]);
            assert!(grant.expire_at.is_none_or(|at| at > now));
            assert!(kind == kinds[0] || grant.rules.is_none());
        }
        if let (true, Some(members)) = (kind == kinds[1], form(body)) {
            let json = Value::Object(members).to_string();
            assert_eq!(decide(&answer(kinds[0], json.as_bytes()), now), said);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, kind: &'static str, body: &str) -> Answer {
        Answer {
            status: StatusCode::from_u16(status).unwrap(),
            headers: HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))]),
            body: Bytes::copy_from_slice(body.as_bytes()),
        }
    }

    #[test]
    fn answers_mean_what_they_mean_to_emqx() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let json = "application/json; charset=utf-8";
        let decided = |body: &str| decide(&answer(200, json, body), now);
        let at = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        let grant = |is_superuser, expire_at| {
            Ok(Decision::Allow(Grant {
                is_superuser,
                expire_at,
                ..Grant::default()
            }))
        };
        assert_eq!(decided(r#"{"result":"allow"}"#), grant(false, None));
        assert_eq!(
            decided(r#"{"result":"allow","is_superuser":true,"expire_at":1000001,"x":1}"#),
            grant(true, at(1_000_001))
        );
        assert_eq!(
            decide(&answer(204, "text/html", ""), now),
            grant(false, None)
        );
        // The end of the year 9999.
        assert_eq!(
            decided(r#"{"result":"allow","expire_at":253402300799}"#),
            grant(false, at(253_402_300_799))
        );
        let form = "Application/x-www-form-urlencoded; charset=utf-8";
        let form = |body: &str| decide(&answer(200, form, body), now);
        assert_eq!(form("result=allow"), grant(false, None));
        for (text, is_superuser) in [
            ("0", false),
            ("1", true),
            (r#""0""#, false),
            (r#""1""#, true),
            (r#""true""#, true),
            (r#""false""#, false),
            (r#""""#, false),
            ("null", false),
        ] {
            let body = format!(r#"{{"result":"allow","acl":null,"is_superuser":{text}}}"#);
            assert_eq!(decided(&body), grant(is_superuser, None), "{body}");
        }
        for (text, is_superuser) in [("1", true), ("0", false), ("false", false)] {
            let body = format!("result=allow&is_superuser={text}");
            assert_eq!(form(&body), grant(is_superuser, None), "{body}");
        }
        let body = "x=%2B+&is_superuser=%74rue&result=allow&expire_at=1000001";
        assert_eq!(form(body), grant(true, at(1_000_001)));
        assert!(matches!(
            form("result=allow&result=deny"),
            Ok(Decision::Deny(_))
        ));
        for body in ["", "result", "result=ignore", "Result=allow"] {
            assert!(!matches!(form(body), Ok(Decision::Allow(_))), "{body}");
        }
        for body in [
            "result=%zz",
            "result=allow&x=%ff",
            "result=allow&is_superuser=yes",
            "result=allow&expire_at=soon",
            "result=allow&acl=a",
        ] {
            assert!(form(body).is_err(), "{body}");
        }
        for (body, part) in [
            (r#"{"result":"deny"}"#, "denies"),
            (r#"{"result":"allow","expire_at":999999}"#, "passed"),
        ] {
            let Ok(Decision::Deny(why)) = decided(body) else {
                panic!("{body}");
            };
            assert!(why.contains(part));
        }
        for body in [r#"{"result":"ignore"}"#, "{}"] {
            assert!(matches!(decided(body), Ok(Decision::Ignore(_))), "{body}");
        }
        for body in [
            "",
            "[]",
            "<html>",
            r#"{"result":"yes"}"#,
            r#"{"result":"allow","expire_at":"soon"}"#,
            r#"{"result":"allow","expire_at":1700000000000}"#,
            r#"{"result":"allow","expire_at":1e12}"#,
            r#"{"result":"allow","is_superuser":"yes"}"#,
            r#"{"result":"allow","is_superuser":2}"#,
            r#"{"result":"allow","is_superuser":[]}"#,
            r#"{"result":"allow","clientid_override":7}"#,
            r#"{"result":"allow","acl":[{"permission":"maybe"}]}"#,
        ] {
            assert!(decided(body).is_err(), "{body}");
        }
        for status in [201, 301, 401, 404, 500] {
            let decided = decide(&answer(status, json, r#"{"result":"allow"}"#), now);
            assert!(decided.unwrap_err().contains(&status.to_string()));
        }
        for (text, clientid) in [
            (r#""other""#, Some("other")),
            (r#""""#, None),
            ("null", None),
        ] {
            let body = format!(r#"{{"result":"allow","clientid_override":{text}}}"#);
            let expected = Grant {
                clientid: clientid.map(str::to_owned),
                ..Grant::default()
            };
            assert_eq!(decided(&body), Ok(Decision::Allow(expected)), "{body}");
        }
        let html = answer(200, "text/html", r#"{"result":"allow"}"#);
        assert!(decide(&html, now).is_err());
    }
}
