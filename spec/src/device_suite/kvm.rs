//! Cases of a device and a VM of the kernel's KVM. They open and close the device themselves, so that they are not for a bench.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use vfio_mediate::control::config::{DeviceConfig, Draft, OpenBy};
use vfio_mediate::control::host::{Embedder, Host, NoGuest};
use vfio_mediate::control::machine;
use vfio_mediate::control::units::ByteSize;
use vfio_mediate::device::vfio::sysfs::Sysfs;
use vfio_mediate::device::vfio::{Options, VfioDevice};
use vfio_mediate::device::{Backend, CONFIG_REGION, Device, DeviceError};
use vfio_mediate::kvm::{Handle, Vm};
use vfio_mediate::mediation::VmmPort;
use vfio_mediate::migration::cause::{Phase, Role};
use vfio_mediate::sys::{duplicate, kvm, vfio};

use super::{Line, Verdict};

/// A directory for each VM that exists; one whose last user goes vanishes from it.
const VMS: &str = "/sys/kernel/debug/kvm";

/// Rounds of a race. Under emulation each takes some 10 ms.
const RACES: u32 = 40;

/// A device that is opened by these cases.
#[derive(Debug, Clone, Copy)]
struct Opener<'a> {
    name: &'a str,
    backend: Backend,
}

/// A VM without memory or CPUs, and its device of type VFIO, by which can be asked what KVM knows.
struct Machine {
    fd: OwnedFd,
    files: OwnedFd,
}

