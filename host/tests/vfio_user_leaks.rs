//! What is left of clients that are gone: nothing. Counted in a program of its own, whose descriptors and threads are all ours.

mod vfio_user_support;

use std::os::fd::AsFd;

use vfio_mediate::frontend::vfio_user::wire::Command;
use vfio_user_support::{Held, Served, access, message, until};

fn set_irqs(flags: u32, index: u32, start: u32, count: u32) -> Vec<u8> {
    [20, flags, index, start, count].iter().flat_map(|number| number.to_le_bytes()).collect()
}

const TRIGGER_EVENTFD: u32 = 1 << 5 | 1 << 2;

/// spec: VFU-88
#[test]
fn clients_leave_no_descriptor_thread_or_mapping_behind() {
    let nobody = Held::now();
    {
        let mut served = [Served::simulated("sim:edu"), Served::simulated("sim:stateful")];
        let started = Held::now();
        let null = std::fs::File::open("/dev/null").unwrap();
        let event = vfio_mediate::sys::EventFd::new().unwrap();
        for round in 1..=50 {
            for (served, msi) in served.iter().zip([1, 1]) {
                let mut client = served.client();
                let armed =
                    client.call_with(Command::DeviceSetIrqs, &set_irqs(TRIGGER_EVENTFD, msi, 0, 1), &[event.as_fd()]);
                armed.outcome().unwrap();
                // Refused, with descriptors; and given up in the middle, with descriptors.
                let refused = client.call_with(Command::DeviceReset, &[], &[null.as_fd(), null.as_fd()]);
                assert_eq!(refused.outcome(), Err(22));
                let many = vec![null.as_fd(); 100];
                assert_eq!(client.call_with(Command::DeviceReset, &[], &many).outcome(), Err(22));
                client.send_with(&message(1, Command::DmaMap, &[0; 32], false)[..20], &[null.as_fd()]);
                if round % 2 == 0 {
                    client.send(&access(0, 0, 0, &[0; 64]));
                }
                drop(client);
                served.await_gone(round);
            }
        }
        drop((null, event));
        until("all is given back", || Held::now() == started);
        served.iter_mut().for_each(|served| served.server.stop());
    }
    until("all is given back", || Held::now() == nobody);
}
