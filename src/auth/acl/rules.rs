//! Rules: who may do what, where. The first that fits decides.
//!
//! A rule that allows fits where its filter covers the topic, or the whole of a subscription. One that
//! denies fits where the two meet at all: a subscription to `#` must not bring what `secret/#` is
//! denied for. (EMQX compares both ways alike.)

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::filters::{covers, overlap};
use crate::auth::fill::{Values, Wish};
use crate::config::{Piece, Template};

/// Rules of one list; far more than anybody writes.
const MAX_RULES: usize = 10_000;

/// What a rule says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permission {
    /// It may.
    Allow,
    /// It may not.
    Deny,
}

/// A topic, or a filter, of a rule.
#[derive(Debug, Clone, PartialEq)]
struct Place {
    /// The very text, wildcards and all, and not what it matches.
    is_exact: bool,
    template: Template,
}

/// One rule.
#[derive(Debug, Clone, PartialEq)]
struct Rule {
    permission: Permission,
    username: Option<String>,
    clientid: Option<String>,
    address: Option<IpNet>,
    publish: bool,
    subscribe: bool,
    /// By number.
    qos: [bool; 3],
    /// Everywhere, where there are none.
    places: Vec<Place>,
}

/// See the module.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rules(Vec<Rule>);

/// The members that a rule may have.
const KEYS: [&str; 9] = [
    "permission",
    "action",
    "topic",
    "topics",
    "qos",
    "retain",
    "username",
    "clientid",
    "ipaddr",
];

impl Rules {
    /// Rules as EMQX writes them in JSON: a list of objects, or an object with filters for `pub`,
    /// `sub` and `all`, which allows those and nothing else.
    ///
    /// # Errors
    /// The first that is none. Nothing of it is said back: others have written it, and it may be secret.
    pub fn parse(value: &Value) -> Result<Self, String> {
        match value {
            Value::Array(items) => {
                if items.len() > MAX_RULES {
                    return Err(too_many());
                }
                let rules = items.iter().enumerate().map(|(index, item)| {
                    rule(item, false).map_err(|problem| format!("rule {}: {problem}", index + 1))
                });
                rules.collect::<Result<_, _>>().map(Self)
            }
            Value::Object(members) => short(members),
            _ => Err("rules are a list of objects, or an object of pub, sub and all".to_owned()),
        }
    }

    /// The rules of a list in a file; or what is wrong with each that is none, by its place.
    pub(super) fn list(items: &[Value]) -> Result<Self, Vec<(usize, String)>> {
        if items.len() > MAX_RULES {
            return Err(vec![(MAX_RULES, too_many())]);
        }
        let (mut rules, mut problems) = (Vec::new(), Vec::new());
        for (index, item) in items.iter().enumerate() {
            match rule(item, true) {
                Ok(rule) => rules.push(rule),
                Err(problem) => problems.push((index, problem)),
            }
        }
        match problems.is_empty() {
            true => Ok(Self(rules)),
            false => Err(problems),
        }
    }

    /// Each of them alone, in order.
    pub(super) fn each(&self) -> Vec<Self> {
        let rules = self.0.iter();
        rules.map(|rule| Self(vec![rule.clone()])).collect()
    }

    /// What they say; none where none fits.
    pub fn decide(&self, values: &Values<'_>, wish: Wish<'_>) -> Option<Permission> {
        let fitting = self.0.iter().find(|rule| rule.fits(values, wish));
        fitting.map(|rule| rule.permission)
    }
}

fn text<'v>(members: &'v Map<String, Value>, name: &str) -> Result<Option<&'v str>, String> {
    match members.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!("{name} is no text")),
    }
}

fn too_many() -> String {
    format!("there are more than {MAX_RULES} rules")
}

/// `quotes` what is in it where that is wrong.
fn rule(item: &Value, quotes: bool) -> Result<Rule, String> {
    let members = item.as_object().ok_or("it is no object")?;
    if let Some(unknown) = members.keys().find(|key| !KEYS.contains(&key.as_str())) {
        let unknown = match quotes {
            true => format!("unknown key {unknown:?}"),
            false => "unknown key".to_owned(),
        };
        return Err(format!("{unknown}; allowed: {}", KEYS.join(", ")));
    }
    let permission = match text(members, "permission")? {
        Some("allow") => Permission::Allow,
        Some("deny") => Permission::Deny,
        _ => return Err("permission is none of \"allow\" and \"deny\"".to_owned()),
    };
    let (publish, subscribe) = match text(members, "action")? {
        Some("publish" | "pub") => (true, false),
        Some("subscribe" | "sub") => (false, true),
        Some("all") | None => (true, true),
        Some(_) => return Err("action is none of publish, subscribe and all".to_owned()),
    };
    let topics = match (members.get("topics"), members.get("topic")) {
        (Some(Value::Array(topics)), None) => topics.iter().collect(),
        (None, Some(topic)) => vec![topic],
        (None, None) => Vec::new(),
        _ => return Err("topics is no list, or topic is there too".to_owned()),
    };
    let address = text(members, "ipaddr")?.map(|text| {
        let address = text
            .parse::<IpNet>()
            .or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        address
            .map_err(|_: std::net::AddrParseError| "ipaddr is no address and no network".to_owned())
    });
    Ok(Rule {
        permission,
        username: text(members, "username")?.map(str::to_owned),
        clientid: text(members, "clientid")?.map(str::to_owned),
        address: address.transpose()?,
        // What handlers publish is never retained.
        publish: publish && !only_retained(members.get("retain"))?,
        subscribe,
        qos: qos(members.get("qos"))?,
        places: topics.into_iter().map(place).collect::<Result<_, _>>()?,
    })
}

