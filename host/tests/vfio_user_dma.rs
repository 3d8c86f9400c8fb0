//! A served device and its client's memory: in files, by messages, in flight when the client is lost.

mod vfio_user_support;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_mediate::device::sim;
use vfio_mediate::frontend::vfio_user::backend::Options;
use vfio_mediate::frontend::vfio_user::wire::Command;
use vfio_mediate::memory::AddressSpace;
use vfio_mediate::sys::{EventFd, Seal, memfd};
use vfio_user_support::{CONFIG, LONG, Memory, Raw, Served, access, dma_map, in_space, mediated, message, until};

const SIZE: u64 = 1 << 20;
const BUFFER: u64 = 0x40000;
const START: u32 = 1;
const TO_MEMORY: u32 = 2;
const INTERRUPT: u32 = 4;
/// SET_IRQS: an eventfd that is triggered
const TRIGGER_EVENTFD: u32 = 1 << 5 | 1 << 2;

fn memory() -> std::fs::File {
    std::fs::File::from(memfd("guest", SIZE, Seal::Size).unwrap())
}

/// An edu whose DMA takes no time of ours.
fn quick_edu() -> Arc<dyn vfio_mediate::device::Device> {
    sim::open("sim:edu").unwrap()
}

/// Starts a transfer of `count` bytes between guest memory and the device's buffer.
fn start(client: &mut Raw, address: u64, count: u64, command: u32) {
    let (source, destination) = if command & TO_MEMORY == 0 { (address, BUFFER) } else { (BUFFER, address) };
    for (register, value) in [(0x80, source), (0x88, destination), (0x90, count)] {
        client.write(0, register, &value.to_le_bytes()).unwrap();
    }
    client.write(0, 0x98, &(START | command).to_le_bytes()).unwrap();
}

fn is_busy(client: &mut Raw) -> bool {
    client.read(0, 0x98, 4).unwrap()[0] & 1 != 0
}

fn transfer(client: &mut Raw, address: u64, count: u64, command: u32) {
    start(client, address, count, command);
    until("the transfer is done", || !is_busy(client));
}

/// As [`transfer`], of a client whose memory is reached by messages.
fn transfer_answering(client: &mut Raw, memory: &mut Memory, address: u64, count: u64, command: u32) {
    start(client, address, count, command);
    let deadline = Instant::now() + LONG;
    loop {
        let status = client.call_answering(Command::RegionRead, &access(0, 0x98, 4, &[]), memory);
        if status.outcome().unwrap()[16] & 1 == 0 {
            return;
        }
        assert!(Instant::now() < deadline);
    }
}

fn edu_with(file: &std::fs::File) -> (Served, Raw) {
    let served = Served::new(mediated(quick_edu()), Options::default());
    let mut client = served.client();
    client.map(0, SIZE, Some(file.as_fd())).unwrap();
    client.enable();
    (served, client)
}

/// spec: VFU-95
#[test]
fn a_device_reaches_its_clients_memory_in_a_file_and_signals_its_eventfd() {
    let file = memory();
    let (_served, mut client) = edu_with(&file);
    file.write_all_at(b"from the guest", 0x1000).unwrap();
    transfer(&mut client, 0x1000, 14, 0);
    let event = EventFd::new().unwrap();
    let msi = [20, TRIGGER_EVENTFD, 1, 0, 1].map(u32::to_le_bytes).concat();
    client.call_with(Command::DeviceSetIrqs, &msi, &[event.as_fd()]).outcome().unwrap();
    transfer(&mut client, 0x3000, 14, TO_MEMORY | INTERRUPT);
    let mut back = [0; 14];
    file.read_exact_at(&mut back, 0x3000).unwrap();
    assert_eq!(&back, b"from the guest");
    assert_eq!(event.wait(Instant::now() + LONG).unwrap(), 1);
}

/// spec: VFU-95
#[test]
fn a_device_reaches_its_clients_memory_by_messages() {
    let served = Served::new(mediated(quick_edu()), Options::default());
    let mut client = served.client();
    client.map(0x10000, SIZE, None).unwrap();
    client.enable();
    let mut memory = Memory::new(0x10000, SIZE as usize);
    memory.bytes[0x1000..0x1005].copy_from_slice(b"hello");
    transfer_answering(&mut client, &mut memory, 0x11000, 5, 0);
    transfer_answering(&mut client, &mut memory, 0x15000, 5, TO_MEMORY);
    assert_eq!(&memory.bytes[0x5000..0x5005], b"hello");
    assert!(memory.asked >= 2);
    // Unmapped, nothing is asked any more.
    client.unmap(0x10000, SIZE).unwrap();
    let asked = memory.asked;
    transfer_answering(&mut client, &mut memory, 0x15000, 5, TO_MEMORY);
    assert_eq!(memory.asked, asked);
}

