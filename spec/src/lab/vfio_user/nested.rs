//! A physical VF, served over vfio-user, in a guest of its machine: stock QEMU, KVM, and the stock igbvf driver.
//!
//! The outer machine is the lab's: its IOMMU is where the guest's memory must be mapped, or no packet passes.

use std::time::Duration;

use anyhow::Result;

use crate::lab::cases::{Case, Programs, Settings, Work};
use crate::lab::machine::{Share, write_initramfs};
use crate::lab::{Lab, Machine, boot};

/// The VF's, by its PF's administrator.
const MAC: &str = "52:54:00:bb:00:01";

pub(in crate::lab) fn nested() -> Case {
    Case {
        name: "vfio-user-vf",
        about: "a VF on vfio-pci, behind a plug-in that lets all pass, in a KVM guest by vfio-user: igbvf pings the PF",
        work: Work::Here(run),
        least_ok: 6,
    }
}

/// In the guest.
const INNER: &str = "
vf=$(pci 0x8086:0x10ca)
[ -n \"$vf\" ] || { echo 'FAIL no VF in the guest'; exit 1; }
driver=$(readlink /sys/bus/pci/devices/$vf/driver) && [ \"${driver##*/}\" = igbvf ] || { echo \"FAIL $vf igbvf: no driver\"; dmesg | tail -n 30; exit 1; }
net=$(ls /sys/bus/pci/devices/$vf/net)
read -r mac </sys/class/net/$net/address
[ $mac = $MAC ] || { echo \"FAIL $vf igbvf: its MAC is $mac, not $MAC\"; exit 1; }
echo \"ok  $vf igbvf: the driver has the MAC that the PF's administrator gave\"
ip addr add 10.78.0.2/24 dev $net && ip link set $net up || { echo \"FAIL $vf igbvf: it does not come up\"; exit 1; }
ping -c 1 -W 10 10.78.0.1 >/tmp/first # until both know each other
ping -c 20 -i 0.1 -s 1400 -W 10 10.78.0.1 >/tmp/ping || { cat /tmp/ping; dmesg | tail -n 30; echo \"FAIL $vf igbvf: no answer\"; exit 1; }
grep -q ' 0% packet loss' /tmp/ping || { cat /tmp/ping; echo \"FAIL $vf igbvf: packets were lost\"; exit 1; }
grep -q \"$net-rx\" /proc/interrupts || grep \"$net\" /proc/interrupts
echo \"ok  $vf igbvf: 20 packets to the PF, 20 answers\"";

/// In the machine around it.
const OUTER: &str = "
fail() { echo \"FAIL $VF0 igbvf: $*\"; grep -v ' saw ' /tmp/host.log; exit 1; }
ip addr add 10.78.0.1/24 dev $PF_NET
vf-mac $PF_NET 0 $MAC || fail 'the PF does not give it a MAC'
vfio-mediate run --device vfio:$VF0 --plugin /case/libvfio_mediate_plugin_witness.so --socket /tmp/vf.sock --control /tmp/control --state-dir /tmp/state >/tmp/ready 2>/tmp/host.log &
host=$!
n=0
until grep -q qemu-system-x86_64 /tmp/ready; do
    n=$((n + 1)); [ $n -lt 200 ] && kill -0 $host || fail 'the host does not start'
    sleep 0.1
done
echo \"ok  $VF0 igbvf: served over vfio-user\"
line=$(sed -n 's/^ *qemu-system-x86_64 //p' /tmp/ready | sed 's/1G/256M/g')
eval \"set -- $line\"
status() { vfio-mediate status --control /tmp/control >/tmp/status && grep -q \"$1\" /tmp/status; }
await() { # await TEXT: until the status says so
    n=0
    until status \"$1\"; do
        n=$((n + 1)); [ $n -lt 200 ] || { cat /tmp/status /tmp/qemu.log; fail \"no '$1'\"; }
        sleep 0.1
    done
}
holds() { # descriptors, guest memory that is mapped, memory that is locked or pinned
    echo \"$(ls /proc/$host/fd | wc -l) fds, $(grep -c /memfd:memory-backend /proc/$host/maps) maps,\" $(grep -E 'VmPin|VmLck' /proc/$host/status)
}
qemu() {
    exec /vm/qemu/run \"$@\" -M usb=off,smbus=off,kernel-irqchip=split -accel kvm -cpu host -nodefaults -no-user-config -display none \\
        -no-reboot -kernel /vm/vmlinux -initrd /case/inner.cpio -append \"$KERNEL\"
}
before=$(holds)
(qemu \"$@\" -S </dev/null 2>/tmp/qemu.log) &
victim=$!
await 'client: process'
n=0
until grep -qE 'Vm(Pin|Lck):.*[1-9]' /proc/$host/status; do
    n=$((n + 1)); [ $n -lt 200 ] || fail \"a client is there, and nothing is pinned for the IOMMU: $(holds)\"
    sleep 0.1
done
during=$(holds)
kill -9 $victim
await 'no client'
[ \"$(holds)\" = \"$before\" ] || fail \"it holds $(holds) after a client was killed, $before before\"
echo \"ok  $VF0 igbvf: a QEMU was killed, and all is given back: $before; while it ran $during\"
(qemu \"$@\" -serial file:/tmp/console -serial stdio </dev/null 2>/tmp/qemu.log) | tr -d '\r'
grep -q 'LAB exit 0' /tmp/console || { tail -n 30 /tmp/console; cat /tmp/qemu.log; fail 'the guest did not end well'; }
await 'no client'
[ \"$(holds)\" = \"$before\" ] || fail \"it holds $(holds) after the guest, $before before\"
grep -q 'saw.*offset=3136' /tmp/host.log || fail 'the plug-in did not see the mailbox'
sed -n 's/.*saw.*offset=\\([0-9]*\\) .*/\\1/p' /tmp/host.log | sort -nu >/tmp/seen
while read -r offset; do
    [ $offset = 3136 ] || { [ $offset -ge 2048 ] && [ $offset -lt 2112 ]; } || fail \"the plug-in saw $offset, which it does not claim\"
done </tmp/seen
echo \"ok  $VF0 igbvf: the plug-in saw the mailbox ($(grep -c saw /tmp/host.log) accesses), and nothing that it does not claim\"
kill $host
wait $host || fail 'the host did not end well'
echo \"ok  $VF0 igbvf: the host ended in good order\"";

fn run(lab: &Lab, programs: &Programs, _: &Settings, heard: &mut dyn FnMut(&str)) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mac = ("MAC".to_owned(), MAC.to_owned());
    let mut inner = Machine::bare(INNER);
    inner.modules = vec!["igbvf"];
    inner.environment = vec![mac.clone()];
    let initramfs = folder.path().join("inner.cpio");
    write_initramfs(lab, &inner, &initramfs)?;

    let mut outer = Machine::new(OUTER);
    outer.files = vec![programs.host.clone(), programs.plugin_witness.clone(), programs.vf_mac.clone(), initramfs];
    outer.modules = vec!["kvm_amd"];
    outer.edus = 0;
    outer.memory_mib = 2048;
    outer.timeout = Duration::from_secs(600);
    outer.shares = vec![Share { folder: lab.folder.clone(), place: "/vm".into(), read_only: true }];
    let kernel = "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check nokaslr audit=0 cryptomgr.notests";
    outer.environment = vec![mac, ("KERNEL".into(), kernel.into())];
    let outcome = boot(lab, &outer, heard)?;
    anyhow::ensure!(outcome.exit_code == 0, "the script ended with {}", outcome.exit_code);
    Ok(())
}
