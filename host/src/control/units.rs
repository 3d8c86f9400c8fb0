//! Quantities as an operator writes them.

use std::fmt;
use std::str::FromStr;

/// A number of bytes: decimal digits, then nothing, `K`, `M`, `G` or `T` (powers of 1024; an `i` or `iB` may follow).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// Text that is no quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadQuantity {
    #[error("{0:?} is not a size: write digits and a unit, such as 256M, 4G or 4096")]
    Size(String),
    #[error("{0:?} does not fit into 64 bits")]
    TooLarge(String),
}

const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

impl FromStr for ByteSize {
    type Err = BadQuantity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || BadQuantity::Size(text.to_owned());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(bad());
        }
        let shift = match unit.strip_suffix("iB").or(unit.strip_suffix('i')).unwrap_or(unit) {
            "" if unit.is_empty() => 0,
            unit => UNITS.iter().find(|(name, _)| unit == name.to_string()).ok_or_else(bad)?.1,
        };
        let too_large = || BadQuantity::TooLarge(text.to_owned());
        let number: u64 = number.parse().map_err(|_| too_large())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(too_large)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = UNITS.iter().rev().find(|(_, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift));
        match fits {
            Some((name, shift)) => write!(f, "{}{name}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// spec: CONTROL-1
    #[test]
    fn sizes_are_digits_and_a_power_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1K", 1 << 10),
            ("256M", 256 << 20),
            ("256Mi", 256 << 20),
            ("256MiB", 256 << 20),
            ("4G", 4 << 30),
            ("1T", 1 << 40),
            ("18446744073709551615", u64::MAX),
            ("16777215T", 16_777_215 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "M", "1m", "1 M", "-1", "+1", "1.5G", "1KB", "1MM", "iB", "1i", "1iB", "0x10", "1é"] {
            assert_eq!(text.parse::<ByteSize>(), Err(BadQuantity::Size(text.to_owned())), "{text}");
        }
        for text in ["18446744073709551616", "16777216T"] {
            assert_eq!(text.parse::<ByteSize>(), Err(BadQuantity::TooLarge(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn a_shown_size_reads_back_as_itself() {
        for bytes in [0, 1, 1023, 1024, 1025, 256 << 20, (256 << 20) + 4096, 1 << 40, u64::MAX] {
            let shown = ByteSize(bytes).to_string();
            assert_eq!(shown.parse(), Ok(ByteSize(bytes)), "{shown}");
        }
    }
}
