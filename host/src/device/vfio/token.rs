//! VF tokens: the UUID that the owner of a PF on vfio-pci sets, and openers of its VFs present.

use std::fmt;
use std::str::FromStr;

/// A UUID in its textual byte order.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct VfToken([u8; 16]);

/// Not a UUID of the form 8-4-4-4-12 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a UUID (8-4-4-4-12 hexadecimal digits)")]
pub struct BadToken;

impl VfToken {
    pub const fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl FromStr for VfToken {
    type Err = BadToken;

    fn from_str(text: &str) -> Result<Self, BadToken> {
        let groups: Vec<&str> = text.split('-').collect();
        if groups.iter().map(|group| group.len()).ne([8, 4, 4, 4, 12]) {
            return Err(BadToken);
        }
        let mut digits = groups.concat().chars().map(|digit| digit.to_digit(16)).collect::<Vec<_>>().into_iter();
        let mut bytes = [0; 16];
        for byte in &mut bytes {
            let (high, low) = (digits.next().flatten().ok_or(BadToken)?, digits.next().flatten().ok_or(BadToken)?);
            *byte = (high << 4 | low) as u8;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for VfToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// A secret: not for logs.
impl fmt::Debug for VfToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VfToken(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_parsed_and_shown_as_it_was() {
        let text = "83d8f4f2-509f-382f-3c1e-e6bfe0fa1001";
        let token: VfToken = text.parse().unwrap();
        assert_eq!(token.as_bytes()[..5], [0x83, 0xd8, 0xf4, 0xf2, 0x50]);
        assert_eq!(token.to_string(), text);
        assert!(!format!("{token:?}").contains("83d8"), "a token stays out of logs");
    }

    #[test]
    fn what_is_no_uuid_is_refused() {
        for text in [
            "",
            "83d8f4f2",
            "83d8f4f2-509f-382f-3c1e-e6bfe0fa100",
            "83d8f4f2-509f-382f-3c1e-e6bfe0fa10011",
            "83d8f4f2-509f-382f-3c1e-e6bfe0fa100g",
            "83d8f4f2509f-382f-3c1e-e6bf-e0fa1001",
            "+3d8f4f2-509f-382f-3c1e-e6bfe0fa1001",
        ] {
            assert_eq!(text.parse::<VfToken>(), Err(BadToken), "{text}");
        }
    }
}
