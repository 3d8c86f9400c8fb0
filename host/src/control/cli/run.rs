//! `run`: a host until it is told to end.

use std::io::{IsTerminal, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::args::RunArgs;
use super::{CliError, print_json, print_line};
use crate::control::exit::Exit;
use crate::control::host::{Host, NoGuest};
use crate::control::service::{HostService, STOP_PATIENCE};
use crate::control::socket::{Patience, Server};

/// Why the host ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    Signal,
    Asked,
}

pub(super) fn run(args: RunArgs, json: bool) -> Result<Exit, CliError> {
    let config = args.draft()?.finish()?;
    log_to_stderr();
    let (end, ended) = channel();
    watch_signals(end.clone())?;
    let socket = config.control_socket.clone();
    let host = Host::start(config, Arc::new(NoGuest))?;
    let asked = move || {
        // Nobody listens any more: the host is ending already.
        let _told = end.send(Why::Asked);
    };
    let service = HostService::new(Arc::clone(&host), asked);
    let server = match Server::start(&socket, service, Patience::default()) {
        Ok(server) => server,
        Err(error) => {
            let _closing = host.stop(Instant::now() + STOP_PATIENCE);
            return Err(error.into());
        }
    };
    let served = host.served();
    let listen = host.listening().map(|address| address.to_string());
    if json {
        let devices = served
            .iter()
            .map(|served| json!({ "device": served.device, "socket": served.at.to_string(), "qemu": served.qemu }));
        let devices: Vec<_> = devices.collect();
        let pid = std::process::id();
        print_json(
            &json!({ "ready": { "pid": pid, "control": server.path(), "listen": listen, "devices": devices } }),
        )?;
    } else {
        let waits = listen.map_or(String::new(), |address| format!(", waits for a guest at {address}"));
        print_line(&format!(
            "ready: process {}, control socket {}{waits}",
            std::process::id(),
            server.path().display()
        ))?;
        for served in &served {
            let how = served.qemu.as_ref().map_or(String::new(), |qemu| format!("\n  qemu-system-x86_64 {qemu}"));
            print_line(&format!("{} is served at {}{how}", served.device, served.at))?;
        }
    }
    // Every sender lives as long as this wait, so that it ends by a message.
    let why = ended.recv().unwrap_or(Why::Asked);
    tracing::info!(?why, "ending");
    let stopped = host.stop(Instant::now() + STOP_PATIENCE);
    drop(server);
    stopped.map_err(|failure| CliError::new(failure.code.exit(), failure.message))?;
    Ok(Exit::Done)
}

fn log_to_stderr() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("VFIO_MEDIATE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // An embedder may have set one already: then it keeps it.
    let _set = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
}

/// SIGTERM and SIGINT end the host in good order; a second one ends it at once.
fn watch_signals(end: Sender<Why>) -> Result<(), CliError> {
    let failed = |what: &str, error: std::io::Error| CliError::failed(format!("{what}: {error}"));
    let (mut read, write) = UnixStream::pair().map_err(|error| failed("a pipe for signals", error))?;
    for signal in [SIGTERM, SIGINT] {
        let write = write.try_clone().map_err(|error| failed("a pipe for signals", error))?;
        signal_hook::low_level::pipe::register(signal, write).map_err(|error| failed("watching signals", error))?;
    }
    let watch = move || {
        // Kept, so that the read below has no end but signals.
        let _write = write;
        let mut byte = [0];
        for count in 0.. {
            if read.read_exact(&mut byte).is_err() {
                return;
            }
            if count > 0 {
                eprintln!("vfio-mediate: ended at once by a second signal");
                std::process::exit(i32::from(Exit::Failed.code()));
            }
            let _told = end.send(Why::Signal);
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(watch).map_err(|error| failed("a thread", error))?;
    Ok(())
}
