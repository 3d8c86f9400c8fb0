//! The access gate of one device: who may reach it, and who has it alone.
//!
//! **Owns** the passes in flight and the right to exclusive change. **Must never** call a device or a plug-in, wait
//! without a deadline, or let an access in while the device is suspended, memory-disabled, resetting or not yet bound.
//!
//! ```text
//!            enter: a pass, as often and as many as wanted
//!   OPEN <------------------------------------------------+
//!     | close(reason, deadline): stops admission          | release: open, or closed for a lasting reason
//!     v                                                   | (of everything, or of the memory regions only)
//!   DRAINING --- last pass left ---> EXCLUSIVE -----------+
//!     | deadline passed                  | dropped without release
//!     v                                  v
//!   FAILED <-----------------------------+        (FAILED is never left)
//! ```
//!
//! A pass is an in-flight reference, not a lock. Each thread counts its passes in a slot of its own (one cache line per
//! thread and gate), with plain stores; the closer pays, by a barrier on every CPU ([`AsymmetricFence`]):
//!
//! ```text
//!   enter:  slot += 1 ; light ; state open?  else slot -= 1, refused       close:  state = closed ; heavy ; slots all 0?
//!   leave:  slot -= 1 ; light ; somebody draining? then wake him                   else wait for a leaver
//! ```
//!
//! Either the closer sees the slot, or the entering thread sees the closed state; likewise for the wake-up.
//!
//! What one access costs is decided here: [`Gate::enter_quickly`] is one comparison (this thread has a slot of its own,
//! and needs no fence), the slot, and the state word, which says everything at once; whatever is not the usual case is out
//! of line. [`Pass::leave`] looks at the state word once, for the closer and for the queue.
//! Locks: `turn` (a leaf: nothing is called while it is held).

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(all(test, not(loom)))]
mod tests;
mod thread_index;

use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::time::Instant;

use rustix::io::Errno;

#[cfg(loom)]
use loom::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicU32, Ordering, fence},
};
#[cfg(not(loom))]
use std::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicU32, Ordering, fence},
};

use crate::lock_order;
#[cfg(not(loom))]
use crate::sys::AsymmetricFence;

use thread_index::{OVERFLOW, OWN_SLOTS};

/// Why a gate is closed. Lasting reasons are answered at once; the others end by themselves, and a caller may wait for
/// that with a deadline ([`Gate::enter_until`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Reason {
    /// The device is not yet, or no longer, bound.
    NotBound = 1,
    /// Low power.
    Suspended = 2,
    /// COMMAND's memory-enable bit is off, or the function left D0.
    MemoryDisabled = 3,
    /// The migration state is not a running one: configuration space and information answer, regions do not.
    Stopped = 4,
    /// A reset is under way.
    Resetting = 5,
    /// An arc of the migration state machine is under way.
    StateArc = 6,
    /// The hook tables are being switched.
    TableSwap = 7,
    /// The device was failed: a drain ran into its deadline, or the plug-in or the device gave up.
    Failed = 8,
    /// The device is being closed.
    Closed = 9,
    /// COMMAND or the power state is being written.
    Reconfiguring = 10,
}

impl Reason {
    pub const ALL: [Self; 10] = [
        Self::NotBound,
        Self::Suspended,
        Self::MemoryDisabled,
        Self::Stopped,
        Self::Resetting,
        Self::StateArc,
        Self::TableSwap,
        Self::Failed,
        Self::Closed,
        Self::Reconfiguring,
    ];

    fn from_raw(raw: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| *reason as u32 == raw)
    }

    /// What an access gets that was refused for this reason.
    pub const fn errno(self) -> Errno {
        match self {
            Self::NotBound => Errno::INVAL,
            Self::Suspended | Self::MemoryDisabled | Self::Stopped => Errno::IO,
            Self::Resetting | Self::StateArc | Self::TableSwap | Self::Reconfiguring => Errno::AGAIN,
            Self::Failed | Self::Closed => Errno::NODEV,
        }
    }

    /// Ends by itself, soon.
    pub const fn is_passing(self) -> bool {
        matches!(self, Self::Resetting | Self::StateArc | Self::TableSwap | Self::Reconfiguring)
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotBound => "not bound",
            Self::Suspended => "suspended",
            Self::MemoryDisabled => "memory disabled",
            Self::Stopped => "stopped for migration",
            Self::Resetting => "being reset",
            Self::StateArc => "changing its migration state",
            Self::TableSwap => "switching its hook tables",
            Self::Failed => "failed",
            Self::Closed => "closed",
            Self::Reconfiguring => "being reconfigured",
        })
    }
}

