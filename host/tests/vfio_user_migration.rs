//! A served device's migration, as its client drives it; and what else a client can be given.

mod vfio_user_support;

use std::os::fd::AsFd;

use vfio_mediate::frontend::vfio_user::backend::Options;
use vfio_mediate::frontend::vfio_user::wire::Command;
use vfio_mediate::sys::EventFd;
use vfio_user_support::{Raw, Served, message, simulated};

const STOP: u32 = 1;
const RUNNING: u32 = 2;
const STOP_COPY: u32 = 3;
const RESUMING: u32 = 4;
const PRE_COPY: u32 = 6;

fn set_state(client: &mut Raw, state: u32) -> Result<(), i32> {
    client.feature(2, 2, &[state.to_le_bytes(), [0; 4]].concat(), 0).map(drop)
}

fn state(client: &mut Raw) -> u32 {
    let data = client.feature(2, 1, &[], 8).unwrap();
    u32::from_le_bytes(data[..4].try_into().unwrap())
}

fn read_data(client: &mut Raw, size: u32) -> Result<Vec<u8>, i32> {
    let payload = [8 + size, size].map(u32::to_le_bytes).concat();
    client.call(Command::MigDataRead, &payload).outcome().map(|payload| payload[8..].to_vec())
}

fn write_data(client: &mut Raw, data: &[u8]) -> Result<(), i32> {
    let head = [8 + data.len() as u32, data.len() as u32].map(u32::to_le_bytes).concat();
    client.call(Command::MigDataWrite, &[&head, data].concat()).outcome().map(drop)
}

/// Until a short read.
fn read_all(client: &mut Raw, size: u32) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let data = read_data(client, size).unwrap();
        all.extend_from_slice(&data);
        if data.len() < size as usize {
            return all;
        }
    }
}

/// With a pattern in its memory and a register.
fn prepared() -> (Served, Raw) {
    let served = Served::simulated("sim:stateful");
    let mut client = served.client();
    client.enable();
    client.write(2, 5000, &[7; 3000]).unwrap();
    client.write(0, 0x14, &0x1234u32.to_le_bytes()).unwrap();
    (served, client)
}

fn loaded_by(data: &[u8], piece: usize) -> Raw {
    let target = Served::simulated("sim:stateful");
    let mut client = target.client();
    set_state(&mut client, RESUMING).unwrap();
    for piece in data.chunks(piece) {
        write_data(&mut client, piece).unwrap();
    }
    set_state(&mut client, RUNNING).unwrap();
    assert_eq!(client.read(2, 5000, 3000).unwrap(), [7; 3000]);
    assert_eq!(client.read(0, 0x14, 4).unwrap(), 0x1234u32.to_le_bytes());
    // Outlived by its stream, which is not used any more.
    client
}

/// spec: VFU-99
#[test]
fn a_devices_state_moves_in_pieces_of_any_size() {
    for (read, write) in [(1 << 20, 1 << 20), (4096, 100_000), (1000, 777), (8193, 4096)] {
        let (_served, mut client) = prepared();
        set_state(&mut client, PRE_COPY).unwrap();
        let mut data = read_all(&mut client, read);
        client.write(2, 5000, &[7; 10]).unwrap();
        set_state(&mut client, STOP_COPY).unwrap();
        data.extend(read_all(&mut client, read));
        assert_eq!(read_data(&mut client, read).unwrap(), [0u8; 0], "the end stays the end");
        loaded_by(&data, write);
        set_state(&mut client, RUNNING).unwrap();
    }
}

/// spec: VFU-99
#[test]
fn the_next_client_goes_on_where_the_last_one_stopped() {
    let (served, mut client) = prepared();
    set_state(&mut client, STOP_COPY).unwrap();
    let mut data = read_data(&mut client, 1000).unwrap();
    drop(client);
    let mut client = served.client();
    assert_eq!(state(&mut client), STOP_COPY);
    data.extend(read_all(&mut client, 3000));
    loaded_by(&data, 5000);
}

