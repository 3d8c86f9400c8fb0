//! One client, from its first byte to its loss.
//!
//! **Owns** the loop receive, serve, send. **Must never** outlive the client with something of it in the device: when it ends, the
//! device has none of the client's memory, eventfds or descriptors.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use super::link::{Failure, Link};
use crate::frontend::vfio_user::backend::{DeviceBackend, Options};
use crate::frontend::vfio_user::session::{Maps, Message, Next, Output, Served, serve};
use crate::mediation::MediatedDevice;

/// Serves the client at the other end of `socket` until it is gone, on this thread. Afterwards the device is as the client left
/// it, without the client's memory and interrupts, and the next one can be served.
pub fn serve_client(device: &Arc<MediatedDevice>, socket: OwnedFd, options: Options) -> Failure {
    run(&mut DeviceBackend::new(Arc::clone(device), options), &Link::new(socket, options.patience))
}

pub(super) fn run(backend: &mut DeviceBackend, link: &Arc<Link>) -> Failure {
    if let Err(error) = backend.attach(Arc::clone(link)) {
        tracing::error!(device = %backend.device().identity().name, %error, "it has not let go of the last client");
        link.end(Failure::Device);
        return Failure::Device;
    }
    let why = requests(link, backend);
    // First nobody waits for the client any more; what the device asked it for fails.
    link.end(why);
    backend.detach();
    link.drain();
    why
}

fn requests(link: &Link, backend: &mut DeviceBackend) -> Failure {
    let maps = Mutex::new(Maps::default());
    let mut message = Message::new();
    let mut out = Output::default();
    loop {
        match link.next(&mut message, &mut out) {
            Err(why) => return why,
            Ok(Next::Serve(negotiated)) => {
                let served = serve(&mut message, &negotiated, &maps, backend, &mut out);
                let sent = if served == Served::Silent { Ok(()) } else { link.reply(&out) };
                backend.replied(served == Served::Report && sent.is_ok());
                if let Err(why) = sent {
                    return why;
                }
            }
            Ok(Next::Send) => {
                if let Err(why) = link.reply(&out) {
                    return why;
                }
            }
            // What else `next` says it does itself.
            Ok(Next::Wait | Next::Close(_)) => {}
        }
    }
}