/// An access was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the device is {reason}")]
pub struct GateClosed {
    pub reason: Reason,
}

/// Exclusive access was not obtained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CloseError {
    /// Passes were still in flight at the deadline. The gate is failed now.
    #[error("accesses were still in flight at the deadline")]
    DrainTimeout,
    /// Somebody else had the device alone until the deadline. Nothing has changed.
    #[error("another state change was still under way at the deadline")]
    Busy,
    /// This thread holds a pass itself and would wait for itself. Nothing has changed.
    #[error("asked for while an access of the same thread is in flight")]
    Held,
    /// The gate is failed or closed for good.
    #[error(transparent)]
    Gone(#[from] GateClosed),
}

/// What an access wants to reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Configuration space, information, irqs, migration steps.
    Control,
    /// Every other region: closed as well while memory is disabled or the device is stopped.
    Memory,
}

// The state word: why everything is closed, why memory regions are closed (0: open), and two flags.
const EVERYTHING: u32 = 0xff;
const MEMORY_SHIFT: u32 = 8;
const MEMORY: u32 = 0xff << MEMORY_SHIFT;
const DRAINING: u32 = 1 << 16;
const ATTENTION: u32 = 1 << 17;

impl Class {
    #[inline(always)]
    const fn mask(self) -> u32 {
        match self {
            Self::Control => EVERYTHING,
            Self::Memory => EVERYTHING | MEMORY,
        }
    }
}

/// One thread's passes, alone on its cache lines (two: the neighbour is prefetched).
#[derive(Debug)]
#[repr(align(128))]
struct Slot(AtomicU32);

/// Whose turn it is to have the device alone.
#[derive(Debug)]
struct Turn {
    taken: bool,
}

/// See the module's text.
#[derive(Debug)]
pub struct Gate {
    state: AtomicU32,
    /// Threads with an index below it go the quick way: all that have a slot of their own, or none where both sides of the
    /// fence cost
    quick: usize,
    #[cfg(not(loom))]
    fence: AsymmetricFence,
    slots: [Slot; OWN_SLOTS + 1],
    turn: Mutex<Turn>,
    /// A pass was left while draining, or a turn ended
    changed: Condvar,
}

impl Gate {
    /// A gate that is closed for `reason` until somebody closes it and releases it open.
    pub fn new(reason: Reason) -> Self {
        #[cfg(not(loom))]
        let fence = AsymmetricFence::get();
        #[cfg(not(loom))]
        let quick = if fence == AsymmetricFence::Membarrier { OWN_SLOTS } else { 0 };
        #[cfg(loom)]
        let quick = OWN_SLOTS;
        Self {
            state: AtomicU32::new(reason as u32),
            quick,
            #[cfg(not(loom))]
            fence,
            slots: std::array::from_fn(|_| Slot(AtomicU32::new(0))),
            turn: Mutex::new(Turn { taken: false }),
            changed: Condvar::new(),
        }
    }