/// spec: VFU-90
#[test]
fn a_device_and_its_client_ask_each_other_at_once_without_end() {
    let served = Served::new(mediated(quick_edu()), Options::default());
    let mut client = served.client();
    client.map(0, SIZE, None).unwrap();
    client.enable();
    let mut memory = Memory::new(0, SIZE as usize);
    for round in 0..3 {
        let asked = memory.asked;
        start(&mut client, 0x2000 * round, 4096, if round % 2 == 0 { 0 } else { TO_MEMORY });
        // Many at once, without waiting for any: the device's own come in between.
        let mut busy = true;
        while busy {
            for id in 0..200 {
                client.send(&message(id, Command::RegionRead, &access(0, 0x98, 4, &[]), false));
            }
            let mut replies = 0;
            while replies < 200 {
                let got = client.receive();
                match memory.answer(&got) {
                    Some(reply) => client.send(&reply),
                    None => {
                        busy = got.outcome().unwrap()[16] & 1 != 0;
                        replies += 1;
                    }
                }
            }
        }
        assert!(memory.asked > asked);
    }
}

/// spec: VFU-96
#[test]
fn a_lost_client_takes_its_memory_and_interrupts_with_it_and_nothing_else() {
    let file = memory();
    let (served, mut client) = edu_with(&file);
    file.write_all_at(b"kept", 0).unwrap();
    transfer(&mut client, 0, 4, 0);
    client.write(0, 4, &5u32.to_le_bytes()).unwrap();
    // In flight when the client goes.
    start(&mut client, 0x8000, 4, TO_MEMORY | INTERRUPT);
    drop(client);
    served.await_gone(1);
    let before: Vec<u8> = {
        let mut all = vec![0; SIZE as usize];
        file.read_exact_at(&mut all, 0).unwrap();
        all
    };
    // A device's transfer takes 100 ms: what was in flight would have come by now.
    let mut second = served.client();
    until("the transfer is done", || !is_busy(&mut second));
    let mut after = vec![0; SIZE as usize];
    file.read_exact_at(&mut after, 0).unwrap();
    assert!(before == after, "no DMA after the loss");
    assert_eq!(second.read(CONFIG, 4, 1).unwrap()[0] & 4, 0, "bus mastering is off");
    assert_eq!(second.read(0, 4, 4).unwrap(), (!5u32).to_le_bytes(), "registers are kept");

    // The next client brings its own memory, at the same addresses.
    let own = memory();
    second.map(0, SIZE, Some(own.as_fd())).unwrap();
    second.enable();
    transfer(&mut second, 0x100, 4, TO_MEMORY);
    let mut back = [0; 4];
    own.read_exact_at(&mut back, 0x100).unwrap();
    assert_eq!(&back, b"kept", "and so is its buffer");
}

/// spec: VFU-91
#[test]
fn a_client_that_dies_while_the_device_waits_for_it_holds_nothing_up() {
    let served = Served::new(mediated(quick_edu()), Options::default());
    for round in 0..3 {
        let mut client = served.client();
        client.map(0, SIZE, None).unwrap();
        client.enable();
        start(&mut client, 0, 64, 0);
        let asked = client.receive();
        assert_eq!(asked.header.command, Command::DmaRead.raw());
        drop(client);
        served.await_gone(2 * round + 1);
        let mut next = served.client();
        until("the transfer has ended", || !is_busy(&mut next));
        drop(next);
        served.await_gone(2 * round + 2);
    }
}

/// spec: VFU-97
#[test]
fn devices_of_one_vm_share_the_same_memory_and_refuse_other_at_its_addresses() {
    let space = AddressSpace::of_clients(1 << 30);
    let one = Served::new(in_space(quick_edu(), &space), Options::default());
    let other = Served::new(in_space(sim::open("sim:stateful").unwrap(), &space), Options::default());
    let (file, foreign) = (memory(), memory());
    let (mut first, mut second) = (one.client(), other.client());
    first.map(0, SIZE, Some(file.as_fd())).unwrap();
    assert_eq!(second.map(0, SIZE, Some(foreign.as_fd())), Err(17), "EEXIST");
    assert_eq!(second.map(0x1000, 0x1000, Some(file.as_fd())), Err(17));
    second.map(0, SIZE, Some(file.as_fd())).unwrap();
    // It stays while one has it.
    drop(first);
    one.await_gone(1);
    let mut first = one.client();
    assert_eq!(first.map(0, SIZE, Some(foreign.as_fd())), Err(17));
    second.unmap(0, SIZE).unwrap();
    first.map(0, SIZE, Some(foreign.as_fd())).unwrap();
}

