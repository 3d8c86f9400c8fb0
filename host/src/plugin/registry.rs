//! The registry: which plug-ins there are, who uses them, and when one may retire.
//!
//! **Owns** publication and references. **Must never** hold its lock across a call into a plug-in, count a reference that
//! was not taken, or let anything of a plug-in run after `retire`.
//!
//! ```text
//!  register: init -> published (one push under the lock) ---- unregister ---> draining -- last device closed --> retired
//!                                    ^                                          |
//!                              open: take, probe, open, hand out          deadline passed: Busy, still draining
//! ```
//! References of one plug-in: each open device, and each probe or open in flight. The last one to be given back after
//! unregistration retires the plug-in, on the thread that gives it back, once.
//!
//! Rules: plug-ins are asked in the order of registration; the first that claims a device has it. Two versions of one name may be
//! registered (the older first, so it keeps what it matches until it is unregistered); the same name and version twice may not.
//! A plug-in that is registered later affects only later opens.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::calls::{HostCalls, ProbeIdentity};
use super::error::{OpenError, RegisterError, UnregisterError};
use super::ffi::{Globals, Library, OpenDevice, open_device};
use super::references::{References, Return, Take};
use super::tables::DeviceMatch;

/// One registered plug-in, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PluginId(u64);

/// How much one plug-in may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Devices open at once
    pub devices_max: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PluginState {
    Published,
    /// Takes no new devices; retires when the last one is closed
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

struct Registered {
    id: PluginId,
    info: PluginInfo,
    matches: Vec<DeviceMatch>,
    limits: Limits,
    globals: Globals,
    references: Mutex<References>,
    drained: Condvar,
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registered({} {})", self.info.name, self.info.version)
    }
}

#[derive(Debug, Default)]
struct List {
    plugins: Vec<Arc<Registered>>,
    next: u64,
    shut_down: bool,
    /// Names and versions whose init is running
    registering: Vec<(String, String)>,
}

/// All plug-ins of one host.
#[derive(Debug, Default)]
pub struct Registry {
    list: Mutex<List>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Runs the plug-in's `init`, then publishes it behind those that are there.
    pub fn register(&self, library: Library, limits: Limits) -> Result<PluginId, RegisterError> {
        let key = (library.name().to_owned(), library.version().to_owned());
        let duplicate = || RegisterError::Duplicate { name: key.0.clone(), version: key.1.clone() };
        {
            let mut list = lock(&self.list);
            if list.shut_down {
                return Err(RegisterError::ShuttingDown);
            }
            let is_key = |info: &PluginInfo| info.name == key.0 && info.version == key.1;
            if list.registering.contains(&key) || list.plugins.iter().any(|plugin| is_key(&plugin.info)) {
                return Err(duplicate());
            }
            list.registering.push(key.clone());
        }
        let globals = Globals::init(&library);
        let mut list = lock(&self.list);
        list.registering.retain(|other| *other != key);
        let globals = globals.map_err(|errno| RegisterError::Init { name: key.0.clone(), errno })?;
        if list.shut_down {
            drop(list);
            globals.retire();
            return Err(RegisterError::ShuttingDown);
        }
        let id = PluginId(list.next);
        list.next += 1;
        let info = PluginInfo {
            name: key.0,
            version: key.1,
            vendor: library.vendor().to_owned(),
            path: library.path().to_owned(),
            state: PluginState::Published,
            devices: Vec::new(),
        };
        let plugin = Registered {
            id,
            info,
            matches: library.matches().to_vec(),
            limits,
            globals,
            references: Mutex::new(References::default()),
            drained: Condvar::new(),
        };
        list.plugins.push(Arc::new(plugin));
        Ok(id)
    }

