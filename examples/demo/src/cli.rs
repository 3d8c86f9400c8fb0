//! The demo's command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

/// Two host processes migrate a running device, and the memory it writes, in front of your eyes.
///
/// Each host process has its own device and loads the same vendor plug-in from its .so file. A small guest keeps the
/// device busy and checks every byte, before, during and after. The exit code is 0 only if every oracle was satisfied.
#[derive(Debug, Parser)]
#[command(name = "cargo demo", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    pub role: Option<Role>,
    #[command(flatten)]
    pub demo: Demo,
}

/// QEMU's edu reaches 28 bits by default, which the demo's guest would fill to the last page.
const SIMULATED: &str = "sim:edu?dma_mask=0xffffffffffffffff";

const EXAMPLES: &str = "Examples:
  cargo demo
  cargo demo -- --memory 1G --dirty-rate 20000
  cargo demo -- --report r.json --dump images
  cargo demo -- --break page          # shows which oracle notices";

#[derive(Debug, Subcommand)]
pub enum Role {
    /// One host process (started by the demo itself)
    #[command(hide = true)]
    Host(Box<HostArgs>),
    /// Only the source, for two machines: migrates its guest to another machine
    Source(Box<SourceArgs>),
    /// Only the destination, for two machines: waits for the guest, runs it and checks it
    Destination(Box<DestinationArgs>),
}

#[derive(Debug, Clone, Args)]
pub struct Demo {
    #[command(flatten)]
    pub load: Load,
    /// The source's device: a simulated edu (which reaches all memory), or vfio:ADDRESS for a real one
    #[arg(long, default_value = SIMULATED, value_name = "DEVICE")]
    pub source_device: String,
    /// The destination's device
    #[arg(long, default_value = SIMULATED, value_name = "DEVICE")]
    pub destination_device: String,
    /// Write what happened as JSON
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Break something on purpose, and see who notices
    #[arg(long = "break", value_enum, value_name = "WHAT")]
    pub fault: Option<Fault>,
    /// Leave both RAM images (source.ram at the switchover, destination.ram before the guest goes on) in this folder
    #[arg(long, value_name = "DIR")]
    pub dump: Option<PathBuf>,
    /// Kill one side (SIGKILL) when it reaches this phase, and see that never two run
    #[arg(long, value_name = "SIDE:PHASE", hide = true)]
    pub kill: Option<String>,
}

/// What the guest does, and on what.
#[derive(Debug, Clone, Args)]
pub struct Load {
    /// Guest memory
    #[arg(long, default_value = "256M", value_name = "SIZE")]
    pub memory: String,
    /// Pages that the guest's CPU stores per second
    #[arg(long, default_value_t = 4000, value_name = "PAGES")]
    pub dirty_rate: u64,
    /// DMA round trips before the migration begins, and again after it
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub rounds: u64,
    /// The vendor's plug-in; built from this workspace when not given
    #[arg(long, value_name = "FILE")]
    pub plugin: Option<PathBuf>,
    /// How to open a real device
    #[arg(long, value_enum, default_value_t = Open::Auto)]
    pub open: Open,
    /// The guest's seed
    #[arg(long, default_value_t = 0x5eed, value_name = "N")]
    pub seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Open {
    Auto,
    Group,
    Cdev,
}

impl Open {
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Group => "group",
            Self::Cdev => "cdev",
        }
    }
}

/// What to break. Each is caught by another oracle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// One page of guest memory arrives changed
    Page,
    /// One device register arrives changed
    Device,
    /// The destination's interrupt is not connected
    Irq,
    /// The source goes on although the destination took over
    Commit,
}

#[derive(Debug, Clone, Args)]
pub struct SourceArgs {
    #[command(flatten)]
    pub load: Load,
    #[arg(long, value_name = "DEVICE")]
    pub device: String,
    /// The destination's migration address
    #[arg(long, value_name = "HOST:PORT")]
    pub to: SocketAddr,
    /// Where the witness of heartbeats listens
    #[arg(long, value_name = "HOST:PORT")]
    pub witness: SocketAddr,
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Allow addresses beyond loopback: the stream is neither encrypted nor authenticated
    #[arg(long)]
    pub insecure: bool,
}

#[derive(Debug, Clone, Args)]
pub struct DestinationArgs {
    #[command(flatten)]
    pub load: Load,
    #[arg(long, value_name = "DEVICE")]
    pub device: String,
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: SocketAddr,
    /// Where the witness of heartbeats shall listen
    #[arg(long, value_name = "HOST:PORT")]
    pub witness: SocketAddr,
    #[arg(long)]
    pub insecure: bool,
}

/// One host process.
#[derive(Debug, Clone, Args)]
pub struct HostArgs {
    #[command(flatten)]
    pub load: Load,
    #[arg(long)]
    pub device: String,
    /// Control socket to create
    #[arg(long)]
    pub control: PathBuf,
    /// Folder of the migration journal
    #[arg(long)]
    pub state: PathBuf,
    #[arg(long)]
    pub witness: SocketAddr,
    /// Take a guest in from this address; without it a new guest starts here
    #[arg(long)]
    pub listen: Option<SocketAddr>,
    #[arg(long)]
    pub insecure: bool,
    #[arg(long = "break", value_enum)]
    pub fault: Option<Fault>,
    /// Write the RAM image here at the switchover
    #[arg(long)]
    pub dump: Option<PathBuf>,
    /// Stop at this phase of the migration until killed
    #[arg(long)]
    pub hold: Option<String>,
}