fn only_retained(value: Option<&Value>) -> Result<bool, String> {
    match value {
        None => Ok(false),
        Some(Value::Bool(retain)) => Ok(*retain),
        Some(Value::String(text)) if text == "all" => Ok(false),
        Some(Value::String(text)) if ["true", "1"].contains(&text.as_str()) => Ok(true),
        Some(Value::String(text)) if ["false", "0"].contains(&text.as_str()) => Ok(false),
        Some(Value::Number(number)) if number.as_u64() == Some(1) => Ok(true),
        Some(Value::Number(number)) if number.as_u64() == Some(0) => Ok(false),
        Some(_) => Err("retain is none of true, false and \"all\"".to_owned()),
    }
}

fn qos(value: Option<&Value>) -> Result<[bool; 3], String> {
    let Some(value) = value else {
        return Ok([true; 3]);
    };
    let one = std::slice::from_ref(value);
    let list = value.as_array().map_or(one, Vec::as_slice);
    let mut allowed = [false; 3];
    for item in list {
        let number = match item {
            Value::String(text) => text.parse().ok(),
            item => item
                .as_u64()
                .and_then(|number| usize::try_from(number).ok()),
        };
        let place = number.and_then(|number: usize| allowed.get_mut(number));
        *place.ok_or("qos is none of 0, 1 and 2, or a list of them")? = true;
    }
    Ok(allowed)
}

fn place(value: &Value) -> Result<Place, String> {
    let text = value.as_str().ok_or("a topic is no text")?;
    let (is_exact, text) = match text.strip_prefix("eq ") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let template = Template::parse(text).ok_or("a topic has a placeholder that is not known")?;
    if text.is_empty() {
        return Err("a topic is empty".to_owned());
    }
    Ok(Place { is_exact, template })
}

/// `{"pub": [...], "sub": [...], "all": [...]}`: what is not in it is denied, as in EMQX.
fn short(members: &Map<String, Value>) -> Result<Rules, String> {
    let mut rules = Vec::new();
    let rule = |permission, (publish, subscribe), places| Rule {
        permission,
        username: None,
        clientid: None,
        address: None,
        publish,
        subscribe,
        qos: [true; 3],
        places,
    };
    for (name, value) in members {
        let actions = match name.as_str() {
            "pub" => (true, false),
            "sub" => (false, true),
            "all" => (true, true),
            _ => return Err("unknown key; allowed: pub, sub, all".to_owned()),
        };
        let topics = value
            .as_array()
            .ok_or_else(|| format!("{name} is no list"))?;
        let places: Vec<Place> = topics.iter().map(place).collect::<Result<_, _>>()?;
        // Without places a rule would fit everywhere.
        if !places.is_empty() {
            rules.push(rule(Permission::Allow, actions, places));
        }
    }
    rules.push(rule(Permission::Deny, (true, true), Vec::new()));
    Ok(Rules(rules))
}

impl Rule {
    fn fits(&self, values: &Values<'_>, wish: Wish<'_>) -> bool {
        let attempt = values.attempt;
        let is = |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|w| w == found);
        let action = match wish.action {
            "publish" => self.publish,
            _ => self.subscribe,
        };
        let qos = usize::try_from(wish.qos).ok();
        action
            && qos.and_then(|qos| self.qos.get(qos)) == Some(&true)
            && is(&self.username, &attempt.username)
            && is(&self.clientid, &attempt.clientid)
            && self.address.is_none_or(|net| net.contains(&attempt.peer))
            && (self.places.is_empty()
                || self
                    .places
                    .iter()
                    .any(|place| place.fits(self.permission, values, wish.topic)))
    }
}

