//! An asymmetric fence: free for the many readers, a system call for the rare writer.
//!
//! A reader runs [`light`], which only holds the compiler back; a writer runs [`heavy`], which makes the kernel run a full
//! barrier on every CPU that executes a thread of this process. Together they order like two `SeqCst` fences. Where the
//! kernel refuses (`membarrier` absent or filtered), both sides use real fences.

use std::sync::OnceLock;
use std::sync::atomic::{Ordering, compiler_fence, fence};

use rustix::thread::{MembarrierCommand, MembarrierQuery, membarrier, membarrier_query};

/// Which fences this process uses. Decided once, before the first light fence, and never changed: a light fence is only as
/// good as the heavy one that it meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AsymmetricFence {
    /// `MEMBARRIER_CMD_PRIVATE_EXPEDITED`, registered
    Membarrier,
    /// `fence(SeqCst)` on both sides
    Symmetric,
}

impl AsymmetricFence {
    /// Registers with the kernel on first use.
    pub fn get() -> Self {
        static CHOICE: OnceLock<AsymmetricFence> = OnceLock::new();
        *CHOICE.get_or_init(|| {
            let needed = MembarrierQuery::PRIVATE_EXPEDITED | MembarrierQuery::REGISTER_PRIVATE_EXPEDITED;
            let offered = membarrier_query().contains(needed);
            if offered && membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok() {
                Self::Membarrier
            } else {
                Self::Symmetric
            }
        })
    }

    /// The reader's side.
    #[inline(always)]
    pub fn light(self) {
        match self {
            Self::Membarrier => compiler_fence(Ordering::SeqCst),
            Self::Symmetric => fence(Ordering::SeqCst),
        }
    }

    /// The writer's side.
    pub fn heavy(self) {
        fence(Ordering::SeqCst);
        if self == Self::Membarrier {
            // After a successful registration the only documented failure is a kernel bug, and going on without the
            // barrier would let an access reach a device that was switched off.
            let done = membarrier(MembarrierCommand::PrivateExpedited);
            assert!(done.is_ok(), "membarrier failed after it was registered: {done:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_is_made_once_and_both_fences_return() {
        let fence = AsymmetricFence::get();
        fence.light();
        fence.heavy();
        assert_eq!(fence, AsymmetricFence::get());
        AsymmetricFence::Symmetric.light();
        AsymmetricFence::Symmetric.heavy();
    }
}
