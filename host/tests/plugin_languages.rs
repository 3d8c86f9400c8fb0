//! The tree's own plug-ins, in Rust and in C, in one host.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use support::*;
use vfio_mediate::plugin::{OpenDevice, ProbeIdentity, Registry, Verdict};

const EDU: (u16, u16) = (0x1234, 0x11e8);

fn open_edu(registry: &Registry, host: Arc<Host>) -> OpenDevice {
    let identity = ProbeIdentity { vendor_id: EDU.0, device_id: EDU.1, revision: 0x10, ..identity("edu", &[0; 64]) };
    registry.open(&identity, host).unwrap_or_else(|error| panic!("{error}")).expect("it is edu's")
}

fn c_plugin() -> std::path::PathBuf {
    compile("c_edu.so", root().join("examples/c-plugin/plugin.c"), &[], &["-shared"])
}

/// spec: LOAD-5, ABI-LAYOUT
#[test]
fn a_plugin_in_rust_loads_by_its_layout() {
    let library = load(build_plugin("first-plugin"));
    assert!(library.is_rust() && !library.panic_aborts());
    assert!(!library.name().is_empty() && !library.version().is_empty());
    let registry = Registry::new();
    let id = registry.register(library, ONE).unwrap();
    let device = open_edu(&registry, Arc::new(Host::default()));
    assert!(!device.claims().is_empty(), "it mediates");
    drop(device);
    registry.unregister(id, soon()).unwrap();
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
    let device = open_edu(&registry, host.clone());
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
    let (rust, c) = (build_plugin("first-plugin"), c_plugin());
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
        let device = open_edu(&registry, Arc::new(Host::default()));
        assert_eq!(device.plugin().name, names[0]);
        drop(device);
        registry.shutdown(soon()).unwrap();
    }
}