    /// The plug-in takes no new devices from now on. Waits until those that it has are closed, then it is retired. On
    /// `Busy` it stays draining: it retires when its last device is closed, and may be unregistered again to wait for it.
    pub fn unregister(&self, id: PluginId, deadline: Instant) -> Result<(), UnregisterError> {
        let plugin = {
            let list = lock(&self.list);
            list.plugins.iter().find(|plugin| plugin.id == id).cloned().ok_or(UnregisterError::Unknown)?
        };
        if lock(&plugin.references).withdraw() {
            plugin.retire();
        }
        let result = plugin.wait_retired(deadline);
        if result.is_ok() {
            lock(&self.list).plugins.retain(|other| other.id != id);
        }
        result
    }

    /// Unregisters everything, and refuses registrations and opens from now on.
    pub fn shutdown(&self, deadline: Instant) -> Result<(), UnregisterError> {
        let plugins: Vec<PluginId> = {
            let mut list = lock(&self.list);
            list.shut_down = true;
            list.plugins.iter().map(|plugin| plugin.id).collect()
        };
        let mut result = Ok(());
        for id in plugins {
            match self.unregister(id, deadline) {
                // Somebody else unregistered it meanwhile.
                Ok(()) | Err(UnregisterError::Unknown) => {}
                Err(busy) => result = Err(busy),
            }
        }
        result
    }

    pub fn list(&self) -> Vec<PluginInfo> {
        let plugins = lock(&self.list).plugins.clone();
        plugins.iter().map(|plugin| plugin.info_now()).collect()
    }

    /// Asks the plug-ins that match, in order; the first that claims the device opens it. `Ok(None)`: nobody did.
    pub fn open(
        &self,
        identity: &ProbeIdentity<'_>,
        calls: Arc<dyn HostCalls>,
    ) -> Result<Option<OpenDevice>, OpenError> {
        let plugins = {
            let list = lock(&self.list);
            if list.shut_down {
                return Err(OpenError::ShuttingDown);
            }
            list.plugins.clone()
        };
        for plugin in plugins {
            if !plugin.matches.iter().any(|wanted| wanted.matches(identity)) {
                continue;
            }
            let limit = plugin.limits.devices_max;
            // Taken before `probe` runs, given back by the reference's drop on every way out.
            let reference = match lock(&plugin.references).take(identity.name, limit) {
                Take::Taken(number) => {
                    DeviceReference { plugin: Arc::clone(&plugin), info: plugin.info.clone(), number }
                }
                Take::Withdrawn => continue,
                Take::Full => return Err(OpenError::TooMany { plugin: plugin.info.name.clone(), limit }),
            };
            match plugin.globals.probe(identity) {
                Ok(true) => return open_device(&plugin.globals, identity, calls, reference).map(Some),
                Ok(false) => {}
                Err(errno) => {
                    let (plugin, device) = (plugin.info.name.clone(), identity.name.to_owned());
                    return Err(OpenError::Probe { plugin, device, errno });
                }
            }
        }
        Ok(None)
    }
}

impl Registered {
    fn info_now(&self) -> PluginInfo {
        let references = lock(&self.references);
        let state = if references.is_withdrawn() { PluginState::Draining } else { PluginState::Published };
        PluginInfo { state, devices: references.holders(), ..self.info.clone() }
    }

    /// Called by whoever was told to: once, with no reference left and no lock held.
    fn retire(&self) {
        self.globals.retire();
        lock(&self.references).retired();
        self.drained.notify_all();
    }

    fn wait_retired(&self, deadline: Instant) -> Result<(), UnregisterError> {
        let mut references = lock(&self.references);
        while !references.is_retired() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(UnregisterError::Busy { plugin: self.info.name.clone(), holders: references.holders() });
            }
            references = self.drained.wait_timeout(references, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

/// Keeps a plug-in from retiring.
#[derive(Debug)]
pub struct DeviceReference {
    plugin: Arc<Registered>,
    info: PluginInfo,
    number: u64,
}

impl DeviceReference {
    pub fn plugin(&self) -> &PluginInfo {
        &self.info
    }
}

impl Drop for DeviceReference {
    fn drop(&mut self) {
        let returned = lock(&self.plugin.references).give_back(self.number);
        if returned == Return::Last {
            self.plugin.retire();
        }
    }
}
