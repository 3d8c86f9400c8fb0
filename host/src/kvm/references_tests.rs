use std::sync::Mutex as StdMutex;
use std::sync::atomic::{AtomicBool, AtomicU32 as StdAtomicU32};
use std::sync::mpsc::channel;

use super::*;

type Inside = Box<dyn FnMut(&'static str) + Send>;

/// A list that counts, and whose calls do what a test puts into them.
#[derive(Default)]
struct World {
    files: StdMutex<Vec<u32>>,
    calls: StdMutex<Vec<(&'static str, u32)>>,
    closed: AtomicBool,
    refuse: StdAtomicU32,
    inside: StdMutex<Option<Inside>>,
}

struct List(Arc<World>);

impl std::fmt::Debug for List {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("List")
    }
}

impl List {
    fn called(&self, what: &'static str, file: u32) -> io::Result<()> {
        assert!(!self.0.closed.load(Ordering::SeqCst), "called after the VM has ended");
        self.0.calls.lock().unwrap().push((what, file));
        let inside = self.0.inside.lock().unwrap().take();
        if let Some(mut inside) = inside {
            inside(what);
        }
        match self.0.refuse.swap(0, Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(Errno::from_raw_os_error(errno.cast_signed())),
        }
    }
}

impl FileList for List {
    type File = u32;

    fn add(&self, file: &u32) -> io::Result<()> {
        self.called("add", *file)?;
        let mut files = self.0.files.lock().unwrap();
        assert!(!files.contains(file), "added twice");
        files.push(*file);
        Ok(())
    }

    fn delete(&self, file: &u32) -> io::Result<()> {
        self.called("delete", *file)?;
        let mut files = self.0.files.lock().unwrap();
        assert!(files.contains(file), "deleted, and was not there");
        files.retain(|there| there != file);
        Ok(())
    }
}

impl Drop for List {
    fn drop(&mut self) {
        assert!(self.0.files.lock().unwrap().is_empty(), "the VM has ended with a file");
        assert!(!self.0.closed.swap(true, Ordering::SeqCst));
    }
}

fn vm() -> (Holder<List>, Arc<References<List>>, Arc<World>) {
    let world: Arc<World> = Arc::default();
    let owner = References::begin(List(Arc::clone(&world)));
    let references = Arc::clone(owner.references());
    (owner, references, world)
}

impl World {
    fn ended(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    fn files(&self) -> Vec<u32> {
        self.files.lock().unwrap().clone()
    }

    /// Runs inside the next call.
    fn inside_next(&self, inside: impl FnMut(&'static str) + Send + 'static) {
        *self.inside.lock().unwrap() = Some(Box::new(inside));
    }
}

/// spec: KVM-3
#[test]
fn the_first_open_takes_and_the_last_close_puts() {
    let (_owner, references, world) = vm();
    let (group, other) = (Arc::new(7), Arc::new(8));
    let mut open: Vec<_> = (0..3).map(|_| references.take(&group, false).unwrap()).collect();
    let alone = references.take(&other, false).unwrap();
    assert_eq!(world.files(), [7, 8]);
    while let Some(reference) = open.pop() {
        assert!(world.files().contains(&7));
        drop(reference);
    }
    assert_eq!(world.files(), [8]);
    drop(alone);
    assert_eq!(*world.calls.lock().unwrap(), [("add", 7), ("add", 8), ("delete", 7), ("delete", 8)]);
    // Nothing lingers: the same again.
    drop(references.take(&group, false).unwrap());
    assert_eq!(Arc::strong_count(&group), 1);
    assert_eq!(references.holders.load(Ordering::SeqCst), 1);
}

/// spec: KVM-1
#[test]
fn a_vm_that_has_ended_refuses_and_is_left_alone() {
    let (owner, references, world) = vm();
    drop(owner);
    assert!(world.ended());
    assert_eq!(references.take(&Arc::new(1), false).unwrap_err(), Refused::Gone);
    assert_eq!(references.take(&Arc::new(1), true).unwrap_err(), Refused::Gone);
    assert!(references.try_hold().is_none());
    assert_eq!(references.holders.load(Ordering::SeqCst), 0);
}

/// spec: KVM-4
#[test]
fn an_open_device_does_not_keep_the_vm() {
    let (owner, references, world) = vm();
    let file = Arc::new(1);
    let reference = references.take(&file, false).unwrap();
    drop(owner);
    assert!(world.ended() && world.files().is_empty());
    drop(reference);
    assert_eq!(*world.calls.lock().unwrap(), [("add", 1), ("delete", 1)], "deleted once");
    assert_eq!(Arc::strong_count(&file), 1);
}

/// spec: KVM-4
#[test]
fn a_pin_keeps_the_vm_until_the_last_close() {
    let (owner, references, world) = vm();
    let file = Arc::new(1);
    let pins = [references.take(&file, true).unwrap(), references.take(&file, true).unwrap()];
    let plain = references.take(&file, false).unwrap();
    drop(owner);
    assert_eq!(world.files(), [1]);
    // Somebody who comes while it is pinned is served.
    drop(references.take(&Arc::new(2), false).unwrap());
    let [one, other] = pins;
    drop(one);
    assert!(!world.ended());
    drop(other);
    assert!(world.ended());
    drop(plain);
}

/// spec: KVM-5
#[test]
fn a_file_that_kvm_refuses_is_as_it_was() {
    let (owner, references, world) = vm();
    let file = Arc::new(1);
    for pins in [false, true] {
        world.refuse.store(Errno::INVAL.raw_os_error().cast_unsigned(), Ordering::SeqCst);
        assert_eq!(references.take(&file, pins).unwrap_err(), Refused::Kernel(Errno::INVAL));
        assert_eq!((references.holders.load(Ordering::SeqCst), Arc::strong_count(&file)), (1, 1));
    }
    drop(references.take(&file, false).unwrap());
    drop(owner);
    assert!(world.ended());
}

/// The owner goes, devices close and others open, each inside KVM's call about another: nothing is locked by then.
/// spec: KVM-6
#[test]
fn the_last_reference_dropped_inside_a_callback_is_no_deadlock() {
    // The VM's owner goes inside the add: the opening thread is the last one, and ends the VM when it is done.
    let (owner, references, world) = vm();
    let mut owner = Some(owner);
    world.inside_next(move |_| drop(owner.take()));
    let reference = references.take(&Arc::new(1), false).unwrap();
    assert!(world.ended());
    drop(reference);

    // Inside the delete.
    let (owner, references, world) = vm();
    let reference = references.take(&Arc::new(1), false).unwrap();
    let mut owner = Some(owner);
    world.inside_next(move |_| drop(owner.take()));
    drop(reference);
    assert!(world.ended());

    // Another device closes inside an add.
    let (_owner, references, world) = vm();
    let mut closing = Some(references.take(&Arc::new(1), true).unwrap());
    world.inside_next(move |_| drop(closing.take()));
    let reference = references.take(&Arc::new(2), false).unwrap();
    assert_eq!(world.files(), [2]);
    drop(reference);

    // A device closes inside the delete of its own file, while the VM ends: it does not wait for itself.
    let (owner, references, world) = vm();
    let mut closing = Some(references.take(&Arc::new(1), false).unwrap());
    world.inside_next(move |_| drop(closing.take()));
    let before = Instant::now();
    drop(owner);
    assert!(world.ended() && before.elapsed() < CALL_WAIT);
}

/// Another thread's call is waited for, and what it left is used.
/// spec: KVM-3
#[test]
fn an_open_during_another_s_add_waits_for_it() {
    let (_owner, references, world) = vm();
    let file = Arc::new(1);
    let (begun, begins) = channel();
    let (go, gone) = channel::<()>();
    world.inside_next(move |_| {
        begun.send(()).unwrap();
        gone.recv().unwrap();
    });
    std::thread::scope(|scope| {
        let first = scope.spawn(|| references.take(&file, false).unwrap());
        begins.recv().unwrap();
        let second = scope.spawn(|| references.take(&file, false).unwrap());
        go.send(()).unwrap();
        let both = [first.join().unwrap(), second.join().unwrap()];
        assert_eq!(world.files(), [1]);
        drop(both);
    });
    assert_eq!(*world.calls.lock().unwrap(), [("add", 1), ("delete", 1)]);
}

/// A close that meets the VM's end returns when KVM has let the file go, not before.
/// spec: KVM-2
#[test]
fn a_close_during_the_vm_s_end_waits_for_it() {
    let (owner, references, world) = vm();
    let reference = references.take(&Arc::new(1), false).unwrap();
    let (begun, begins) = channel();
    let (go, gone) = channel::<()>();
    world.inside_next(move |_| {
        begun.send(()).unwrap();
        gone.recv().unwrap();
    });
    std::thread::scope(|scope| {
        scope.spawn(|| drop(owner));
        begins.recv().unwrap();
        let closing = scope.spawn(|| {
            drop(reference);
            assert!(world.ended());
        });
        go.send(()).unwrap();
        closing.join().unwrap();
    });
}

/// spec: KVM-1 KVM-2
#[test]
fn vm_exit_against_opens_and_closes_leaves_nothing() {
    for round in 0..200 {
        let (owner, references, world) = vm();
        let files: Vec<_> = (0..2).map(Arc::new).collect();
        std::thread::scope(|scope| {
            for thread in 0..4_usize {
                let (references, file) = (&references, &files[thread % 2]);
                scope.spawn(move || {
                    for turn in 0..20 {
                        match references.take(file, (turn + thread) % 3 == 0) {
                            Ok(reference) => drop(reference),
                            Err(refused) => return assert_eq!(refused, Refused::Gone),
                        }
                    }
                });
            }
            scope.spawn(move || {
                (0..round).for_each(|_| std::thread::yield_now());
                drop(owner);
            });
        });
        assert!(world.ended() && world.files().is_empty());
        assert!(files.iter().all(|file| Arc::strong_count(file) == 1), "round {round}");
    }
}
