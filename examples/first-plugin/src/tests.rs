//! No hardware, no host: a model of the few registers that matter.

use vfio_mediate_sdk::Result;
use vfio_mediate_sdk::testing::{Bus, FakeHost, Model, TestIdentity};

use super::*;

/// Swallows writes and remembers the last one; reads as all ones.
struct WriteOnly(u32);

impl Model for WriteOnly {
    fn read(&mut self, _: &mut Bus, _: u32, _: u64, data: &mut [u8]) -> Result<()> {
        data.fill(0xff);
        Ok(())
    }

    fn write(&mut self, _: &mut Bus, _: u32, _: u64, data: &[u8]) -> Result<()> {
        self.0 = data.try_into().map(u32::from_le_bytes).unwrap_or(0);
        Ok(())
    }

    fn tick(&mut self, _: &mut Bus) {}
}

const EDU: TestIdentity = TestIdentity { vendor_id: 0x1234, device_id: 0x11e8, revision: 0x10, name: "edu0" };

#[test]
fn what_was_written_reads_back_and_reached_the_device() {
    let host = FakeHost::new(WriteOnly(0), 0);
    let device = host.open::<FirstPlugin>(&EDU).unwrap().unwrap();
    assert_eq!(device.read_u32(BAR, IRQ_RAISE), Ok(0));
    device.write_u32(BAR, IRQ_RAISE, 0x40).unwrap();
    assert_eq!(device.read_u32(BAR, IRQ_RAISE), Ok(0x40));
    assert_eq!(host.with(|model, _| model.0), 0x40);
    // The neighbours are the device's own.
    assert_eq!(device.read_u32(BAR, IRQ_RAISE + 4), Ok(u32::MAX));
}

#[test]
fn an_older_revision_is_declined() {
    let host = FakeHost::new(WriteOnly(0), 0);
    assert!(host.open::<FirstPlugin>(&TestIdentity { revision: 0x0f, ..EDU }).unwrap().is_none());
}
