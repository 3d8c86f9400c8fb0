//! Is this file a whole shared library of this machine? Asked before the dynamic linker maps it.
//!
//! A library that is cut short maps all the same, and kills the process with SIGBUS when its missing pages are touched.

use object::elf::{EM_X86_64, ET_DYN, FileHeader64, PT_DYNAMIC, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, LittleEndian};

/// Larger files are not read.
pub const SIZE_MAX: u64 = 256 * 1024 * 1024;

/// Checks the whole file's bytes. The error says what is wrong, in a few words.
pub fn check(bytes: &[u8]) -> Result<(), String> {
    if bytes.is_empty() {
        return Err("the file is empty".into());
    }
    if !bytes.starts_with(b"\x7fELF") {
        return Err("not a shared library (no ELF header)".into());
    }
    let header = FileHeader64::<Endianness>::parse(bytes).map_err(|_| "not a 64-bit ELF file, or one cut short")?;
    let endian = header.endian().map_err(|_| "an ELF file of unknown byte order")?;
    if endian != Endianness::Little {
        return Err("an ELF file of the other byte order".into());
    }
    let header = FileHeader64::<LittleEndian>::parse(bytes).map_err(|_| "an ELF file cut short")?;
    if header.e_machine(LittleEndian) != EM_X86_64 {
        return Err(format!("built for another machine (e_machine {})", header.e_machine(LittleEndian)));
    }
    if header.e_type(LittleEndian) != ET_DYN {
        return Err(format!("not a shared library (e_type {})", header.e_type(LittleEndian)));
    }
    let segments = header.program_headers(LittleEndian, bytes).map_err(|_| "cut short: program headers are missing")?;
    let (mut loads, mut dynamic) = (0, false);
    for segment in segments {
        let (offset, length) = segment.file_range(LittleEndian);
        let inside = offset.checked_add(length).is_some_and(|end| end <= bytes.len() as u64);
        match segment.p_type(LittleEndian) {
            PT_LOAD => loads += 1,
            PT_DYNAMIC => dynamic = true,
            _ => {}
        }
        if !inside {
            return Err(format!(
                "cut short: a segment of {length} bytes at {offset:#x} lies beyond the file's {} bytes",
                bytes.len()
            ));
        }
    }
    if loads == 0 || !dynamic {
        return Err("not a shared library (nothing to load)".into());
    }
    Ok(())
}