    /// Lets one access in, until the pass is dropped. Never waits. Passes of one thread may nest.
    #[inline]
    pub fn enter(&self, class: Class) -> Result<Pass<'_>, GateClosed> {
        self.enter_at(thread_index::current(), class)
    }

    /// As [`Self::enter`], but waits until `deadline` while the gate is closed for a passing reason.
    #[inline]
    pub fn enter_until(&self, class: Class, deadline: impl Fn() -> Instant) -> Result<Pass<'_>, GateClosed> {
        match self.enter(class) {
            Err(closed) if closed.reason.is_passing() => self.enter_slow(thread_index::current(), class, deadline()),
            other => other,
        }
    }

    /// As [`Self::enter`], where that takes next to nothing. `None`: go the other way, which may let the access in or say
    /// why not.
    #[inline(always)]
    pub fn enter_quickly(&self, class: Class) -> Option<Pass<'_>> {
        self.enter_quickly_at(thread_index::assigned(), class)
    }

    #[inline(always)]
    fn enter_quickly_at(&self, index: usize, class: Class) -> Option<Pass<'_>> {
        if index >= self.quick {
            return None;
        }
        let slot = &self.slots[index % OWN_SLOTS].0;
        let closed = self.count(slot, Way::Quick, class);
        if closed != 0 {
            self.refuse(slot, Way::Quick);
            return None;
        }
        Some(Pass { gate: self, slot, way: Way::Quick, not_send: PhantomData })
    }

    #[inline]
    fn enter_at(&self, index: usize, class: Class) -> Result<Pass<'_>, GateClosed> {
        let way = match index {
            OVERFLOW => Way::Shared,
            index if index < self.quick => Way::Quick,
            _ => Way::Fenced,
        };
        let slot = &self.slots[index].0;
        let closed = self.count(slot, way, class);
        if closed != 0 {
            self.refuse(slot, way);
            return Err(refusal(closed));
        }
        Ok(Pass { gate: self, slot, way, not_send: PhantomData })
    }

    /// Counts one access in and looks whether it may be: the reason bits, 0 for none.
    #[inline(always)]
    fn count(&self, slot: &AtomicU32, way: Way, class: Class) -> u32 {
        match way {
            Way::Shared => _ = slot.fetch_add(1, Ordering::Relaxed),
            // Only this thread writes its slot.
            Way::Quick | Way::Fenced => slot.store(slot.load(Ordering::Relaxed) + 1, Ordering::Relaxed),
        }
        way.light();
        // Acquire: what was done under the last exclusive turn is seen.
        self.state.load(Ordering::Acquire) & class.mask()
    }

    /// Takes a count back. Whoever raised attention in between still has to look himself, as ever.
    #[cold]
    #[inline(never)]
    fn refuse(&self, slot: &AtomicU32, way: Way) {
        self.leave(slot, way);
    }

    #[cold]
    fn enter_slow(&self, index: usize, class: Class, deadline: Instant) -> Result<Pass<'_>, GateClosed> {
        loop {
            let closed = match self.enter_at(index, class) {
                Err(closed) if closed.reason.is_passing() => closed,
                other => return other,
            };
            let mut turn = lock(&self.turn);
            while turn.taken {
                match self.wait(turn, deadline) {
                    Ok(next) => turn = next,
                    Err(TimedOut) => return Err(closed),
                }
            }
        }
    }

    /// True when somebody asked for attention.
    #[inline(always)]
    fn leave(&self, slot: &AtomicU32, way: Way) -> bool {
        // Release: the closer that sees the slot empty sees what the access did.
        match way {
            Way::Shared => _ = slot.fetch_sub(1, Ordering::Release),
            Way::Quick | Way::Fenced => slot.store(slot.load(Ordering::Relaxed) - 1, Ordering::Release),
        }
        way.light();
        let state = self.state.load(Ordering::Relaxed);
        state & (DRAINING | ATTENTION) != 0 && self.tell(state)
    }

    #[cold]
    #[inline(never)]
    fn tell(&self, state: u32) -> bool {
        if state & DRAINING != 0 {
            self.wake_closer();
        }
        state & ATTENTION != 0
    }

    fn wake_closer(&self) {
        // Under the lock, so that the closer is either before its look at the slots or already waiting.
        let _turn = lock(&self.turn);
        self.changed.notify_all();
    }

    /// Stops admission, waits until no pass is in flight and hands out the device alone.
    ///
    /// Accesses that come meanwhile are refused with `reason`. When passes are still in flight at `deadline` the gate is
    /// failed, for good: nobody can tell what the device is doing.
    pub fn close(&self, reason: Reason, deadline: Instant) -> Result<Exclusive<'_>, CloseError> {
        self.refuse_holder()?;
        self.close_as(reason, deadline, Late::Fail)
    }

    /// As [`Self::close`], for a change that can as well be left undone: with passes in flight at `deadline` the answer is
    /// [`CloseError::Busy`], accesses are admitted again, and nothing has changed.
    pub fn close_or_leave(&self, reason: Reason, deadline: Instant) -> Result<Exclusive<'_>, CloseError> {
        self.refuse_holder()?;
        self.close_as(reason, deadline, Late::Leave)
    }

    fn refuse_holder(&self) -> Result<(), CloseError> {
        let index = thread_index::current();
        match index != OVERFLOW && self.slots[index].0.load(Ordering::Relaxed) != 0 {
            true => Err(CloseError::Held),
            false => Ok(()),
        }
    }

    fn close_as(&self, reason: Reason, deadline: Instant, late: Late) -> Result<Exclusive<'_>, CloseError> {
        let mut turn = lock(&self.turn);
        while turn.taken {
            turn = self.wait(turn, deadline).map_err(|TimedOut| CloseError::Busy)?;
        }
        let gone = self.state.load(Ordering::Relaxed) & EVERYTHING;
        if gone == Reason::Closed as u32 || (gone == Reason::Failed as u32 && reason != Reason::Closed) {
            return Err(CloseError::Gone(refusal(gone)));
        }
        turn.taken = true;
        self.update(|state| {
            let all = if state & EVERYTHING == Reason::Failed as u32 { Reason::Failed } else { reason };
            (state & !EVERYTHING) | all as u32 | DRAINING
        });
        self.heavy();
        while !self.is_drained() {
            match self.wait(turn, deadline) {
                Ok(next) => turn = next,
                // The last pass may have left between the timeout and our having the lock again.
                Err(TimedOut) if self.is_drained() => break,
                Err(TimedOut) if late == Late::Leave => {
                    // As it was, unless it failed meanwhile.
                    let failed = |state| state & EVERYTHING == Reason::Failed as u32;
                    self.end_turn(|state| if failed(state) { state } else { (state & !EVERYTHING) | gone });
                    return Err(CloseError::Busy);
                }
                Err(TimedOut) => {
                    self.end_turn(|state| (state & !EVERYTHING) | Reason::Failed as u32);
                    return Err(CloseError::DrainTimeout);
                }
            }
        }
        self.update(|state| state & !DRAINING);
        Ok(Exclusive { gate: self })
    }

    /// Refuses everything from now on, without waiting for what is in flight.
    pub fn fail(&self) {
        self.update(|state| match state & EVERYTHING {
            closed if closed == Reason::Closed as u32 => state,
            _ => (state & !EVERYTHING) | Reason::Failed as u32,
        });
    }

    /// Refuses accesses of memory from now on, until the next turn ends, without waiting for what is in flight: for somebody
    /// with a pass, who cannot have the device alone.
    pub fn refuse_memory(&self, reason: Reason) {
        self.update(|state| match state & MEMORY {
            0 => state | (reason as u32) << MEMORY_SHIFT,
            _ => state,
        });
    }

    /// Whether the gate is failed and nobody is inside: then nobody will be.
    pub fn is_failed_and_empty(&self) -> bool {
        if self.state.load(Ordering::Acquire) & EVERYTHING != Reason::Failed as u32 {
            return false;
        }
        self.heavy();
        self.is_drained()
    }

    /// Why an access in flight may go no further, if it may not: a lasting reason that came after it was let in.
    pub fn cut(&self, class: Class) -> Option<Reason> {
        let state = self.state.load(Ordering::Acquire) & class.mask();
        // Memory's reasons last; everything's may be that of a turn that waits for this access.
        let reasons = [state & EVERYTHING, (state & MEMORY) >> MEMORY_SHIFT];
        reasons.into_iter().filter_map(Reason::from_raw).find(|reason| !reason.is_passing())
    }

    /// Why accesses of this class are refused now, if they are. Changes at any time.
    pub fn closed(&self, class: Class) -> Option<Reason> {
        match self.state.load(Ordering::Acquire) & class.mask() {
            0 => None,
            closed => Some(refusal(closed).reason),
        }
    }

    /// Asks whoever leaves next to look at the device's queue ([`Self::take_attention`]).
    pub fn raise_attention(&self) {
        self.state.fetch_or(ATTENTION, Ordering::Release);
    }

    #[inline]
    pub fn wants_attention(&self) -> bool {
        self.state.load(Ordering::Relaxed) & ATTENTION != 0
    }

    /// Clears the flag; the caller looks at the queue afterwards.
    pub fn take_attention(&self) -> bool {
        self.state.fetch_and(!ATTENTION, Ordering::AcqRel) & ATTENTION != 0
    }

    /// Whether this thread has a pass in flight. Threads in the overflow slot are taken for holders while anyone there is.
    pub fn is_held(&self) -> bool {
        self.slots[thread_index::current()].0.load(Ordering::Relaxed) != 0
    }

    fn is_drained(&self) -> bool {
        // Acquire: pairs with `leave`.
        self.slots.iter().all(|slot| slot.0.load(Ordering::Acquire) == 0)
    }

    /// Ends a turn. FAILED, which `fail` may have set meanwhile, stays, unless the gate is closed for good.
    fn end_turn(&self, next: impl Fn(u32) -> u32) {
        let mut turn = lock(&self.turn);
        self.update(|state| next(state) & !DRAINING);
        turn.taken = false;
        self.changed.notify_all();
    }

    fn update(&self, next: impl Fn(u32) -> u32) {
        // Release: what was done alone is seen by whoever enters next. The closure always gives a value.
        let _ = self.state.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |state| Some(next(state)));
    }

    fn wait<'a>(&self, locked: Locked<'a>, deadline: Instant) -> Result<Locked<'a>, TimedOut> {
        let Locked { turn, held } = locked;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() && !cfg!(loom) {
            return Err(TimedOut);
        }
        match self.changed.wait_timeout(turn, left) {
            Ok((turn, _)) => Ok(Locked { turn, held }),
            Err(poisoned) => Ok(Locked { turn: poisoned.into_inner().0, held }),
        }
    }

    fn heavy(&self) {
        #[cfg(not(loom))]
        self.fence.heavy();
        #[cfg(loom)]
        fence(Ordering::SeqCst);
    }
}

