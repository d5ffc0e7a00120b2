//! What can be filled into templates, and where.

use std::fmt;

macro_rules! placeholders {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// What can be filled in.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Placeholder {
            $($(#[$doc])* $variant,)*
        }

        impl Placeholder {
            const ALL: &'static [Placeholder] = &[$(Placeholder::$variant),*];

            fn name(self) -> &'static str {
                match self {
                    $(Placeholder::$variant => $name,)*
                }
            }
        }
    };
}

placeholders! {
    /// The client id.
    ClientId = "clientid",
    /// The user name.
    Username = "username",
    /// The password.
    Password = "password",
    /// The device's address.
    PeerHost = "peerhost",
    /// The common name of its certificate.
    CertCommonName = "cert_common_name",
    /// The distinguished name of its certificate.
    CertSubject = "cert_subject",
    /// The name of its protocol.
    ProtoName = "proto_name",
    /// What it wants to do: `publish` or `subscribe`.
    Action = "action",
    /// Where it wants to do it.
    Topic = "topic",
    /// With which QoS.
    Qos = "qos",
}

use Placeholder::{
    Action, CertCommonName, CertSubject, ClientId, Password, PeerHost, ProtoName, Qos, Topic,
    Username,
};

/// Those that everybody may see.
const SHOWN: [Placeholder; 6] = [
    ClientId,
    Username,
    PeerHost,
    CertCommonName,
    CertSubject,
    ProtoName,
];

impl Placeholder {
    /// None where nothing has this name.
    pub(super) fn named(name: &str) -> Option<Self> {
        let mut all = Self::ALL.iter();
        all.find(|one| one.name() == name).copied()
    }
}

impl fmt::Display for Placeholder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "${{{}}}", self.name())
    }
}

/// What has a value at the key with this dotted path, and may be seen there.
pub(super) fn of(path: &str) -> Vec<Placeholder> {
    let mut all = SHOWN.to_vec();
    let parts: Vec<&str> = path.split('.').collect();
    match parts.as_slice() {
        // A service that gives keys is asked for nobody.
        ["authentication", _, "endpoint"] => all.clear(),
        // What a device is called is in topics and in logs, the broker's too.
        ["authentication", _, "clientid"] => {}
        ["authentication", ..] | ["clientinfo_override", "password"] => all.push(Password),
        // The password has done its service by then.
        ["authorization", ..] => all.extend([Action, Topic, Qos]),
        _ => {}
    }
    all
}

fn list(placeholders: &[Placeholder]) -> String {
    if placeholders.is_empty() {
        return "no placeholders".to_owned();
    }
    let names: Vec<String> = placeholders.iter().map(Placeholder::to_string).collect();
    format!("placeholders are {}", names.join(" "))
}

/// All that there are, worded to follow "allowed: text; ".
pub(super) fn allowed() -> String {
    list(Placeholder::ALL)
}

/// The same for the key with this path.
pub(super) fn allowed_at(path: &str) -> String {
    list(&of(path))
}

/// What is said to be allowed, with the placeholders of the key with this path: a type does not know
/// where it stands.
pub(super) fn narrow(allowed_anywhere: &str, path: &str) -> String {
    allowed_anywhere.replace(&allowed(), &allowed_at(path))
}
