//! Live migration for QEMU's edu device (1234:11e8): the smallest device that has everything hard about migration.
//!
//! A buffer that nobody can read but by DMA, a result that nobody can write, a DMA that takes 100 ms and cannot be
//! cancelled, and no reset. Read [`registers`](self) for the device, `dma` for what is claimed and why no write of the
//! device to guest memory is lost, `migration` for save and restore.
//!
//! **Claims** the DMA registers: which memory the device writes, and no DMA but in RUNNING. Everything else can be read when
//! the device has stopped, and is the device's own business.
//!
//! Locks: `dma`, then none; `stream`, then `dma`. Neither is held while this waits for the device.
//!
//! Start the device with `dma_mask=0xffffffffffffffff` where guest memory fills the first 256 MiB: the default of 28 bits cuts
//! addresses off in silence, the guest's as ours.

mod dma;
mod migration;
mod registers;

use std::sync::{Mutex, MutexGuard};

use registers::{BAR, DMA, DMA_SRC, ID, ID_VALUE};
use vfio_mediate_sdk::state::MigrationFlags;
use vfio_mediate_sdk::{
    Claim, Context, Device, DeviceMatch, Errno, Exactness, Identity, Layout, Plugin, Probe, Result, abi,
};

/// The plug-in.
#[derive(Debug)]
pub struct Edu;

/// One open edu.
#[derive(Debug)]
pub struct EduDevice {
    /// The identification register, which does not change
    id: u32,
    dma: Mutex<dma::Dma>,
    stream: Mutex<migration::Stream>,
}

vfio_mediate_sdk::export_plugin!(Edu);

impl Plugin for Edu {
    const NAME: &'static str = "edu";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const VENDOR: &'static str = "vfio-mediate";
    const MATCHES: &'static [DeviceMatch] = &[DeviceMatch {
        vendor_id: 0x1234,
        device_id: 0x11e8,
        subsystem_vendor_id: abi::ANY_ID,
        subsystem_device_id: abi::ANY_ID,
    }];

    type Device = EduDevice;

    fn init() -> Result<Self> {
        Ok(Self)
    }

    fn probe(&self, identity: &Identity<'_>) -> Result<Probe> {
        match (identity.vendor_id(), identity.device_id()) {
            (0x1234, 0x11e8) => Ok(Probe::Claim),
            _ => Ok(Probe::Decline),
        }
    }

    fn open(&self, cx: &Context<'_>, identity: &Identity<'_>, layout: &mut Layout<EduDevice>) -> Result<EduDevice> {
        let id = registers::with_bus_master(cx, || check_device(cx, identity))?;
        layout
            .claim(Claim::new(BAR, DMA).rw(EduDevice::dma))
            .migration(MigrationFlags { p2p: true, pre_copy: true })
            .dirty_tracking(Exactness::Superset);
        Ok(EduDevice { id, dma: Mutex::new(dma::Dma::new()), stream: Mutex::new(migration::Stream::None) })
    }
}

/// Refuses what is no edu, and a host that cannot do 8-byte accesses: older kernels split them into two of 4, of which edu
/// ignores the second, so that addresses would be cut off.
fn check_device(cx: &Context<'_>, identity: &Identity<'_>) -> Result<u32> {
    let id = cx.read_u32(BAR, ID)?;
    if id != ID_VALUE {
        tracing::error!(device = identity.name(), id, "not an edu of a known version");
        return Err(Errno::ENODEV);
    }
    // A former user's DMA: nothing can stop it, so wait.
    registers::wait_for_dma(cx)?;
    const PATTERN: u64 = 0x0123_4567_89ab_cdef;
    let before = cx.read_u64(BAR, DMA_SRC)?;
    cx.write_u64(BAR, DMA_SRC, PATTERN)?;
    if cx.read_u64(BAR, DMA_SRC)? != PATTERN {
        tracing::error!(device = identity.name(), "8-byte accesses do not reach the device whole");
        return Err(Errno::EOPNOTSUPP);
    }
    cx.write_u64(BAR, DMA_SRC, before)?;
    Ok(id)
}

impl Device for EduDevice {
    /// The next user finds no interrupt pending and no DMA running; the buffer and the registers stay as they are.
    fn close(&self, cx: &Context<'_>) {
        let cleaned = registers::with_bus_master(cx, || {
            cx.write_u32(BAR, registers::STATUS, 0)?;
            registers::wait_for_dma(cx)?;
            let pending = cx.read_u32(BAR, registers::IRQ_STATUS)?;
            cx.write_u32(BAR, registers::IRQ_ACK, pending)
        });
        if let Err(errno) = cleaned {
            tracing::warn!(%errno, "the device was left as it was");
        }
    }
}

/// A panic while a lock was held leaves what it protects unknown.
fn lock<T>(mutex: &Mutex<T>) -> Result<MutexGuard<'_, T>> {
    mutex.lock().map_err(|_| Errno::EIO)
}

#[cfg(test)]
mod tests;
