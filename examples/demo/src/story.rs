//! What the demo prints: a dozen lines that say what happened, and why it is to be believed.

use std::io::IsTerminal;
use std::time::Instant;

/// Prints one line per chapter, with the time since the start.
#[derive(Debug)]
pub struct Story {
    started: Instant,
    bold: bool,
}

impl Story {
    pub fn begin() -> Self {
        Self { started: Instant::now(), bold: std::io::stdout().is_terminal() }
    }

    pub fn tell(&self, line: impl AsRef<str>) {
        println!("{:6.2} s  {}", self.started.elapsed().as_secs_f64(), line.as_ref());
    }

    /// The line that matters.
    pub fn conclude(&self, line: &str) {
        if self.bold {
            self.tell(format!("\x1b[1m{line}\x1b[0m"));
        } else {
            self.tell(line);
        }
    }
}

/// `1234567` pages as `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1024.0 * 1024.0))
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn thousands_are_grouped_from_the_right() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), text);
        }
    }
}
