//! Access rules of a listener: which peer addresses may connect.

use std::fmt;
use std::net::IpAddr;

use figment::value::Value;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::value::{
    ConfigValue, Rejected, list_from_text, list_from_value, list_to_text, list_to_toml,
};

/// What a rule does with the addresses it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The peer may connect.
    Allow,
    /// The peer is turned away.
    Deny,
}

/// The addresses a rule names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peers {
    /// Every address.
    All,
    /// A network, or a single address.
    Net(IpNet),
    /// From the first to the last, both included; of one family.
    Range(IpAddr, IpAddr),
}

impl Peers {
    fn contains(self, peer: IpAddr) -> bool {
        match self {
            Peers::All => true,
            Peers::Net(net) => net.contains(&peer),
            // `IpAddr` orders IPv4 before IPv6, so the family has to be compared too.
            Peers::Range(first, last) => {
                peer.is_ipv4() == first.is_ipv4() && first <= peer && peer <= last
            }
        }
    }
}

/// One rule, such as `deny 10.0.0.0/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessRule {
    /// What happens to a peer the rule names.
    pub action: Action,
    /// The peers the rule names.
    pub peers: Peers,
}

impl fmt::Display for AccessRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let action = match self.action {
            Action::Allow => "allow",
            Action::Deny => "deny",
        };
        write!(f, "{action} {}", self.peers)
    }
}

impl ConfigValue for AccessRule {
    fn allowed() -> String {
        "\"allow\" or \"deny\" and an address, a network, a range or \"all\", such as \"deny 10.0.0.0/8\", \"allow 10.0.0.1-10.0.0.9\", \"deny all\"".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        rule(text).ok_or_else(|| Rejected::new(Self::allowed()))
    }

    fn to_text(&self) -> String {
        self.to_string()
    }
}

impl fmt::Display for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peers::All => f.write_str("all"),
            Peers::Net(net) if net.prefix_len() == net.max_prefix_len() => {
                write!(f, "{}", net.addr())
            }
            Peers::Net(net) => write!(f, "{net}"),
            Peers::Range(first, last) => write!(f, "{first}-{last}"),
        }
    }
}

impl ConfigValue for Peers {
    fn allowed() -> String {
        "an address, a network, a range or \"all\", such as \"10.0.0.0/8\", \"10.0.0.1-10.0.0.9\""
            .to_owned()
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        peers(text.trim()).ok_or_else(|| Rejected::new(Self::allowed()))
    }

    fn to_text(&self) -> String {
        self.to_string()
    }
}

fn rule(text: &str) -> Option<AccessRule> {
    let (action, peers) = text.trim().split_once(char::is_whitespace)?;
    let action = match action {
        "allow" => Action::Allow,
        "deny" => Action::Deny,
        _ => return None,
    };
    let peers = self::peers(peers.trim())?;
    Some(AccessRule { action, peers })
}

fn peers(peers: &str) -> Option<Peers> {
    let address = |text: &str| {
        text.trim()
            .parse::<IpAddr>()
            .ok()
            .map(|ip| ip.to_canonical())
    };
    Some(if peers == "all" {
        Peers::All
    } else if let Some((first, last)) = peers.split_once('-') {
        let (first, last) = (address(first)?, address(last)?);
        if first.is_ipv4() != last.is_ipv4() || first > last {
            return None;
        }
        Peers::Range(first, last)
    } else if let Some(address) = address(peers) {
        Peers::Net(IpNet::from(address))
    } else {
        Peers::Net(canonical(peers.parse().ok()?))
    })
}

/// A network of IPv4-mapped addresses is one of IPv4: peers are compared as that, and a
/// rule that never counts would be no rule.
fn canonical(net: IpNet) -> IpNet {
    let ipv4 = |net: Ipv6Net| {
        let length = net.prefix_len().checked_sub(96)?;
        Ipv4Net::new(net.addr().to_ipv4_mapped()?, length).ok()
    };
    match net {
        IpNet::V4(_) => net,
        IpNet::V6(wide) => ipv4(wide).map_or(net, IpNet::V4),
    }
}

/// Addresses of peers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerList(Vec<Peers>);

