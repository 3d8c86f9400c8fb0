//! Is this file a whole shared library of this machine, and what does it export? Asked before the dynamic linker maps it.
//!
//! **Owns** reading the file's headers and the tables that the dynamic linker walks. **Must never** trust an offset, a
//! size or a count in them.
//!
//! A library that is cut short maps all the same, and kills the process with SIGBUS when its missing pages are touched; one
//! whose end was never written (a download broken off in a preallocated file) makes the linker follow null pointers. Both
//! end here. So does a stranger's library, before its constructors run. What cannot be told apart here is a file that was
//! forged: loading one is running it.

use object::elf::{
    DF_1_PIE, DT_FLAGS_1, DT_GNU_HASH, DT_HASH, DT_INIT_ARRAY, DT_INIT_ARRAYSZ, DT_JMPREL, DT_PLTRELSZ, DT_RELA,
    DT_RELASZ, DT_RELR, DT_RELRSZ, DT_STRSZ, DT_STRTAB, DT_SYMTAB, DynamicTag, ET_DYN, FileHeader64, Machine,
    PT_DYNAMIC, PT_LOAD, ProgramHeader64, SHT_STRTAB, STB_GLOBAL, STB_WEAK, STT_OBJECT, Sym64,
};
use object::read::elf::{Dyn, FileHeader, GnuHashTable, HashTable, ProgramHeader, SectionHeader, Sym};
use object::{Endianness, LittleEndian};

/// Larger files are not read.
pub const SIZE_MAX: u64 = 256 * 1024 * 1024;

const LE: LittleEndian = LittleEndian;

/// `e_machine` of the machine that this host was compiled for.
#[cfg(target_arch = "x86_64")]
const MACHINE: Machine = object::elf::EM_X86_64;
#[cfg(target_arch = "aarch64")]
const MACHINE: Machine = object::elf::EM_AARCH64;
#[cfg(target_arch = "riscv64")]
const MACHINE: Machine = object::elf::EM_RISCV;

/// A library that may be linked.
#[derive(Debug)]
pub struct Image<'data> {
    symbols: &'data [Sym64<LittleEndian>],
    strings: &'data [u8],
}

/// Something that a library exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// Data, and no function
    pub is_data: bool,
    /// Bytes
    pub size: u64,
}

impl Image<'_> {
    /// What the library exports by this name. Nothing of the library runs.
    pub fn export(&self, name: &str) -> Option<Export> {
        let is_ours = |symbol: &&Sym64<LittleEndian>| {
            let binding = symbol.st_bind();
            (binding == STB_GLOBAL || binding == STB_WEAK)
                && !symbol.is_undefined(LE)
                && self.name(symbol) == Some(name.as_bytes())
        };
        let symbol = self.symbols.iter().find(is_ours)?;
        Some(Export { is_data: symbol.st_type() == STT_OBJECT, size: symbol.st_size(LE) })
    }

    fn name(&self, symbol: &Sym64<LittleEndian>) -> Option<&[u8]> {
        let rest = self.strings.get(symbol.st_name(LE) as usize..)?;
        rest.iter().position(|byte| *byte == 0).map(|end| &rest[..end])
    }
}

/// Checks the whole file's bytes. The error says what is wrong, in a few words.
pub fn check(bytes: &[u8]) -> Result<Image<'_>, String> {
    let header = check_header(bytes)?;
    let segments = header.program_headers(LE, bytes).map_err(|_| "cut short: program headers are missing")?;
    check_segments(segments, bytes)?;
    check_sections(header, bytes)?;
    Tables::read(segments, bytes)?.check()
}

fn check_header(bytes: &[u8]) -> Result<&FileHeader64<LittleEndian>, String> {
    if bytes.is_empty() {
        return Err("the file is empty".into());
    }
    if !bytes.starts_with(b"\x7fELF") {
        return Err("not a shared library (no ELF header)".into());
    }
    let any = FileHeader64::<Endianness>::parse(bytes).map_err(|_| "not a 64-bit ELF file, or one cut short")?;
    if any.endian().map_err(|_| "an ELF file of unknown byte order")? != Endianness::Little {
        return Err("an ELF file of the other byte order".into());
    }
    let header = FileHeader64::<LittleEndian>::parse(bytes).map_err(|_| "an ELF file cut short")?;
    if header.e_machine(LE) != MACHINE {
        return Err(format!("built for another machine (e_machine {})", header.e_machine(LE).0));
    }
    if header.e_type(LE) != ET_DYN {
        return Err(format!("not a shared library (e_type {})", header.e_type(LE).0));
    }
    Ok(header)
}

