//! Lets everything pass, and logs each access that it was called for: what tests compare with what a guest did.
//!
//! It claims a few registers of edu and of an igb's VF, and **must never** change what an access does. A line of its log is
//! `saw` with `region`, `offset`, `write` and `length` as fields.

use vfio_mediate_sdk::{
    Access, Claim, Context, Device, DeviceMatch, Errno, Identity, Layout, Plugin, Probe, Result, Verdict, abi,
};

const EDU: (u32, u32) = (0x1234, 0x11e8);
const IGB_VF: (u32, u32) = (0x8086, 0x10ca);
const BAR: u32 = 0;

/// edu: liveness, and what raises an interrupt.
const EDU_CLAIMS: [std::ops::Range<u64>; 2] = [0x04..0x08, 0x60..0x64];
/// igb's VF: the mailbox's memory, and its register.
const IGB_VF_CLAIMS: [std::ops::Range<u64>; 2] = [0x800..0x840, 0xc40..0xc44];

/// The plug-in.
#[derive(Debug)]
pub struct Witness;

/// One device that is watched.
#[derive(Debug)]
pub struct Watched;

vfio_mediate_sdk::export_plugin!(Witness);

const fn matches((vendor_id, device_id): (u32, u32)) -> DeviceMatch {
    DeviceMatch { vendor_id, device_id, subsystem_vendor_id: abi::ANY_ID, subsystem_device_id: abi::ANY_ID }
}

impl Plugin for Witness {
    const NAME: &'static str = "witness";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const VENDOR: &'static str = "vfio-mediate";
    const MATCHES: &'static [DeviceMatch] = &[matches(EDU), matches(IGB_VF)];
    type Device = Watched;

    fn init() -> Result<Self> {
        Ok(Self)
    }

    fn probe(&self, _: &Identity<'_>) -> Result<Probe> {
        Ok(Probe::Claim)
    }

    fn open(&self, _: &Context<'_>, identity: &Identity<'_>, layout: &mut Layout<Watched>) -> Result<Watched> {
        let claims = match (u32::from(identity.vendor_id()), u32::from(identity.device_id())) {
            EDU => EDU_CLAIMS,
            IGB_VF => IGB_VF_CLAIMS,
            _ => return Err(Errno::ENODEV),
        };
        for claim in claims {
            layout.claim(Claim::new(BAR, claim).rw(Watched::saw));
        }
        Ok(Watched)
    }
}

impl Watched {
    fn saw(&self, _: &Context<'_>, access: &mut Access<'_>) -> Verdict {
        tracing::info!(
            region = BAR,
            offset = access.offset(),
            write = access.is_write(),
            length = access.length(),
            "saw"
        );
        Verdict::Forward
    }
}

impl Device for Watched {
    fn close(&self, _: &Context<'_>) {}
}

#[cfg(test)]
mod tests {
    use vfio_mediate_sdk::testing::{Bus, FakeHost, Model, TestIdentity};

    use super::*;

    /// Answers every read with the complement of what was written last, whatever the register.
    struct Complement(u32);

    impl Model for Complement {
        fn read(&mut self, _: &mut Bus, _: u32, _: u64, data: &mut [u8]) -> Result<()> {
            data.copy_from_slice(&(!self.0).to_le_bytes());
            Ok(())
        }

        fn write(&mut self, _: &mut Bus, _: u32, _: u64, data: &[u8]) -> Result<()> {
            self.0 = data.try_into().map(u32::from_le_bytes).unwrap_or(0);
            Ok(())
        }

        fn tick(&mut self, _: &mut Bus) {}
    }

    #[test]
    fn what_it_watches_reaches_the_device_unchanged() {
        for (vendor_id, device_id, offset) in [(0x1234, 0x11e8, 0x04), (0x8086, 0x10ca, 0x83c)] {
            let host = FakeHost::new(Complement(0), 0);
            let identity = TestIdentity { vendor_id, device_id, revision: 1, name: "watched" };
            let device = host.open::<Witness>(&identity).unwrap().unwrap();
            device.write_u32(BAR, offset, 0x1234).unwrap();
            assert_eq!(device.read_u32(BAR, offset), Ok(!0x1234));
        }
    }
}
