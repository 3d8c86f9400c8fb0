//! What the lab shows, case by case.
//!
//! A case is one boot of one machine (or of two that are joined), a script, and the lines that it must print. Every line
//! that begins with `ok` or `FAIL` names the real device that it speaks of, and is passed on.

use std::path::PathBuf;
use std::time::Duration;

use super::power::low_power;
use super::vfio_user;
use super::{Lab, Machine};

/// The programs that the cases run, built before.
#[derive(Debug, Clone)]
pub struct Programs {
    pub device_suite: PathBuf,
    pub demo: PathBuf,
    pub host: PathBuf,
    pub plugin_edu: PathBuf,
    pub plugin_witness: PathBuf,
    pub guest_edu: PathBuf,
    pub vf_mac: PathBuf,
}

/// What a case does.
#[derive(Debug, Clone)]
pub enum Work {
    One(Machine),
    /// Two machines, joined
    Pair(Machine),
    /// Programs of this machine, and machines that it boots for them; `ok` and `FAIL` are its own
    Here(Here),
}

/// Ends with an error, or has told every promise that was kept.
pub type Here = fn(&Lab, &Programs, &Settings, &mut dyn FnMut(&str)) -> anyhow::Result<()>;

/// What an operator chooses.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Fewer rounds
    pub quick: bool,
    /// Whatever is random follows from it
    pub seed: u64,
}

#[derive(Debug, Clone)]
pub struct Case {
    pub name: &'static str,
    pub about: &'static str,
    pub work: Work,
    /// At least so many lines must begin with `ok`: a script that runs nothing has not passed
    pub least_ok: usize,
}

impl Case {
    /// Stock VMMs boot guests in it: minutes of emulation, only when they are asked for.
    pub fn is_long(&self) -> bool {
        self.name.starts_with("vfio-user-")
    }
}

/// edu reaches only 28 bits unless it is told otherwise; scratch memory lies above guest RAM.
const DEMO: &str = "--plugin /case/libvfio_mediate_plugin_edu.so --memory 32M --dirty-rate 200 --rounds 2";

pub fn all(programs: &Programs) -> Vec<Case> {
    vec![
        devices(programs),
        mtty(programs),
        mtty_hosts(programs),
        vf_token(programs),
        kvm(programs),
        low_power(programs),
        demo(programs),
        demo_pair(programs),
        vfio_user::edu(),
        vfio_user::suite(),
        vfio_user::kills(),
        vfio_user::nested(),
    ]
}

pub(super) fn machine(programs: &[&PathBuf], script: &str) -> Machine {
    let mut machine = Machine::new(script);
    machine.files = programs.iter().map(|path| (*path).clone()).collect();
    machine
}

fn devices(programs: &Programs) -> Case {
    let script = "
code=0
for open in group cdev; do
    device-suite edu $open $EDU0 $EDU1 || code=1
    device-suite igbvf $open $VF0 || code=1
done
exit $code";
    Case {
        name: "devices",
        about: "the device suite on edu and on an igb VF, by group and by cdev",
        work: Work::One(machine(&[&programs.device_suite], script)),
        least_ok: 80,
    }
}

/// Two mediated devices of the kernel's sample driver, named $one and $two.
const MTTY_PAIR: &str = "
parent=/sys/devices/virtual/mtty/mtty
type=$(ls $parent/mdev_supported_types | head -n 1)
one=83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
two=83b8f4f2-509f-382f-3c1e-e6bfe0fa1002
echo $one >$parent/mdev_supported_types/$type/create
echo $two >$parent/mdev_supported_types/$type/create";

fn mtty(programs: &Programs) -> Case {
    let script = format!(
        "{MTTY_PAIR}
code=0
for open in group cdev; do device-suite mtty $open $one $two || code=1; done
exit $code"
    );
    let script = &script;
    let mut machine = machine(&[&programs.device_suite], script);
    machine.modules = vec!["mtty"];
    machine.vfs = 0;
    machine.edus = 0;
    Case {
        name: "mtty",
        about: "the kernel's own migration v2: the mtty sample device saves, loads, logs",
        work: Work::One(machine),
        least_ok: 30,
    }
}

