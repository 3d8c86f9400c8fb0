//! Runs the device suite on a device of this machine: `device-suite KIND HOW NAME [SECOND]`.
//!
//! One line per case, `ok|skip|FAIL` first. Exit codes: 0 all passed, 1 a case failed or the device is of another kind,
//! 2 wrong use or a device that does not open.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use vfio_mediate::device::vfio::{Options, VfToken, VfioDevice};
use vfio_mediate::device::{Backend, Device, ErrorKind};
use vfio_mediate_spec::device_suite::{self, Line, Verdict};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// QEMU's edu device; with a second one, the two also share an address space
    Edu,
    /// A VF of an igb (82576)
    Igbvf,
    /// A serial port of the kernel's mtty sample; with a second one, the first also migrates to it
    Mtty,
    /// Any PCI device
    Device,
    /// Any PCI device, and a VM of KVM; with a second one, two devices of one group
    Kvm,
    /// A PF on vfio-pci with `enable_sriov`: it gets a VF, which opens with the PF's token only
    Pf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum How {
    /// Through the IOMMU group and a container
    Group,
    /// Through the character device and an iommufd
    Cdev,
}

/// Runs the device suite on a VFIO device of this machine.
#[derive(Debug, Parser)]
#[command(name = "device-suite")]
struct Arguments {
    /// What the device is to be
    #[arg(value_enum)]
    kind: Kind,
    /// How to open it
    #[arg(value_enum)]
    how: How,
    /// PCI address, or an mdev's UUID
    name: String,
    /// Another one, for the cases of two devices of one VM
    second: Option<String>,
    /// Only cases whose name contains this
    #[arg(long, default_value = "")]
    case: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            println!("FAIL {error:#}");
            ExitCode::from(2)
        }
    }
}

/// The number of failures.
fn run(arguments: &Arguments) -> Result<usize> {
    if arguments.kind == Kind::Kvm {
        return with_vm(arguments);
    }
    let device = open(&arguments.name, arguments.how, &Options::default())?;
    let kind = device_suite::kind(device.identity());
    let is_expected = match arguments.kind {
        Kind::Edu => kind == "edu",
        Kind::Igbvf => kind == "igbvf",
        Kind::Mtty => kind == "mtty",
        Kind::Device | Kind::Kvm | Kind::Pf => true,
    };
    if !is_expected {
        println!("FAIL {}: it is not {:?} but {kind}", arguments.name, arguments.kind);
        return Ok(1);
    }
    if arguments.kind == Kind::Pf {
        return pf(&device, arguments.how);
    }
    let print = |line: &Line<'_>| println!("{line}");
    let mut failures = device_suite::run(&device, &arguments.case, print)?;
    failures += usize::from(!asks_iommu(&device));
    if let Some(second) = &arguments.second {
        let options = Options { iommu: Some(device.iommu().clone()), ..Default::default() };
        let second = open(second, arguments.how, &options)?;
        failures += device_suite::run_pair(&device, &second, &arguments.case, print)?;
    }
    if matches!(arguments.kind, Kind::Edu | Kind::Igbvf) {
        // At last, since they mediate it and so have it for themselves.
        let device: Arc<dyn Device> = Arc::new(device);
        failures += device_suite::maps::run(&device, &arguments.case, print)?;
    }
    Ok(failures)
}

fn with_vm(arguments: &Arguments) -> Result<usize> {
    device_suite::kvm::is_ready().context("this machine's KVM")?;
    let backend = match arguments.how {
        How::Group => Backend::VfioGroup,
        How::Cdev => Backend::VfioCdev,
    };
    let print = |line: &Line<'_>| println!("{line}");
    match &arguments.second {
        Some(second) => device_suite::kvm::run_pair(&arguments.name, second, backend, print),
        None => device_suite::kvm::run(&arguments.name, backend, &arguments.case, print),
    }
}

/// Not of every device, hence not in the suite: an IOMMU that tracks dirty pages, or says that it does not.
fn asks_iommu(device: &VfioDevice) -> bool {
    let (case, verdict) = match device.iommu_tracks_dirt() {
        Ok(true) => ("the IOMMU tracks dirty pages", Verdict::Passed),
        Ok(false) => ("the IOMMU says that it tracks no dirty pages", Verdict::Passed),
        Err(error) => ("the IOMMU says whether it tracks dirty pages", Verdict::Failed(error.into())),
    };
    println!("{}", Line { identity: device.identity(), case, verdict: &verdict });
    !verdict.is_failure()
}

fn open(name: &str, how: How, options: &Options) -> Result<VfioDevice> {
    Ok(match how {
        How::Cdev => VfioDevice::open_cdev(name, options)?,
        How::Group => VfioDevice::open_group(name, options)?,
    })
}

fn pf(pf: &VfioDevice, how: How) -> Result<usize> {
    let numvfs = Path::new("/sys/bus/pci/devices").join(&pf.identity().name).join("sriov_numvfs");
    let verdict = Verdict::of(vf_token(pf, &numvfs, how));
    fs::write(&numvfs, "0").context("removing the VF")?;
    let case = "a VF of a PF on vfio-pci opens with the PF's token only";
    println!("{}", Line { identity: pf.identity(), case, verdict: &verdict });
    Ok(usize::from(verdict.is_failure()))
}

fn vf_token(pf: &VfioDevice, numvfs: &Path, how: How) -> Result<()> {
    let token: VfToken = "5a1e7ab0-0c5c-4a55-8a0f-9d3f7b6e2c11".parse()?;
    let wrong: VfToken = "5a1e7ab0-0c5c-4a55-8a0f-9d3f7b6e2c12".parse()?;
    pf.set_vf_token(token)?;
    // vfio-pci has its PF's VFs bound to itself.
    fs::write(numvfs, "1").context("making a VF (vfio-pci's parameter enable_sriov)")?;
    let vf = fs::read_link(numvfs.with_file_name("virtfn0"))?;
    let Some(vf) = vf.file_name().and_then(|name| name.to_str()) else { bail!("virtfn0 leads nowhere") };
    for vf_token in [None, Some(wrong)] {
        match open(vf, how, &Options { vf_token, ..Default::default() }) {
            Ok(_) => bail!("opened {} token", if vf_token.is_none() { "without a" } else { "with a wrong" }),
            Err(error) => {
                let kind = error.downcast_ref().map(|error: &vfio_mediate::device::DeviceError| error.kind);
                ensure!(kind == Some(ErrorKind::Refused) && error.to_string().contains("token"), "{error}");
            }
        }
    }
    let device = open(vf, how, &Options { vf_token: Some(token), ..Default::default() })?;
    ensure!(device.identity().device_id == 0x10ca, "{:?}", device.identity());
    Ok(())
}
