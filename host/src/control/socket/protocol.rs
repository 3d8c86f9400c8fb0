//! What is said over the control socket: one JSON object a line, requests up, responses down.
//!
//! The numbers of `version` are frozen; a host answers another version with an error that names its own. Unknown fields
//! of a request are refused, unknown fields of a response are ignored, so that a newer host can tell an older command more.

use serde::{Deserialize, Serialize};

use crate::control::exit::Exit;

/// The version that this program speaks.
pub const VERSION: u32 = 1;
/// Longest request, in bytes, with its line end.
pub const REQUEST_MAX: usize = 64 * 1024;
/// Longest response. A report with the most rounds and devices is far below it.
pub const RESPONSE_MAX: usize = 16 * 1024 * 1024;

/// The report of a migration that moved the guest.
pub type Report = serde_json::Value;

/// One line up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestLine {
    pub version: u32,
    pub request: Request,
}

/// One line down.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResponseLine {
    pub version: u32,
    pub response: Response,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    Status {},
    /// Migrate the guest to another host. Progress lines follow, then `migrated` or `error`. The migration goes on if the
    /// client goes away.
    Migrate {
        /// HOST:PORT
        to: String,
        /// Allow an address beyond loopback
        #[serde(default)]
        insecure: bool,
        /// Compare all of guest memory afterwards, outside the downtime
        #[serde(default)]
        verify: bool,
    },
    /// Give up the migration under way. Answered when it was asked for; whether the guest stayed is told to whoever
    /// migrates, since a migration past its commit point is not undone.
    Cancel {},
    /// An operator's word about a migration in doubt.
    Resolve {
        /// The migration's id, 32 hexadecimal digits
        id: String,
        run: Run,
    },
    /// Low power of one device; answered with `power`
    Power {
        /// Its name as `status` shows it, or its place in that list
        device: String,
        action: PowerAction,
    },
    /// End the host in good order. Refused while a migration is under way or the guest is in doubt, unless forced.
    Stop {
        #[serde(default)]
        force: bool,
    },
}

/// What is to be done about a device's power.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PowerAction {
    /// Nothing: it is asked for
    Status,
    /// Let the device be suspended; with a wake-up until the next request that needs it
    Enter {
        #[serde(default)]
        wakeup: bool,
    },
    Exit,
}

/// Where the guest is to run, by an operator's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Run {
    Here,
    There,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Response {
    Status(Box<Status>),
    Power(Power),
    Progress(Progress),
    Migrated {
        report: Box<Report>,
    },
    /// Done; `note` says what follows from it, if anything
    Done {
        #[serde(default)]
        note: String,
    },
    Error(Failure),
}

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub code: FailureCode,
    pub message: String,
}

/// What a client can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The line is not a request: mend the client
    BadRequest,
    /// The host speaks another version
    Version,
    /// Too many clients: try again later
    TooManyClients,
    /// Refused as things stand; nothing has changed
    Refused,
    /// The guest is still here
    NotMigrated,
    /// Where the guest runs must be settled
    InDoubt,
    /// The machine or the host failed
    Failed,
}

impl FailureCode {
    /// The exit code of a command that got this answer.
    pub fn exit(self) -> Exit {
        match self {
            Self::BadRequest | Self::Version | Self::TooManyClients | Self::Refused => Exit::Refused,
            Self::NotMigrated => Exit::NotMigrated,
            Self::InDoubt => Exit::InDoubt,
            Self::Failed => Exit::Failed,
        }
    }
}

impl Failure {
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(FailureCode::Refused, message)
    }
}

/// Where a migration is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// As the report names it
    pub phase: String,
    /// Pre-copy round under way, from 1; 0 before the first
    pub round: u32,
    pub pages_sent: u64,
    /// Pages of the round under way that are still to be sent
    pub pages_left: u64,
    /// Pages of guest memory
    pub pages_total: u64,
    pub bytes: u64,
    pub elapsed_ms: u64,
}

/// May the guest run here?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ownership {
    /// It runs, or may
    Here,
    /// Not yet, or not any more
    Elsewhere,
    /// Nobody may assume either
    InDoubt,
}

/// A host, as `status` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub program_version: String,
    pub pid: u32,
    pub uptime_ms: u64,
    pub guest: Ownership,
    /// One sentence about `guest`
    pub explanation: String,
    /// The migration that `resolve` wants
    pub in_doubt: Option<InDoubt>,
    pub memory_bytes: u64,
    pub devices: Vec<DeviceStatus>,
    /// Devices that the kernel wanted back, and has
    #[serde(default)]
    pub released: Vec<String>,
    pub plugins: Vec<PluginStatus>,
    /// Where a guest is awaited
    pub listen: Option<String>,
    pub migration: Option<Progress>,
    /// How the last migration of this process ended
    pub last: Option<LastMigration>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InDoubt {
    pub id: String,
    pub peer: String,
    pub explanation: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    pub name: String,
    pub backend: String,
    /// `vvvv:dddd`, hexadecimal
    pub id: String,
    pub state: String,
    pub plugin: Option<PluginStatus>,
    /// Why it cannot be migrated; `None`: it can
    pub unmigratable: Option<String>,
    /// `None`: an older host
    #[serde(default)]
    pub power: Option<Power>,
    /// Why it refuses requests, if it does
    #[serde(default)]
    pub closed: Option<String>,
    /// Who uses it over vfio-user, if it is served
    #[serde(default)]
    pub served: Option<ServedStatus>,
}

/// A device that is served over vfio-user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedStatus {
    /// A path, or `fd:N`
    pub socket: String,
    /// A client is attached
    pub attached: bool,
    /// Process that connected, where the kernel says it
    pub client_pid: Option<i32>,
    /// Clients that were served and are gone
    pub clients_gone: u64,
}

/// A device's power, told without waking it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Power {
    pub device: String,
    /// Low power was entered: the device may be suspended, and requests are refused or wake it
    pub low_power: bool,
    /// The next request ends it
    pub wakeup: bool,
    /// `D0`, `D3hot`, `D3cold` ..., where the kernel says it
    pub state: Option<String>,
    /// By the kernel's runtime power management
    pub suspended: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginStatus {
    pub name: String,
    pub version: String,
    pub path: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum LastMigration {
    Moved { report: Box<Report> },
    Arrived { report: Box<Report> },
    Failed { failure: Failure },
}
