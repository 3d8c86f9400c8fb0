//! The one suite of opening with a VM, run by group and by cdev: a kernel whose every step can fail, whose descriptors tell when
//! they have been closed, and a simulated KVM.

use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicUsize;

use rustix::event::{PollFd, PollFlags, poll};

use super::*;
use crate::kvm::sim::{Call, SimKvm};
use crate::kvm::{Handle, Vm};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Group,
    Cdev,
}

/// Each descriptor that it gives away is a pipe's writing end: the reading end tells when the last duplicate has been closed.
#[derive(Debug, Default)]
struct Steps {
    log: Mutex<Vec<String>>,
    given: Mutex<Vec<OwnedFd>>,
    fail_at: AtomicUsize,
}

const NEVER: usize = usize::MAX;

impl Steps {
    fn step(&self, name: &str) -> io::Result<()> {
        let mut log = self.log.lock().unwrap();
        log.push(name.to_owned());
        let failing = self.fail_at.fetch_sub(1, Ordering::SeqCst) == 0;
        if failing { Err(Errno::NOSPC) } else { Ok(()) }
    }

    fn fail_at(&self, step: usize) {
        self.fail_at.store(step, Ordering::SeqCst);
    }

    fn give(&self) -> io::Result<OwnedFd> {
        let (read, write) = rustix::pipe::pipe()?;
        self.given.lock().unwrap().push(read);
        Ok(write)
    }

