//! W3C Trace Context: `traceparent`, in calls to handlers, in theirs to the adapter, and as a user
//! property of messages.

use std::fmt::{self, Write};

/// The header's name, and the user property's.
pub const KEY: &str = "traceparent";

/// Which trace something belongs to, and what came before it there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Traceparent {
    trace: [u8; 16],
    parent: [u8; 8],
    flags: u8,
}

/// The flag that asks for the trace to be recorded.
const SAMPLED: u8 = 1;

/// `version-trace-parent-flags` with the version that is known.
const LENGTH: usize = 55;

impl Traceparent {
    /// A new trace, which asks to be recorded. `None` where the system gives no randomness.
    pub fn begin() -> Option<Self> {
        let mut new = Self {
            trace: [0; 16],
            parent: [0; 8],
            flags: SAMPLED,
        };
        getrandom::fill(&mut new.trace).ok()?;
        getrandom::fill(&mut new.parent).ok()?;
        Some(new)
    }

    /// What a header says; `None` where it is no `traceparent` (Trace Context, 3.2.2). Of a later
    /// version the first four fields are read.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (known, more) = text.split_at_checked(LENGTH)?;
        let mut fields = known.split(|byte| *byte == b'-');
        let [version] = hex(fields.next()?)?;
        let parsed = Self {
            trace: hex(fields.next()?)?,
            parent: hex(fields.next()?)?,
            // The others have no meaning yet, and are not passed on.
            flags: hex::<1>(fields.next()?)?[0] & SAMPLED,
        };
        let valid = match version {
            0 => more.is_empty(),
            0xff => false,
            _ => more.first().is_none_or(|byte| *byte == b'-'),
        };
        let nothing = parsed.trace == [0; 16] || parsed.parent == [0; 8];
        (valid && !nothing && fields.next().is_none()).then_some(parsed)
    }
}

/// The trace that several things are part of, if it is one and the same: after the first of them,
/// recorded where one is.
pub fn of_all(traces: impl IntoIterator<Item = Option<Traceparent>>) -> Option<Traceparent> {
    let mut traces = traces.into_iter();
    let mut all = traces.next()??;
    for other in traces {
        let other = other.filter(|other| other.trace == all.trace)?;
        all.flags |= other.flags;
    }
    Some(all)
}

/// So many bytes in lower case.
fn hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = text.as_chunks::<2>();
    let mut bytes = [0; N];
    if pairs.len() != N || !rest.is_empty() {
        return None;
    }
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}

/// As it is sent.
impl fmt::Display for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("00")?;
        for field in [&self.trace[..], &self.parent, &[self.flags]] {
            f.write_char('-')?;
            field.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        }
        Ok(())
    }
}

/// The same.
impl fmt::Debug for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The example of the standard (Trace Context, 3.2.3).
    const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_is_read_is_written() {
        let parsed = Traceparent::parse(EXAMPLE.as_bytes()).unwrap();
        assert_eq!(parsed.to_string(), EXAMPLE);
        let flags = EXAMPLE.replace("-01", "-ff");
        assert_eq!(Traceparent::parse(flags.as_bytes()), Some(parsed));
        let new = Traceparent::begin().unwrap();
        assert_eq!(Traceparent::parse(new.to_string().as_bytes()), Some(new));
    }

    #[test]
    fn several_are_of_a_trace_that_all_are_of() {
        let [one, other] = [(); 2].map(|()| Traceparent::begin());
        // Calls of one trace have ids of their own.
        let unrecorded = one.map(|one| Traceparent {
            parent: [7; 8],
            flags: 0,
            ..one
        });
        assert_eq!(of_all([one, unrecorded]), one);
        let recorded = unrecorded.map(|call| Traceparent { flags: 1, ..call });
        assert_eq!(of_all([unrecorded, one]), recorded);
        for traces in [&[one, other][..], &[one, None], &[None, one], &[None], &[]] {
            assert_eq!(of_all(traces.iter().copied()), None, "{traces:?}");
        }
    }

    #[test]
    fn a_later_version_may_say_more() {
        let of = |version: &str, more: &str| format!("{version}{}{more}", &EXAMPLE[2..]);
        let parsed = Traceparent::parse(EXAMPLE.as_bytes());
        for text in [of("01", ""), of("cc", "-what-the-future-will-be")] {
            assert_eq!(Traceparent::parse(text.as_bytes()), parsed, "{text}");
        }
        for text in [of("cc", ".what"), of("ff", ""), of("00", "-x")] {
            assert_eq!(Traceparent::parse(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn what_is_none_is_refused() {
        for text in [
            "",
            "00",
            &EXAMPLE[..54],
            &EXAMPLE.to_uppercase(),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-600f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0g",
            "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01",
        ] {
            assert_eq!(Traceparent::parse(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        /// Whatever comes: no panic, and what is taken for one is one.
        #[test]
        fn anything_may_come(text in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Some(parsed) = Traceparent::parse(&text) {
                prop_assert_eq!(Traceparent::parse(parsed.to_string().as_bytes()), Some(parsed));
            }
        }
    }
}
