//! A host process that serves devices.

#[allow(dead_code)]
mod cli_support;
mod vfio_user_support;

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use cli_support::{Host, command, run};
use rustix::process::{Pid, Signal, kill_process};
use vfio_user_support::{CONFIG, Raw, until};

/// spec: VFU-94
#[test]
fn a_host_serves_each_device_at_its_socket_and_says_how_to_use_it() {
    let folder = tempfile::tempdir().unwrap();
    let sockets: Vec<PathBuf> = ["edu.sock", "it's.sock"].iter().map(|name| folder.path().join(name)).collect();
    let shown: Vec<&str> = sockets.iter().map(|path| path.to_str().unwrap()).collect();
    let arguments = ["--device", "sim:edu", "--socket", shown[0], "--device", "sim:stateful", "--socket", shown[1]];
    let host = Host::start(&arguments);
    let devices = &host.ready["devices"];
    assert_eq!((&devices[0]["device"], &devices[0]["socket"]), (&"sim:edu".into(), &shown[0].into()));
    let qemu = devices[1]["qemu"].as_str().unwrap();
    // As a shell takes it apart: one argument that is the device, as JSON.
    let words = std::process::Command::new("sh").arg("-c").arg(format!("printf '%s\\n' {qemu}")).output().unwrap();
    let words = String::from_utf8(words.stdout).unwrap();
    let device: serde_json::Value = serde_json::from_str(words.lines().last().unwrap()).unwrap();
    assert_eq!(device["driver"], "vfio-user-pci");
    assert_eq!(device["socket"]["path"], shown[1]);
    assert!(words.contains("share=on"), "{words}");

    let mut client = Raw::connect(&sockets[0]).agreed();
    assert_eq!(client.read(CONFIG, 0, 4).unwrap(), [0x34, 0x12, 0xe8, 0x11]);
    Raw::connect(&sockets[1]).agreed().read(CONFIG, 0, 4).unwrap();
    until("the second is gone", || {
        let status = host.ask(&["status", "--json"]).json();
        let (first, second) = (&status["devices"][0]["served"], &status["devices"][1]["served"]);
        assert_eq!((&first["attached"], &first["client_pid"]), (&true.into(), &std::process::id().into()));
        (&second["attached"], &second["clients_gone"]) == (&false.into(), &1.into())
    });
    assert!(host.ask(&["status"]).out.contains(&format!("client: process {}", std::process::id())));

    let refused = host.ask(&["migrate", "--to", "127.0.0.1:9"]);
    assert_eq!(refused.code, 6, "{refused:?}");
    assert!(refused.err.contains("by its VMM"), "{refused:?}");

    kill_process(Pid::from_child(&host.child), Signal::TERM).unwrap();
    assert_eq!(host.ended().0, 0);
    client.assert_closed();
    assert!(sockets.iter().all(|path| !path.exists()));
}

/// spec: VFU-94
#[test]
fn a_listening_socket_can_be_inherited() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edu.sock");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let host = Host::start(&["--device", "sim:edu", "--socket", &format!("fd:{}", listener.as_raw_fd())]);
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC).unwrap();
    assert!(host.ready["devices"][0]["qemu"].is_null());
    Raw::connect(&path).agreed().read(CONFIG, 0, 4).unwrap();
}

/// spec: VFU-93
#[test]
fn what_cannot_be_served_is_refused_before_anything_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let start = |arguments: &[&str]| {
        let own = ["run", "--control", &path("control.sock"), "--state-dir", state.to_str().unwrap()];
        run(&[&own, arguments].concat())
    };
    let edu = ["--device", "sim:edu", "--socket", &path("x.sock")];
    assert_eq!(start(&[&edu[..], &["--memory", "4M"]].concat()).code, 3);
    assert_eq!(start(&[&edu[..], &["--listen", "127.0.0.1:0"]].concat()).code, 3);
    assert_eq!(start(&[&edu[..], &["--socket", &path("y.sock")]].concat()).code, 3);
    assert_eq!(start(&[&edu[..], &["--device", "sim:edu"]].concat()).code, 3);
    std::fs::write(path("x.sock"), "precious").unwrap();
    let refused = start(&edu);
    assert!(refused.code != 0 && refused.err.contains("no socket"), "{refused:?}");
    assert_eq!(std::fs::read(path("x.sock")).unwrap(), b"precious");
    let refused = start(&["--device", "sim:edu", "--socket", "fd:99"]);
    assert!(refused.code != 0 && refused.err.contains("listens"), "{refused:?}");
    drop(command(&[]));
}
