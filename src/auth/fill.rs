//! Fills placeholders in.

use std::fmt::Write;

use super::Attempt;
use crate::config::{Piece, Placeholder, Template};

/// What a device wants to do.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// `publish` or `subscribe`.
    pub action: &'static str,
    /// With the mountpoint.
    pub topic: &'a str,
    /// 0, 1 or 2.
    pub qos: u32,
}

/// Where the values come from.
#[derive(Debug, Clone, Copy)]
pub struct Values<'a> {
    /// The device.
    pub attempt: &'a Attempt,
    /// What it wants to do.
    pub wish: Option<Wish<'a>>,
}

impl Values<'_> {
    /// The value of a placeholder; empty where there is none.
    pub fn get(&self, placeholder: Placeholder) -> String {
        let attempt = self.attempt;
        let subject = attempt.certificate.as_ref();
        match placeholder {
            Placeholder::ClientId => attempt.clientid.clone(),
            Placeholder::Username => attempt.username.clone(),
            Placeholder::Password => attempt.password.expose().to_owned(),
            Placeholder::PeerHost => attempt.peer.to_string(),
            Placeholder::CertCommonName => subject.map_or_else(String::new, |s| s.cn.clone()),
            Placeholder::CertSubject => subject.map_or_else(String::new, |s| s.dn.clone()),
            Placeholder::ProtoName => attempt.proto_name.clone(),
            Placeholder::Action => self.wish.map_or("", |wish| wish.action).to_owned(),
            Placeholder::Topic => self.wish.map_or("", |wish| wish.topic).to_owned(),
            Placeholder::Qos => self.wish.map_or_else(String::new, |w| w.qos.to_string()),
        }
    }

    /// The template with everything filled in, each value through `escape`.
    pub fn fill(&self, template: &Template, escape: impl Fn(&str) -> String) -> String {
        let mut text = String::new();
        for piece in template.pieces() {
            match piece {
                Piece::Text(part) => text.push_str(part),
                Piece::Fill(placeholder) => text.push_str(&escape(&self.get(*placeholder))),
            }
        }
        text
    }

    /// The template with everything filled in, as it is.
    pub fn plain(&self, template: &Template) -> String {
        self.fill(template, str::to_owned)
    }
}

/// A value for a URL's path or query, or a form (RFC 3986, 2.3: all but the unreserved is escaped).
pub fn percent(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                text.push(char::from(byte));
            }
            // Writing to a String cannot fail.
            byte => drop(write!(text, "%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::tests::attempt;
    use super::*;

    #[test]
    fn values_are_escaped_and_not_read_again() {
        let mut attempt = attempt("a/../b?x=1&y", "${password}");
        attempt.peer = "10.0.0.1".parse().unwrap();
        let wish = None;
        let values = Values {
            attempt: &attempt,
            wish,
        };
        let template = Template::parse("/u/${clientid}?n=${username}&h=${peerhost}").unwrap();
        assert_eq!(
            values.fill(&template, percent),
            "/u/a%2F..%2Fb%3Fx%3D1%26y?n=%24%7Bpassword%7D&h=10.0.0.1"
        );
        assert_eq!(percent("é \n"), "%C3%A9%20%0A");
    }
}
