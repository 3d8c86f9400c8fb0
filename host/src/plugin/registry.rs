//! The registry: which plug-ins there are, who uses them, and when one may retire.
//!
//! **Owns** publication and references (the protocol is `roster`'s). **Must never** hold a lock across a call into a plug-in,
//! count a reference that was not taken, or let anything of a plug-in run after `retire`.
//!
//! ```text
//!  register: place taken -> init -> published (one step) --- unregister ---> draining -- last device closed --> retired
//!                                       ^                                       |
//!               open: held, probed, seated, opened, handed out         deadline passed: Busy, still draining
//! ```
//! References of one plug-in: each open device, and each probe in flight. The last one to be given back after
//! unregistration retires the plug-in, on the thread that gives it back, once. `retire` has no deadline: a plug-in that
//! hangs there hangs its thread.
//!
//! Rules: plug-ins are asked in the order in which they were registered; the first that claims a device has it. Two versions
//! of one name may be registered (the older one first, so it keeps what it matches until it is unregistered; from then on the
//! newer one gets it); the same name and version twice may not. A plug-in that is registered later affects only later opens.
//! A device is passed through plainly only when nobody who is registered could have wanted it: one that matches a plug-in in
//! the middle of its registration is EAGAIN, one that matches a plug-in being unregistered is ENODEV.
//!
//! A registry that is dropped without [`Registry::shutdown`] retires nobody.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::calls::{HostCalls, ProbeIdentity};
use super::error::{OpenError, RegisterError, UnregisterError};
use super::ffi::{Globals, Library, OpenDevice, open_device};
use super::roster::{Busy, Entry, Hold, Member, Refused, Roster, Standing, Unseated};
use super::tables::DeviceMatch;

pub use super::roster::PluginId;

/// How much one plug-in may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Devices open at once
    pub devices_max: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PluginState {
    Published,
    /// Takes no new devices; retires when the last one is closed, and is not listed any more then
    Draining,
}

/// A plug-in, for people and for reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginInfo {
    pub name: String,
    pub version: String,
    pub vendor: String,
    pub path: PathBuf,
    pub state: PluginState,
    /// Names of the devices that it has open
    pub devices: Vec<String>,
}

/// Who a plug-in is, known before any of its functions runs.
#[derive(Debug)]
pub struct Card {
    info: PluginInfo,
    matches: Vec<DeviceMatch>,
    limits: Limits,
}

impl Card {
    fn new(library: &Library, limits: Limits) -> Self {
        let info = PluginInfo {
            name: library.name().to_owned(),
            version: library.version().to_owned(),
            vendor: library.vendor().to_owned(),
            path: library.path().to_owned(),
            state: PluginState::Published,
            devices: Vec::new(),
        };
        Self { info, matches: library.matches().to_vec(), limits }
    }

    fn is_same(&self, other: &Self) -> bool {
        self.info.name == other.info.name && self.info.version == other.info.version
    }

    fn wants(&self, identity: &ProbeIdentity<'_>) -> bool {
        self.matches.iter().any(|wanted| wanted.matches(identity))
    }

    pub fn info(&self) -> &PluginInfo {
        &self.info
    }

    fn busy(&self, busy: Busy) -> UnregisterError {
        UnregisterError::Busy { plugin: self.info.name.clone(), holders: busy.0 }
    }
}

impl Member for Globals {
    fn retire(&self) {
        Globals::retire(self);
    }
}

/// Keeps a plug-in from retiring: an open device's, or a probe's.
pub type Reference = Hold<Card, Globals>;

/// All plug-ins of one host.
#[derive(Debug)]
pub struct Registry {
    roster: Arc<Roster<Card, Globals>>,
}