fn vf_token(programs: &Programs) -> Case {
    let script = "
. /lab/functions
echo 1 >/sys/module/vfio_pci/parameters/enable_sriov
give $PF vfio-pci || { echo \"FAIL $PF: it does not bind to vfio-pci\"; exit 1; }
code=0
for open in group cdev; do device-suite pf $open $PF || code=1; done
exit $code";
    let mut machine = machine(&[&programs.device_suite], script);
    machine.vfs = 0;
    machine.edus = 0;
    Case {
        name: "vf-token",
        about: "a VF of a PF on vfio-pci opens with the PF's token only, by group and by cdev",
        work: Work::One(machine),
        least_ok: 2,
    }
}

/// The lab machine's KVM, which is emulated as its processor is; this machine's is not touched.
fn kvm(programs: &Programs) -> Case {
    let script = "
mount -t debugfs debugfs /sys/kernel/debug || exit 1
code=0
for open in group cdev; do
    device-suite kvm $open $EDU0 || code=1
    device-suite kvm $open $VF0 || code=1
    device-suite kvm $open $EDU1 $EDU2 || code=1
done
exit $code";
    let mut machine = machine(&[&programs.device_suite], script);
    machine.modules = vec!["kvm_amd"];
    machine.edus = 1;
    // Behind a conventional bridge the IOMMU cannot tell devices apart: one group.
    let bridge =
        "-device pcie-pci-bridge,id=bridge0,addr=0x8 -device edu,bus=bridge0,addr=1 -device edu,bus=bridge0,addr=2";
    machine.qemu = bridge.split_whitespace().map(str::to_owned).collect();
    Case {
        name: "kvm",
        about: "KVM learns of a device's file and lets it go, by group and by cdev; VMs exit while devices are open",
        work: Work::One(machine),
        least_ok: 42,
    }
}

/// The kernel's own migration v2 under two real hosts: no plug-in, no guest, the operator's commands.
fn mtty_hosts(programs: &Programs) -> Case {
    let script = format!(
        "{MTTY_PAIR}
code=0
for open in group cdev; do
    vfio-mediate run --device vfio:$two --open $open --memory 1M --downtime-ms-max 5000 --control /tmp/b.$open --state-dir /tmp/b.$open.d --listen 127.0.0.1:7000 &
    vfio-mediate run --device vfio:$one --open $open --memory 1M --downtime-ms-max 5000 --control /tmp/a.$open --state-dir /tmp/a.$open.d &
    n=0
    until vfio-mediate status --control /tmp/a.$open >/tmp/status && vfio-mediate status --control /tmp/b.$open >/tmp/status; do
        n=$((n + 1)); [ $n -lt 100 ] || exit 1; sleep 0.1
    done 2>/dev/null
    vfio-mediate migrate --control /tmp/a.$open --to 127.0.0.1:7000 || exit 1
    vfio-mediate status --control /tmp/b.$open | grep RUNNING || exit 1
    echo \"ok  $open $one -> $two mtty: its own migration v2 moved it between two hosts\"
    vfio-mediate stop --control /tmp/a.$open
    vfio-mediate stop --control /tmp/b.$open
    wait
done"
    );
    let mut machine = machine(&[&programs.host], &script);
    machine.modules = vec!["mtty"];
    machine.vfs = 0;
    machine.edus = 0;
    Case {
        name: "mtty-hosts",
        about: "two hosts migrate the kernel's mtty device, which no plug-in claims",
        work: Work::One(machine),
        least_ok: 2,
    }
}

fn demo(programs: &Programs) -> Case {
    let script = format!(
        "
for open in group cdev; do
    demo {DEMO} --open $open --source-device vfio:$EDU0 --destination-device vfio:$EDU1 --report /tmp/r.json || exit 1
    echo \"ok  $open $EDU0 -> $EDU1 edu: the demo migrated a running device\"
done"
    );
    let mut machine = machine(&[&programs.demo, &programs.plugin_edu], &script);
    machine.vfs = 0;
    machine.timeout = Duration::from_secs(240);
    Case {
        name: "demo",
        about: "the demo with two real edu devices in one machine, by group and by cdev",
        work: Work::One(machine),
        least_ok: 2,
    }
}

fn demo_pair(programs: &Programs) -> Case {
    let script = format!(
        "
if [ $SIDE = B ]; then
    demo destination {DEMO} --open cdev --device vfio:$EDU0 --listen $OWN:7000 --witness $OWN:7001 --insecure &
    child=$!
    meet listening
    wait $child || exit 1
    echo \"ok  cdev $EDU0 edu: a guest and its device arrived from the other machine\"
else
    meet listening
    demo source {DEMO} --open group --device vfio:$EDU0 --to $PEER:7000 --witness $PEER:7001 --insecure || exit 1
    echo \"ok  group $EDU0 edu: a running device left for the other machine\"
fi
meet done"
    );
    let mut machine = machine(&[&programs.demo, &programs.plugin_edu], &script);
    machine.vfs = 0;
    machine.edus = 1;
    machine.timeout = Duration::from_secs(240);
    Case {
        name: "demo-pair",
        about: "the demo between two machines that are joined by a network",
        work: Work::Pair(machine),
        least_ok: 2,
    }
}
