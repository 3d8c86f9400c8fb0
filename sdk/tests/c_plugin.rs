//! `examples/c-plugin` compiles without a warning, and its entry is what the host wants to see.
//!
//! It is loaded here to be read and called with nothing but the sdk; the host's own tests load it as a plug-in.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::path::Path;
use std::process::Command;

use vfio_mediate_sdk::abi::{self, Bytes};
use vfio_mediate_sdk::layout::ABI_FINGERPRINT;

unsafe extern "C" {
    fn dlopen(path: *const std::ffi::c_char, flags: i32) -> *mut c_void;
    fn dlsym(library: *mut c_void, symbol: *const std::ffi::c_char) -> *mut c_void;
}

fn compile() -> std::path::PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("c_edu.so");
    let output = Command::new("gcc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-shared", "-fPIC", "-I"])
        .arg(root.join("spec/include"))
        .arg("-o")
        .arg(&library)
        .arg(root.join("examples/c-plugin/plugin.c"))
        .output()
        .expect("a C compiler, gcc");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

fn text(bytes: Bytes) -> &'static str {
    // SAFETY: the plug-in's static text.
    std::str::from_utf8(unsafe { std::slice::from_raw_parts(bytes.ptr, bytes.len) }).unwrap()
}

/// spec: ABI-C
#[test]
fn the_c_plug_in_compiles_without_a_warning_and_exports_a_valid_entry() {
    let path = std::ffi::CString::new(compile().to_str().unwrap()).unwrap();
    // SAFETY: our own file; RTLD_NOW.
    let library = unsafe { dlopen(path.as_ptr(), 2) };
    assert!(!library.is_null());
    let symbol = std::ffi::CString::new(abi::ENTRY_SYMBOL).unwrap();
    // SAFETY: an open library.
    let entry = unsafe { dlsym(library, symbol.as_ptr()) }.cast::<abi::Entry>();
    assert!(!entry.is_null());
    // SAFETY: the layout was compared with C's in `c_header`, and the library stays open.
    let entry = unsafe { &*entry };
    assert_eq!(entry.magic, abi::ENTRY_MAGIC);
    assert_eq!(entry.struct_size as usize, size_of::<abi::Entry>());
    assert_eq!((entry.abi_major, entry.abi_minor), (abi::ABI_MAJOR, abi::ABI_MINOR));
    assert_eq!(entry.fingerprint, ABI_FINGERPRINT);
    assert_eq!((entry.flags, entry.reserved), (0, 0));
    assert!(entry.rust_header.is_null());
    // SAFETY: never null, by the contract.
    let plugin = unsafe { &*entry.plugin };
    assert_eq!(plugin.struct_size as usize, size_of::<abi::Plugin>());
    assert_eq!((text(plugin.name), text(plugin.version)), ("c-edu", "0.1.0"));

    let mut identity = abi::DeviceIdentity {
        struct_size: size_of::<abi::DeviceIdentity>() as u32,
        backend: abi::BACKEND_SIM,
        vendor_id: 0x1234,
        device_id: 0x11e8,
        subsystem_vendor_id: 0,
        subsystem_device_id: 0,
        class_code: 0,
        revision: 0,
        reserved: [0; 3],
        num_regions: 9,
        num_irqs: 5,
        name: Bytes::EMPTY,
        config: Bytes::EMPTY,
    };
    let probe = plugin.probe.unwrap();
    // SAFETY: a valid identity; this plug-in's `probe` does not look at its state.
    assert_eq!(unsafe { probe(std::ptr::null_mut(), &raw const identity) }, abi::PROBE_CLAIM);
    identity.device_id = 1;
    // SAFETY: as above.
    assert_eq!(unsafe { probe(std::ptr::null_mut(), &raw const identity) }, abi::PROBE_DECLINE);
}
