//! What the parent and its two host processes say to each other: one JSON object a line, events up, commands down.

use serde::{Deserialize, Serialize};

/// A host process tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The host is up: its control socket answers.
    Ready { pid: u32, device: String, backend: String, plugin: Option<Plugin>, listen: Option<String> },
    /// A guest runs here from now on.
    Running,
    /// The guest runs; told several times a second.
    Progress { rounds: u64, stores: u64, interrupts: u64 },
    /// The migration reached a phase here.
    Phase { name: String },
    /// The host waits at a phase, as it was told to.
    Holding { name: String },
    /// Every byte with a known value was checked.
    Checked { pages: u64 },
    /// An image of guest RAM was written.
    Dumped { path: String, bytes: u64 },
    /// An oracle was not satisfied; the guest has stopped.
    Caught { oracle: String, what: String },
    /// Something else failed.
    Failed { what: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plugin {
    pub name: String,
    pub version: String,
    pub path: String,
}

/// The parent asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Command {
    /// Check every byte, then go on.
    Check,
    /// End in good order.
    Stop,
}
