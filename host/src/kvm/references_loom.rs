//! Interleavings of opens, closes and the VM's exit, over the real protocol. The list's own flags are relaxed, so that only the
//! references order what its calls see.
//!
//! The key line is `holders == 0` in `References::try_hold`: without it a VM that has ended is held again.

use loom::sync::Arc as LoomArc;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

use super::*;

/// What KVM would notice.
#[derive(Debug, Default)]
struct Seen {
    /// Files in the list now
    files: AtomicU32,
    added: AtomicU32,
    closed: AtomicU32,
}

#[derive(Debug)]
struct Fake(LoomArc<Seen>);

impl Fake {
    fn alive(&self) {
        assert_eq!(self.0.closed.load(Ordering::Relaxed), 0, "called after the VM has ended");
    }
}

impl FileList for Fake {
    type File = ();

    fn add(&self, (): &()) -> io::Result<()> {
        self.alive();
        assert_eq!(self.0.files.fetch_add(1, Ordering::Relaxed), 0, "added twice");
        self.0.added.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn delete(&self, (): &()) -> io::Result<()> {
        self.alive();
        assert_eq!(self.0.files.fetch_sub(1, Ordering::Relaxed), 1, "deleted, and was not there");
        Ok(())
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        assert_eq!(self.0.files.load(Ordering::Relaxed), 0, "the VM has ended with a file");
        assert_eq!(self.0.closed.fetch_add(1, Ordering::Relaxed), 0, "closed twice");
    }
}

struct Model {
    references: Arc<References<Fake>>,
    seen: LoomArc<Seen>,
    file: Arc<()>,
}

fn vm() -> (Holder<Fake>, Model) {
    let zero = || AtomicU32::new(0);
    let seen = LoomArc::new(Seen { files: zero(), added: zero(), closed: zero() });
    let owner = References::begin(Fake(LoomArc::clone(&seen)));
    let references = Arc::clone(owner.references());
    (owner, Model { references, seen, file: Arc::new(()) })
}

impl Model {
    fn again(&self) -> Self {
        let Self { references, seen, file } = self;
        Self { references: Arc::clone(references), seen: LoomArc::clone(seen), file: Arc::clone(file) }
    }

    /// One device: opened and closed. Afterwards KVM does not have its file, unless another device is open.
    fn device(&self, pins: bool) -> bool {
        match self.references.take(&self.file, pins) {
            Ok(reference) => {
                if pins {
                    assert_eq!(self.seen.closed.load(Ordering::Relaxed), 0, "a pinned VM has ended");
                    assert_eq!(self.seen.files.load(Ordering::Relaxed), 1, "an open device's file is not there");
                }
                drop(reference);
                true
            }
            Err(refused) => {
                assert_eq!(refused, Refused::Gone);
                false
            }
        }
    }

    fn nothing_is_left(&self) {
        assert_eq!(self.seen.files.load(Ordering::Relaxed), 0);
        assert_eq!(self.references.holders.load(Ordering::Relaxed), 0);
        assert_eq!(self.seen.closed.load(Ordering::Relaxed), 1);
    }
}

/// spec: KVM-1 KVM-2
#[test]
fn loom_kvm_vm_exit_against_open_takes_all_or_nothing() {
    loom::model(|| {
        let (owner, model) = vm();
        let device = model.again();
        let thread = thread::spawn(move || {
            device.device(false);
            assert_eq!(device.seen.files.load(Ordering::Relaxed), 0, "closed, and KVM still has the file");
        });
        drop(owner);
        thread.join().unwrap();
        assert!(!model.device(false), "a VM that has ended was held again");
        model.nothing_is_left();
    });
}

/// spec: KVM-4
#[test]
fn loom_kvm_a_pinned_vm_ends_with_its_last_device() {
    loom::model(|| {
        let (owner, model) = vm();
        let device = model.again();
        let thread = thread::spawn(move || device.device(true));
        drop(owner);
        thread.join().unwrap();
        model.nothing_is_left();
    });
}

/// spec: KVM-3
#[test]
fn loom_kvm_devices_of_one_file_add_it_once_and_delete_it_last() {
    loom::model(|| {
        let (owner, model) = vm();
        let other = model.again();
        let thread = thread::spawn(move || assert!(other.device(false)));
        let reference = model.references.take(&model.file, false).unwrap();
        assert_eq!(model.seen.files.load(Ordering::Relaxed), 1, "an open device's file is not there");
        thread.join().unwrap();
        assert_eq!(model.seen.files.load(Ordering::Relaxed), 1, "the other device took the file with it");
        drop(reference);
        assert_eq!(model.seen.files.load(Ordering::Relaxed), 0);
        drop(owner);
        model.nothing_is_left();
    });
}

/// Two devices close, and the VM ends: whoever is last, each close returns only when KVM has let the file go.
/// spec: KVM-2
#[test]
fn loom_kvm_closes_against_vm_exit_leave_nothing() {
    // Three threads: bounded, since the full search takes minutes.
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(|| {
        let (owner, model) = vm();
        let closing = model.references.take(&model.file, false).unwrap();
        let other = model.references.take(&model.file, false).unwrap();
        let thread = thread::spawn(move || drop(other));
        let exit = thread::spawn(move || drop(owner));
        drop(closing);
        thread.join().unwrap();
        exit.join().unwrap();
        assert_eq!(model.seen.added.load(Ordering::Relaxed), 1);
        model.nothing_is_left();
    });
}

/// Looking and counting are one step.
/// spec: KVM-3
#[test]
fn loom_kvm_a_second_open_of_a_file_waits_until_the_first_has_added_it() {
    loom::model(|| {
        let (owner, model) = vm();
        let first = model.again();
        let open = move |model: &Model| {
            let reference = model.references.take(&model.file, false).unwrap();
            assert_eq!(model.seen.files.load(Ordering::Relaxed), 1, "opened before KVM knew the file");
            reference
        };
        let thread = thread::spawn(move || open(&first));
        let references = [open(&model), thread.join().unwrap()];
        assert_eq!(model.seen.added.load(Ordering::Relaxed), 1);
        drop(references);
        drop(owner);
        model.nothing_is_left();
    });
}
