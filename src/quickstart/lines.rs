//! Lines of text out of chunks of bytes.

use bytes::{Bytes, BytesMut};

/// Longest line in bytes, its end not counted.
pub(super) const MAX_LINE: usize = 64 * 1024;

/// A line that is longer than [`MAX_LINE`], complete or not.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLong;

/// The line that a device has not ended yet. Holds [`MAX_LINE`] and a CR at most.
#[derive(Debug, Default)]
pub(super) struct LineBuffer {
    partial: BytesMut,
}

impl LineBuffer {
    /// Takes bytes in and gives the lines that are complete now, without their LF or
    /// CRLF, and whether the rest can still become one.
    pub(super) fn push(&mut self, mut bytes: Bytes) -> (Vec<Bytes>, Result<(), TooLong>) {
        let mut lines = Vec::new();
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let tail = bytes.split_to(end + 1);
            let mut line = if self.partial.is_empty() {
                tail
            } else {
                self.partial.extend_from_slice(&tail);
                self.partial.split().freeze()
            };
            line.truncate(line.len() - 1);
            if line.ends_with(b"\r") {
                line.truncate(line.len() - 1);
            }
            if line.len() > MAX_LINE {
                return (lines, Err(TooLong));
            }
            lines.push(line);
        }
        // The CR of a CRLF whose LF is still to come is no part of the line.
        let open = self.partial.len() + bytes.len();
        let open = open - usize::from(bytes.ends_with(b"\r"));
        if open > MAX_LINE {
            return (lines, Err(TooLong));
        }
        self.partial.extend_from_slice(&bytes);
        (lines, Ok(()))
    }
}

/// The bytes that make a message one line for a device.
pub(super) fn as_line(message: &[u8]) -> Bytes {
    let text = message.strip_suffix(b"\n").unwrap_or(message);
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    [text, b"\n"].concat().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pushed(buffer: &mut LineBuffer, bytes: &str) -> Vec<Bytes> {
        let (lines, rest) = buffer.push(Bytes::copy_from_slice(bytes.as_bytes()));
        assert_eq!(rest, Ok(()));
        lines
    }

    #[test]
    fn lines_may_come_in_any_pieces() {
        let mut buffer = LineBuffer::default();
        assert_eq!(pushed(&mut buffer, "he"), [""; 0]);
        assert_eq!(pushed(&mut buffer, "llo\r"), [""; 0]);
        assert_eq!(pushed(&mut buffer, "\n\na b\nrest"), ["hello", "", "a b"]);
        assert_eq!(pushed(&mut buffer, "\r\n"), ["rest"]);
        assert_eq!(pushed(&mut buffer, "\rx\n"), ["\rx"]);
    }

    #[test]
    fn a_line_is_bounded() {
        let longest = "x".repeat(MAX_LINE);
        let mut buffer = LineBuffer::default();
        assert_eq!(pushed(&mut buffer, &longest), [""; 0]);
        assert_eq!(pushed(&mut buffer, "\r\n"), [longest.as_str()]);
        assert_eq!(
            buffer.push(format!("a\n{longest}y\n").into()),
            (vec!["a".into()], Err(TooLong))
        );

        let mut buffer = LineBuffer::default();
        pushed(&mut buffer, &longest);
        assert_eq!(buffer.push("y".into()), (vec![], Err(TooLong)));
    }

    #[test]
    fn a_message_becomes_one_line() {
        for message in ["on", "on\n", "on\r\n"] {
            assert_eq!(as_line(message.as_bytes()), "on\n");
        }
        assert_eq!(as_line(b""), "\n");
    }
}
