//! The traits of a plug-in, one a role: [`Plugin`] and [`Device`] for all, the others as a device needs them.
//!
//! *Common contract*: every method takes `&self`, since hooks run concurrently with everything but `open` and `close`. A
//! method may call any service of the [`Context`] that it was given, on the same thread, before it returns; no service
//! calls back into the same device. A panic becomes EIO, is logged, and leaves the device in use: a lock that it poisoned
//! stays so.
#![allow(unsafe_code)]

use std::fmt;
use std::marker::PhantomData;

use crate::abi;
use crate::context::Context;
use crate::hooks::Layout;
use crate::state::DeviceState;
use crate::{Errno, Result};

/// A plug-in: who it is, which devices it knows, how to open one. Exported by [`export_plugin!`](crate::export_plugin).
pub trait Plugin: Sized + Send + Sync + 'static {
    /// 1 to 64 bytes of `[a-z0-9_-]`. Two versions of one plug-in share it.
    const NAME: &'static str;
    /// Semantic version, 1 to 64 bytes.
    const VERSION: &'static str;
    /// For people, at most 128 bytes.
    const VENDOR: &'static str;
    /// Devices to be asked about.
    const MATCHES: &'static [abi::DeviceMatch];

    type Device: Device;

    /// Called once, before the first `probe`, on the thread that registers.
    fn init() -> Result<Self>;

    /// Claim or decline. May only look at `identity`. An error says that the device is this plug-in's and cannot be
    /// served: the open fails then, no other plug-in is asked. Never overlaps `open` and `close` of the same device.
    fn probe(&self, identity: &Identity<'_>) -> Result<Probe>;

    /// Opens a device that was claimed, in state RUNNING, and says in `layout` what the plug-in does for it. No hook of
    /// the device is called before this returns. Whoever fails here cleans up: `close` is not called.
    fn open(
        &self,
        cx: &Context<'_>,
        identity: &Identity<'_>,
        layout: &mut Layout<Self::Device>,
    ) -> Result<Self::Device>;
}

/// [`Plugin::probe`]'s answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    Claim,
    /// Not mine: the next plug-in is asked, then the device passes through plainly.
    Decline,
}

/// One open device.
pub trait Device: Sized + Send + Sync + 'static {
    /// The last call, in any state; no hook is in flight and the device is still there. Dropped afterwards.
    fn close(&self, cx: &Context<'_>);
}

