//! The project's own value types: durations, sizes, rates, limits, secrets.

use std::cmp::Ordering;
use std::fmt;
use std::time::Duration;

use figment::value::Value;

use super::value::{ConfigValue, Rejected, quote, whole};

/// The longest duration a key takes. Deadlines are computed as `now + duration`, which must not
/// overflow the clock; a year is longer than anyone needs, and `"infinity"` says "never".
pub(crate) const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

const DURATION_UNITS: [(&str, u64); 5] = [
    // `ms` before `s`: the first suffix that fits is taken.
    ("ms", 1),
    ("s", 1_000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

impl ConfigValue for Duration {
    fn allowed() -> String {
        "a duration such as \"30s\" (a whole number and ms, s, m, h or d; at most 365d)".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        let text = text.trim();
        DURATION_UNITS
            .iter()
            .find_map(|(unit, millis)| Some((digits(text.strip_suffix(unit)?)?, millis)))
            .and_then(|(count, millis)| count.checked_mul(*millis))
            .map(Duration::from_millis)
            .filter(|duration| *duration <= LONGEST)
            .ok_or_else(|| Rejected::new(Self::allowed()))
    }

    fn to_text(&self) -> String {
        let total = u64::try_from(self.as_millis()).unwrap_or(u64::MAX);
        if total == 0 {
            return "0s".to_owned();
        }
        // Days are read but not written: "24h" is easier to compare with "1h" than "1d" is.
        let (unit, millis) = DURATION_UNITS
            .iter()
            .rev()
            .skip(1)
            .find(|(_, millis)| total.is_multiple_of(*millis))
            .unwrap_or(&("ms", 1));
        format!("{}{unit}", total / millis)
    }
}

/// Plain ASCII digits only: `u64::from_str` would take a sign too.
fn digits(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(usize);

const SIZE_UNITS: [(&str, usize); 3] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];

impl Size {
    /// A size of `bytes` bytes.
    pub const fn new(bytes: usize) -> Size {
        Size(bytes)
    }

    /// The number of bytes.
    pub const fn bytes(self) -> usize {
        self.0
    }
}

impl ConfigValue for Size {
    fn allowed() -> String {
        "a size such as \"64KiB\" or \"1MiB\" (a whole number and KiB, MiB, GiB or nothing for bytes)".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        let text = text.trim();
        let (count, unit) = SIZE_UNITS
            .iter()
            .find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, *bytes)))
            .unwrap_or((text, 1));
        digits(count)
            .and_then(|count| usize::try_from(count).ok()?.checked_mul(unit))
            .map(Size)
            .ok_or_else(|| Rejected::new(Self::allowed()))
    }

    fn from_value(value: &Value) -> Result<Self, Rejected> {
        let size = match value {
            Value::String(_, text) => return Self::from_text(text),
            Value::Num(_, n) => whole(n).and_then(|n| n.try_into().ok()).map(Size),
            _ => None,
        };
        size.ok_or_else(|| Rejected::new(Self::allowed()))
    }

    fn to_text(&self) -> String {
        SIZE_UNITS
            .iter()
            .rev()
            .find(|(_, bytes)| self.0 != 0 && self.0.is_multiple_of(*bytes))
            .map_or_else(
                || self.0.to_string(),
                |(unit, bytes)| format!("{}{unit}", self.0 / bytes),
            )
    }

    fn to_toml(&self) -> String {
        let text = self.to_text();
        if digits(&text).is_some() {
            text
        } else {
            quote(&text)
        }
    }
}

/// Events, or bytes, a second; more than zero.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Rate(f64);

impl Rate {
    /// How many a second.
    pub const fn per_second(self) -> f64 {
        self.0
    }

    // Above 2^53 a float no longer counts single events.
    fn new(per_second: f64) -> Result<Rate, Rejected> {
        if per_second > 0.0 && per_second <= 9e15 {
            Ok(Rate(per_second))
        } else {
            Err(Rejected::new(Self::allowed()))
        }
    }
}

impl ConfigValue for Rate {
    fn allowed() -> String {
        "a number per second, more than 0".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        Rate::new(text.trim().parse().unwrap_or(f64::NAN))
    }

    fn from_value(value: &Value) -> Result<Self, Rejected> {
        match value {
            Value::String(_, text) => Self::from_text(text),
            Value::Num(_, n) => {
                // Exact for every integer the bound above lets through.
                let per_second = whole(n).map(|n| n as f64).or_else(|| n.to_f64());
                Rate::new(per_second.unwrap_or(f64::NAN))
            }
            _ => Err(Rejected::new(Self::allowed())),
        }
    }

    fn to_text(&self) -> String {
        self.0.to_string()
    }

    fn to_toml(&self) -> String {
        self.to_text()
    }
}

/// A limit that `"infinity"` turns off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit<T> {
    /// The limit holds.
    Finite(T),
    /// There is no limit.
    Infinity,
}

impl<T: Copy> Limit<T> {
    /// The limit, or none when it is off.
    pub fn finite(self) -> Option<T> {
        match self {
            Limit::Finite(limit) => Some(limit),
            Limit::Infinity => None,
        }
    }
}

impl<T: PartialOrd> PartialOrd for Limit<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        match (self, other) {
            (Limit::Finite(a), Limit::Finite(b)) => a.partial_cmp(b),
            (Limit::Finite(_), Limit::Infinity) => Some(Ordering::Less),
            (Limit::Infinity, Limit::Finite(_)) => Some(Ordering::Greater),
            (Limit::Infinity, Limit::Infinity) => Some(Ordering::Equal),
        }
    }
}

