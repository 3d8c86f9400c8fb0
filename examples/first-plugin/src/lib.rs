//! A first plug-in: gives edu's write-only register at 0x60 (raise interrupt) a value that can be read.

use vfio_mediate_sdk::{
    Access, Claim, Context, Device, DeviceMatch, Identity, Layout, Plugin, Probe, Result, Shadow, Verdict, abi,
};

const BAR: u32 = 0;
const IRQ_RAISE: u64 = 0x60;

/// What is the same for all devices: nothing.
#[derive(Debug)]
pub struct FirstPlugin;

/// What one device needs. Hooks run concurrently, so it is behind atomics (here) or locks.
#[derive(Debug)]
pub struct FirstDevice {
    written: Shadow<1>,
}

vfio_mediate_sdk::export_plugin!(FirstPlugin);

impl Plugin for FirstPlugin {
    const NAME: &'static str = "first";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const VENDOR: &'static str = "an example";
    /// The host asks us about these devices only.
    const MATCHES: &'static [DeviceMatch] = &[DeviceMatch {
        vendor_id: 0x1234,
        device_id: 0x11e8,
        subsystem_vendor_id: abi::ANY_ID,
        subsystem_device_id: abi::ANY_ID,
    }];
    type Device = FirstDevice;

    fn init() -> Result<Self> {
        Ok(Self)
    }

    /// Look closer, and claim or decline. Whoever declines is not failing: the next plug-in is asked.
    fn probe(&self, identity: &Identity<'_>) -> Result<Probe> {
        Ok(if identity.revision() >= 0x10 { Probe::Claim } else { Probe::Decline })
    }

    /// Say which bytes are yours, and what happens when a client touches them. All others cost nothing.
    fn open(&self, _: &Context<'_>, identity: &Identity<'_>, layout: &mut Layout<FirstDevice>) -> Result<FirstDevice> {
        tracing::info!(device = identity.name(), "opened");
        layout.claim(Claim::new(BAR, IRQ_RAISE..IRQ_RAISE + 4).rw(FirstDevice::irq_raise));
        Ok(FirstDevice { written: Shadow::new([IRQ_RAISE]) })
    }
}

impl FirstDevice {
    fn irq_raise(&self, _: &Context<'_>, access: &mut Access<'_>) -> Verdict {
        if access.is_write() {
            self.written.note(access);
            return Verdict::Forward;
        }
        access.set_value(self.written.get(IRQ_RAISE).unwrap_or(0).into()).into()
    }
}

impl Device for FirstDevice {
    fn close(&self, _: &Context<'_>) {}
}

#[cfg(test)]
mod tests;
