//! Version 1 of every structure, byte by byte, as it was released.

use std::fmt::Write;
use std::path::Path;

use vfio_mediate_sdk::layout::{ABI_FINGERPRINT, structs};

fn text() -> String {
    let mut text = String::from("# ABI 1 on 64-bit little-endian machines: offset size field\n");
    writeln!(text, "fingerprint {ABI_FINGERPRINT:#018x}").unwrap();
    for layout in structs() {
        writeln!(text, "\n{} size {} align {}", layout.name, layout.size, layout.align).unwrap();
        for field in layout.fields {
            writeln!(text, "{:5} {:4} {}", field.offset, field.size, field.name).unwrap();
        }
    }
    text
}

/// spec: ABI-FROZEN
///
/// Until the first release `UPDATE_GOLDEN=1` rewrites the file; afterwards a difference is a bug.
#[test]
fn the_layout_is_the_released_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../spec/abi/v1.layout");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, text()).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text(), golden, "the ABI differs from {}", path.display());
}

/// Padding is where C and Rust could come to differ, and where bytes leak: every structure has none.
#[test]
fn no_structure_has_padding() {
    for layout in structs() {
        let mut end = 0;
        for field in layout.fields {
            assert_eq!(field.offset, end, "padding before {}.{}", layout.name, field.name);
            end = field.offset + field.size;
        }
        assert_eq!(end, layout.size, "padding at the end of {}", layout.name);
    }
}
