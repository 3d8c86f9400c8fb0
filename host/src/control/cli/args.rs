//! The command line, and its help.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::control::config::{
    Bandwidth, ConfigError, DeviceName, Draft, OnStall, OpenBy, ServeAt, ServeConfig, default_control_socket,
};
use crate::control::exit;
use crate::control::units::ByteSize;
use crate::device::vfio::VfToken;

/// Live migration for passthrough VFIO devices, in user space.
///
/// A host opens devices, lets vendor plug-ins mediate them, and moves devices and guest memory to another host.
#[derive(Debug, Parser)]
#[command(name = "vfio-mediate", version, after_help = overview(), max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// Print JSON, one object a line, for machines
    #[arg(long, global = true)]
    pub json: bool,
}

fn overview() -> String {
    format!(
        "Examples:\n  \
         vfio-mediate doctor\n  \
         vfio-mediate plugin check libvfio_mediate_plugin_edu.so\n  \
         vfio-mediate run --device vfio:0000:00:10.0 --plugin libvfio_mediate_plugin_edu.so --memory 256M\n  \
         vfio-mediate run --config vm.toml --listen 127.0.0.1:7000    # the destination\n  \
         vfio-mediate migrate --to 127.0.0.1:7000                     # on the source\n\n{}",
        exit::table()
    )
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a host: open devices, load plug-ins, serve the control socket
    #[command(after_help = RUN)]
    Run(Box<RunArgs>),
    /// Look at plug-in files
    #[command(subcommand)]
    Plugin(PluginCommand),
    /// Look at devices
    #[command(subcommand)]
    Device(DeviceCommand),
    /// Move a running host's guest to another host
    #[command(after_help = MIGRATE)]
    Migrate(MigrateArgs),
    /// Show a running host: whose guest it is, devices, plug-ins, the last migration
    Status(ControlArgs),
    /// Give up the migration under way; the guest stays where it is
    #[command(
        after_help = "Past the commit point a migration cannot be given up: `migrate` then ends as it would have."
    )]
    Cancel(ControlArgs),
    /// Say where the guest of a migration in doubt runs
    #[command(after_help = RESOLVE)]
    Resolve(ResolveArgs),
    /// Let a running host's device sleep, wake it, or show its power
    #[command(after_help = POWER)]
    Power(PowerArgs),
    /// End a running host in good order
    Stop(StopArgs),
    /// Check what this machine can do, and say what to do about the rest
    #[command(after_help = DOCTOR)]
    Doctor(DoctorArgs),
}

