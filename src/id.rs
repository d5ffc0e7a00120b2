//! Identities: of this gateway among others, of a connection, of a message.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A short stable mark of a gateway, derived from its `node_name`.
///
/// Every connection id carries it, so that a call for a connection of another
/// gateway can be told from a call for one that never was.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct NodeTag(u32);

impl NodeTag {
    /// The tag of a node name: 32-bit FNV-1a, stable across versions.
    pub fn of(node_name: &str) -> Self {
        let hash = node_name.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
        Self(hash)
    }
}

/// Number of a shard: a thread with everything that serves its connections.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ShardId(pub u16);

/// The name of a handler in the configuration: "default" for `[handler]`, else the NAME of
/// `[handlers.NAME]`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct HandlerName(Arc<str>);

impl HandlerName {
    /// The handler with this name.
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }
}

/// The `conn` of the ExProto interface: names one connection for ever.
///
/// As text it is 46 printable ASCII characters: the gateway's [`NodeTag`], the
/// shard and 128 random bits, in hexadecimal. The random part makes it neither
/// guessable nor ever used again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ConnId {
    node: NodeTag,
    shard: ShardId,
    /// 128 random bits, in two halves: as one number they would take 8 bytes more, in
    /// every table of connections.
    nonce: [u64; 2],
}

impl ConnId {
    /// Length of the text form.
    pub const TEXT_LEN: usize = 8 + 1 + 4 + 1 + 32;

    /// Makes a new id. Fails only where the system has no randomness.
    pub fn generate(node: NodeTag, shard: ShardId) -> std::io::Result<Self> {
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).map_err(std::io::Error::from)?;
        Ok(Self {
            node,
            shard,
            nonce: halves(u128::from_be_bytes(nonce)),
        })
    }

    /// Reads the text form; `None` for anything this gateway cannot have written.
    pub fn parse(text: &str) -> Option<Self> {
        let (node, rest) = text.as_bytes().split_first_chunk::<8>()?;
        let ([dash, shard @ ..], rest) = rest.split_first_chunk::<5>()?;
        let ([other, high @ ..], low) = rest.split_first_chunk::<17>()?;
        let low: &[u8; 16] = low.try_into().ok()?;
        if [*dash, *other] != *b"--" {
            return None;
        }
        // The numbers have as many digits as fit into their types.
        Some(Self {
            node: NodeTag(number(node, &LOWER)? as u32),
            shard: ShardId(number(shard, &LOWER)? as u16),
            nonce: [number(high, &LOWER)?, number(low, &LOWER)?],
        })
    }

    /// The gateway that made it.
    pub fn node(&self) -> NodeTag {
        self.node
    }

    /// The shard that serves it.
    pub fn shard(&self) -> ShardId {
        self.shard
    }

    /// A number that differs for each connection, for spreading work.
    pub fn route(&self) -> u64 {
        // Half of random bits is as random as the whole.
        self.nonce[1]
    }
}

/// By half of its random bits, which are as good as all.
impl Hash for ConnId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.route());
    }
}

fn halves(nonce: u128) -> [u64; 2] {
    // The cast cuts off what the other half holds.
    [(nonce >> 64) as u64, nonce as u64]
}

// Each message has ids written and read. What the standard library has for it takes as long as
// all else that a message needs of its connection.

const DIGITS: [u8; 16] = *b"0123456789abcdef";

/// The last digits of a number, in hexadecimal.
fn digits<const COUNT: usize>(number: u64) -> [u8; COUNT] {
    let mut text = [0; COUNT];
    let mut rest = number;
    for digit in text.iter_mut().rev() {
        // Four bits are always below the table's end.
        *digit = DIGITS.get((rest & 0xf) as usize).copied().unwrap_or(0);
        rest >>= 4;
    }
    text
}

/// No digit.
const NONE: u8 = 0xff;

/// The values of hexadecimal digits as we write them.
const LOWER: [u8; 256] = values(*b"abcdef");

/// The same where letters may be capital.
#[allow(clippy::indexing_slicing)]
const UPPER: [u8; 256] = {
    let (mut table, upper) = (LOWER, values(*b"ABCDEF"));
    let mut byte = b'A' as usize;
    while byte <= b'F' as usize {
        table[byte] = upper[byte];
        byte += 1;
    }
    table
};

#[allow(clippy::indexing_slicing)]
const fn values(letters: [u8; 6]) -> [u8; 256] {
    let mut table = [NONE; 256];
    let mut value = 0;
    while value < 16 {
        let byte = match value {
            0..10 => b'0' + value,
            _ => letters[value as usize - 10],
        };
        table[byte as usize] = value;
        value += 1;
    }
    table
}

/// Reads 16 hexadecimal digits at most.
fn number(text: &[u8], values: &[u8; 256]) -> Option<u64> {
    let (mut number, mut all) = (0, 0);
    for byte in text {
        let value = values.get(usize::from(*byte)).copied().unwrap_or(NONE);
        all |= value;
        number = number << 4 | u64::from(value & 0xf);
    }
    // Only what is no digit has further bits.
    (all < 16).then_some(number)
}

