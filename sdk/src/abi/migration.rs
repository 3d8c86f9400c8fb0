//! A device's state and its dirty pages.

use abi_stable::StableAbi;

use super::{CallContext, Opaque};

/// Device states, as `enum vfio_device_mig_state`.
pub const STATE_ERROR: u32 = 0;
pub const STATE_STOP: u32 = 1;
pub const STATE_RUNNING: u32 = 2;
pub const STATE_STOP_COPY: u32 = 3;
pub const STATE_RESUMING: u32 = 4;
pub const STATE_RUNNING_P2P: u32 = 5;
pub const STATE_PRE_COPY: u32 = 6;
pub const STATE_PRE_COPY_P2P: u32 = 7;

/// [`MigrationOps::flags`], as `VFIO_MIGRATION_*`. STOP_COPY is mandatory.
pub const MIGRATION_STOP_COPY: u64 = 1 << 0;
pub const MIGRATION_P2P: u64 = 1 << 1;
pub const MIGRATION_PRE_COPY: u64 = 1 << 2;

/// `save`: bytes were written, more may follow.
pub const SAVE_MORE: i32 = 0;
/// `save`: the stream has ended (STOP_COPY), or has nothing more for now (PRE_COPY).
pub const SAVE_END: i32 = 1;

/// Why a device is refused. Text for people.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct Reason {
    /// The host's buffer, to be filled with UTF-8
    pub text: *mut u8,
    pub capacity: usize,
    pub length: usize,
}

/// What is left to send, in bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct Remaining {
    pub struct_size: u32,
    pub reserved: u32,
    /// Not yet sent once; should have been sent and loaded before the switchover
    pub initial_bytes: u64,
    /// Sent once and changed since
    pub dirty_bytes: u64,
    /// The whole of STOP_COPY; `u64::MAX` when unknown
    pub stop_copy_bytes: u64,
}

/// Save, restore and the arcs between states. Called by the host's migration, one at a time.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct MigrationOps {
    pub struct_size: u32,
    pub reserved: u32,
    /// `MIGRATION_*`
    pub flags: u64,
    /// Describes this device for the other side: model, firmware, format version. Writes at most `capacity` bytes and
    /// stores the count; ERANGE when they do not suffice. Any state but ERROR. Null: nothing to compare.
    pub match_data: Option<
        unsafe extern "C" fn(
            state: Opaque,
            ctx: *const CallContext,
            buffer: *mut u8,
            capacity: usize,
            length: *mut usize,
        ) -> i32,
    >,
    /// Called at the destination, before anything moves, with the source's match data: can its state be loaded here?
    /// A refusal fills in `reason`. Null: equal match data are required.
    pub check_match: Option<
        unsafe extern "C" fn(
            state: Opaque,
            ctx: *const CallContext,
            data: *const u8,
            length: usize,
            reason: *mut Reason,
        ) -> i32,
    >,
    /// One arc of the state machine, never a longer path. On failure the device is left in `*actual` (which comes set
    /// to `from`), and the host goes on from there: recover, else reset. `STATE_ERROR` asks for a reset.
    pub set_state: Option<
        unsafe extern "C" fn(state: Opaque, ctx: *const CallContext, from: u32, to: u32, actual: *mut u32) -> i32,
    >,
    /// Fills `buffer` with the next bytes of the state and stores their count. [`SAVE_MORE`] or [`SAVE_END`]. In
    /// PRE_COPY, PRE_COPY_P2P and STOP_COPY: one stream. Buffers of the host are initialised memory.
    pub save: Option<
        unsafe extern "C" fn(
            state: Opaque,
            ctx: *const CallContext,
            buffer: *mut u8,
            capacity: usize,
            length: *mut usize,
        ) -> i32,
    >,
    /// Takes the next bytes of the state, cut anywhere. In RESUMING. The arc RESUMING -> STOP validates the whole.
    pub load:
        Option<unsafe extern "C" fn(state: Opaque, ctx: *const CallContext, data: *const u8, length: usize) -> i32>,
    /// How much is left. In any state. Null: unknown.
    pub remaining:
        Option<unsafe extern "C" fn(state: Opaque, ctx: *const CallContext, remaining: *mut Remaining) -> i32>,
}

/// [`DirtyOps::exactness`]: reports just what the device wrote.
pub const DIRTY_EXACT: u32 = 1;
/// [`DirtyOps::exactness`]: may report more, never less.
pub const DIRTY_SUPERSET: u32 = 2;

/// A range of I/O virtual addresses, in bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct IovaRange {
    pub iova: u64,
    pub length: u64,
}

/// What a plug-in knows of the pages that its device writes.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct DirtyOps {
    pub struct_size: u32,
    /// `DIRTY_*`
    pub exactness: u32,
    /// Starts tracking `ranges` (ascending, disjoint, page-aligned). The host has switched to the tracking map and
    /// drained accesses under the normal one before. Failing leaves nothing started.
    pub start: Option<
        unsafe extern "C" fn(
            state: Opaque,
            ctx: *const CallContext,
            ranges: *const IovaRange,
            count: usize,
            page_size: u64,
        ) -> i32,
    >,
    /// Sets (never clears) bit i of `bitmap` (little-endian words) for page i of `iova ..` written since the last
    /// report. May also use `mark_dirty` while running. An error makes the host take the whole range as dirty.
    pub report: Option<
        unsafe extern "C" fn(
            state: Opaque,
            ctx: *const CallContext,
            iova: u64,
            length: u64,
            page_size: u64,
            bitmap: *mut u64,
        ) -> i32,
    >,
    pub stop: Option<unsafe extern "C" fn(state: Opaque, ctx: *const CallContext)>,
}