const RUN: &str = "The file (all keys are optional, flags override it):
  memory = \"256M\"
  plugins = [\"/usr/lib/vfio-mediate/libvfio_mediate_plugin_edu.so\"]   # first match has a device
  [[devices]]
  device = \"vfio:0000:00:10.0\"    # or vfio:UUID (an mdev), or sim:edu
  open = \"auto\"                   # cdev, group
  socket = \"/run/vm/edu.sock\"     # serve it over vfio-user; then without memory
  [migration]
  listen = \"127.0.0.1:7000\"
  downtime_ms_max = 300

Examples:
  vfio-mediate run --device sim:edu --memory 64M
  vfio-mediate run --device sim:edu --socket /run/vm/edu.sock      # for QEMU; prints its command line
  vfio-mediate run --config vm.toml
  vfio-mediate run --config vm.toml --listen 127.0.0.1:7000

Without --listen a guest starts here; with it, the host waits for a guest to arrive. SIGTERM and SIGINT end the host in \
good order; a second one ends it at once. The log goes to standard error; VFIO_MEDIATE_LOG=debug says more.";

const MIGRATE: &str = "Examples:
  vfio-mediate migrate --to 127.0.0.1:7000
  vfio-mediate migrate --to [::1]:7000 --verify --json

The guest runs on while its memory is copied, and stands still only at the end. Ctrl-C leaves the migration running: \
`vfio-mediate cancel` gives it up. Exit code 7: the guest is still here. Exit code 8: see `vfio-mediate resolve --help`.";

const RESOLVE: &str = "When the connection is lost at the worst moment, neither host can know alone whether the other runs the guest. Hosts \
that can reach each other settle it by themselves. When they cannot, look at the other host (its status, its journal), \
decide, and say the opposite on each side: --run-here on one, --run-there on the other. The same word on both loses the \
guest or, worse, runs it twice.

Examples:
  vfio-mediate status                                  # shows the id
  vfio-mediate resolve --id 5f0e...c1 --run-here
  vfio-mediate resolve --id 5f0e...c1 --run-there --state-dir /var/lib/vfio-mediate   # host not running";

const POWER: &str = "Examples:
  vfio-mediate power 0000:00:10.0 enter
  vfio-mediate power 0000:00:10.0 enter --wakeup
  vfio-mediate power 0000:00:10.0 status --json
  vfio-mediate power 0000:00:10.0 exit

While a device is in low power its requests fail with EIO, or, with --wakeup, the first one wakes it. A migration and a reset \
wake it in any case. Whether and when the kernel really suspends it `status` shows (D3hot, D3cold).";

const DOCTOR: &str = "Examples:
  vfio-mediate doctor
  vfio-mediate doctor --config vm.toml
  vfio-mediate doctor --device vfio:0000:00:10.0 --memory 4G

Nothing is changed: commands are shown, for you to run. Exit code 4 if anything that was asked for will not work.";

/// Where the host is.
#[derive(Debug, Clone, Args)]
pub struct ControlArgs {
    /// The host's control socket
    #[arg(long, value_name = "PATH", default_value_os_t = default_control_socket())]
    pub control: PathBuf,
}

/// What a host is made of: `run` and `doctor` take the same.
#[derive(Debug, Clone, Default, Args)]
pub struct MachineArgs {
    /// Configuration file (TOML); flags override it
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// A device: vfio:0000:00:10.0, vfio:UUID, sim:edu. May be repeated; replaces the file's list
    #[arg(long = "device", short, value_name = "DEVICE")]
    pub devices: Vec<DeviceName>,
    /// How to open the devices given by --device
    #[arg(long, value_enum, default_value_t = OpenBy::Auto)]
    pub open: OpenBy,
    /// VF token for the devices given by --device, if their PF is on vfio-pci too
    #[arg(long, value_name = "UUID")]
    pub vf_token: Option<VfToken>,
    /// A vendor's plug-in (.so). May be repeated; the first that claims a device has it; replaces the file's list
    #[arg(long = "plugin", short, value_name = "FILE")]
    pub plugins: Vec<PathBuf>,
    /// Guest memory: 256M, 4G
    #[arg(long, short, value_name = "SIZE")]
    pub memory: Option<ByteSize>,
    /// Folder of the migration journal, one for each host
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Serve the devices over vfio-user, for QEMU and others: the n-th socket is the n-th device's, a path or fd:N. Without
    /// --memory, which the VM brings
    #[arg(long = "socket", short, value_name = "PATH")]
    pub sockets: Vec<ServeAt>,
    /// Control socket to create
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Wait for a guest at this address instead of starting one
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,
    /// Allow --listen beyond loopback: the stream is neither encrypted nor authenticated
    #[arg(long)]
    pub insecure: bool,
    /// Switch over once the estimated downtime is not above this
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=crate::control::config::MS_MAX))]
    pub downtime_ms_max: Option<u64>,
    /// Send no more than this a second when migrating: 100M
    #[arg(long, value_name = "SIZE")]
    pub bandwidth_max: Option<Bandwidth>,
    /// Most pre-copy rounds
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(crate::control::config::ROUNDS_MAX)))]
    pub rounds_max: Option<u32>,
    /// What to do when pre-copy does not get anywhere
    #[arg(long, value_enum)]
    pub on_stall: Option<OnStall>,
}

