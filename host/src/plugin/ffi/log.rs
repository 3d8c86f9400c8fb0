//! What plug-ins say, into the host's log.
//!
//! A guest can make a plug-in talk, so its lines are counted: beyond [`MESSAGES_PER_SECOND`] they are dropped, and the next
//! line that gets through says how many were. Lines that nobody records are free, and cost nothing of that.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use vfio_mediate_sdk::abi;

/// Lines of all plug-ins together that reach the host's log in one second.
const MESSAGES_PER_SECOND: u64 = 200;
/// Longest line, in bytes; the rest of a longer one is cut off.
const MESSAGE_MAX: usize = 4096;
const TARGET_MAX: usize = 128;

/// How many lines may pass.
#[derive(Debug)]
struct Budget {
    /// The second in bits 63:16, how many lines it has had in bits 15:0
    spent: AtomicU64,
    dropped: AtomicU64,
}

static BUDGET: Budget = Budget { spent: AtomicU64::new(0), dropped: AtomicU64::new(0) };

impl Budget {
    /// Whether a line may pass in this second, and how many were dropped before it.
    fn take(&self, second: u64) -> Option<u64> {
        let second = second & (u64::MAX >> 16);
        let update = |spent: u64| match (spent >> 16 == second, spent & 0xffff) {
            (false, _) => Some(second << 16 | 1),
            (true, count) if count < MESSAGES_PER_SECOND => Some(spent + 1),
            (true, _) => None,
        };
        if self.spent.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(self.dropped.swap(0, Ordering::Relaxed))
    }
}

/// The service. Any thread, any time.
pub unsafe extern "C" fn log(level: u32, target: abi::Bytes, message: abi::Bytes) {
    // A subscriber that panics must not take the process down through a plug-in's frames.
    let _ = catch_unwind(AssertUnwindSafe(|| {
        if !is_recorded(level) {
            return;
        }
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec;
        let Some(dropped) = BUDGET.take(now.cast_unsigned()) else { return };
        if dropped > 0 {
            tracing::warn!(target: "plugin", "{dropped} messages of plug-ins were dropped");
        }
        // SAFETY: readable during this call, by the plug-in's word.
        let (plugin, message) = unsafe { (line(target, TARGET_MAX), line(message, MESSAGE_MAX)) };
        match level {
            abi::LOG_ERROR => tracing::error!(target: "plugin", %plugin, "{message}"),
            abi::LOG_WARN => tracing::warn!(target: "plugin", %plugin, "{message}"),
            abi::LOG_INFO => tracing::info!(target: "plugin", %plugin, "{message}"),
            abi::LOG_DEBUG => tracing::debug!(target: "plugin", %plugin, "{message}"),
            _ => tracing::trace!(target: "plugin", %plugin, "{message}"),
        }
    }));
}

fn is_recorded(level: u32) -> bool {
    match level {
        abi::LOG_ERROR => tracing::enabled!(target: "plugin", tracing::Level::ERROR),
        abi::LOG_WARN => tracing::enabled!(target: "plugin", tracing::Level::WARN),
        abi::LOG_INFO => tracing::enabled!(target: "plugin", tracing::Level::INFO),
        abi::LOG_DEBUG => tracing::enabled!(target: "plugin", tracing::Level::DEBUG),
        _ => tracing::enabled!(target: "plugin", tracing::Level::TRACE),
    }
}

/// At most `most` bytes of the text, on one line: control characters could forge lines, or drive a terminal.
///
/// # Safety
/// `text` is readable for its length, if it is not null.
unsafe fn line(text: abi::Bytes, most: usize) -> String {
    let length = text.len.min(most);
    if text.ptr.is_null() || length == 0 {
        return String::new();
    }
    // SAFETY: not null, and readable by the caller; a length that wraps around would not be.
    let bytes = unsafe { std::slice::from_raw_parts(text.ptr, length) };
    String::from_utf8_lossy(bytes).replace(char::is_control, " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// spec: REG-20
    #[test]
    fn lines_beyond_the_budget_are_dropped_and_counted() {
        let budget = Budget { spent: AtomicU64::new(0), dropped: AtomicU64::new(0) };
        for _ in 0..MESSAGES_PER_SECOND {
            assert_eq!(budget.take(7), Some(0));
        }
        for _ in 0..3 {
            assert_eq!(budget.take(7), None);
        }
        assert_eq!(budget.take(8), Some(3), "the next second says so, once");
        assert_eq!(budget.take(8), Some(0));
    }

    /// spec: REG-20
    #[test]
    fn a_line_is_one_line_however_long_or_strange() {
        let text = |text: &[u8], most| {
            // SAFETY: a slice.
            unsafe { line(abi::Bytes::borrowed(text), most) }
        };
        assert_eq!(text(b"a\nERROR forged\x1b[2J", 64), "a ERROR forged [2J");
        assert_eq!(text(b"abcdef", 3), "abc");
        assert_eq!(text("\u{e4}".as_bytes(), 1), "\u{fffd}");
        // SAFETY: null is not read.
        assert_eq!(unsafe { line(abi::Bytes { ptr: std::ptr::null(), len: 9 }, 64) }, "");
    }
}