impl Registry {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { roster: Roster::new() })
    }

    /// Runs the plug-in's `init` on this thread, then publishes it behind those whose registration began before. When
    /// `init` fails nothing else of the plug-in is called.
    pub fn register(&self, library: Library, limits: Limits) -> Result<PluginId, RegisterError> {
        let card = Arc::new(Card::new(&library, limits));
        let (name, version) = (card.info.name.clone(), card.info.version.clone());
        let refused = |refused| match refused {
            Refused::Duplicate => RegisterError::Duplicate { name: name.clone(), version: version.clone() },
            Refused::Closed => RegisterError::ShuttingDown,
        };
        let id = self.roster.reserve(card, Card::is_same).map_err(refused)?;
        let globals = Globals::init(&library).map_err(|errno| {
            self.roster.abandon(id);
            RegisterError::Init { name: name.clone(), errno }
        })?;
        self.roster.publish(id, globals).map_err(refused)?;
        tracing::info!(plugin = name, version, path = %library.path().display(), "plug-in registered");
        if library.panic_aborts() {
            tracing::warn!(plugin = name, "a panic of this plug-in ends the process: it was built with panic=abort");
        }
        Ok(id)
    }

    /// The plug-in takes no new devices from now on. Waits until those that it has are closed and it is retired. On
    /// `Busy` it stays draining: it retires when its last device is closed, and may be unregistered again to wait for it.
    /// `Ok` also when it had retired before; numbers are not used again.
    pub fn unregister(&self, id: PluginId, deadline: Instant) -> Result<(), UnregisterError> {
        if !self.roster.withdraw(id) {
            return Err(UnregisterError::Unknown);
        }
        self.roster.wait_gone(id, deadline).map_err(|(card, busy)| card.busy(busy))
    }

    /// Unregisters everything, and refuses registrations and opens from now on. `Busy` names one plug-in that is left;
    /// all the others that could retire have.
    pub fn shutdown(&self, deadline: Instant) -> Result<(), UnregisterError> {
        for id in self.roster.close() {
            let _known = self.roster.withdraw(id);
        }
        self.roster.wait_empty(deadline).map_err(|(card, busy)| card.busy(busy))
    }

    /// What is published or draining, in order.
    pub fn list(&self) -> Vec<PluginInfo> {
        self.roster.list().into_iter().filter_map(info_of).collect()
    }

    /// Asks the plug-ins that match, in order; the first that claims the device opens it. `Ok(None)`: nobody did.
    pub fn open(
        &self,
        identity: &ProbeIdentity<'_>,
        calls: Arc<dyn HostCalls>,
    ) -> Result<Option<OpenDevice>, OpenError> {
        let mut asked = self.roster.survey().map_err(|_| OpenError::ShuttingDown)?;
        asked.retain(|entry| entry.card.wants(identity));
        let device = identity.name;
        let mut not_asked = None;
        for (position, entry) in asked.iter().enumerate() {
            let (name, limits) = (&entry.card.info.name, entry.card.limits);
            let (plugin, device_name) = (name.clone(), device.to_owned());
            // A hold is given back on every way out; what became a device's goes into the OpenDevice.
            let hold = match entry.standing {
                Standing::Published => self.roster.hold(entry.id, device),
                Standing::Registering => {
                    not_asked = Some(OpenError::Registering { plugin, device: device_name });
                    continue;
                }
                Standing::Withdrawn => None,
            };
            let withdrawn = |plugin, device| OpenError::Withdrawn { plugin, device };
            let Some(hold) = hold else {
                not_asked.get_or_insert(withdrawn(plugin, device_name));
                continue;
            };
            match hold.member().probe(identity) {
                Ok(true) => {}
                Ok(false) => {
                    tracing::info!(plugin, device, "plug-in declines the device");
                    continue;
                }
                Err(errno) => return Err(OpenError::Probe { plugin, device: device_name, errno }),
            }
            match hold.seat(limits.devices_max) {
                Ok(()) => {}
                Err(Unseated::Withdrawn) => {
                    not_asked.get_or_insert(withdrawn(plugin, device_name));
                    continue;
                }
                Err(Unseated::Full) => return Err(OpenError::TooMany { plugin, limit: limits.devices_max }),
            }
            let opened = open_device(identity, calls, hold)?;
            // Once per open, which is the operator's doing.
            let others: Vec<&str> = asked[position + 1..].iter().map(|other| &*other.card.info.name).collect();
            tracing::info!(plugin, device, also_matching = ?others, "plug-in mediates the device");
            return Ok(Some(opened));
        }
        not_asked.map_or(Ok(None), Err)
    }
}

fn info_of(entry: Entry<Card>) -> Option<PluginInfo> {
    let state = match entry.standing {
        Standing::Registering => return None,
        Standing::Published => PluginState::Published,
        Standing::Withdrawn => PluginState::Draining,
    };
    Some(PluginInfo { state, devices: entry.devices, ..entry.card.info.clone() })
}
