//! Finding the packet upon which a broker hangs up.
//!
//! A packet that the broker will not have would break the link for ever, for it is sent
//! again each time. Brokers work packets off in order, so the oldest one without an answer
//! is the likely cause; but brokers and networks also fail by themselves, and then it is
//! an innocent one. So a suspect is tried: on a link over which the broker has just
//! answered a ping it is sent alone. Only when the broker hangs up upon that, again and
//! again, it is guilty.
//!
//! ```text
//! None --SUSPECTED hang-ups with the same oldest packet--> Pending
//! Pending --CONNACK: a ping is sent--> Checking --the answer--> Ready --sent alone--> Alone
//! Checking, Ready --link broke--> Pending         (nothing was learnt)
//! Alone --answered, or not for long--> None       (innocent)
//! Alone --the broker hung up--> Pending | guilty after PROOFS
//! ```

use std::collections::HashSet;
use std::sync::Arc;

/// Hang-ups in a row after which a packet is tried.
pub(super) const SUSPECTED: u32 = 2;

/// Hang-ups upon a packet that was sent alone after which it is guilty.
pub(super) const PROOFS: u32 = 2;

/// Seconds or so for which a packet that was sent alone may go unanswered. A broker that
/// is slow is none that hangs up.
const PATIENCE: u32 = 5;

/// Innocents that are remembered, so that the next one is looked at.
const MAX_INNOCENT: usize = 1024;

/// What a broker may have hung up upon.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Suspect {
    /// The packet that was first sent as this one.
    Packet(u64),
    /// A filter that was being restored, which is another packet each time.
    Restore(Arc<str>),
}

#[derive(Debug, PartialEq, Eq)]
enum Stage {
    Pending,
    Checking,
    Ready,
    /// Sent alone, as this packet, so many looks at the clock ago.
    Alone(u16, u32),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Trial {
    suspect: Option<Suspect>,
    hang_ups: u32,
    proofs: u32,
    stage: Option<Stage>,
    innocent: HashSet<Suspect>,
}

impl Trial {
    /// The broker ended a working connection, and this is what it owed answers to, oldest
    /// first. The guilty one, where there is proof.
    pub(super) fn hung_up(&mut self, owed: impl Iterator<Item = Suspect>) -> Option<Suspect> {
        match self.stage {
            Some(Stage::Alone(..)) => {
                self.proofs += 1;
                self.stage = Some(Stage::Pending);
                if self.proofs < PROOFS {
                    return None;
                }
                self.stage = None;
                self.proofs = 0;
                self.hang_ups = 0;
                return self.suspect.take();
            }
            Some(Stage::Pending | Stage::Checking | Stage::Ready) => {
                self.stage = Some(Stage::Pending);
                return None;
            }
            None => {}
        }
        let oldest = owed.into_iter().find(|s| !self.innocent.contains(s));
        if oldest.is_none() {
            self.innocent.clear();
        }
        self.hang_ups = match (&self.suspect, &oldest) {
            (Some(last), Some(now)) if last == now => self.hang_ups + 1,
            _ => 1,
        };
        self.suspect = oldest;
        if self.suspect.is_some() && self.hang_ups >= SUSPECTED {
            self.stage = Some(Stage::Pending);
            self.proofs = 0;
        }
        None
    }

    /// A CONNACK came. Whether a trial begins: then nothing is to be sent but a ping.
    pub(super) fn begin(&mut self) -> bool {
        if self.stage.is_some() {
            self.stage = Some(Stage::Checking);
        }
        self.stage.is_some()
    }

    /// The link broke for another reason than the broker's will.
    pub(super) fn interrupt(&mut self) {
        if self.stage.is_some() {
            self.stage = Some(Stage::Pending);
        }
    }

    /// The broker has answered a ping.
    pub(super) fn ping_answered(&mut self) {
        if self.stage == Some(Stage::Checking) {
            self.stage = Some(Stage::Ready);
        }
    }

    /// The suspect, when it is to be sent.
    pub(super) fn ready(&self) -> Option<&Suspect> {
        let suspect = self.suspect.as_ref();
        suspect.filter(|_| self.stage == Some(Stage::Ready))
    }

    /// The suspect is sent.
    pub(super) fn sent(&mut self, pkid: u16) {
        self.stage = Some(Stage::Alone(pkid, 0));
    }

    /// The packet id of the suspect that is on trial now.
    pub(super) fn on_trial(&self) -> Option<u16> {
        match self.stage {
            Some(Stage::Alone(pkid, _)) => Some(pkid),
            _ => None,
        }
    }

    /// Looks at the clock. Whether the suspect has gone without an answer for long.
    pub(super) fn tick(&mut self) -> bool {
        match &mut self.stage {
            Some(Stage::Alone(_, ticks)) => {
                *ticks += 1;
                *ticks > PATIENCE
            }
            _ => false,
        }
    }

    /// The suspect is innocent, or there is none any more: the trial is over.
    pub(super) fn acquit(&mut self) {
        self.stage = None;
        self.hang_ups = 0;
        self.proofs = 0;
        if let Some(suspect) = self.suspect.take() {
            if self.innocent.len() >= MAX_INNOCENT {
                self.innocent.clear();
            }
            self.innocent.insert(suspect);
        }
    }
}