#[derive(Debug)]
struct TimedOut;

/// What becomes of a gate whose passes are still in flight at the deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Late {
    Fail,
    Leave,
}

/// How a thread counts its passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// In a slot of its own, and the closer pays for the order
    Quick,
    /// In a slot of its own, and both pay
    Fenced,
    /// In the overflow slot, with others
    Shared,
}

impl Way {
    /// The reader's side of the fence.
    #[inline(always)]
    fn light(self) {
        #[cfg(not(loom))]
        match self {
            Self::Quick => AsymmetricFence::Membarrier.light(),
            Self::Fenced | Self::Shared => fence(Ordering::SeqCst),
        }
        #[cfg(loom)]
        fence(Ordering::SeqCst);
    }
}

/// The turn, locked: a leaf.
struct Locked<'a> {
    // Unlocked first.
    turn: MutexGuard<'a, Turn>,
    held: lock_order::Held,
}

impl std::ops::Deref for Locked<'_> {
    type Target = Turn;

    fn deref(&self) -> &Turn {
        &self.turn
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Turn {
        &mut self.turn
    }
}

fn lock(turn: &Mutex<Turn>) -> Locked<'_> {
    let held = lock_order::leaf();
    Locked { turn: turn.lock().unwrap_or_else(std::sync::PoisonError::into_inner), held }
}

