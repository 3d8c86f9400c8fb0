//! Sockets and clients: who is served, when, and what is left afterwards.

mod vfio_user_support;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use vfio_mediate::frontend::vfio_user::backend::Options;
use vfio_mediate::frontend::vfio_user::server::{ListenError, Listener};
use vfio_mediate::frontend::vfio_user::wire::Command;
use vfio_user_support::{CONFIG, Raw, Served, access, message, simulated, until};

/// spec: VFU-80
#[test]
fn a_client_finds_the_device_behind_the_socket() {
    let served = Served::simulated("sim:edu");
    let mut client = served.client();
    assert_eq!(client.read(CONFIG, 0, 4).unwrap(), [0x34, 0x12, 0xe8, 0x11]);
    assert_eq!(client.read(0, 0, 4).unwrap(), [0xed, 0, 0, 1]);
    client.write(0, 4, &0x1234_5678_u32.to_le_bytes()).unwrap();
    assert_eq!(client.read(0, 4, 4).unwrap(), (!0x1234_5678_u32).to_le_bytes());
    assert!(served.server.clients().attached);
    assert_eq!(served.server.clients().pid, Some(std::process::id() as i32));
}

/// spec: VFU-81
#[test]
fn the_next_client_waits_for_the_first_and_finds_the_same_state() {
    let served = Served::simulated("sim:edu");
    let mut first = served.client();
    first.write(0, 4, &7u32.to_le_bytes()).unwrap();
    let mut second = Raw::connect(&served.path);
    second.send(&message(1, Command::Version, &[0, 0, 1, 0], false));
    assert_eq!(first.read(0, 4, 4).unwrap(), (!7u32).to_le_bytes(), "the first is served on");
    assert_eq!(served.server.clients().served, 0);
    drop(first);
    second.receive().outcome().unwrap();
    assert_eq!(second.read(0, 4, 4).unwrap(), (!7u32).to_le_bytes());
    assert_eq!(served.server.clients().served, 1);
}

/// spec: VFU-82
#[test]
fn a_client_that_goes_in_the_middle_of_a_message_is_only_gone() {
    let served = Served::simulated("sim:edu");
    let before = served.client().read(0, 4, 4).unwrap();
    served.await_gone(1);
    let whole = message(9, Command::RegionWrite, &access(0, 4, 4, &[1, 2, 3, 4]), false);
    for (count, cut) in (1..whole.len()).enumerate() {
        let mut client = served.client();
        client.send(&whole[..cut]);
        drop(client);
        served.await_gone(count as u64 + 2);
    }
    assert_eq!(served.client().read(0, 4, 4).unwrap(), before, "none of them was done");
}

/// spec: VFU-82
#[test]
fn a_client_that_goes_in_the_middle_of_a_reply_is_only_gone() {
    let served = Served::simulated("sim:stateful");
    for count in 1..=5 {
        let mut client = served.client();
        for id in 0..20 {
            client.send(&message(id, Command::RegionRead, &access(2, 4096, 0x1000, &[]), false));
        }
        client.receive();
        drop(client);
        served.await_gone(count);
    }
    served.client().read(CONFIG, 0, 4).unwrap();
}

/// spec: VFU-67
#[test]
fn whoever_does_not_say_version_is_disconnected_and_the_next_is_served() {
    let options = Options { patience: Duration::from_millis(200), ..Options::default() };
    let served = Served::new(simulated("sim:edu"), options);
    let version = message(1, Command::Version, &[0, 0, 0, 0], false);
    for (count, said) in [0, 1, 16, version.len() - 1].into_iter().enumerate() {
        let mut silent = UnixStream::connect(&served.path).unwrap();
        silent.write_all(&version[..said]).unwrap();
        served.await_gone(count as u64 + 1);
    }
    // Bytes that trickle in make no difference.
    let mut slow = UnixStream::connect(&served.path).unwrap();
    let mut byte = [0];
    slow.write_all(&version[..4]).unwrap();
    for next in &version[4..] {
        std::thread::sleep(Duration::from_millis(50));
        // It is gone before the last.
        if slow.write_all(std::slice::from_ref(next)).is_err() {
            break;
        }
    }
    assert_eq!(slow.read(&mut byte).unwrap_or(0), 0, "no reply");
    // Whoever has said it may be silent.
    let mut client = served.client();
    std::thread::sleep(Duration::from_millis(300));
    client.read(CONFIG, 0, 4).unwrap();
}

