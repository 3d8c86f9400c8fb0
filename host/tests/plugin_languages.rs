//! The tree's own plug-ins, in Rust and in C, in one host.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use support::*;
use vfio_mediate::device::sim;
use vfio_mediate::mediation::MediatedDevice;
use vfio_mediate::memory::{AddressSpace, GuestRam};
use vfio_mediate::plugin::{ProbeIdentity, Registry, UnregisterError, Verdict};

const EDU: (u16, u16) = (0x1234, 0x11e8);

/// A simulated edu, mediated by whoever claims it.
fn open_edu(registry: &Registry) -> Arc<MediatedDevice> {
    let memory = AddressSpace::new(GuestRam::new(1 << 20).unwrap());
    MediatedDevice::open(sim::open("sim:edu").unwrap(), registry, memory).unwrap_or_else(|error| panic!("{error}"))
}

fn c_plugin() -> std::path::PathBuf {
    compile("c_edu.so", root().join("examples/c-plugin/plugin.c"), &[], &["-shared"])
}

/// spec: LOAD-5, ABI-LAYOUT
#[test]
fn plugins_in_rust_load_by_their_layout_and_mediate() {
    for (package, name) in [("vfio-mediate-plugin-edu", "edu"), ("first-plugin", "first")] {
        let library = load(build_plugin(package));
        assert!(library.is_rust() && !library.panic_aborts());
        assert_eq!(library.name(), name);
        let registry = Registry::new();
        let id = registry.register(library, ONE).unwrap();
        let device = open_edu(&registry);
        assert_eq!(device.plugin().map(|plugin| plugin.name).as_deref(), Some(name));
        // The liveness register answers by the complement, through whatever mediates.
        let mut data = [0; 4];
        device.region_write(0, 4, &[0x0f; 4]).unwrap();
        device.region_read(0, 4, &mut data).unwrap();
        assert_eq!(data, [0xf0; 4]);
        let busy = registry.unregister(id, Instant::now()).unwrap_err();
        assert!(matches!(busy, UnregisterError::Busy { .. }), "{busy}");
        drop(device);
        registry.unregister(id, soon()).unwrap();
    }
}

/// spec: ABI-C
#[test]
fn a_plugin_in_c_loads_by_its_fingerprint_and_mediates() {
    let library = load(c_plugin());
    assert!(!library.is_rust());
    assert_eq!((library.name(), library.version()), ("c-edu", "0.1.0"));
    let registry = Registry::new();
    registry.register(library, ONE).unwrap();
    let host = Arc::new(Host::default());
    let identity = ProbeIdentity { vendor_id: EDU.0, device_id: EDU.1, ..identity("edu", &[0; 64]) };
    let device = registry.open(&identity, host.clone()).unwrap().expect("it is edu's");
    let mut data = [0; 4];
    assert_eq!(device.read(0, FRAME, 4, &mut data), Verdict::Handled);
    assert_eq!((data, host.defaults.load(Ordering::SeqCst)), ([4, 5, 6, 7], 1), "it asked the device");
    assert_eq!(device.write(0, FRAME, 4, &mut data), Verdict::Handled);
    let mut counters = [0; 16];
    assert_eq!(device.extra_read(0, 9, FRAME, 0, &mut counters), Verdict::Handled);
    assert_eq!(counters, [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
}

/// spec: REG-2
#[test]
fn both_load_beside_each_other_and_the_operators_order_decides() {
    let (rust, c) = (build_plugin("vfio-mediate-plugin-edu"), c_plugin());
    for order in [[&rust, &c], [&c, &rust]] {
        let registry = Registry::new();
        let names: Vec<String> = order
            .iter()
            .map(|path| {
                let library = load(path);
                let name = library.name().to_owned();
                registry.register(library, ONE).unwrap();
                name
            })
            .collect();
        let device = open_edu(&registry);
        assert_eq!(device.plugin().map(|plugin| plugin.name).as_ref(), Some(&names[0]));
        drop(device);
        registry.shutdown(soon()).unwrap();
    }
}