#[cold]
fn refusal(closed: u32) -> GateClosed {
    let raw = if closed & EVERYTHING != 0 { closed & EVERYTHING } else { (closed & MEMORY) >> MEMORY_SHIFT };
    // Only reasons are ever stored; should a bit flip, the device is failed.
    GateClosed { reason: Reason::from_raw(raw).unwrap_or(Reason::Failed) }
}

/// An access in flight. Stays on its thread.
#[derive(Debug)]
#[must_use = "dropping the pass ends the access"]
pub struct Pass<'a> {
    gate: &'a Gate,
    slot: &'a AtomicU32,
    way: Way,
    not_send: PhantomData<*const ()>,
}

impl Pass<'_> {
    /// Ends the access. True when somebody asked for attention ([`Gate::raise_attention`]).
    #[inline(always)]
    pub fn leave(self) -> bool {
        let pass = ManuallyDrop::new(self);
        pass.gate.leave(pass.slot, pass.way)
    }
}

impl Drop for Pass<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.gate.leave(self.slot, self.way);
    }
}

/// What stays closed when a turn ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Standing {
    /// Why everything stays closed
    pub everything: Option<Reason>,
    /// Why memory regions stay closed
    pub memory: Option<Reason>,
}

impl Standing {
    pub const OPEN: Self = Self { everything: None, memory: None };

    fn raw(self) -> u32 {
        let raw = |reason: Option<Reason>| reason.map_or(0, |reason| reason as u32);
        raw(self.everything) | raw(self.memory) << MEMORY_SHIFT
    }
}

/// The device alone: no access is in flight, none is admitted. Must be released; when it is merely dropped, by a panic
/// half-way, nobody knows the device's state and the gate is failed.
#[derive(Debug)]
#[must_use = "dropping it without `release` fails the device"]
pub struct Exclusive<'a> {
    gate: &'a Gate,
}

impl Exclusive<'_> {
    /// Ends the turn. A failed gate stays failed, unless it is now closed for good.
    pub fn release(self, standing: Standing) {
        let keep_failed = standing.everything != Some(Reason::Closed);
        self.gate.end_turn(|state| {
            let failed = state & EVERYTHING == Reason::Failed as u32 && keep_failed;
            if failed { state } else { (state & !(EVERYTHING | MEMORY)) | standing.raw() }
        });
        std::mem::forget(self);
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        self.gate.end_turn(|state| (state & !EVERYTHING) | Reason::Failed as u32);
    }
}