impl<T: ConfigValue> ConfigValue for Limit<T> {
    fn allowed() -> String {
        format!("\"infinity\" or {}", T::allowed())
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        if text.trim().eq_ignore_ascii_case("infinity") {
            return Ok(Limit::Infinity);
        }
        T::from_text(text)
            .map(Limit::Finite)
            .map_err(|_| Rejected::new(Self::allowed()))
    }

    fn from_value(value: &Value) -> Result<Self, Rejected> {
        match value {
            Value::String(_, text) => Self::from_text(text),
            value => T::from_value(value)
                .map(Limit::Finite)
                .map_err(|_| Rejected::new(Self::allowed())),
        }
    }

    fn to_text(&self) -> String {
        match self {
            Limit::Finite(limit) => limit.to_text(),
            Limit::Infinity => "infinity".to_owned(),
        }
    }

    fn to_toml(&self) -> String {
        match self {
            Limit::Finite(limit) => limit.to_toml(),
            Limit::Infinity => quote("infinity"),
        }
    }
}

/// Who may do what with a file: the bits of chmod(1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMode(u32);

impl FileMode {
    /// The bits.
    pub const fn bits(self) -> u32 {
        self.0
    }
}

impl ConfigValue for FileMode {
    fn allowed() -> String {
        "three octal digits in quotes, with or without a 0 before them, such as \"0660\"".to_owned()
    }

    // In quotes only: a bare 0660 is no number in TOML, and a bare 660 is decimal.
    fn from_text(text: &str) -> Result<Self, Rejected> {
        let text = text.trim();
        let octal = match text.len() {
            4 => text.strip_prefix('0'),
            _ => Some(text),
        };
        octal
            .filter(|octal| octal.len() == 3 && octal.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|octal| u32::from_str_radix(octal, 8).ok())
            .map(FileMode)
            .ok_or_else(|| Rejected::new(Self::allowed()))
    }

    fn to_text(&self) -> String {
        format!("{:04o}", self.0)
    }
}

/// A value that no log, dump, fault or Debug output shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub(crate) const MASK: &str = "***";

    /// Wraps a secret.
    pub fn new(secret: impl Into<String>) -> Secret {
        Secret(secret.into())
    }

    /// The secret itself. The caller keeps it out of logs.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::MASK)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::MASK)
    }
}

impl ConfigValue for Secret {
    const SECRET: bool = true;

    fn allowed() -> String {
        String::allowed()
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        String::from_text(text).map(Secret)
    }

    fn to_text(&self) -> String {
        Self::MASK.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn duration(text: &str) -> Option<Duration> {
        Duration::from_text(text).ok()
    }

    #[test]
    fn durations_are_whole_numbers_with_a_unit() {
        assert_eq!(duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(duration(" 30s "), Some(Duration::from_secs(30)));
        assert_eq!(duration("5m"), Some(Duration::from_secs(300)));
        assert_eq!(duration("1h"), Some(Duration::from_secs(3600)));
        assert_eq!(duration("365d"), Some(LONGEST));
        for bad in [
            "",
            "30",
            "s",
            "-1s",
            "+1s",
            "1.5s",
            "30 s",
            "30S",
            "1m30s",
            "366d",
            "99999999999999999999s",
        ] {
            assert_eq!(duration(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn durations_and_sizes_come_back_from_their_text() {
        let mut n: u64 = 1;
        for step in 0..2_000_u64 {
            // A multiplicative walk reaches all magnitudes and both round and odd numbers.
            n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(step);
            for value in [n % 1000, (n >> 20) % 100_000_000, ((n >> 7) % 500) * 60_000] {
                let duration = Duration::from_millis(value);
                assert_eq!(Duration::from_text(&duration.to_text()), Ok(duration));
                let size = Size(usize::try_from(value << (10 * (n % 4))).unwrap());
                assert_eq!(Size::from_text(&size.to_text()), Ok(size));
            }
        }
    }

    #[test]
    fn sizes_are_bytes_or_binary_multiples() {
        assert_eq!(Size::from_text("64KiB"), Ok(Size(65536)));
        assert_eq!(Size::from_text("17"), Ok(Size(17)));
        assert_eq!(Size(1 << 20).to_toml(), "\"1MiB\"");
        assert_eq!(Size(17).to_toml(), "17");
        for bad in ["", "KiB", "-1", "1.5MiB", "1MB", "99999999999GiB"] {
            assert!(Size::from_text(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn rates_are_positive_and_finite() {
        assert_eq!(Rate::from_text("0.5").map(Rate::per_second), Ok(0.5));
        assert_eq!(Rate(1000.0).to_toml(), "1000");
        for bad in ["0", "-1", "inf", "NaN", "1/s", ""] {
            assert!(Rate::from_text(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn file_modes_are_octal() {
        let mode = |text| FileMode::from_text(text).map(|mode| mode.to_text());
        for text in ["0660", "660", " 0660 "] {
            assert_eq!(mode(text).as_deref(), Ok("0660"));
        }
        assert_eq!(FileMode::from_text("777").map(FileMode::bits), Ok(0o777));
        for bad in ["", "66", "0668", "1660", "00660", "+66", "rw-", "6600"] {
            assert!(mode(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn secrets_are_masked() {
        let secret = Secret::new("hunter2");
        assert_eq!(
            format!("{secret:?} {secret} {}", secret.to_toml()),
            "*** *** \"***\""
        );
        assert_eq!(secret.expose(), "hunter2");
    }
}
