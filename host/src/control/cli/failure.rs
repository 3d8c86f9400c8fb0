//! A command that failed: its exit code and its text.

use crate::control::address::AddressError;
use crate::control::chain;
use crate::control::client::ClientError;
use crate::control::config::ConfigError;
use crate::control::exit::Exit;
use crate::control::host::StartError;
use crate::control::machine::MachineError;
use crate::control::socket::BindError;
use crate::migration::journal::JournalError;

/// Why a command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct CliError {
    pub exit: Exit,
    pub message: String,
}

impl CliError {
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, message)
    }

    /// For people on standard error; for machines as an object on standard output.
    pub fn show(&self, json: bool) {
        if json {
            let error = serde_json::json!({ "error": { "exit": self.exit.code(), "message": self.message } });
            println!("{error}");
        } else {
            eprintln!("vfio-mediate: {}", self.message);
        }
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        Self::new(Exit::Config, chain(&error))
    }
}

impl From<AddressError> for CliError {
    fn from(error: AddressError) -> Self {
        Self::new(Exit::Refused, error.to_string())
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let exit = match &error {
            ClientError::NoHost { .. } => Exit::NoHost,
            ClientError::Failure(failure) => failure.code.exit(),
            ClientError::Broken { .. } => Exit::Failed,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<MachineError> for CliError {
    fn from(error: MachineError) -> Self {
        Self::new(Exit::Check, chain(&error))
    }
}

impl From<BindError> for CliError {
    fn from(error: BindError) -> Self {
        let exit = match &error {
            BindError::InUse { .. } => Exit::Refused,
            BindError::Io { .. } => Exit::Failed,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<JournalError> for CliError {
    fn from(error: JournalError) -> Self {
        let exit = match &error {
            JournalError::InUse { .. } | JournalError::NotAllowed { .. } => Exit::Refused,
            JournalError::Damaged { .. } => Exit::InDoubt,
            JournalError::Storage(_) => Exit::Failed,
        };
        Self::new(exit, chain(&error))
    }
}

impl From<StartError> for CliError {
    fn from(error: StartError) -> Self {
        let exit = match &error {
            StartError::Machine(_) => Exit::Check,
            StartError::InDoubt { .. } => Exit::InDoubt,
            StartError::GuestElsewhere { .. } | StartError::StateInUse { .. } => Exit::Refused,
            _ => Exit::Failed,
        };
        Self::new(exit, chain(&error))
    }
}
