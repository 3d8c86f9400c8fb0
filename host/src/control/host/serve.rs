//! Served devices: their sockets, who uses them, and what their users have to write.
//!
//! **Must never** keep a device open that the host lets go of: a server holds its device until it is stopped.

use std::sync::{Arc, Weak};

use super::{Host, StartError, lock};
use crate::control::config::{ServeAt, ServeConfig};
use crate::control::machine::MachineError;
use crate::frontend::vfio_user::backend::Options;
use crate::frontend::vfio_user::server::{Clients, ListenError, Listener, Server};
use crate::mediation::MediatedDevice;
use crate::sys;

/// One served device.
#[derive(Debug)]
pub(super) struct Serving {
    at: ServeAt,
    device: Weak<MediatedDevice>,
    server: Server,
}

/// Where a device is served, and by what a VMM finds it.
#[derive(Debug, Clone)]
pub struct Served {
    pub device: String,
    pub at: ServeAt,
    /// The exact command line of a VMM; `None` for a socket without a path
    pub qemu: Option<String>,
}

/// What QEMU is to be started with for these sockets. Without memory that is shared, every DMA is a message.
fn qemu(path: &str) -> String {
    let device = serde_json::json!({ "driver": "vfio-user-pci", "socket": { "path": path, "type": "unix" } });
    // In single quotes, which a path may have: 'it'\''s'.
    let device = device.to_string().replace('\'', r"'\''");
    format!("-machine q35,memory-backend=m -m 1G -object memory-backend-memfd,id=m,size=1G,share=on -device '{device}'")
}

impl Host {
    /// Lets the clients of served devices come.
    pub(super) fn serve_devices(&self) -> Result<(), StartError> {
        let devices = self.with_machine(|machine| machine.devices.clone()).unwrap_or_default();
        let mut serving = Vec::new();
        for (device, config) in devices.iter().zip(&self.config.devices) {
            if let Some(serve) = &config.serve {
                serving.push(start(device, serve)?);
            }
        }
        *lock(&self.serving) = serving;
        Ok(())
    }

    /// In the order of the devices; empty where none is served.
    pub fn served(&self) -> Vec<Served> {
        let devices = self.config.devices.iter();
        let served = devices.filter_map(|device| Some((device.name.to_string(), device.serve.as_ref()?)));
        served
            .map(|(device, serve)| {
                let qemu = match &serve.at {
                    ServeAt::Path(path) => path.to_str().map(qemu),
                    ServeAt::Inherited(_) => None,
                };
                Served { device, at: serve.at.clone(), qemu }
            })
            .collect()
    }

    /// Who uses this device, if it is served.
    pub(in crate::control) fn clients(&self, device: &Arc<MediatedDevice>) -> Option<(String, Clients)> {
        let serving = lock(&self.serving);
        let found = serving.iter().find(|serving| serving.device.as_ptr() == Arc::as_ptr(device))?;
        Some((found.at.to_string(), found.server.clients()))
    }

    /// Disconnects the clients of one device, or of all.
    pub(super) fn stop_serving(&self, device: Option<&Arc<MediatedDevice>>) {
        let stopped: Vec<Serving> = {
            let mut serving = lock(&self.serving);
            let ends =
                |serving: &mut Serving| device.is_none_or(|device| serving.device.as_ptr() == Arc::as_ptr(device));
            serving.extract_if(.., ends).collect()
        };
        // Outside of the lock: a client's last call may take a while.
        drop(stopped);
    }
}

fn start(device: &Arc<MediatedDevice>, serve: &ServeConfig) -> Result<Serving, StartError> {
    if serve.share_device_fd {
        let device_name = device.identity().name.clone();
        device.check_shareable().map_err(|source| MachineError::Mediation { device: device_name, source })?;
    }
    let listener = match &serve.at {
        ServeAt::Path(path) => Listener::bind(path)?,
        ServeAt::Inherited(number) => {
            let socket = sys::duplicate(*number).map_err(|_| ListenError::NotListening)?;
            Listener::inherited(socket)?
        }
    };
    let options = Options { share_device_fd: serve.share_device_fd, ..Options::default() };
    let server = Server::start(Arc::clone(device), listener, options).map_err(StartError::Thread)?;
    Ok(Serving { at: serve.at.clone(), device: Arc::downgrade(device), server })
}
