//! Texts of the configuration.

use std::net::{IpAddr, Ipv4Addr};

use crate::config::{AccessRules, Action, Peers};

/// Rules as the configuration has them: what is written again is the same, and a rule
/// that stands alone decides about the addresses it names.
pub fn access_rules(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let Some(rules) = AccessRules::parse(text) else {
        return;
    };
    let written: Vec<String> = rules.rules().iter().map(ToString::to_string).collect();
    assert_eq!(
        AccessRules::parse(&written.join(",")).as_ref(),
        Some(&rules)
    );
    for (rule, written) in rules.rules().iter().zip(&written) {
        let alone = AccessRules::parse(written).unwrap();
        let named = match rule.peers {
            Peers::All => vec![Ipv4Addr::LOCALHOST.into()],
            Peers::Net(net) => vec![net.network(), net.broadcast()],
            Peers::Range(first, last) => vec![first, last],
        };
        for peer in named {
            let allowed = rule.action == Action::Allow;
            assert_eq!(alone.permits(peer), allowed, "{written}: {peer}");
            assert_eq!(rules.permits(peer), as_ipv6(&rules, peer), "{peer}");
        }
    }
}

/// What a socket of both families would find, which sees IPv4 peers as IPv6.
fn as_ipv6(rules: &AccessRules, peer: IpAddr) -> bool {
    match peer {
        IpAddr::V4(peer) => rules.permits(peer.to_ipv6_mapped().into()),
        IpAddr::V6(_) => rules.permits(peer),
    }
}
