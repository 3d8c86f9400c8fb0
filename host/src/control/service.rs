//! What the control socket asks, answered by a [`Host`].

use std::sync::Arc;
use std::time::Duration;

use super::host::{Host, power};
use super::protocol::{DeviceStatus, Failure, PluginStatus, Request, Response, ServedStatus, Status};
use super::socket::{Answer, Service};
use crate::device::Backend;
use crate::mediation::MediatedDevice;

/// How long a host that was asked to stop may take to end its devices.
pub const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// A host behind a socket. `stop` is called, once the answer is on its way, when a client asks the host to end.
pub struct HostService {
    host: Arc<Host>,
    stop: Arc<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for HostService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostService").field("host", &self.host).finish_non_exhaustive()
    }
}

impl HostService {
    pub fn new(host: Arc<Host>, stop: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { host, stop: Arc::new(stop) })
    }

    fn act(&self, request: Request) -> Result<Answer, Failure> {
        let done = |note: String| Answer::Now(Response::Done { note });
        match request {
            Request::Status {} => Ok(Answer::Now(Response::Status(Box::new(status(&self.host))))),
            Request::Migrate { to, insecure, verify } => self.host.migrate(&to, insecure, verify).map(Answer::Follow),
            Request::Cancel {} => self.host.cancel().map(|()| done("asked for".to_owned())),
            Request::Resolve { id, run } => self.host.resolve(&id, run).map(done),
            Request::Power { device, action } => {
                self.host.power(&device, action).map(|power| Answer::Now(Response::Power(power)))
            }
            Request::Stop { force } => {
                self.host.may_stop(force)?;
                let stop = Arc::clone(&self.stop);
                let response = Response::Done { note: "the host ends".to_owned() };
                Ok(Answer::Then(response, Box::new(move || stop())))
            }
        }
    }
}

impl Service for HostService {
    fn answer(&self, request: Request) -> Answer {
        self.act(request).unwrap_or_else(|failure| Answer::Now(Response::Error(failure)))
    }
}

fn status(host: &Host) -> Status {
    let (guest, explanation) = host.ownership();
    // Devices and plug-ins are asked under no lock of the host's.
    let parts = host.with_machine(|machine| {
        (machine.memory.ram().map_or(0, |ram| ram.size()), machine.devices.clone(), Arc::clone(&machine.registry))
    });
    let (memory_bytes, devices, plugins) = parts.map_or_else(Default::default, |(bytes, devices, registry)| {
        let devices = devices.iter().map(|device| device_status(host, device)).collect();
        let plugins = registry.list().into_iter().map(|plugin| PluginStatus {
            name: plugin.name,
            version: plugin.version,
            path: plugin.path.display().to_string(),
        });
        (bytes, devices, plugins.collect())
    });
    Status {
        program_version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_ms: host.uptime().as_millis().try_into().unwrap_or(u64::MAX),
        guest,
        explanation,
        in_doubt: host.doubt(),
        memory_bytes,
        devices,
        released: host.released(),
        plugins,
        listen: host.listening().map(|address| address.to_string()),
        migration: host.progress(),
        last: host.last(),
    }
}

/// The name of a way to open devices, as configuration and reports write it.
pub fn backend_name(backend: Backend) -> &'static str {
    match backend {
        Backend::VfioGroup => "vfio group",
        Backend::VfioCdev => "vfio cdev",
        Backend::Sim => "simulated",
    }
}

fn device_status(host: &Host, device: &Arc<MediatedDevice>) -> DeviceStatus {
    let identity = device.identity();
    DeviceStatus {
        name: identity.name.clone(),
        backend: backend_name(identity.backend).to_owned(),
        id: format!("{:04x}:{:04x}", identity.vendor_id, identity.device_id),
        state: device.state().to_string(),
        plugin: device.plugin().map(|p| PluginStatus { name: p.name, version: p.version, path: p.path }),
        unmigratable: device.migratable().err().map(|error| error.to_string()),
        power: Some(power(device)),
        closed: device.closed().map(|reason| reason.to_string()),
        served: host.clients(device).map(|(socket, clients)| ServedStatus {
            socket,
            attached: clients.attached,
            client_pid: clients.pid,
            clients_gone: clients.served,
        }),
    }
}
