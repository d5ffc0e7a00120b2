//! Identities: of this gateway among others, of a connection, of a message.

use std::fmt;
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

/// The `conn` of the ExProto interface: names one connection for ever.
///
/// As text it is 46 printable ASCII characters: the gateway's [`NodeTag`], the
/// shard and 128 random bits, in hexadecimal. The random part makes it neither
/// guessable nor ever used again.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
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
        // Parsing hexadecimal accepts signs and upper case, which are never ours.
        let canonical = |part: &&str| {
            part.bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        let mut parts = text.splitn(3, '-');
        let node = parts.next().filter(|p| p.len() == 8).filter(canonical)?;
        let shard = parts.next().filter(|p| p.len() == 4).filter(canonical)?;
        let nonce = parts.next().filter(|p| p.len() == 32).filter(canonical)?;
        Some(Self {
            node: NodeTag(u32::from_str_radix(node, 16).ok()?),
            shard: ShardId(u16::from_str_radix(shard, 16).ok()?),
            nonce: halves(u128::from_str_radix(nonce, 16).ok()?),
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

fn halves(nonce: u128) -> [u64; 2] {
    // The cast cuts off what the other half holds.
    [(nonce >> 64) as u64, nonce as u64]
}

impl ConnId {
    /// The text form, made in one allocation.
    pub fn text(&self) -> String {
        use fmt::Write;
        let mut text = String::with_capacity(Self::TEXT_LEN);
        // Writing into a String does not fail.
        let _ = write!(text, "{self}");
        text
    }
}

impl fmt::Display for ConnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [high, low] = self.nonce;
        let (node, shard) = (self.node.0, self.shard.0);
        write!(f, "{node:08x}-{shard:04x}-{high:016x}{low:016x}")
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
        let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let number = digits.then(|| u128::from_str_radix(text, 16))?;
        number.ok().map(Self)
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
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
        for text in ["", "-", "g2dkABFlbXF4", &id[1..], &upper, &signed, &longer] {
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
        for bad in ["", &a[1..], &format!("{a}0"), &format!("+{}", &a[1..])] {
            assert_eq!(MessageId::parse(bad), None, "{bad:?}");
        }
    }
}