/// spec: VFU-99
#[test]
fn data_of_another_device_and_data_that_are_not_whole_are_refused() {
    let (_served, mut client) = prepared();
    set_state(&mut client, STOP_COPY).unwrap();
    let data = read_all(&mut client, 1 << 20);
    let target = Served::simulated("sim:stateful");
    let mut client = target.client();
    assert_eq!(write_data(&mut client, &data), Err(22), "not RESUMING");
    let attempt = |client: &mut Raw, data: &[u8]| {
        // Out of a RESUMING that has failed nothing else leads.
        client.call(Command::DeviceReset, &[]).outcome().unwrap();
        set_state(client, RESUMING).unwrap();
        let written = write_data(client, data);
        written.and_then(|()| set_state(client, STOP))
    };
    let mut foreign = data.clone();
    // The device id, in the match data behind the head of 8 bytes.
    foreign[8 + 6] ^= 1;
    assert_eq!(attempt(&mut client, &foreign), Err(19), "ENODEV");
    assert_eq!(attempt(&mut client, b"nonsense"), Err(74), "EBADMSG");
    for cut in [1, 7, 8, 20, data.len() - 1] {
        assert!(attempt(&mut client, &data[..cut]).is_err(), "{cut}");
    }
    assert_eq!(attempt(&mut client, &data), Ok(()));
    assert_eq!(state(&mut client), STOP);
}

/// spec: VFU-99
#[test]
fn features_are_there_as_the_device_has_them() {
    let stateful = Served::simulated("sim:stateful");
    let mut client = stateful.client();
    let probe = |client: &mut Raw, feature: u32, operations: u32| client.feature(feature, 4 | operations, &[], 0);
    assert!(probe(&mut client, 1, 1).is_ok() && probe(&mut client, 1, 2).is_err());
    assert!(probe(&mut client, 2, 3).is_ok());
    for (feature, operation) in [(6, 2), (7, 2), (8, 1)] {
        assert!(probe(&mut client, feature, operation).is_ok() && probe(&mut client, feature, 3 - operation).is_err());
    }
    let flags = client.feature(1, 1, &[], 8).unwrap();
    assert_eq!(flags, 5u64.to_le_bytes(), "STOP_COPY and PRE_COPY; P2P is not used");
    let edu = Served::simulated("sim:edu");
    let mut client = edu.client();
    assert_eq!(probe(&mut client, 1, 1), Err(25), "nobody saves it");
    assert_eq!(client.feature(2, 1, &[], 8), Err(25));
}

/// spec: VFU-96
#[test]
fn low_power_of_a_lost_client_is_ended() {
    let served = Served::simulated("sim:stateful");
    let mut client = served.client();
    client.feature(3, 2, &[], 0).unwrap();
    assert_eq!(client.read(7, 0, 4), Err(5));
    client.feature(5, 2, &[], 0).unwrap();
    client.read(7, 0, 4).unwrap();
    let event = EventFd::new().unwrap();
    let head = [16u32, 4 | 2 << 16].map(u32::to_le_bytes).concat();
    client.call_with(Command::DeviceFeature, &[&head[..], &[0; 8]].concat(), &[event.as_fd()]).outcome().unwrap();
    drop(client);
    served.await_gone(1);
    assert!(served.device.entered().is_none());
    served.client().read(7, 0, 4).unwrap();
}

/// spec: VFU-66
#[test]
fn a_devices_file_is_handed_out_only_where_the_operator_shares_it() {
    let info = |client: &mut Raw| {
        let id = client.next_id();
        let payload = [&[4096u32, 0, 2, 0].map(u32::to_le_bytes).concat()[..], &[0; 16]].concat();
        client.send(&message(id, Command::DeviceGetRegionInfo, &payload, false));
        let (got, fds) = client.receive_with();
        (u32::from_le_bytes(got.outcome().unwrap()[4..8].try_into().unwrap()), fds)
    };
    const MMAP: u32 = 4;
    let (flags, fds) = info(&mut Served::simulated("sim:stateful").client());
    assert!(flags & MMAP == 0 && fds.is_empty());
    let options = Options { share_device_fd: true, ..Options::default() };
    let served = Served::new(simulated("sim:stateful"), options);
    let mut client = served.client();
    client.enable();
    client.write(2, 8192, b"seen").unwrap();
    let (flags, fds) = info(&mut client);
    assert!(flags & MMAP != 0 && fds.len() == 1);
    let mapping = vfio_mediate::sys::Mapping::new(&fds[0], 8192, 4096).unwrap();
    let mut seen = [0; 4];
    mapping.read(0, &mut seen).unwrap();
    assert_eq!(&seen, b"seen");
}
