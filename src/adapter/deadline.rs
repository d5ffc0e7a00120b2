//! `grpc-timeout`: how long a caller waits for an answer.

use std::time::Duration;

use tonic::Status;
use tonic::metadata::MetadataMap;

/// The header of gRPC over HTTP/2.
const HEADER: &str = "grpc-timeout";

/// The most digits that it may have.
const MAX_DIGITS: usize = 8;

/// How long the caller waits; `None` is for ever.
///
/// `TimeoutValue TimeoutUnit`: at most eight digits and one of `H M S m u n` (gRPC over HTTP/2,
/// "Requests").
///
/// # Errors
/// `INTERNAL` for what is not written so, as gRPC's own servers have it.
pub(super) fn timeout(metadata: &MetadataMap) -> Result<Option<Duration>, Status> {
    let Some(value) = metadata.get(HEADER) else {
        return Ok(None);
    };
    let malformed = || Status::internal("the header grpc-timeout is malformed");
    parse(value.as_encoded_bytes())
        .ok_or_else(malformed)
        .map(Some)
}

fn parse(text: &[u8]) -> Option<Duration> {
    let (unit, digits) = text.split_last()?;
    if digits.is_empty() || digits.len() > MAX_DIGITS || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(count * 3600),
        b'M' => Duration::from_secs(count * 60),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

/// What comes of `work` while the caller waits for it.
///
/// # Errors
/// `DEADLINE_EXCEEDED` where that is over. What had begun may have been done all the same.
pub(super) async fn within<T>(
    limit: Option<Duration>,
    work: impl Future<Output = T>,
) -> Result<T, Status> {
    let exceeded = |text| Err(Status::deadline_exceeded(text));
    match limit {
        None => Ok(work.await),
        Some(Duration::ZERO) => exceeded("the grpc-timeout was over before it began: not done"),
        Some(limit) => match tokio::time::timeout(limit, work).await {
            Ok(done) => Ok(done),
            Err(_) => exceeded("the grpc-timeout is over; it may have been done all the same"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_digits_and_a_unit() {
        for (text, millis) in [
            ("1H", 3_600_000),
            ("2M", 120_000),
            ("3S", 3_000),
            ("4m", 4),
            ("5000u", 5),
            ("6000000n", 6),
            ("0S", 0),
        ] {
            let expected = Some(Duration::from_millis(millis));
            assert_eq!(parse(text.as_bytes()), expected, "{text}");
        }
        // The longest there can be: 99,999,999 hours.
        let longest = Duration::from_secs(99_999_999 * 3600);
        assert_eq!(parse(b"99999999H"), Some(longest));
        for bad in [
            "",
            "S",
            "1",
            "1s",
            "123456789S",
            "-1S",
            "+1S",
            "1.5S",
            "1 S",
            "1SS",
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad:?}");
        }
    }

    #[test]
    fn no_header_is_no_limit_and_a_malformed_one_is_refused() {
        let mut metadata = MetadataMap::new();
        assert!(matches!(timeout(&metadata), Ok(None)));
        metadata.insert(HEADER, "150m".parse().unwrap());
        let limit = timeout(&metadata).unwrap();
        assert_eq!(limit, Some(Duration::from_millis(150)));
        metadata.insert(HEADER, "soon".parse().unwrap());
        let status = timeout(&metadata).unwrap_err();
        assert_eq!(status.code(), tonic::Code::Internal);
    }
}
