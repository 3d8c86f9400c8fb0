//! A function-level reset that a client asks for by configuration space is a reset as any other.

mod mediation_support;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use mediation_support::*;
use rustix::io::Errno;
use vfio_mediate::mediation::mediator::Verdict;
use vfio_mediate_sdk::abi;

/// PCI Express capability; its DEVCTL, and in that the bit that starts a reset.
const EXPRESS: usize = 0x60;
const DEVCTL: u64 = EXPRESS as u64 + 8;
const EXPRESS_FLR: u16 = 1 << 15;
/// Advanced features capability, and its control byte.
const ADVANCED: usize = 0x70;
const AF_CTRL: u64 = ADVANCED as u64 + 4;

fn device(has_reset: bool) -> Arc<FakeDevice> {
    let mut device = FakeDevice::new();
    let config = &mut device.identity.config;
    config[0x41] = EXPRESS as u8;
    config[EXPRESS..EXPRESS + 2].copy_from_slice(&[0x10, ADVANCED as u8]);
    config[ADVANCED..ADVANCED + 3].copy_from_slice(&[0x13, 0, 6]);
    if has_reset {
        config[EXPRESS + 7] = 1 << 4;
        config[ADVANCED + 3] = 0b11;
    }
    *device.config.lock().unwrap() = config.clone();
    Arc::new(device)
}

/// spec: CONFIG-3
#[test]
fn a_reset_by_configuration_space_is_done_alone_and_told_and_the_rest_of_the_write_is_written() {
    for (offset, data) in [(DEVCTL, &(EXPRESS_FLR | 0x2810).to_le_bytes()[..]), (DEVCTL + 1, &[0xa8]), (AF_CTRL, &[1])]
    {
        let device = device(true);
        let told = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&told);
        let mediated = open_script(&device, |script| {
            script.event = Box::new(move |_, event| {
                heard.lock().unwrap().push(event.kind);
                Ok(())
            });
        })
        .unwrap();
        told.lock().unwrap().clear();
        let map = mediated.region_map(0, 0, PAGE).unwrap();
        let (seen, fake) = (Arc::clone(&map), Arc::downgrade(&device));
        let watcher = move |what| {
            let asked = fake.upgrade().is_some_and(|fake| {
                let config = fake.config.lock().unwrap();
                config[DEVCTL as usize + 1] & 0x80 != 0 || config[AF_CTRL as usize] & 1 != 0
            });
            assert!(!asked, "the device was told itself");
            assert!(what != "reset" || !seen.is_live());
        };
        device.watcher.set(Watcher(Box::new(watcher))).unwrap();
        mediated.region_write(CONFIG, offset, data).unwrap();
        assert_eq!(device.resets.load(Ordering::SeqCst), 1, "by {offset:#x}");
        assert_eq!(*told.lock().unwrap(), [abi::EVENT_RESET_PREPARE, abi::EVENT_RESET_DONE]);
        assert!(map.is_live());
        if offset < AF_CTRL {
            assert_eq!(device.config.lock().unwrap()[DEVCTL as usize + 1], 0x28);
        }
    }
}

/// spec: CONFIG-3
#[test]
fn bits_that_start_no_reset_are_written_as_any_other() {
    let with = device(true);
    let mediated = open_plain(&with);
    for (offset, data) in [(DEVCTL, &[0xff, 0x7f][..]), (DEVCTL + 1, &[0x7f]), (AF_CTRL, &[0xfe]), (AF_CTRL + 1, &[1])]
    {
        mediated.region_write(CONFIG, offset, data).unwrap();
        assert_eq!(with.config.lock().unwrap()[offset as usize..][..data.len()], *data);
    }
    assert_eq!(with.resets.load(Ordering::SeqCst), 0);
    // The capabilities do not say that there is a reset: the bits mean something else, or nothing.
    let without = device(false);
    let mediated = open_plain(&without);
    for (offset, data) in [(DEVCTL, &EXPRESS_FLR.to_le_bytes()[..]), (AF_CTRL, &[1])] {
        mediated.region_write(CONFIG, offset, data).unwrap();
        assert_eq!(without.config.lock().unwrap()[offset as usize..][..data.len()], *data);
    }
    assert_eq!(without.resets.load(Ordering::SeqCst), 0);
}

/// spec: CONFIG-3
#[test]
fn a_hook_that_asks_the_device_itself_is_busy() {
    let device = device(true);
    let answers = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&answers);
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(0, 0, 4)];
        script.write = Box::new(move |calls, _, _, _| {
            let asked = [(DEVCTL, &EXPRESS_FLR.to_le_bytes()[..]), (AF_CTRL, &[1]), (DEVCTL, &[0, 0])];
            let mut heard = heard.lock().unwrap();
            heard.extend(asked.map(|(offset, data)| calls.region_write(CONFIG, offset, data)));
            Verdict::Handled
        });
    })
    .unwrap();
    mediated.region_write(0, 0, &[0]).unwrap();
    assert_eq!(*answers.lock().unwrap(), [Err(Errno::BUSY), Err(Errno::BUSY), Ok(())]);
    assert_eq!(device.resets.load(Ordering::SeqCst), 0);
}