fn check_segments(segments: &[ProgramHeader64<LittleEndian>], bytes: &[u8]) -> Result<(), String> {
    let size = bytes.len() as u64;
    for segment in segments {
        let (offset, length) = segment.file_range(LE);
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(format!(
                "cut short: a segment of {length} bytes at {offset:#x} lies beyond the file's {size} bytes"
            ));
        }
        let memory = segment.p_memsz(LE);
        if segment.p_type(LE) == PT_LOAD
            && (memory < length || segment.p_vaddr(LE).checked_add(memory).is_none_or(|end| end > 1 << 46))
        {
            return Err("damaged: a segment's size in memory makes no sense".into());
        }
    }
    if !segments.iter().any(|segment| segment.p_type(LE) == PT_LOAD) {
        return Err("not a shared library (nothing to load)".into());
    }
    Ok(())
}

/// Section headers are no business of the dynamic linker. They come last in a file, so that they tell whether its end is
/// there; a stripped library that has none says so.
fn check_sections(header: &FileHeader64<LittleEndian>, bytes: &[u8]) -> Result<(), String> {
    let sections = header.section_headers(LE, bytes).map_err(|_| "cut short: section headers are missing")?;
    if sections.is_empty() {
        return Ok(());
    }
    let names = header.section_strings_index(LE, bytes).ok().and_then(|index| sections.get(index.0));
    let names = names.filter(|names| names.sh_type(LE) == SHT_STRTAB);
    let range = names.and_then(|names| names.file_range(LE));
    match range.and_then(|(offset, length)| offset.checked_add(length)) {
        Some(end) if end <= bytes.len() as u64 => Ok(()),
        _ => Err("cut short or damaged: section names are missing".into()),
    }
}

/// What the dynamic linker reads before it runs anything.
struct Tables<'data> {
    segments: &'data [ProgramHeader64<LittleEndian>],
    bytes: &'data [u8],
    entries: Vec<(DynamicTag, u64)>,
}

impl<'data> Tables<'data> {
    fn read(segments: &'data [ProgramHeader64<LittleEndian>], bytes: &'data [u8]) -> Result<Self, String> {
        let segment = segments.iter().find(|segment| segment.p_type(LE) == PT_DYNAMIC);
        let segment = segment.ok_or("not a shared library (no dynamic section)")?;
        let all = segment.dynamic(LE, bytes).ok().flatten().ok_or("damaged: its dynamic section cannot be read")?;
        let entries: Vec<_> = all
            .iter()
            .map(|entry| (entry.d_tag(LE), entry.d_val(LE)))
            .take_while(|(tag, _)| *tag != object::elf::DT_NULL)
            .collect();
        if entries.len() == all.len() {
            return Err("damaged: its dynamic section has no end".into());
        }
        Ok(Self { segments, bytes, entries })
    }

    fn value(&self, wanted: DynamicTag) -> Option<u64> {
        self.entries.iter().rev().find(|(tag, _)| *tag == wanted).map(|(_, value)| *value)
    }