#[derive(Debug, Clone, Subcommand)]
pub enum PluginCommand {
    /// Show a plug-in: name, version, vendor, the devices it asks for
    #[command(after_help = "Example:\n  vfio-mediate plugin info libvfio_mediate_plugin_edu.so")]
    Info {
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Check that files are plug-ins which this host can load. Their code is loaded, and asked to do nothing
    #[command(after_help = "Example:\n  vfio-mediate plugin check /usr/lib/vfio-mediate/*.so")]
    Check {
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
    },
}

#[derive(Debug, Clone, Subcommand)]
pub enum DeviceCommand {
    /// Open a device for a moment and show it: regions, interrupts, features, who would mediate it
    #[command(after_help = "Examples:
  vfio-mediate device inspect vfio:0000:00:10.0
  vfio-mediate device inspect sim:edu --plugin libvfio_mediate_plugin_edu.so --json")]
    Inspect(InspectArgs),
}

#[derive(Debug, Clone, Args)]
pub struct InspectArgs {
    /// vfio:0000:00:10.0, vfio:UUID, sim:edu
    #[arg(value_name = "DEVICE")]
    pub device: DeviceName,
    #[arg(long, value_enum, default_value_t = OpenBy::Auto)]
    pub open: OpenBy,
    /// If its PF is on vfio-pci too
    #[arg(long, value_name = "UUID")]
    pub vf_token: Option<VfToken>,
    /// Plug-ins to offer it to. May be repeated
    #[arg(long = "plugin", short, value_name = "FILE")]
    pub plugins: Vec<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub struct MigrateArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    /// The destination's --listen address
    #[arg(long, value_name = "HOST:PORT")]
    pub to: String,
    /// Allow an address beyond loopback: the stream is neither encrypted nor authenticated
    #[arg(long)]
    pub insecure: bool,
    /// Compare all of guest memory afterwards, outside the downtime
    #[arg(long)]
    pub verify: bool,
}

#[derive(Debug, Clone, Args)]
pub struct ResolveArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    /// The migration's id, as `status` shows it
    #[arg(long, value_name = "ID")]
    pub id: String,
    #[command(flatten)]
    pub run: RunWhere,
    /// The host is not running: write the decision into the journal in this folder
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
pub struct RunWhere {
    /// The guest runs on this host
    #[arg(long)]
    pub run_here: bool,
    /// The guest runs on the other host
    #[arg(long)]
    pub run_there: bool,
}

#[derive(Debug, Clone, Args)]
pub struct PowerArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    /// Its name as `status` shows it, or its place in that list, from 0
    #[arg(value_name = "DEVICE")]
    pub device: String,
    #[arg(value_enum)]
    pub what: PowerWhat,
    /// With `enter`: the first request that needs the device wakes it
    #[arg(long)]
    pub wakeup: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PowerWhat {
    /// Let it be suspended
    Enter,
    /// Wake it
    Exit,
    /// Show its power; wakes nothing
    Status,
}

#[derive(Debug, Clone, Args)]
pub struct StopArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    /// Even while a migration is under way or in doubt (the journal keeps the doubt)
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
}

impl MachineArgs {
    /// The file with the flags over it.
    pub fn draft(&self) -> Result<Draft, super::CliError> {
        use crate::control::config::DeviceConfig;
        let mut draft = self.config.as_deref().map(Draft::read).transpose()?.unwrap_or_default();
        if !self.devices.is_empty() {
            let device = |name: &DeviceName| match name {
                DeviceName::Vfio(_) => {
                    DeviceConfig { name: name.clone(), open: self.open, vf_token: self.vf_token, serve: None }
                }
                DeviceName::Sim(_) => {
                    DeviceConfig { name: name.clone(), open: OpenBy::Auto, vf_token: None, serve: None }
                }
            };
            draft.devices = self.devices.iter().map(device).collect();
        }
        if !self.plugins.is_empty() {
            draft.plugins = self.plugins.iter().cloned().map(Into::into).collect();
        }
        draft.memory = self.memory.or(draft.memory);
        draft.state_dir = self.state_dir.clone().or(draft.state_dir);
        Ok(draft)
    }
}

impl RunArgs {
    /// The file with the flags over it.
    pub fn draft(&self) -> Result<Draft, super::CliError> {
        let mut draft = self.machine.draft()?;
        if self.sockets.len() > draft.devices.len() {
            let what = format!("{} for {} devices", self.sockets.len(), draft.devices.len());
            return Err(ConfigError::Whole { key: "socket", what }.into());
        }
        for (device, at) in draft.devices.iter_mut().zip(&self.sockets) {
            match &mut device.serve {
                Some(serve) => serve.at = at.clone(),
                none => *none = Some(ServeConfig::at(at.clone())),
            }
        }
        draft.control_socket = self.control.clone().or(draft.control_socket);
        draft.listen = self.listen.clone().or(draft.listen);
        draft.insecure |= self.insecure;
        let limits = &mut draft.limits;
        limits.downtime_ms_max = self.downtime_ms_max.or(limits.downtime_ms_max);
        limits.bandwidth_max = self.bandwidth_max.or(limits.bandwidth_max);
        limits.rounds_max = self.rounds_max.or(limits.rounds_max);
        limits.on_stall = self.on_stall.or(limits.on_stall);
        Ok(draft)
    }
}
