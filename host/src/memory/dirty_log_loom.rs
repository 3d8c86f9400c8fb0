//! Interleavings of marks, drains and starts. The model's guest memory is one atomic per page, written and read without any
//! ordering of its own: what the log does not order is lost here, as it would be on a machine.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use super::{DirtyLog, LOOKS_FIRST};

const PAGES: usize = 2;

struct Vm {
    log: DirtyLog,
    memory: [AtomicU64; PAGES],
}

impl Vm {
    /// loom remembers the last access of an atomic only: a drain that looks at a word before it takes it would hide
    /// others' accesses from loom's search. Models where that matters do without the look.
    fn that_never_looks_first() -> Arc<Self> {
        LOOKS_FIRST.set(false);
        Self::new()
    }

    fn new() -> Arc<Self> {
        Arc::new(Self { log: DirtyLog::new(PAGES as u64), memory: std::array::from_fn(|_| AtomicU64::new(0)) })
    }

    fn write(&self, page: usize, value: u64) {
        self.memory[page].store(value, Ordering::Relaxed);
        self.log.mark_pages(page as u64, 1).unwrap();
    }

    /// Sends what is dirty; the peer has it only if `arrives`.
    fn round(&self, peer: &mut [u64; PAGES], arrives: bool) {
        let drain = self.log.drain();
        let mut sent = *peer;
        for run in drain.runs() {
            for page in run.first..run.first + run.count {
                sent[page as usize] = self.memory[page as usize].load(Ordering::Relaxed);
            }
        }
        if arrives {
            *peer = sent;
            drain.commit();
        }
    }

    fn assert_same(&self, peer: &[u64; PAGES]) {
        let memory: [u64; PAGES] = std::array::from_fn(|page| self.memory[page].load(Ordering::Relaxed));
        assert_eq!(memory, *peer);
    }
}

/// A mark that finds its bit set, and a drain that takes the bit meanwhile.
/// spec: MEM-17
#[test]
fn loom_marks_against_a_drain_that_never_looks_first_lose_no_write() {
    marks_against_a_drain(Vm::that_never_looks_first);
}

/// The same with the look.
#[test]
fn loom_marks_against_a_drain_lose_no_write() {
    marks_against_a_drain(Vm::new);
}

fn marks_against_a_drain(vm: fn() -> Arc<Vm>) {
    loom::model(move || {
        let vm = vm();
        vm.log.start();
        vm.log.drain().commit();
        let guest = {
            let vm = Arc::clone(&vm);
            thread::spawn(move || {
                vm.write(0, 1);
                vm.write(0, 2);
            })
        };
        let mut peer = [0; PAGES];
        vm.round(&mut peer, true);
        guest.join().unwrap();
        vm.round(&mut peer, true);
        vm.assert_same(&peer);
    });
}

/// The same when the round fails and its pages come back.
#[test]
fn loom_marks_against_a_restore_lose_no_write() {
    loom::model(|| {
        let vm = Vm::that_never_looks_first();
        vm.log.start();
        let guest = {
            let vm = Arc::clone(&vm);
            thread::spawn(move || {
                vm.write(0, 1);
                vm.write(1, 2);
            })
        };
        let mut peer = [0; PAGES];
        vm.round(&mut peer, false);
        vm.round(&mut peer, true);
        guest.join().unwrap();
        vm.round(&mut peer, true);
        vm.assert_same(&peer);
    });
}

/// Two markers of one word, and a drain.
#[test]
fn loom_two_markers_of_one_word_lose_no_write() {
    loom::model(|| {
        let vm = Vm::that_never_looks_first();
        vm.log.start();
        vm.log.drain().commit();
        let guests: Vec<_> = (0..2)
            .map(|page| {
                let vm = Arc::clone(&vm);
                thread::spawn(move || vm.write(page, 1))
            })
            .collect();
        let mut peer = [0; PAGES];
        vm.round(&mut peer, true);
        for guest in guests {
            guest.join().unwrap();
        }
        vm.round(&mut peer, true);
        vm.assert_same(&peer);
    });
}

/// A write that finds the log stopped, while it starts and its first round copies everything.
#[test]
fn loom_a_write_while_tracking_starts_is_not_lost() {
    loom::model(|| {
        let vm = Vm::that_never_looks_first();
        let guest = {
            let vm = Arc::clone(&vm);
            thread::spawn(move || vm.write(0, 1))
        };
        let mut peer = [0; PAGES];
        vm.log.start();
        vm.round(&mut peer, true);
        guest.join().unwrap();
        vm.round(&mut peer, true);
        vm.assert_same(&peer);
    });
}