impl ConnId {
    /// The text form, made in one allocation.
    pub fn text(&self) -> String {
        let [high, low] = self.nonce;
        let mut text = Vec::with_capacity(Self::TEXT_LEN);
        text.extend_from_slice(&digits::<8>(self.node.0.into()));
        text.push(b'-');
        text.extend_from_slice(&digits::<4>(self.shard.0.into()));
        text.push(b'-');
        text.extend_from_slice(&digits::<16>(high));
        text.extend_from_slice(&digits::<16>(low));
        String::from_utf8(text).unwrap_or_default()
    }
}

impl fmt::Display for ConnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text())
    }
}

impl fmt::Debug for ConnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Makes message ids: 32 hexadecimal digits, unique across gateways and restarts.
///
/// Half of an id is random for each generator, half counts.
#[derive(Debug)]
pub struct MessageIds {
    prefix: u64,
    next: AtomicU64,
}

impl MessageIds {
    /// A generator with a random prefix. Fails only where the system has no randomness.
    pub fn new() -> std::io::Result<Self> {
        let mut prefix = [0; 8];
        getrandom::fill(&mut prefix).map_err(std::io::Error::from)?;
        Ok(Self {
            prefix: u64::from_be_bytes(prefix),
            next: AtomicU64::new(1),
        })
    }

    /// The next id.
    pub fn next_id(&self) -> MessageId {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        MessageId(u128::from(self.prefix) << 64 | u128::from(number))
    }
}

/// Unique name of one message.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MessageId(u128);

impl MessageId {
    /// Reads the text form, which is 32 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let text: &[u8; 32] = text.as_bytes().try_into().ok()?;
        let (high, low) = text.split_at(16);
        let (high, low) = (number(high, &UPPER)?, number(low, &UPPER)?);
        Some(Self(u128::from(high) << 64 | u128::from(low)))
    }

    /// The text form.
    pub fn text(&self) -> String {
        let [high, low] = halves(self.0);
        let mut text = Vec::with_capacity(32);
        text.extend_from_slice(&digits::<16>(high));
        text.extend_from_slice(&digits::<16>(low));
        String::from_utf8(text).unwrap_or_default()
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conn_id_survives_its_text_form() {
        let id = ConnId::generate(NodeTag::of("sidecar-1"), ShardId(3)).unwrap();
        let text = id.text();
        assert_eq!(text, id.to_string());
        assert_eq!(text.len(), ConnId::TEXT_LEN);
        assert!(text.len() <= 64 && text.bytes().all(|b| b.is_ascii_graphic()));
        let known = ConnId {
            node: NodeTag(0x0123_4567),
            shard: ShardId(0x89ab),
            nonce: [0xcdef_0123_4567_89ab, 0xf0],
        };
        let written = "01234567-89ab-cdef0123456789ab00000000000000f0";
        assert_eq!(known.text(), written);
        assert_eq!(ConnId::parse(written), Some(known));
        assert_eq!(ConnId::parse(&text), Some(id));
    }

    #[test]
    fn what_is_not_an_id_of_ours_is_told_apart() {
        let id = ConnId::generate(NodeTag::of("a"), ShardId(0))
            .unwrap()
            .to_string();
        let upper = id.to_uppercase();
        let signed = format!("+{}", &id[1..]);
        let longer = format!("{id}0");
        let other = id.replacen('-', "0", 1);
        let wide = format!("{}é", &id[..44]);
        let all = ["", "-", "g2dkABFlbXF4", &id[1..], &upper, &signed, &longer];
        for text in all.into_iter().chain([&other[..], &wide]) {
            assert_eq!(ConnId::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn node_tags_are_stable() {
        assert_eq!(NodeTag::of("sidecar-1"), NodeTag::of("sidecar-1"));
        assert_eq!(NodeTag::of(""), NodeTag(0x811c_9dc5));
        assert_ne!(NodeTag::of("sidecar-1"), NodeTag::of("sidecar-2"));
    }

    #[test]
    fn message_ids_are_32_hex_digits_and_differ() {
        let ids = MessageIds::new().unwrap();
        let (a, b) = (ids.next_id().to_string(), ids.next_id().to_string());
        assert_ne!(a, b);
        assert!(a.len() == 32 && a.bytes().all(|b| b.is_ascii_hexdigit()));
        assert_eq!(MessageId::parse(&a).unwrap().to_string(), a);
        let upper = a.to_uppercase();
        assert_eq!(MessageId::parse(&upper).unwrap().to_string(), a);
        for bad in ["", &a[1..], &format!("{a}0"), &format!("+{}", &a[1..])] {
            assert_eq!(MessageId::parse(bad), None, "{bad:?}");
        }
    }
}