    /// What the file has from `address` to the end of its segment.
    fn from(&self, address: u64) -> Option<&'data [u8]> {
        self.segments.iter().filter(|segment| segment.p_type(LE) == PT_LOAD).find_map(|segment| {
            let from = usize::try_from(address.checked_sub(segment.p_vaddr(LE))?).ok()?;
            segment.data(LE, self.bytes).ok()?.get(from..).filter(|rest| !rest.is_empty())
        })
    }

    /// The table that these two entries describe, if the library has it.
    fn table(&self, address: DynamicTag, size: DynamicTag, what: &str) -> Result<Option<&'data [u8]>, String> {
        let Some(address) = self.value(address) else { return Ok(None) };
        let length = self.value(size).and_then(|length| usize::try_from(length).ok());
        let found =
            length.and_then(|length| if length == 0 { Some(&[][..]) } else { self.from(address)?.get(..length) });
        found.map(Some).ok_or_else(|| format!("damaged: its {what} lie outside the file"))
    }

    fn check(&self) -> Result<Image<'data>, String> {
        if self.value(DT_FLAGS_1).is_some_and(|flags| flags & DF_1_PIE.0 != 0) {
            return Err("a program, not a shared library".into());
        }
        self.table(DT_RELA, DT_RELASZ, "relocations")?;
        self.table(DT_JMPREL, DT_PLTRELSZ, "relocations")?;
        self.table(DT_RELR, DT_RELRSZ, "relocations")?;
        self.table(DT_INIT_ARRAY, DT_INIT_ARRAYSZ, "constructors")?;
        let strings = self.table(DT_STRTAB, DT_STRSZ, "symbol names")?.ok_or("damaged: it has no symbol names")?;
        if strings.last() != Some(&0) {
            return Err("damaged: its symbol names have no end".into());
        }
        let count = self.symbol_count()?;
        let rest = self.value(DT_SYMTAB).and_then(|address| self.from(address)).ok_or("damaged: it has no symbols")?;
        let (symbols, _) = object::pod::slice_from_bytes::<Sym64<LittleEndian>>(rest, count)
            .map_err(|()| "damaged: its symbols lie outside the file")?;
        Ok(Image { symbols, strings })
    }

    /// The symbol table does not know its own length; the hash tables do.
    fn symbol_count(&self) -> Result<usize, String> {
        type Header = FileHeader64<LittleEndian>;
        let damaged = || "damaged: its symbols' hash table cannot be read".to_owned();
        if let Some(address) = self.value(DT_GNU_HASH) {
            let table = self.from(address).ok_or_else(damaged)?;
            let table = GnuHashTable::<Header>::parse(LE, table).map_err(|_| damaged())?;
            // A library that exports nothing has an empty table, whose symbols are all undefined.
            return Ok(table.symbol_table_length(LE).unwrap_or(0) as usize);
        }
        let table = self.value(DT_HASH).and_then(|address| self.from(address)).ok_or_else(damaged)?;
        let table = HashTable::<Header>::parse(LE, table).map_err(|_| damaged())?;
        Ok(table.symbol_table_length() as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This test program itself: a whole ELF file, and no library.
    fn this_program() -> Vec<u8> {
        std::fs::read("/proc/self/exe").unwrap()
    }

    /// spec: LOAD-1
    #[test]
    fn what_is_no_library_is_told_in_a_few_words() {
        for (bytes, word) in [(&b""[..], "empty"), (b"#!/bin/sh\n", "no ELF"), (b"\x7fELF", "cut short")] {
            let error = check(bytes).unwrap_err();
            assert!(error.contains(word) && !error.contains('\n'), "{error}");
        }
        let error = check(&this_program()).unwrap_err();
        assert!(error.contains("program") || error.contains("e_type"), "{error}");
    }

    /// spec: LOAD-1
    #[test]
    fn another_machine_word_size_or_byte_order_is_refused() {
        let mut bytes = this_program();
        bytes[18] = 0xfe;
        assert!(check(&bytes).unwrap_err().contains("another machine"));
        bytes[5] = 2;
        assert!(check(&bytes).unwrap_err().contains("byte order"));
        bytes[4] = 1;
        assert!(check(&bytes).unwrap_err().contains("64-bit"));
    }

    /// No byte of the headers, whatever it says, makes the check panic.
    ///
    /// spec: LOAD-2
    #[test]
    fn damaged_headers_never_panic() {
        let mut bytes = this_program();
        bytes.truncate(1 << 20);
        bytes[16] = 3; // ET_DYN
        for at in 0..4096 {
            let before = bytes[at];
            for value in [0, 0xff, before.wrapping_add(1), before ^ 0x80] {
                bytes[at] = value;
                let _ = check(&bytes);
            }
            bytes[at] = before;
        }
    }
}