impl Place {
    fn fits(&self, permission: Permission, values: &Values<'_>, topic: &str) -> bool {
        // A name such as `+` or `a/b` must not open what is not its own.
        let is_plain = |piece: &Piece| match piece {
            Piece::Text(_) => true,
            Piece::Fill(placeholder) => {
                let value = values.get(*placeholder);
                !value.is_empty() && !value.contains(['+', '#', '/'])
            }
        };
        if permission == Permission::Allow && !self.template.pieces().iter().all(is_plain) {
            return false;
        }
        let place = values.plain(&self.template);
        match (self.is_exact, permission) {
            (true, _) => place == topic,
            (false, Permission::Allow) => covers(&place, topic),
            (false, Permission::Deny) => overlap(&place, topic),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::tests::attempt;
    use super::*;

    fn decide(
        rules: &Value,
        clientid: &str,
        action: &'static str,
        topic: &str,
    ) -> Option<Permission> {
        let attempt = attempt(clientid, "ann");
        let wish = Wish {
            action,
            topic,
            qos: 1,
        };
        let values = Values {
            attempt: &attempt,
            wish: Some(wish),
        };
        Rules::parse(rules).unwrap().decide(&values, wish)
    }

    const ALLOW: Option<Permission> = Some(Permission::Allow);
    const DENY: Option<Permission> = Some(Permission::Deny);

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rules = json!([
            {"permission": "deny", "action": "subscribe", "topics": ["$SYS/#", "eq #"]},
            {"permission": "deny", "topic": "secret/#"},
            {"permission": "allow", "username": "ann", "topic": "meters/${clientid}/#"},
            {"permission": "allow", "ipaddr": "127.0.0.0/8", "action": "publish", "qos": [0, "1"], "topic": "log"},
            {"permission": "deny", "clientid": "c2"},
        ]);
        for (clientid, action, topic, expected) in [
            ("c1", "subscribe", "#", DENY),
            ("c1", "subscribe", "$SYS/x", DENY),
            ("c1", "publish", "$SYS/x", None),
            // Wider than what is denied, and so with it.
            ("c1", "subscribe", "+/x", DENY),
            ("c1", "publish", "secret", DENY),
            ("c1", "publish", "meters/c1/a", ALLOW),
            ("c1", "subscribe", "meters/c1/#", ALLOW),
            ("c1", "subscribe", "meters/+/a", None),
            ("c1", "publish", "meters/c2/a", None),
            ("c1", "publish", "log", ALLOW),
            ("c1", "subscribe", "log", None),
            ("c2", "subscribe", "log", DENY),
        ] {
            assert_eq!(
                decide(&rules, clientid, action, topic),
                expected,
                "{clientid} {action} {topic}"
            );
        }
    }

    #[test]
    fn names_open_nothing_that_is_not_their_own() {
        let rules = json!([{"permission": "allow", "topic": "m/${clientid}/#"}]);
        assert_eq!(decide(&rules, "c", "publish", "m/c/x"), ALLOW);
        for name in ["+", "#", "c/d", ""] {
            for topic in ["m/c/x", "m//x", "m/c/d/x", "m/+/x"] {
                assert_eq!(
                    decide(&rules, name, "subscribe", topic),
                    None,
                    "{name} {topic}"
                );
            }
        }
        let rules = json!([{"permission": "deny", "topic": "m/${clientid}/#"}]);
        assert_eq!(decide(&rules, "+", "publish", "m/c/x"), DENY);
    }

    #[test]
    fn the_short_form_denies_the_rest() {
        let rules = json!({"pub": ["up/${clientid}"], "sub": ["down/#"], "all": ["eq a/+"]});
        assert_eq!(decide(&rules, "c", "publish", "up/c"), ALLOW);
        assert_eq!(decide(&rules, "c", "subscribe", "up/c"), DENY);
        assert_eq!(decide(&rules, "c", "subscribe", "down/x"), ALLOW);
        assert_eq!(decide(&rules, "c", "subscribe", "a/+"), ALLOW);
        assert_eq!(decide(&rules, "c", "subscribe", "a/b"), DENY);
        assert_eq!(decide(&json!({"pub": []}), "c", "publish", "x"), DENY);
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for bad in [
            json!("x"),
            json!([1]),
            json!([{}]),
            json!([{"permission": "maybe"}]),
            json!([{"permission": "allow", "topcis": ["x"]}]),
            json!([{"permission": "allow", "topics": "x"}]),
            json!([{"permission": "allow", "topic": ""}]),
            json!([{"permission": "allow", "topic": "${what}"}]),
            json!([{"permission": "allow", "qos": 3}]),
            json!([{"permission": "allow", "ipaddr": "here"}]),
            json!({"pub": "x"}),
            json!({"publish": []}),
        ] {
            assert!(Rules::parse(&bad).is_err(), "{bad}");
        }
    }
}