impl PeerList {
    /// Whether `peer` is one of them. An IPv4-mapped IPv6 address counts as the IPv4 address.
    pub fn contains(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        self.0.iter().any(|peers| peers.contains(peer))
    }
}

impl ConfigValue for PeerList {
    fn allowed() -> String {
        Vec::<Peers>::allowed()
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        Vec::from_text(text).map(Self)
    }

    fn from_value(value: &Value) -> Result<Self, Rejected> {
        Vec::from_value(value).map(Self)
    }

    fn to_text(&self) -> String {
        list_to_text(&self.0)
    }

    fn to_toml(&self) -> String {
        list_to_toml(&self.0)
    }
}

/// The rules of one listener, in order. The first that names the peer decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessRules(Vec<AccessRule>);

impl AccessRules {
    /// Whether `peer` may connect.
    ///
    /// An IPv4-mapped IPv6 address counts as the IPv4 address. A peer that no rule names may
    /// connect, as in EMQX (esockd turns away only those that a `deny` names): end with
    /// `deny all` to admit only what is listed.
    pub fn permits(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        self.0
            .iter()
            .find(|rule| rule.peers.contains(peer))
            .is_none_or(|rule| rule.action == Action::Allow)
    }

    /// As an environment variable has them; `None` where one is none.
    pub fn parse(text: &str) -> Option<Self> {
        Self::from_text(text).ok()
    }

    /// The rules in order.
    pub fn rules(&self) -> &[AccessRule] {
        &self.0
    }
}

/// An empty list is allowed: every peer may connect.
impl ConfigValue for AccessRules {
    fn allowed() -> String {
        format!("a list of rules: {}", AccessRule::allowed())
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        list_from_text(text).map(AccessRules)
    }

    fn from_value(value: &Value) -> Result<Self, Rejected> {
        list_from_value(value).map(AccessRules)
    }

    fn to_text(&self) -> String {
        list_to_text(&self.0)
    }

    fn to_toml(&self) -> String {
        list_to_toml(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permits(rules: &str, peer: &str) -> bool {
        AccessRules::from_text(rules)
            .unwrap()
            .permits(peer.parse().unwrap())
    }

    #[test]
    fn the_first_match_wins() {
        let rules = "allow 10.1.0.0/16, deny 10.0.0.0/8, allow all";
        assert!(permits(rules, "10.1.2.3"));
        assert!(!permits(rules, "10.2.2.3"));
        assert!(permits(rules, "192.168.0.1"));
    }

    #[test]
    fn no_match_is_allowed() {
        assert!(permits("deny 10.0.0.1", "10.0.0.2"));
        assert!(permits("", "10.0.0.2"));
    }

    #[test]
    fn mapped_addresses_count_as_ipv4() {
        assert!(!permits("deny 10.0.0.0/8", "::ffff:10.0.0.2"));
        assert!(!permits("deny ::ffff:10.0.0.2", "10.0.0.2"));
        assert!(!permits("deny ::ffff:10.0.0.0/104", "10.0.0.2"));
        assert!(permits("deny ::ffff:10.0.0.0/104", "11.0.0.2"));
    }

    #[test]
    fn ranges_keep_to_their_family() {
        let rules = "allow 10.0.0.1-10.0.0.9, deny all";
        assert!(permits(rules, "10.0.0.1") && permits(rules, "10.0.0.9"));
        assert!(!permits(rules, "10.0.0.10") && !permits(rules, "::1"));
        assert!(permits(
            "allow 2001:db8::-2001:db8::ff, deny all",
            "2001:db8::7"
        ));
    }

    #[test]
    fn rules_come_back_from_their_text_and_bad_ones_do_not_parse() {
        for text in [
            "allow all",
            "deny 10.0.0.0/8",
            "deny 10.0.0.1",
            "allow ::1",
            "allow 10.0.0.1-10.0.0.9",
        ] {
            assert_eq!(
                AccessRule::from_text(text).map(|rule| rule.to_string()),
                Ok(text.to_owned())
            );
        }
        for bad in [
            "",
            "allow",
            "permit all",
            "deny 10.0.0.0/33",
            "deny 10.0.0.9-10.0.0.1",
            "deny 10.0.0.1-::1",
        ] {
            assert!(AccessRule::from_text(bad).is_err(), "{bad:?}");
        }
    }
}
