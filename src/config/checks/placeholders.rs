//! Placeholders where they have no value, or one that nobody is to see.

use super::super::auth::ClientInfoOverride;
use super::super::template::{Piece, Placeholder, Template};
use super::super::types::Will;
use super::Checks;

/// What a device wants to do, which only rules of access know.
const WISHES: [Placeholder; 3] = [Placeholder::Action, Placeholder::Topic, Placeholder::Qos];

/// Those that everybody may see.
const SHOWN: &str = "${clientid} ${username} ${peerhost} ${cert_common_name} ${cert_subject} \
                     ${proto_name}";

fn has(template: &Template, unfit: &[Placeholder]) -> bool {
    let mut pieces = template.pieces().iter();
    pieces.any(|piece| matches!(piece, Piece::Fill(placeholder) if unfit.contains(placeholder)))
}

impl Checks<'_> {
    pub(super) fn will(&mut self, will: &Will) {
        for (name, template) in [("topic", &will.topic), ("payload", &will.payload)] {
            if has(template, &WISHES) || has(template, &[Placeholder::Password]) {
                self.fault(
                    &format!("broker.will.{name}"),
                    format!("found a placeholder that a will has no value for; allowed: {SHOWN}"),
                );
            }
        }
    }

    /// What a device is called is in topics and in the log: no password may be in it.
    pub(super) fn overrides(&mut self, overrides: &ClientInfoOverride) {
        for (name, template, is_shown) in [
            ("clientid", &overrides.clientid, true),
            ("username", &overrides.username, true),
            ("password", &overrides.password, false),
        ] {
            let (unfit, more): (&[_], _) = match is_shown {
                true => (&[Placeholder::Password], ""),
                false => (&[], " ${password}"),
            };
            if has(template, &WISHES) || has(template, unfit) {
                self.fault(
                    &format!("clientinfo_override.{name}"),
                    format!("found a placeholder that it cannot have; allowed: {SHOWN}{more}"),
                );
            }
        }
    }
}
