//! The case of low power: real functions that reach D3hot and come back, and a kernel that wants one back.
//!
//! An igb PF, a VF of an NVMe controller and one of a virtio-net function have the power capability; edu has none, and
//! is suspended in D0. Each is asked at the device, and the PF once more through a host's commands.

use std::time::Duration;

use super::cases::{Case, Programs, Work, machine};

const SCRIPT: &str = "
code=0
vf_of() { # vf_of VENDOR:DEVICE: makes a VF of this function and gives it to vfio-pci; its name is in $vf
    pf=$(pci $1) && [ -n \"$pf\" ] || return 1
    echo 0 >/sys/bus/pci/devices/$pf/sriov_drivers_autoprobe
    echo 1 >/sys/bus/pci/devices/$pf/sriov_numvfs || return 1
    vf=$(readlink /sys/bus/pci/devices/$pf/virtfn0)
    vf=${vf##*/}
    give $vf vfio-pci
}
give $PF vfio-pci || { echo \"FAIL $PF: it does not bind to vfio-pci\"; exit 1; }
devices=\"$PF $EDU0\"
for id in 0x1b36:0x0010 0x1af4:0x1041; do
    vf_of $id && devices=\"$devices $vf\" || { echo \"FAIL $id: no VF of it\"; code=1; }
done
for open in group cdev; do
    for device in $devices; do device-suite device $open $device --case 'low power' || code=1; done
done

power() { # power DEVICE: its state and its status, as the kernel says
    read -r state </sys/bus/pci/devices/$1/power_state
    read -r status </sys/bus/pci/devices/$1/power/runtime_status
    echo \"$state $status\"
}
await() { # await WHAT COMMAND...: until it succeeds
    what=$1 n=0
    shift
    until \"$@\"; do
        n=$((n + 1))
        [ $n -lt 200 ] || { echo \"FAIL $open $PF igb: $what\"; exit 1; }
        sleep 0.1
    done
}
answers() { vfio-mediate status --control $control >/tmp/status 2>/tmp/error; }
says() { answers && grep -q \"$1\" /tmp/status; }
is() { [ \"$(power $PF)\" = \"$1\" ]; }
for open in group cdev; do
    control=/tmp/$open.socket
    vfio-mediate run --device vfio:$PF --open $open --memory 1M --control $control --state-dir /tmp/$open.d &
    await 'the host does not start' answers
    vfio-mediate power $PF enter --control $control || exit 1
    await 'not suspended in D3hot' is 'D3hot suspended'
    vfio-mediate power $PF status --control $control | grep 'D3hot, suspended' || exit 1
    is 'D3hot suspended' || { echo \"FAIL $open $PF igb: asking woke it\"; exit 1; }
    vfio-mediate power $PF exit --control $control || exit 1
    is 'D0 active' || { echo \"FAIL $open $PF igb: $(power $PF) after the exit\"; exit 1; }
    echo \"ok  $open $PF igb: a host let it sleep in D3hot, and woke it\"
    vfio-mediate power $PF enter --wakeup --control $control || exit 1
    await 'not suspended in D3hot with a wake-up' is 'D3hot suspended'
    echo $PF >/sys/bus/pci/drivers/vfio-pci/unbind &
    await 'the host does not let go of it' says \"released  $PF\"
    wait $!
    [ ! -e /sys/bus/pci/devices/$PF/driver ] || { echo \"FAIL $open $PF igb: still bound\"; exit 1; }
    echo \"ok  $open $PF igb: the kernel wanted it back while it slept, and the host let go\"
    vfio-mediate stop --control $control
    wait
    give $PF vfio-pci || exit 1
done
exit $code";

pub(super) fn low_power(programs: &Programs) -> Case {
    let mut machine = machine(&[&programs.device_suite, &programs.host], SCRIPT);
    machine.modules = vec!["nvme", "virtio_net"];
    machine.vfs = 0;
    machine.edus = 1;
    machine.timeout = Duration::from_secs(240);
    machine.qemu = [
        "-device pcie-root-port,id=port1,chassis=2,slot=2 -device nvme-subsys,id=subsystem",
        "-device nvme,bus=port1,serial=lab,subsys=subsystem,sriov_max_vfs=1,sriov_vq_flexible=2,sriov_vi_flexible=1",
        "-device pcie-root-port,id=port2,chassis=3,slot=3,multifunction=on",
        "-netdev hubport,hubid=1,id=net1 -netdev hubport,hubid=1,id=net2",
        "-device virtio-net-pci,bus=port2,addr=0x0.1,netdev=net1,sriov-pf=virtio,romfile=",
        "-device virtio-net-pci,bus=port2,addr=0x0.0,netdev=net2,multifunction=on,id=virtio,romfile=",
    ]
    .iter()
    .flat_map(|line| line.split_whitespace().map(str::to_owned))
    .collect();
    Case {
        name: "low-power",
        about: "a PF and VFs on vfio-pci reach D3hot and come back, and an unbind is waited for, by group and by cdev",
        work: Work::One(machine),
        least_ok: 42,
    }
}