fn report(client: &mut Raw, iova: u64, length: u64) -> Result<Vec<u8>, i32> {
    let data = [iova, length, 4096].map(u64::to_le_bytes).concat();
    let room = length.div_ceil(4096).div_ceil(64) as u32 * 8;
    client.feature(8, 1, &data, room).map(|data| data[24..].to_vec())
}

/// No ranges: everything.
fn start_logging(client: &mut Raw) {
    let data = [4096u64, 0].map(u64::to_le_bytes).concat();
    client.feature(6, 2, &data, 0).unwrap();
}

fn dirty(bitmap: &[u8]) -> Vec<usize> {
    (0..bitmap.len() * 8).filter(|bit| bitmap[bit / 8] >> (bit % 8) & 1 != 0).collect()
}

/// spec: VFU-98
#[test]
fn what_the_device_wrote_is_reported_once_to_whom_it_arrived() {
    let space = AddressSpace::of_clients(1 << 30);
    let options = Options { patience: Duration::from_millis(300), ..Options::default() };
    let served = Served::new(in_space(sim::open("sim:stateful").unwrap(), &space), options);
    let other = Served::new(in_space(sim::open("sim:stateful").unwrap(), &space), Options::default());
    let file = memory();
    let (mut client, mut second) = (served.client(), other.client());
    for client in [&mut client, &mut second] {
        client.map(0, SIZE, Some(file.as_fd())).unwrap();
        client.enable();
    }
    assert_eq!(report(&mut client, 0, SIZE), Err(22), "nobody logs");
    start_logging(&mut client);
    start_logging(&mut second);
    assert_eq!(dirty(&report(&mut client, 0, SIZE).unwrap()), [0usize; 0], "what was before is known to the client");
    let doorbell = |client: &mut Raw, target: u64| {
        client.write(0, 0x08, &target.to_le_bytes()).unwrap();
        client.write(0, 0x10, &64u32.to_le_bytes()).unwrap();
        client.write(0, 0x18, &1u32.to_le_bytes()).unwrap();
    };
    doorbell(&mut client, 0x5000);
    assert_eq!(dirty(&report(&mut client, 0, SIZE).unwrap()), [5]);
    assert_eq!(dirty(&report(&mut client, 0, SIZE).unwrap()), [0usize; 0]);

    // A report that nobody takes, behind replies that nobody takes: it is given back, and the VM's other device has it.
    doorbell(&mut client, 0x9000);
    let read = message(1, Command::RegionRead, &access(2, 4096, 0x1000, &[]), false);
    // More than any socket's buffer takes, and as many as can wait.
    for _ in 0..3500 {
        client.send(&read);
    }
    let data = [0, SIZE, 4096].map(u64::to_le_bytes).concat();
    let head = [8 + 24 + 32u32, 8 | 1 << 16].map(u32::to_le_bytes).concat();
    client.send(&message(2, Command::DeviceFeature, &[head, data].concat(), false));
    served.await_gone(1);
    assert_eq!(dirty(&report(&mut second, 0, SIZE).unwrap()), [9]);
    drop(client);
}

/// spec: VFU-98
#[test]
fn a_lost_clients_logging_is_ended() {
    let served = Served::simulated("sim:stateful");
    let file = memory();
    for count in 1..=3 {
        let mut client = served.client();
        client.map(0, SIZE, Some(file.as_fd())).unwrap();
        start_logging(&mut client);
        drop(client);
        served.await_gone(count);
    }
}

/// spec: VFU-95
#[test]
fn maps_come_and_go_in_any_number() {
    let served = Served::simulated("sim:edu");
    let mut client = served.client();
    let file: OwnedFd = memory().into();
    for round in 0..20u64 {
        for map in 0..100 {
            client.map(map * SIZE, SIZE, (round % 2 == 0).then(|| file.as_fd())).unwrap();
        }
        if round % 3 == 0 {
            let all = [&24u32.to_le_bytes()[..], &2u32.to_le_bytes(), &[0; 16]].concat();
            client.call(Command::DmaUnmap, &all).outcome().unwrap();
        } else {
            (0..100).for_each(|map| client.unmap(map * SIZE, SIZE).unwrap());
        }
    }
    // Posted, as QEMU does it.
    client.send(&message(5, Command::DmaMap, &dma_map(0, SIZE), true));
    client.unmap(0, SIZE).unwrap();
}
