//! See `crate::hot`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::hint::black_box;
use std::time::Duration;

use futures_util::FutureExt;

use super::acl::{Acl, Options, Permission, Rules, Wish};
use super::{Attempt, Grant};
use crate::metrics::{AuthMetrics, Metrics};

/// A device publishes what the rule with this number, of ten, allows.
fn rule(number: usize) -> Box<dyn FnMut()> {
    let rules = (0..10).map(|n| {
        serde_json::json!({
            "permission": "allow", "action": "publish", "topic": format!("t{n}/${{clientid}}/#"),
        })
    });
    let metrics = AuthMetrics::new(&Metrics::new().unwrap());
    let options = Options {
        sources: Vec::new(),
        no_match: Permission::Deny,
        cache_size: 32,
        cache_ttl: Duration::from_secs(60),
    };
    let acl = Acl::new(&options, &metrics).unwrap_or_else(|_| panic!("no sources, no trouble"));
    let attempt = Attempt {
        clientid: "device-1".to_owned(),
        ..Attempt::nobody()
    };
    let grant = Grant {
        rules: Some(Rules::parse(&rules.collect()).unwrap()),
        ..Grant::default()
    };
    let person = acl.person(&attempt, grant).unwrap();
    let topic = format!("t{number}/device-1/up");
    Box::new(move || {
        let wish = Wish {
            action: "publish",
            topic: &topic,
            qos: 1,
        };
        let decided = acl.decide(&person, wish).now_or_never();
        assert_eq!(black_box(decided), Some(Permission::Allow));
    })
}

pub(crate) fn first_rule() -> Box<dyn FnMut()> {
    rule(0)
}

pub(crate) fn last_rule() -> Box<dyn FnMut()> {
    rule(9)
}