/// What happens to a device beside accesses.
pub trait Events: Device {
    /// Called after the fact, on any thread, never concurrently with itself, in any state. An error refuses
    /// [`Event::DmaMap`] and [`Event::ResetPrepare`]; elsewhere it is logged.
    fn event(&self, cx: &Context<'_>, event: Event) -> Result<()>;
}

/// Saves, restores and moves the device through its states. Called by the host's migration: one call at a time, together with
/// [`DirtyTracking`]; hooks overlap in the states in which they are called.
pub trait Migration: Device {
    /// Describes this device for the other side: model, firmware, format version. At most 64 KiB. Any state but ERROR.
    fn match_data(&self, cx: &Context<'_>) -> Result<Vec<u8>>;

    /// At the destination, before anything moves: can the state of a device that says `data` of itself be loaded here?
    /// `data` come from the network.
    fn check_match(&self, cx: &Context<'_>, data: &[u8]) -> Result<(), Refusal>;

    /// One arc of the state machine, never a longer path. The arc from RUNNING_P2P to STOP and those among states that
    /// do not run overlap no `rw` hook but those of configuration space and extra regions.
    fn set_state(&self, cx: &Context<'_>, from: DeviceState, to: DeviceState) -> Result<(), ArcFailed>;

    /// Fills `buffer` with the next bytes of the state. In PRE_COPY, PRE_COPY_P2P and STOP_COPY: one stream.
    fn save(&self, cx: &Context<'_>, buffer: &mut [u8]) -> Result<Saved>;

    /// Takes the next bytes, cut anywhere. In RESUMING; the arc to STOP validates the whole. They come from the network.
    fn load(&self, cx: &Context<'_>, data: &[u8]) -> Result<()>;

    /// How much is left. Any state.
    fn remaining(&self, cx: &Context<'_>) -> Result<Remaining>;
}

/// Knows the pages that the device writes. One call at a time; hooks overlap.
pub trait DirtyTracking: Device {
    /// Starts tracking `ranges`: ascending, disjoint, page-aligned. The tracking map is in force, accesses under the
    /// normal one are drained. After an error nothing is started.
    fn start(&self, cx: &Context<'_>, ranges: &[abi::IovaRange], page_size: u64) -> Result<()>;

    /// Marks what was written since the last report, inside the bitmap's range; nothing else is looked at. On an error
    /// the host takes the whole range as dirty.
    fn report(&self, cx: &Context<'_>, bitmap: &mut DirtyBitmap<'_>) -> Result<()>;

    fn stop(&self, cx: &Context<'_>);
}

/// How well a [`DirtyTracking`] knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exactness {
    /// Just what the device wrote
    Exact,
    /// Perhaps more, never less
    Superset,
}

/// A destination refuses a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub errno: Errno,
    /// For people; names what differs
    pub reason: String,
}

impl Refusal {
    /// The usual refusal: the two devices differ.
    pub fn differs(reason: impl Into<String>) -> Self {
        Self { errno: Errno::EINVAL, reason: reason.into() }
    }
}

/// An arc failed. The host goes on from `actual`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArcFailed {
    pub errno: Errno,
    /// [`DeviceState::Error`] asks for a reset
    pub actual: DeviceState,
}

/// What a [`Migration::save`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    pub bytes: usize,
    /// The stream has ended (STOP_COPY), or has nothing more for now (PRE_COPY)
    pub end: bool,
}

/// What is left to send, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remaining {
    /// Not yet sent once; should be sent and loaded before the switchover
    pub initial_bytes: u64,
    /// Sent once and changed since
    pub dirty_bytes: u64,
    /// The whole of STOP_COPY; `None` when unknown
    pub stop_copy_bytes: Option<u64>,
}

/// Something happened to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    ResetPrepare,
    ResetDone,
    /// `writable`: by the device
    DmaMap {
        iova: u64,
        length: u64,
        writable: bool,
    },
    DmaUnmap {
        iova: u64,
        length: u64,
    },
    /// COMMAND's bus-master bit
    BusMaster {
        on: bool,
    },
    Power {
        low: bool,
    },
    ClientAttach,
    ClientDetach,
    DeviceError(Errno),
    Timer {
        cookie: u64,
    },
}

impl Event {
    /// `None` for a kind that this version does not know.
    pub(crate) fn from_raw(raw: &abi::Event) -> Option<Self> {
        let [a, b, c] = raw.args;
        Some(match raw.kind {
            abi::EVENT_RESET_PREPARE => Self::ResetPrepare,
            abi::EVENT_RESET_DONE => Self::ResetDone,
            abi::EVENT_DMA_MAP => Self::DmaMap { iova: a, length: b, writable: c != 0 },
            abi::EVENT_DMA_UNMAP => Self::DmaUnmap { iova: a, length: b },
            abi::EVENT_BUS_MASTER => Self::BusMaster { on: a != 0 },
            abi::EVENT_POWER => Self::Power { low: a != 0 },
            abi::EVENT_CLIENT_ATTACH => Self::ClientAttach,
            abi::EVENT_CLIENT_DETACH => Self::ClientDetach,
            abi::EVENT_DEVICE_ERROR => {
                Self::DeviceError(i32::try_from(a).ok().and_then(Errno::new).unwrap_or(Errno::EIO))
            }
            abi::EVENT_TIMER => Self::Timer { cookie: a },
            _ => return None,
        })
    }
}

/// Which device this is. Lives during the call only.
#[derive(Clone, Copy)]
pub struct Identity<'a> {
    raw: &'a abi::DeviceIdentity,
}

impl<'a> Identity<'a> {
    /// # Safety
    /// `raw` is an identity of at least version 1, and lives with what it points to during `'a`.
    pub(crate) unsafe fn from_raw(raw: *const abi::DeviceIdentity) -> Self {
        // SAFETY: by the caller.
        Self { raw: unsafe { &*raw } }
    }

