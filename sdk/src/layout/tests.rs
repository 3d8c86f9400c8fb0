//! The layout tells two ABIs apart wherever they differ, and reaches everything.

use std::collections::BTreeSet;

use abi_stable::abi_stability::abi_checking::{CheckingGlobals, check_layout_compatibility_with_globals};

use super::*;

fn check(a: &'static TypeLayout, b: &'static TypeLayout) -> Result<(), String> {
    check_layout_compatibility_with_globals(a, b, &CheckingGlobals::new()).map_err(|error| error.to_string())
}

/// The same names as the ABI's, one thing changed, deep inside.
mod changed {
    use abi_stable::StableAbi;

    /// A parameter of a function behind a pointer of a parameter of a function.
    pub mod deep {
        use super::StableAbi;
        #[repr(C)]
        #[derive(StableAbi)]
        pub struct Leaf {
            pub width: u64,
        }
        #[repr(C)]
        #[derive(StableAbi)]
        pub struct Table {
            pub hook: Option<unsafe extern "C" fn(leaf: *const Leaf) -> i32>,
        }
        #[repr(C)]
        #[derive(StableAbi)]
        pub struct Root {
            pub open: Option<unsafe extern "C" fn(table: *mut Table) -> i32>,
        }
    }

    pub mod deep_changed {
        use super::StableAbi;
        #[repr(C)]
        #[derive(StableAbi)]
        pub struct Leaf {
            pub width: i64,
        }
        #[repr(C)]
        #[derive(StableAbi)]
        pub struct Table {
            pub hook: Option<unsafe extern "C" fn(leaf: *const Leaf) -> i32>,
        }
        #[repr(C)]
        #[derive(StableAbi)]
        pub struct Root {
            pub open: Option<unsafe extern "C" fn(table: *mut Table) -> i32>,
        }
    }
}

#[test]
fn the_same_abi_is_compatible_with_itself() {
    check(root_layout(), root_layout()).unwrap();
}

/// spec: ABI-LAYOUT
#[test]
fn a_parameter_behind_pointers_of_hooks_is_compared() {
    let root = <changed::deep::Root as StableAbi>::LAYOUT;
    let other = <changed::deep_changed::Root as StableAbi>::LAYOUT;
    check(root, root).unwrap();
    let error = check(root, other).unwrap_err();
    assert!(error.contains("u64") && error.contains("i64"), "{error}");
    check(other, root).unwrap_err();
}

/// Every structure of the list is reachable from the root, so none escapes the comparison.
/// spec: ABI-LAYOUT
#[test]
fn the_root_reaches_every_structure() {
    let mut seen = BTreeSet::new();
    let mut pending = vec![root_layout()];
    while let Some(layout) = pending.pop() {
        if seen.insert(layout.full_type().to_string()) {
            pending.extend(layout.shared_vars().type_layouts().iter().map(|get| get()));
        }
    }
    for layout in structs() {
        assert!(seen.contains(layout.name), "{} is not reachable: {seen:?}", layout.name);
    }
}

#[test]
fn the_header_reads_back_as_this_layout() {
    // SAFETY: our own static.
    let layout = unsafe { read_header(rust_header()) }.unwrap();
    check(root_layout(), layout).unwrap();
}

/// spec: ABI-LAYOUT-FOREIGN
#[test]
fn a_foreign_header_is_refused_before_its_layout_is_read() {
    // SAFETY: null.
    assert_eq!(unsafe { read_header(std::ptr::null()) }.unwrap_err(), HeaderError::Null);
    let zeroes = [0_u64; size_of::<RustHeader>().div_ceil(8)];
    // SAFETY: large enough, aligned, lives through the call; not a valid header, so nothing else is read.
    let error = unsafe { read_header(zeroes.as_ptr().cast()) }.unwrap_err();
    assert_eq!(error, HeaderError::OtherAbiStable { major: 0, minor: 0 });
    // SAFETY: as above.
    let error = unsafe { read_header(zeroes.as_ptr().cast::<u8>().wrapping_add(1).cast()) }.unwrap_err();
    assert_eq!(error, HeaderError::Misaligned);
}

/// The oracle: the same hash, written down once more over a byte string.
/// spec: ABI-FINGERPRINT
#[test]
fn the_fingerprint_is_the_hash_that_its_text_says() {
    let mut bytes = Vec::new();
    for layout in structs() {
        bytes.extend(layout.name.bytes().chain([0]));
        bytes.extend((layout.size as u64).to_le_bytes());
        bytes.extend((layout.align as u64).to_le_bytes());
        for field in layout.fields {
            bytes.extend(field.name.bytes().chain([0]));
            bytes.extend((field.offset as u64).to_le_bytes());
            bytes.extend((field.size as u64).to_le_bytes());
        }
    }
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    assert_eq!(ABI_FINGERPRINT, hash);
}
