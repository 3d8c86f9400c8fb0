//! The exit codes of the binary: one number for each thing that a script does next.

use std::process::ExitCode;

/// How a command ended. The numbers are frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Done = 0,
    Failed = 1,
    Usage = 2,
    Config = 3,
    Check = 4,
    NoHost = 5,
    Refused = 6,
    NotMigrated = 7,
    InDoubt = 8,
}

impl Exit {
    pub const ALL: [Self; 9] = [
        Self::Done,
        Self::Failed,
        Self::Usage,
        Self::Config,
        Self::Check,
        Self::NoHost,
        Self::Refused,
        Self::NotMigrated,
        Self::InDoubt,
    ];

    pub const fn code(self) -> u8 {
        self as u8
    }

    /// What it means, as `--help` and `spec/control.md` say it.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed for a reason of the machine or of this program; the text says which",
            Self::Usage => "the command line is wrong",
            Self::Config => "the configuration is wrong; the text names file, line and key",
            Self::Check => "a check said no: doctor found a failure, a file is no plug-in, a device does not open",
            Self::NoHost => "no host answers at the control socket",
            Self::Refused => "the host refused the request and has changed nothing",
            Self::NotMigrated => "the migration failed or was cancelled; the guest is still here",
            Self::InDoubt => "in doubt: where the guest runs must be settled, see `resolve --help`",
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// The table, as `--help` shows it.
pub fn table() -> String {
    let mut text = String::from("Exit codes:");
    for exit in Exit::ALL {
        text.push_str(&format!("\n  {}  {}", exit.code(), exit.meaning()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// spec: CONTROL-2
    #[test]
    fn the_pages_and_the_program_agree_on_every_exit_code() {
        let tree = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for page in ["spec/control.md", "docs/operator.md"] {
            let text = std::fs::read_to_string(tree.join(page)).unwrap();
            for (number, exit) in Exit::ALL.into_iter().enumerate() {
                assert_eq!(usize::from(exit.code()), number);
                let row = format!("| {number} | {} |", exit.meaning());
                assert!(text.contains(&row), "{page} lacks: {row}");
            }
        }
    }
}