/// spec: VFU-83
#[test]
fn a_client_that_never_reads_is_disconnected_and_the_next_is_served() {
    let options = Options { patience: Duration::from_millis(200), ..Options::default() };
    let served = Served::new(simulated("sim:stateful"), options);
    let mut client = served.client();
    let read = message(1, Command::RegionRead, &access(2, 4096, 0x1000, &[]), false);
    let blocked = (0..10_000).find(|_| std::io::Write::write_all(&mut client.stream, &read).is_err());
    assert!(blocked.is_some(), "the server stops taking requests whose replies nobody takes");
    served.await_gone(1);
    served.client().read(CONFIG, 0, 4).unwrap();
}

/// spec: VFU-84
#[test]
fn a_client_that_floods_or_does_not_read_holds_up_no_other_devices_client() {
    let (one, other) = (Served::simulated("sim:stateful"), Served::simulated("sim:edu"));
    let mut hostile = one.client();
    let flood = std::thread::spawn(move || {
        let read = message(1, Command::RegionRead, &access(2, 4096, 0x1000, &[]), false);
        // Until its own send has no room any more, which lasts.
        hostile.stream.set_nonblocking(true).unwrap();
        while std::io::Write::write_all(&mut hostile.stream, &read).is_ok() {}
        hostile
    });
    let hostile = flood.join().unwrap();
    let mut client = other.client();
    for _ in 0..2000 {
        client.read(0, 0, 4).unwrap();
    }
    assert_eq!(other.server.clients().served, 0);
    drop(hostile);
}

/// spec: VFU-85
#[test]
fn a_server_stops_whatever_its_client_does() {
    for what in ["nothing", "half a message", "never reads", "nobody"] {
        let mut served = Served::simulated("sim:stateful");
        let mut client = (what != "nobody").then(|| served.client());
        if let Some(client) = &mut client {
            match what {
                "half a message" => client.send(&message(1, Command::RegionRead, &[0; 16], false)[..20]),
                "never reads" => {
                    let read = message(1, Command::RegionRead, &access(2, 4096, 0x1000, &[]), false);
                    client.stream.set_nonblocking(true).unwrap();
                    while std::io::Write::write_all(&mut client.stream, &read).is_ok() {}
                }
                _ => {}
            }
        }
        let before = Instant::now();
        served.server.stop();
        assert!(before.elapsed() < Duration::from_secs(3), "{what}");
        if let Some(client) = &mut client {
            client.stream.set_nonblocking(false).unwrap();
            client.assert_closed();
        }
        assert!(UnixStream::connect(&served.path).is_err(), "{what}");
        assert!(!served.path.exists(), "{what}");
    }
}

/// spec: VFU-86
#[test]
fn the_socket_is_for_its_owner_alone_and_a_dead_servers_one_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.sock");
    let listener = Listener::bind(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(Listener::bind(&path), Err(ListenError::InUse { .. })));
    drop(listener);
    assert!(!path.exists());

    // As a server that was killed leaves it.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = Listener::bind(&path).unwrap();
    assert_eq!(listener.path(), Some(path.as_path()));

    // One that another has put there is not ours to remove.
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    drop(listener);
    assert!(path.exists());
    drop(other);

    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "a file").unwrap();
    assert!(matches!(Listener::bind(&path), Err(ListenError::NoSocket { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"a file");
}

/// spec: VFU-86
#[test]
fn a_socket_that_listens_can_be_inherited_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.sock");
    let inherited = UnixListener::bind(&path).unwrap();
    let device = simulated("sim:edu");
    let listener = Listener::inherited(inherited.into()).unwrap();
    let server =
        vfio_mediate::frontend::vfio_user::server::Server::start(device, listener, Options::default()).unwrap();
    Raw::connect(&path).agreed().read(CONFIG, 0, 4).unwrap();
    drop(server);
    assert!(path.exists(), "whoever made it removes it");
    assert!(Listener::inherited(UnixStream::pair().unwrap().0.into()).is_err());
    assert!(Listener::inherited(std::fs::File::open("/dev/null").unwrap().into()).is_err());
    assert!(Listener::inherited(std::net::TcpListener::bind("127.0.0.1:0").unwrap().into()).is_err());
}

/// spec: VFU-87
#[test]
fn what_breaks_the_protocol_ends_the_connection_and_what_is_refused_does_not() {
    let served = Served::simulated("sim:edu");
    let mut client = served.client();
    client.send(&message(3, Command::DmaRead, &[0; 16], false));
    assert_eq!(client.receive().outcome(), Err(38), "ENOSYS");
    client.read(CONFIG, 0, 4).unwrap();
    // Shorter than its header.
    client.send(&[1, 0, 4, 0, 15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    client.assert_closed();
    served.await_gone(1);

    let mut client = Raw::connect(&served.path);
    client.send(&message(1, Command::Version, &[9, 0, 0, 0], false));
    assert!(client.receive().outcome().is_err(), "answered before it is closed");
    client.assert_closed();
    until("both are gone", || served.server.clients().served == 2);
}