    /// How many of the descriptors given away are open still, whoever has them.
    fn open(&self) -> usize {
        let is_open = |read: &OwnedFd| {
            let mut fds = [PollFd::new(read, PollFlags::empty())];
            poll(&mut fds, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
            !fds[0].revents().contains(PollFlags::HUP)
        };
        self.given.lock().unwrap().iter().filter(|read| is_open(read)).count()
    }

    fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

impl Kernel for Arc<Steps> {
    fn open_node(&self, _: &Path) -> io::Result<OwnedFd> {
        self.step("open")?;
        self.give()
    }

    fn group_status(&self, _: BorrowedFd<'_>) -> io::Result<u32> {
        self.step("status").map(|()| VFIO_GROUP_FLAGS_VIABLE)
    }

    fn group_set_container(&self, _: BorrowedFd<'_>, _: &IoSpace) -> io::Result<()> {
        self.step("container")
    }

    fn choose_type1v2(&self, _: &IoSpace) -> io::Result<()> {
        self.step("type1")
    }

    fn group_device_fd(&self, _: BorrowedFd<'_>, _: &CStr) -> io::Result<OwnedFd> {
        self.step("device")?;
        self.give()
    }

    fn bind_iommufd(&self, _: BorrowedFd<'_>, _: &IoSpace, _: Option<&[u8; 16]>) -> io::Result<u32> {
        self.step("bind").map(|()| 1)
    }

    fn attach(&self, _: BorrowedFd<'_>, _: &IoSpace) -> io::Result<()> {
        self.step("attach")
    }
}

/// As a device has them: the fd goes first.
type Opened = (Arc<OwnedFd>, Membership);

struct Bench {
    how: How,
    steps: Arc<Steps>,
    iommu: Arc<Iommu>,
    kvm: SimKvm,
}

impl Bench {
    /// With a VM, whose calls are steps in the log as well.
    fn new(how: How) -> (Self, Vm) {
        let steps = Arc::new(Steps { fail_at: AtomicUsize::new(NEVER), ..Steps::default() });
        let iommu = Iommu::new(IoSpace::fake(), Box::new(Arc::clone(&steps)));
        let bench = Self { how, steps, iommu, kvm: SimKvm::new() };
        let log = Arc::clone(&bench.steps);
        bench.kvm.inside_calls(move |call| log.log.lock().unwrap().push(format!("{call:?}")));
        let vm = Vm::over(bench.kvm.files());
        (bench, vm)
    }

    fn open(&self, vm: Option<&Handle>) -> Result<Opened, IommuError> {
        self.open_group(4, vm)
    }

    fn open_group(&self, number: u32, vm: Option<&Handle>) -> Result<Opened, IommuError> {
        let node = Path::new("/node");
        match self.how {
            How::Group => self.iommu.open_by_group(number, node, c"device", vm, || "unviable".to_owned()),
            How::Cdev => self.iommu.open_by_cdev(node, None, vm),
        }
    }

    /// Descriptors of one open device.
    fn fds(&self) -> usize {
        if self.how == How::Group { 2 } else { 1 }
    }

    fn assert_closed(&self, when: &str) {
        assert_eq!((self.steps.open(), self.kvm.count()), (0, 0), "left open after {when}: {:?}", self.steps.log());
        assert!(self.iommu.groups().is_empty(), "{when}");
    }
}

fn close((fd, membership): Opened) {
    drop(fd);
    drop(membership);
}

fn kvm_knows_the_file_before_the_device_is_opened(how: How) {
    let (bench, vm) = Bench::new(how);
    close(bench.open(Some(&vm.handle())).unwrap());
    let steps: &[&str] = match how {
        How::Group => &["open", "status", "container", "type1", "Add", "device", "Delete"],
        How::Cdev => &["open", "Add", "bind", "attach", "Delete"],
    };
    assert_eq!(bench.steps.log(), steps);
    bench.assert_closed("closing");
    // Without a VM KVM hears of nothing.
    close(bench.open(None).unwrap());
    assert_eq!(bench.kvm.calls(), [Call::Add, Call::Delete]);
}

fn each_failing_step_unwinds(how: How) {
    let (bench, vm) = Bench::new(how);
    close(bench.open(Some(&vm.handle())).unwrap());
    let count = bench.steps.log().len() - bench.kvm.calls().len();
    assert_eq!(count, if how == How::Group { 5 } else { 3 });
    for pinning in [false, true] {
        let handle = if pinning { vm.handle().pinning() } else { vm.handle() };
        for step in 0..count {
            bench.steps.fail_at(step);
            assert_eq!(bench.open(Some(&handle)).unwrap_err().errno, Errno::NOSPC, "step {step}");
            bench.assert_closed(&format!("a fault at step {step}"));
        }
        for errno in [Errno::EXIST, Errno::IO] {
            bench.kvm.refuse_next(Call::Add, errno);
            let error = bench.open(Some(&handle)).unwrap_err();
            assert!(error.errno == errno && error.what.starts_with("KVM_DEV_VFIO_FILE_ADD"), "{error:?}");
            bench.assert_closed("a refusal by KVM");
        }
        // After all that it opens.
        close(bench.open(Some(&handle)).unwrap());
    }
    // Nobody kept the VM.
    drop(vm);
    assert_eq!(bench.kvm.calls().last(), Some(&Call::Close));
}

fn a_failing_second_device_leaves_the_first_alone(how: How) {
    let (bench, vm) = Bench::new(how);
    let first = bench.open(Some(&vm.handle())).unwrap();
    let last_step = if how == How::Group { 0 } else { 2 };
    for step in 0..=last_step {
        bench.steps.fail_at(step);
        assert_eq!(bench.open(Some(&vm.handle())).unwrap_err().errno, Errno::NOSPC);
        assert_eq!((bench.steps.open(), bench.kvm.count()), (bench.fds(), 1));
    }
    close(first);
    bench.assert_closed("closing");
}

fn a_vm_that_has_ended_opens_nothing(how: How) {
    let (bench, vm) = Bench::new(how);
    let handle = vm.handle();
    drop(vm);
    for handle in [handle.pinning(), handle] {
        let error = bench.open(Some(&handle)).unwrap_err();
        assert_eq!((error.errno, error.what.as_str()), (Errno::NODEV, "the VM has ended"));
        bench.assert_closed("a refusal");
    }
    close(bench.open(None).unwrap());
}

fn the_vm_exits_while_the_device_is_open(how: How) {
    let (bench, vm) = Bench::new(how);
    let (one, other) = (bench.open(Some(&vm.handle())).unwrap(), bench.open(Some(&vm.handle())).unwrap());
    drop(vm);
    assert_eq!(bench.kvm.calls().last(), Some(&Call::Close), "an open device keeps the VM");
    assert_eq!(bench.kvm.count(), 0);
    let fds = if how == How::Group { 3 } else { 2 };
    assert_eq!(bench.steps.open(), fds, "the devices are open still");
    close(one);
    close(other);
    bench.assert_closed("closing");
}

fn a_pinning_device_keeps_the_vm_until_it_is_closed(how: How) {
    let (bench, vm) = Bench::new(how);
    let device = bench.open(Some(&vm.handle().pinning())).unwrap();
    drop(vm);
    assert_eq!((bench.kvm.calls(), bench.kvm.count()), (vec![Call::Add], 1));
    close(device);
    assert_eq!(bench.kvm.calls(), [Call::Add, Call::Delete, Call::Close]);
    bench.assert_closed("closing");
}

/// The group once, each cdev for itself.
fn devices_are_counted_by_their_file(how: How) {
    let (bench, vm) = Bench::new(how);
    let devices: Vec<_> = (0..3).map(|_| bench.open(Some(&vm.handle())).unwrap()).collect();
    let files = if how == How::Group { 1 } else { 3 };
    assert_eq!(bench.kvm.count(), files);
    for (closed, device) in devices.into_iter().enumerate() {
        assert_eq!(bench.kvm.count(), if how == How::Group { 1 } else { files - closed });
        close(device);
    }
    assert_eq!(bench.kvm.calls().len(), 2 * files);
    bench.assert_closed("closing");
}

/// By the thread that is inside KVM's call for another device's file, or that ends the VM.
fn the_last_reference_goes_inside_a_callback(how: How) {
    // The VM and the device that pinned it go inside the add, or the delete, of another group's or device's file.
    for inside in [Call::Add, Call::Delete] {
        let (bench, vm) = Bench::new(how);
        let (pinning, plain) = (vm.handle().pinning(), vm.handle());
        let mut victims = Some((vm, bench.open(Some(&pinning)).unwrap()));
        bench.kvm.inside_calls(move |call| {
            if let Some((vm, device)) = victims.take_if(|_| call == inside) {
                drop(vm);
                close(device);
            }
        });
        close(bench.open_group(5, Some(&plain)).unwrap());
        assert_eq!(bench.kvm.calls().last(), Some(&Call::Close), "inside {inside:?}");
        bench.assert_closed(&format!("inside {inside:?}"));
    }
    // The devices go inside the VM's end.
    let (bench, vm) = Bench::new(how);
    let open = |number| bench.open_group(number, Some(&vm.handle())).unwrap();
    let mut victims = vec![open(4), open(5)];
    bench.kvm.inside_calls(move |_| victims.drain(..).for_each(close));
    drop(vm);
    assert_eq!(bench.kvm.calls().last(), Some(&Call::Close));
    bench.assert_closed("the VM's end");
}

fn what_kvm_does_not_let_go_ends_with_the_vm(how: How) {
    let (bench, vm) = Bench::new(how);
    let device = bench.open(Some(&vm.handle())).unwrap();
    bench.kvm.refuse_next(Call::Delete, Errno::IO);
    close(device);
    assert_eq!((bench.steps.open(), bench.kvm.count()), (1, 1), "its file, in KVM");
    drop(vm);
    bench.assert_closed("the VM's end");
}

fn a_group_is_known_to_one_vm(how: How) {
    let (bench, vm) = Bench::new(how);
    let other_kvm = SimKvm::new();
    let other_vm = Vm::over(other_kvm.files());
    let device = bench.open(Some(&vm.handle())).unwrap();
    match (how, bench.open(Some(&other_vm.handle()))) {
        (How::Group, Err(error)) => assert_eq!(error.errno, Errno::INVAL),
        (How::Cdev, Ok(other)) => close(other),
        (_, other) => panic!("{other:?}"),
    }
    // Once the first one has ended, the other one may.
    drop(vm);
    close(bench.open(Some(&other_vm.handle())).unwrap());
    close(device);
    bench.assert_closed("closing");
}

/// An open that failed, or has been closed, leaves nothing of its VM on a group that others hold open.
fn a_group_forgets_a_vm_that_has_no_device_of_it(how: How) {
    let (bench, vm) = Bench::new(how);
    let other_kvm = SimKvm::new();
    let other_vm = Vm::over(other_kvm.files());
    let nobodys = bench.open(None).unwrap();
    close(bench.open(Some(&vm.handle())).unwrap());
    bench.steps.fail_at(0);
    bench.open(Some(&vm.handle())).unwrap_err();
    close(bench.open(Some(&other_vm.handle())).unwrap());
    let ours = bench.open(Some(&vm.handle())).unwrap();
    if matches!(how, How::Group) {
        assert_eq!(bench.open(Some(&other_vm.handle())).unwrap_err().errno, Errno::INVAL);
    }
    close(ours);
    close(nobodys);
    bench.assert_closed("closing");
}

const SUITE: &[fn(How)] = &[
    kvm_knows_the_file_before_the_device_is_opened,
    each_failing_step_unwinds,
    a_failing_second_device_leaves_the_first_alone,
    a_vm_that_has_ended_opens_nothing,
    the_vm_exits_while_the_device_is_open,
    a_pinning_device_keeps_the_vm_until_it_is_closed,
    devices_are_counted_by_their_file,
    the_last_reference_goes_inside_a_callback,
    what_kvm_does_not_let_go_ends_with_the_vm,
    a_group_is_known_to_one_vm,
    a_group_forgets_a_vm_that_has_no_device_of_it,
];

/// spec: KVM-1 KVM-3 KVM-4 KVM-5 KVM-6 KVM-7 KVM-8 KVM-9 KVM-12
#[test]
fn opening_with_a_vm_keeps_its_promises_by_group() {
    SUITE.iter().for_each(|case| case(How::Group));
}

/// spec: KVM-1 KVM-3 KVM-4 KVM-5 KVM-6 KVM-7 KVM-8 KVM-12
#[test]
fn opening_with_a_vm_keeps_its_promises_by_cdev() {
    SUITE.iter().for_each(|case| case(How::Cdev));
}
