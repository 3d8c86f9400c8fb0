//! Runs the device suite on devices of this machine: `device-suite [--by group|cdev|both] NAME...`.
//!
//! One line per case. Exit codes: 0 all passed, 1 a case failed, 2 wrong use or a device that does not open.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use vfio_mediate::device::vfio::{Options, VfToken, VfioDevice};
use vfio_mediate::device::{Device, ErrorKind};
use vfio_mediate_spec::device_suite::{self, Line, Verdict};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum By {
    Group,
    Cdev,
    Both,
}

#[derive(Debug, Parser)]
#[command(about = "Runs the device suite on VFIO devices of this machine")]
struct Arguments {
    /// How to open the devices
    #[arg(long, value_enum, default_value_t = By::Both)]
    by: By,
    /// Only cases whose name contains this
    #[arg(long, default_value = "")]
    case: String,
    /// The devices come in pairs: run the cases of two devices (shared memory, migration by their own driver)
    #[arg(long, conflicts_with = "vf_token")]
    pairs: bool,
    /// The devices are PFs on vfio-pci: each gets a VF, which opens with the PF's token only
    #[arg(long)]
    vf_token: bool,
    /// PCI addresses, or mdev UUIDs
    #[arg(required = true)]
    devices: Vec<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.pairs && !arguments.devices.len().is_multiple_of(2) {
        eprintln!("device-suite: --pairs takes pairs of devices");
        return ExitCode::from(2);
    }
    let ways: &[By] = match arguments.by {
        By::Both => &[By::Group, By::Cdev],
        By::Group => &[By::Group],
        By::Cdev => &[By::Cdev],
    };
    let run = match (arguments.pairs, arguments.vf_token) {
        (true, _) => pairs,
        (_, true) => vf_tokens,
        _ => singles,
    };
    let mut failures = 0;
    for way in ways {
        match run(&arguments, *way) {
            Ok(more) => failures += more,
            Err(error) => {
                println!("FAIL {error:#}");
                return ExitCode::from(2);
            }
        }
    }
    ExitCode::from(u8::from(failures > 0))
}

fn open(name: &str, way: By, options: &Options) -> Result<VfioDevice> {
    Ok(match way {
        By::Cdev => VfioDevice::open_cdev(name, options)?,
        By::Group | By::Both => VfioDevice::open_group(name, options)?,
    })
}

fn singles(arguments: &Arguments, way: By) -> Result<usize> {
    let mut failures = 0;
    for name in &arguments.devices {
        let device = open(name, way, &Options::default())?;
        failures += device_suite::run(&device, &arguments.case, |line| println!("{line}"))?;
    }
    Ok(failures)
}

fn pairs(arguments: &Arguments, way: By) -> Result<usize> {
    let mut failures = 0;
    for pair in arguments.devices.chunks_exact(2) {
        let one = open(&pair[0], way, &Options::default())?;
        let options = Options { iommu: Some(one.iommu().clone()), ..Default::default() };
        let other = open(&pair[1], way, &options)?;
        failures += device_suite::run_pair(&one, &other, &arguments.case, |line| println!("{line}"))?;
    }
    Ok(failures)
}

fn vf_tokens(arguments: &Arguments, way: By) -> Result<usize> {
    let mut failures = 0;
    for name in &arguments.devices {
        let pf = open(name, way, &Options::default())?;
        let numvfs = Path::new("/sys/bus/pci/devices").join(name).join("sriov_numvfs");
        let verdict = Verdict::of(vf_token(&pf, &numvfs, way));
        fs::write(&numvfs, "0").context("removing the VF")?;
        let case = "a VF of a PF on vfio-pci opens with the PF's token only";
        println!("{}", Line { identity: pf.identity(), case, verdict: &verdict });
        failures += usize::from(verdict.is_failure());
    }
    Ok(failures)
}

fn vf_token(pf: &VfioDevice, numvfs: &Path, way: By) -> Result<()> {
    let token: VfToken = "5a1e7ab0-0c5c-4a55-8a0f-9d3f7b6e2c11".parse()?;
    let wrong: VfToken = "5a1e7ab0-0c5c-4a55-8a0f-9d3f7b6e2c12".parse()?;
    pf.set_vf_token(token)?;
    // vfio-pci has its PF's VFs bound to itself.
    fs::write(numvfs, "1").context("making a VF (vfio-pci's parameter enable_sriov)")?;
    let vf = fs::read_link(numvfs.with_file_name("virtfn0"))?;
    let Some(vf) = vf.file_name().and_then(|name| name.to_str()) else { bail!("virtfn0 leads nowhere") };
    for vf_token in [None, Some(wrong)] {
        match open(vf, way, &Options { vf_token, ..Default::default() }) {
            Ok(_) => bail!("opened {} token", if vf_token.is_none() { "without a" } else { "with a wrong" }),
            Err(error) => {
                let kind = error.downcast_ref().map(|error: &vfio_mediate::device::DeviceError| error.kind);
                ensure!(kind == Some(ErrorKind::Refused) && error.to_string().contains("token"), "{error}");
            }
        }
    }
    let device = open(vf, way, &Options { vf_token: Some(token), ..Default::default() })?;
    ensure!(device.identity().device_id == 0x10ca, "{:?}", device.identity());
    Ok(())
}