    /// `abi::BACKEND_*`
    pub fn backend(&self) -> u32 {
        self.raw.backend
    }

    pub fn vendor_id(&self) -> u16 {
        self.raw.vendor_id
    }

    pub fn device_id(&self) -> u16 {
        self.raw.device_id
    }

    /// Vendor and device.
    pub fn subsystem(&self) -> (u16, u16) {
        (self.raw.subsystem_vendor_id, self.raw.subsystem_device_id)
    }

    /// Base class, subclass, programming interface in bits 23:0.
    pub fn class_code(&self) -> u32 {
        self.raw.class_code
    }

    pub fn revision(&self) -> u8 {
        self.raw.revision
    }

    pub fn num_regions(&self) -> u32 {
        self.raw.num_regions
    }

    pub fn num_irqs(&self) -> u32 {
        self.raw.num_irqs
    }

    /// The PCI address, or a simulated device's name; empty when it is not UTF-8.
    pub fn name(&self) -> &'a str {
        // SAFETY: lives during `'a`, by `from_raw`.
        std::str::from_utf8(unsafe { bytes(self.raw.name) }).unwrap_or("")
    }

    /// The first 256 bytes (or as many as there are) of configuration space, as they were at open.
    pub fn config(&self) -> &'a [u8] {
        // SAFETY: lives during `'a`, by `from_raw`.
        unsafe { bytes(self.raw.config) }
    }
}

impl fmt::Debug for Identity<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:04x}:{:04x})", self.name(), self.vendor_id(), self.device_id())
    }
}

/// # Safety
/// The bytes live during `'a`.
unsafe fn bytes<'a>(raw: abi::Bytes) -> &'a [u8] {
    if raw.ptr.is_null() || raw.len == 0 {
        return &[];
    }
    // SAFETY: by the caller.
    unsafe { std::slice::from_raw_parts(raw.ptr, raw.len) }
}

/// The host's bitmap of one range: bits are set, never cleared.
pub struct DirtyBitmap<'a> {
    iova: u64,
    length: u64,
    page_size: u64,
    words: *mut u64,
    call: PhantomData<&'a mut [u64]>,
}

impl DirtyBitmap<'_> {
    /// EINVAL for a page size that is no power of two, or a range that is empty, misaligned or overflows.
    ///
    /// # Safety
    /// `words` points at one bit per page of the range, rounded up to whole words, exclusively the caller's during `'a`.
    pub unsafe fn from_raw(iova: u64, length: u64, page_size: u64, words: *mut u64) -> Result<Self> {
        let aligned = page_size.is_power_of_two() && iova.is_multiple_of(page_size) && length.is_multiple_of(page_size);
        if !aligned || length == 0 || iova.checked_add(length - 1).is_none() || words.is_null() {
            return Err(Errno::EINVAL);
        }
        Ok(Self { iova, length, page_size, words, call: PhantomData })
    }

    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// In bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Marks every page that holds one of the bytes `iova ..`. Bytes outside the range are left out: they belong to
    /// another bitmap's report.
    pub fn mark(&mut self, iova: u64, length: u64) {
        if length == 0 {
            return;
        }
        // Inclusive ends: a range may end at 2^64.
        let first = iova.max(self.iova);
        let last = iova.saturating_add(length - 1).min(self.iova + (self.length - 1));
        if first > last {
            return;
        }
        for page in (first - self.iova) / self.page_size..=(last - self.iova) / self.page_size {
            // SAFETY: a page of the range, so inside the words, by `from_raw`; exclusively ours.
            unsafe { *self.words.add((page / 64) as usize) |= (1_u64 << (page % 64)).to_le() };
        }
    }
}

impl fmt::Debug for DirtyBitmap<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bitmap of {:#x} bytes at iova {:#x}", self.length, self.iova)
    }
}