type Run = fn(Opener<'_>) -> Result<()>;

const CASES: &[(&str, Run)] = &[
    ("KVM knows the file while the device is open, and not before or after", known_while_open),
    ("KVM gets its device of type VFIO once for a VM", one_device_per_vm),
    ("the VM exits while the device is open", vm_exits),
    ("the VM's fd is closed while the device is open", vm_fd_is_closed),
    ("a pinning device keeps the VM until it is closed", pinned),
    ("a VM that has ended is refused, and the device opens without one", ended),
    ("a device that was opened without a VM keeps none", nobody_asked),
    ("VM exit against open, in a race", race),
    ("no access before the bind is complete", not_bound),
    ("a host opens its devices for its embedder's VM", whole_host),
];

/// Runs every case on the device `name`, and returns the number of failures.
pub fn run(name: &str, backend: Backend, filter: &str, mut report: impl FnMut(&Line<'_>)) -> Result<usize> {
    let opener = Opener { name, backend };
    let identity = opener.open(None)?.identity().clone();
    let mut failures = 0;
    for (case, run) in CASES.iter().filter(|(case, _)| case.contains(filter)) {
        let verdict = Verdict::of(run(opener).and_then(|()| opener.is_closed()));
        failures += usize::from(verdict.is_failure());
        report(&Line { identity: &identity, case, verdict: &verdict });
    }
    Ok(failures)
}

/// The case of two devices of one group: as [`run`], and nothing for devices of two groups.
pub fn run_pair(one: &str, other: &str, backend: Backend, mut report: impl FnMut(&Line<'_>)) -> Result<usize> {
    let sysfs = Sysfs::default();
    if sysfs.group(one)?.context("no group")? != sysfs.group(other)?.context("no group")? {
        return Ok(0);
    }
    let (one, other) = (Opener { name: one, backend }, Opener { name: other, backend });
    let identity = one.open(None)?.identity().clone();
    let verdict = Verdict::of(one_group(one, other).and_then(|()| one.is_closed()).and_then(|()| other.is_closed()));
    let case = "devices of one group: KVM learns of the group once, of each cdev for itself";
    report(&Line { identity: &identity, case, verdict: &verdict });
    Ok(usize::from(verdict.is_failure()))
}

impl Opener<'_> {
    fn open(self, vm: Option<Handle>) -> Result<VfioDevice, DeviceError> {
        self.open_with(&Options { kvm: vm, ..Options::default() })
    }

    fn open_with(self, options: &Options) -> Result<VfioDevice, DeviceError> {
        match self.backend {
            Backend::VfioCdev => VfioDevice::open_cdev(self.name, options),
            Backend::VfioGroup | Backend::Sim => VfioDevice::open_group(self.name, options),
        }
    }

    /// The group's or the device's node.
    fn node(self) -> Result<PathBuf> {
        let sysfs = Sysfs::default();
        Ok(match self.backend {
            Backend::VfioCdev => sysfs.cdev_node(self.name)?.context("no cdev")?,
            Backend::VfioGroup | Backend::Sim => sysfs.group_node(sysfs.group(self.name)?.context("no group")?),
        })
    }

    /// The file that the host has open and does not hand out: the same file by another descriptor.
    fn file(self) -> Result<Option<OwnedFd>> {
        let node = self.node()?;
        for entry in std::fs::read_dir("/proc/self/fd")? {
            let path = entry?.path();
            if std::fs::read_link(&path).is_ok_and(|target| target == node) {
                let number = path.file_name().and_then(|name| name.to_str()).context("a descriptor's number")?;
                return Ok(Some(duplicate(number.parse()?)?));
            }
        }
        Ok(None)
    }

    /// Nothing of it is open, here or in KVM: an exclusive open succeeds.
    fn is_closed(self) -> Result<()> {
        ensure!(self.file()?.is_none(), "the case left the device's file open");
        self.open(None).map(drop).context("opening again")
    }
}

impl Machine {
    fn new() -> Result<Self> {
        let node = File::options().read(true).write(true).open("/dev/kvm").context("/dev/kvm")?;
        let fd = kvm::create_vm(node.as_fd()).context("KVM_CREATE_VM")?;
        let files = kvm::create_vfio_device(fd.as_fd()).context("KVM_CREATE_DEVICE")?;
        Ok(Self { fd, files })
    }

    /// As an embedder hands it over whose VMM has made the device itself, so that the case can ask as well.
    fn vm(&self) -> Result<Vm> {
        Ok(Vm::with_device(self.files.try_clone()?)?)
    }

    /// Whether KVM knows the file. Leaves it so.
    fn knows(&self, file: BorrowedFd<'_>) -> Result<bool> {
        match kvm::vfio_file_add(self.files.as_fd(), file) {
            Err(Errno::EXIST) => Ok(true),
            Ok(()) => {
                kvm::vfio_file_delete(self.files.as_fd(), file).context("deleting it again")?;
                Ok(false)
            }
            Err(errno) => Err(errno).context("asking KVM"),
        }
    }
}

/// How many VMs there are on this machine.
fn vms() -> Result<usize> {
    let entries = std::fs::read_dir(VMS).context(VMS)?;
    Ok(entries.flatten().filter(|entry| entry.path().is_dir()).count())
}

fn works(device: &VfioDevice) -> Result<()> {
    let mut ids = [0; 4];
    device.region_read(CONFIG_REGION, 0, &mut ids)?;
    ensure!(ids[..2] == device.identity().vendor_id.to_le_bytes(), "ids {ids:x?}");
    Ok(())
}

/// spec: KVM-3, KVM-7
fn known_while_open(opener: Opener<'_>) -> Result<()> {
    let machine = Machine::new()?;
    let vm = machine.vm()?;
    ensure!(opener.file()?.is_none(), "open already");
    for pins in [false, true] {
        let handle = if pins { vm.handle().pinning() } else { vm.handle() };
        let device = opener.open(Some(handle))?;
        let file = opener.file()?.context("its file is not among the descriptors")?;
        ensure!(machine.knows(file.as_fd())?, "open, and KVM does not know it");
        works(&device)?;
        drop(device);
        ensure!(!machine.knows(file.as_fd())?, "closed, and KVM knows it still");
        drop(file);
        opener.open(None).context("KVM has it still open")?;
    }
    Ok(())
}

fn one_device_per_vm(opener: Opener<'_>) -> Result<()> {
    let node = File::options().read(true).write(true).open("/dev/kvm").context("/dev/kvm")?;
    let fd = kvm::create_vm(node.as_fd()).context("KVM_CREATE_VM")?;
    let vm = Vm::new(fd.as_fd())?;
    let error = Vm::new(fd.as_fd()).err().context("a second one was made")?;
    ensure!(error.errno() == Errno::BUSY, "{error}");
    works(&opener.open(Some(vm.handle()))?)?;
    // Something that is no VFIO file is refused by name of the call.
    let null = Arc::new(OwnedFd::from(File::open("/dev/null")?));
    let error = vm.handle().take(&null).err().context("KVM took /dev/null")?;
    ensure!(error.errno() == Errno::INVAL && error.to_string().contains("KVM_DEV_VFIO_FILE_ADD"), "{error}");
    Ok(())
}

/// spec: KVM-3, KVM-9
fn one_group(one: Opener<'_>, other: Opener<'_>) -> Result<()> {
    let by_group = one.backend != Backend::VfioCdev;
    let (machine, stranger) = (Machine::new()?, Machine::new()?);
    let (vm, strange_vm) = (machine.vm()?, stranger.vm()?);
    for one_goes_first in [true, false] {
        let first = one.open(Some(vm.handle()))?;
        let shared = Options { iommu: Some(Arc::clone(first.iommu())), ..Options::default() };
        if by_group {
            let error = other.open_with(&Options { kvm: Some(strange_vm.handle()), ..shared.clone() });
            let error = error.err().context("the group was made known to two VMs")?;
            ensure!(error.errno == Errno::INVAL && error.to_string().contains("another VM"), "{error}");
        }
        let second = other.open_with(&Options { kvm: Some(vm.handle()), ..shared })?;
        let missing = "a file is not among the descriptors";
        let files = [one.file()?.context(missing)?, other.file()?.context(missing)?];
        let known = || Ok::<_, anyhow::Error>([machine.knows(files[0].as_fd())?, machine.knows(files[1].as_fd())?]);
        ensure!(known()? == [true, true], "open, and KVM does not know them: {:?}", known()?);
        let (leaving, staying) = if one_goes_first { (first, second) } else { (second, first) };
        drop(leaving);
        let expected = [by_group || !one_goes_first, by_group || one_goes_first];
        ensure!(known()? == expected, "one has been closed: {:?}", known()?);
        works(&staying)?;
        drop(staying);
        ensure!(known()? == [false, false], "closed, and KVM knows them still: {:?}", known()?);
    }
    Ok(())
}

/// spec: KVM-4
fn vm_exits(opener: Opener<'_>) -> Result<()> {
    let before = vms()?;
    let machine = Machine::new()?;
    let vm = machine.vm()?;
    let device = opener.open(Some(vm.handle()))?;
    let file = opener.file()?.context("its file is not among the descriptors")?;
    ensure!(machine.knows(file.as_fd())?, "open, and KVM does not know it");
    drop(vm);
    ensure!(!machine.knows(file.as_fd())?, "the VM has exited, and KVM knows the file still");
    drop((machine, file));
    ensure!(vms()? == before + 1, "the kernel's own reference to the VM is gone");
    works(&device)?;
    device.reset().or_else(|error| if error.errno == Errno::NOTTY { Ok(()) } else { Err(error) })?;
    works(&device)?;
    drop(device);
    ensure!(vms()? == before, "the VM is there after all has been closed");
    Ok(())
}

fn vm_fd_is_closed(opener: Opener<'_>) -> Result<()> {
    let before = vms()?;
    let Machine { fd, files } = Machine::new()?;
    let vm = Vm::with_device(files)?;
    let device = opener.open(Some(vm.handle()))?;
    drop(fd);
    works(&device)?;
    // The second one is added to, and all are deleted from, a VM whose fd nobody has.
    drop(device);
    let device = opener.open(Some(vm.handle()))?;
    works(&device)?;
    drop(vm);
    works(&device)?;
    drop(device);
    ensure!(vms()? == before, "the VM is there after all has been closed");
    Ok(())
}

/// spec: KVM-4
fn pinned(opener: Opener<'_>) -> Result<()> {
    let before = vms()?;
    let machine = Machine::new()?;
    let vm = machine.vm()?;
    let device = opener.open(Some(vm.handle().pinning()))?;
    let file = opener.file()?.context("its file is not among the descriptors")?;
    drop(vm);
    ensure!(machine.knows(file.as_fd())?, "pinned, and KVM does not know the file");
    drop(device);
    ensure!(!machine.knows(file.as_fd())?, "closed, and KVM knows it still");
    drop((machine, file));
    ensure!(vms()? == before, "the VM is there after all has been closed");
    Ok(())
}

/// spec: KVM-1
fn ended(opener: Opener<'_>) -> Result<()> {
    let machine = Machine::new()?;
    let vm = machine.vm()?;
    let handle = vm.handle();
    drop(vm);
    for handle in [handle.pinning(), handle] {
        let error = opener.open(Some(handle)).err().context("it was opened for a VM that has ended")?;
        ensure!(error.errno == Errno::NODEV && error.to_string().contains("the VM has ended"), "{error}");
    }
    works(&opener.open(None)?)
}

/// spec: KVM-4
fn nobody_asked(opener: Opener<'_>) -> Result<()> {
    let before = vms()?;
    let machine = Machine::new()?;
    let vm = machine.vm()?;
    let device = opener.open(None)?;
    ensure!(vms()? == before + 1, "a VM does not show in {VMS}");
    drop((vm, machine));
    ensure!(vms()? == before, "the open device keeps a VM that it was not opened for");
    works(&device)
}

/// Wherever the exit meets the open, both end, and nothing is left.
/// spec: KVM-1, KVM-2
fn race(opener: Opener<'_>) -> Result<()> {
    let before = vms()?;
    let (mut opened, mut refused) = (0, 0);
    for round in 0..RACES {
        let machine = Machine::new()?;
        let vm = machine.vm()?;
        let handle = if round % 2 == 0 { vm.handle() } else { vm.handle().pinning() };
        let begin = Barrier::new(2);
        let outcome = std::thread::scope(|scope| {
            let opening = scope.spawn(|| {
                begin.wait();
                opener.open(Some(handle)).and_then(|device| device.region_read(CONFIG_REGION, 0, &mut [0; 4]))
            });
            begin.wait();
            // Later from round to round, so that it meets each step.
            (0..round * 8).for_each(|_| std::hint::spin_loop());
            drop(vm);
            opening.join()
        });
        match outcome {
            Ok(Ok(())) => opened += 1,
            Ok(Err(error)) if error.errno == Errno::NODEV => refused += 1,
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => bail!("the opening thread panicked"),
        }
        drop(machine);
        ensure!(vms()? == before, "round {round}: the VM is there after all has been closed");
    }
    ensure!(opened + refused == RACES, "{opened} opened, {refused} refused");
    Ok(())
}

/// By cdev the device's own fd refuses everything; by group there is no device before the group is whole.
/// spec: KVM-10
fn not_bound(opener: Opener<'_>) -> Result<()> {
    let node = File::options().read(true).write(true).open(opener.node()?)?;
    match opener.backend {
        Backend::VfioCdev => {
            let mut data = [0; 4];
            let read = rustix::io::pread(&node, &mut data, 7 << 40);
            ensure!(read == Err(Errno::INVAL), "a read before the bind: {read:?}");
            let wrote = rustix::io::pwrite(&node, &data, 7 << 40);
            ensure!(wrote == Err(Errno::INVAL), "a write before the bind: {wrote:?}");
            let info = vfio::device_info(node.as_fd()).err();
            ensure!(info == Some(Errno::INVAL), "information before the bind: {info:?}");
        }
        Backend::VfioGroup | Backend::Sim => {
            let name = std::ffi::CString::new(opener.name)?;
            let device = vfio::group_device_fd(node.as_fd(), &name).err();
            ensure!(device == Some(Errno::INVAL), "a device before its group has an IOMMU: {device:?}");
        }
    }
    drop(node);
    works(&opener.open(None)?)
}

/// An embedder whose VM is KVM's, and ends while its host goes on.
struct Program(Mutex<Option<Vm>>);

impl Program {
    fn vm(&self) -> MutexGuard<'_, Option<Vm>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Embedder for Program {
    fn kvm(&self) -> Option<Handle> {
        self.vm().as_ref().map(Vm::handle)
    }

    fn vmm(&self, machine: &machine::Machine) -> Result<Arc<dyn VmmPort>, String> {
        NoGuest.vmm(machine)
    }

    fn phase(&self, _: Role, _: Phase) {}

    fn running(&self) {}

    fn gone(&self) {}
}

/// spec: KVM-11
fn whole_host(opener: Opener<'_>) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let open = if opener.backend == Backend::VfioCdev { OpenBy::Cdev } else { OpenBy::Group };
    let mut draft = Draft {
        memory: Some(ByteSize(1 << 20)),
        control_socket: Some(folder.path().join("control")),
        state_dir: Some(folder.path().join("state")),
        ..Draft::default()
    };
    draft.devices.push(DeviceConfig {
        name: format!("vfio:{}", opener.name).parse()?,
        open,
        vf_token: None,
        serve: None,
    });
    let machine = Machine::new()?;
    let program = Arc::new(Program(Mutex::new(Some(machine.vm()?))));
    let host = Host::start(draft.finish()?, program.clone())?;
    let file = opener.file()?.context("its file is not among the descriptors")?;
    ensure!(machine.knows(file.as_fd())?, "the host has opened it, and KVM does not know it");
    let vm = program.vm().take();
    drop(vm);
    ensure!(!machine.knows(file.as_fd())?, "the VM has exited, and KVM knows the file still");
    drop(file);
    host.stop(Instant::now() + Duration::from_secs(10)).map_err(|failure| anyhow::anyhow!("{failure:?}"))
}

/// Whether this machine has what the cases need.
pub fn is_ready() -> Result<()> {
    ensure!(Path::new("/dev/kvm").exists(), "no /dev/kvm");
    vms().map(drop)
}
