//! A plug-in file, opened and checked.
//!
//! ```text
//!  read whole -> ELF and export checked -> sealed copy in memory -> linked (constructors run) -> entry, layout, table checked
//! ```
//! **Linking runs the library's constructors**, and those of the libraries that it needs: from then on the file's author is
//! trusted with the process. Whatever can be refused before is refused before; what is refused afterwards stays mapped, with
//! its copy, for the life of the process (as every library here: it is never unloaded).
//!
//! The copy has no folder, so `$ORIGIN` in a library's search path finds nothing: a plug-in links its own parts statically,
//! or finds them in the system's folders.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use abi_stable::abi_stability::abi_checking::{
    AbiInstability, AbiInstabilityErrors, CheckingGlobals, check_layout_compatibility_with_globals,
};
use abi_stable::type_layout::{TLFieldOrFunction, TypeLayout};
use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW};
use vfio_mediate_sdk::abi::{self, Entry};
use vfio_mediate_sdk::layout;

use super::{copy_sized, entries, text};
use crate::plugin::error::LoadError;
use crate::plugin::{DeviceMatch, elf};
use crate::sys::{Seal, memfd};

/// `RTLD_NODELETE` of the C library: the library stays mapped for ever, whatever is done with its handle.
const RTLD_NODELETE: i32 = 0x1000;

/// A checked plug-in, not registered yet. Its code stays mapped for the life of the process.
pub struct Library {
    path: PathBuf,
    name: String,
    version: String,
    vendor: String,
    matches: Vec<DeviceMatch>,
    panic_aborts: bool,
    is_rust: bool,
    plugin: abi::Plugin,
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Library({} {} from {})", self.name, self.version, self.path.display())
    }
}

impl Library {
    /// Opens and checks `path`. A file that is cut short, replaced while it is read, or no plug-in at all is an error.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let bytes = read(path)?;
        let image = elf::check(&bytes).map_err(|what| LoadError::NotALibrary { path: path.to_owned(), what })?;
        let size = check_export(&image).map_err(|what| LoadError::NotAPlugin { path: path.to_owned(), what })?;
        let handle = link(path, &bytes)?;
        Self::inspect(path, &handle, size)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn version(&self) -> &str {
        &self.version
    }

    pub fn vendor(&self) -> &str {
        &self.vendor
    }

    pub fn matches(&self) -> &[DeviceMatch] {
        &self.matches
    }

    /// A panic of this plug-in ends the process: it was compiled with `panic=abort`.
    pub fn panic_aborts(&self) -> bool {
        self.panic_aborts
    }

    pub fn is_rust(&self) -> bool {
        self.is_rust
    }

    pub(in crate::plugin) fn table(&self) -> &abi::Plugin {
        &self.plugin
    }

    /// `size`: bytes of the exported entry.
    fn inspect(path: &Path, handle: &Handle, size: u64) -> Result<Self, LoadError> {
        let not_ours = |what: String| LoadError::NotAPlugin { path: path.to_owned(), what };
        let other_abi = |what: String| LoadError::Abi { path: path.to_owned(), what };
        let malformed = |what: String| LoadError::Malformed { path: path.to_owned(), what };

        // SAFETY: the symbol is only turned into a pointer here, and what it points at is checked before it is believed.
        let symbol =
            unsafe { handle.get::<*const Entry>(abi::ENTRY_SYMBOL.as_bytes()) }.map_err(|_| not_ours(no_entry()))?;
        let entry = symbol.into_raw().cast::<Entry>().cast_const();
        let start = read_start(entry).map_err(not_ours)?;
        check_version(&start, size).map_err(other_abi)?;
        // SAFETY: the symbol has the size of an entry of this ABI, checked just now, and an entry is integers and pointers
        // only, so that any bytes are one. The library is never unloaded.
        let entry = unsafe { entry.read() };
        if entry.plugin.is_null() {
            return Err(malformed("its entry names no plug-in".into()));
        }
        let unknown = entry.flags & !abi::ENTRY_PANIC_ABORTS;
        if unknown != 0 {
            return Err(other_abi(format!("its entry has unknown flags {unknown:#x}")));
        }
        let is_rust = !entry.rust_header.is_null();
        if is_rust {
            check_layout(&entry).map_err(other_abi)?;
        } else if entry.fingerprint != layout::ABI_FINGERPRINT {
            return Err(other_abi(format!(
                "its header's fingerprint is {:#018x}, this host's is {:#018x}",
                entry.fingerprint,
                layout::ABI_FINGERPRINT
            )));
        }
        // SAFETY: the entry was checked to be of this ABI, by which `plugin` is a whole structure that lives for ever.
        let plugin = unsafe { copy_sized(entry.plugin, "the plug-in's table") }.map_err(malformed)?;
        // SAFETY: texts and lists of the table live for ever, as the ABI says.
        let described = unsafe { describe(&plugin) }.map_err(malformed)?;
        let (name, version, vendor, matches) = described;
        Ok(Self {
            path: path.to_owned(),
            name,
            version,
            vendor,
            matches,
            panic_aborts: entry.flags & abi::ENTRY_PANIC_ABORTS != 0,
            is_rust,
            plugin,
        })
    }
}

/// Reads a file of at most [`elf::SIZE_MAX`] bytes. A FIFO or a device is not waited for.
fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    let fail = |source| LoadError::Read { path: path.to_owned(), source };
    let not = |what: &str| LoadError::NotALibrary { path: path.to_owned(), what: what.to_owned() };
    let check = |kind: &Metadata| match kind {
        kind if kind.is_dir() => Err(not("it is a folder")),
        kind if !kind.is_file() => Err(not("it is not a regular file")),
        kind if kind.len() > elf::SIZE_MAX => Err(not("it is larger than 256 MiB")),
        _ => Ok(()),
    };
    // Looked at before it is opened, since opening some devices does something; and again, since it may have been replaced.
    check(&std::fs::metadata(path).map_err(fail)?)?;
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(nonblock).open(path).map_err(fail)?;
    check(&file.metadata().map_err(fail)?)?;
    let mut bytes = Vec::new();
    file.take(elf::SIZE_MAX).read_to_end(&mut bytes).map_err(fail)?;
    Ok(bytes)
}

/// Links a sealed copy in memory, so that the file can be replaced or cut while it is loaded.
fn link(path: &Path, bytes: &[u8]) -> Result<Handle, LoadError> {
    let fail = |source: std::io::Error| LoadError::Read { path: path.to_owned(), source };
    let size = bytes.len() as u64;
    let copy = memfd(&shown_name(path), size, Seal::Open).map_err(fail)?;
    let mut copy = File::from(copy);
    copy.write_all(bytes).map_err(fail)?;
    crate::sys::seal(&copy, Seal::Contents).map_err(fail)?;
    let name = format!("/proc/self/fd/{}", copy.as_raw_fd());
    // SAFETY: runs the library's constructors, whose author is trusted with the process (invariant 7). The handle's
    // library stays mapped: NODELETE.
    let handle = unsafe { Handle::open(Some(&name), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE) }
        .map_err(|error| LoadError::Link { path: path.to_owned(), what: linker_said(&error, &name) })?;
    // The dynamic linker knows loaded libraries by name: the number must never be another file's, so it is never closed.
    std::mem::forget(copy);
    Ok(handle)
}

/// What maps, profilers and debuggers show: the file's own name.
fn shown_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.chars().filter(|c| c.is_ascii_graphic()).take(128).collect()
}

/// The dynamic linker's own words; libloading's say only that it failed.
fn linker_said(error: &libloading::Error, name: &str) -> String {
    let mut words = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        words = inner.to_string();
        source = inner.source();
    }
    words.replace(name, "the library").replace('\n', " ")
}

fn no_entry() -> String {
    format!("it does not export {}", abi::ENTRY_SYMBOL)
}

/// The size of the exported entry in bytes; at least its start.
fn check_export(image: &elf::Image<'_>) -> Result<u64, String> {
    let export = image.export(abi::ENTRY_SYMBOL).ok_or_else(no_entry)?;
    if !export.is_data || export.size < size_of::<Start>() as u64 {
        return Err(format!("its {} is something else", abi::ENTRY_SYMBOL));
    }
    Ok(export.size)
}

/// What an entry of every version begins with.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Start {
    magic: u64,
    struct_size: u32,
    abi_major: u16,
    abi_minor: u16,
}

const _: () = {
    assert!(std::mem::offset_of!(Start, struct_size) == std::mem::offset_of!(Entry, struct_size));
    assert!(std::mem::offset_of!(Start, abi_major) == std::mem::offset_of!(Entry, abi_major));
    assert!(std::mem::offset_of!(Start, abi_minor) == std::mem::offset_of!(Entry, abi_minor));
};

fn read_start(entry: *const Entry) -> Result<Start, String> {
    if entry.is_null() || !entry.is_aligned() {
        return Err(format!("{} is null or misaligned", abi::ENTRY_SYMBOL));
    }
    // SAFETY: an exported object of at least this size (`check_export`), in a library that is never unloaded; any bytes are
    // such integers.
    let start = unsafe { entry.cast::<Start>().read() };
    if start.magic != abi::ENTRY_MAGIC {
        return Err(format!("its {} is something else (magic {:#018x})", abi::ENTRY_SYMBOL, start.magic));
    }
    Ok(start)
}

fn check_version(start: &Start, size: u64) -> Result<(), String> {
    if start.abi_major != abi::ABI_MAJOR {
        let age = if start.abi_major < abi::ABI_MAJOR { "an older" } else { "a newer" };
        return Err(format!(
            "{age} one, version {}.{}; this host has {}.{}",
            start.abi_major,
            start.abi_minor,
            abi::ABI_MAJOR,
            abi::ABI_MINOR
        ));
    }
    if start.struct_size as usize != size_of::<Entry>() || size < size_of::<Entry>() as u64 {
        let told = start.struct_size;
        return Err(format!("its entry has {size} bytes and says {told}, not {}", size_of::<Entry>()));
    }
    Ok(())
}

/// Compares the layout that a Rust plug-in was compiled with to ours, in both directions: the checker of the one side
/// takes what the other side lacks for granted.
fn check_layout(entry: &Entry) -> Result<(), String> {
    // SAFETY: the entry's magic and version say that it was made by our macro; the header is data that lives for ever.
    let theirs = unsafe { layout::read_header(entry.rust_header) }.map_err(|error| error.to_string())?;
    let ours = layout::root_layout();
    compare(ours, theirs)?;
    compare(theirs, ours)
}

fn compare(interface: &'static TypeLayout, implementation: &'static TypeLayout) -> Result<(), String> {
    // Fresh globals for each comparison: cached ones would keep pointers into this library.
    match check_layout_compatibility_with_globals(interface, implementation, &CheckingGlobals::new()) {
        Ok(()) => Ok(()),
        Err(errors) => {
            let lines = leaves(&errors);
            if lines.is_empty() { Ok(()) } else { Err(lines.join("\n  ")) }
        }
    }
}

/// One line per difference. The version of the crate that defines a type is not the ABI's version.
fn leaves(errors: &AbiInstabilityErrors) -> Vec<String> {
    const LINES_MAX: usize = 16;
    let mut lines = Vec::new();
    for error in &errors.errors {
        let mut place = vec![errors.interface.name()];
        place.extend(error.stack_trace.iter().filter_map(|step| name_of(&step.expected)));
        for difference in &error.errs {
            if matches!(difference, AbiInstability::PackageVersion(_)) {
                continue;
            }
            if lines.len() == LINES_MAX {
                lines.push("... and more".to_owned());
                return lines;
            }
            lines.push(format!("{}: {}", place.join("."), short(difference)));
        }
    }
    lines
}

/// A step of the way: a field or a parameter. Function pointers have no name of their own.
fn name_of(step: &TLFieldOrFunction) -> Option<&'static str> {
    match step {
        // abi_stable's derive leaves a comma at the end of a function pointer's parameter.
        TLFieldOrFunction::Field(field) => Some(field.name().trim_end_matches(',')),
        TLFieldOrFunction::Function(_) => None,
    }
}

fn short(difference: &AbiInstability) -> String {
    let name = |layout: &TypeLayout| layout.name().to_owned();
    match difference {
        AbiInstability::Name(found) => format!("expected {}, found {}", found.expected, found.found),
        AbiInstability::Size(found) => format!("expected {} bytes, found {}", found.expected, found.found),
        AbiInstability::Alignment(found) => format!("expected alignment {}, found {}", found.expected, found.found),
        AbiInstability::FieldCountMismatch(found) => {
            format!("expected {} fields, found {}", found.expected, found.found)
        }
        AbiInstability::CyclicTypeChecking { interface, implementation } => {
            format!("{} against {}", name(interface), name(implementation))
        }
        other => format!("{other:?}").chars().filter(|c| *c != '\n').take(160).collect(),
    }
}

/// # Safety
/// The table's texts and lists are readable, as the ABI says.
#[allow(clippy::type_complexity)] // four plain values that become fields at once
unsafe fn describe(plugin: &abi::Plugin) -> Result<(String, String, String, Vec<DeviceMatch>), String> {
    // SAFETY: by the caller.
    let name = unsafe { text(plugin.name, "the plug-in's name", 1, 64) }?;
    if !name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_' || c == b'-') {
        return Err(format!("the plug-in's name {name:?} has other characters than a-z, 0-9, _ and -"));
    }
    // SAFETY: by the caller.
    let version = unsafe { text(plugin.version, "the plug-in's version", 1, 64) }?;
    // SAFETY: by the caller.
    let vendor = unsafe { text(plugin.vendor, "the plug-in's vendor", 0, 128) }?;
    if version.chars().chain(vendor.chars()).any(char::is_control) {
        return Err("the plug-in's version or vendor has control characters".into());
    }
    // SAFETY: by the caller.
    let matches = unsafe { entries(plugin.matches, plugin.match_count, "device matches") }?;
    let matches = matches.iter().map(DeviceMatch::from_abi).collect::<Result<_, _>>()?;
    if plugin.open.is_none() {
        return Err("the plug-in has no open function".into());
    }
    Ok((name, version, vendor, matches))
}

#[cfg(test)]
mod tests {
    use abi_stable::StableAbi;

    use super::*;

    mod ours {
        #[repr(C)]
        #[derive(abi_stable::StableAbi)]
        pub struct Table {
            pub hook: Option<unsafe extern "C" fn(offset: u64) -> i32>,
            pub count: u32,
        }
    }

    #[allow(dead_code)]
    mod theirs {
        #[repr(C)]
        #[derive(abi_stable::StableAbi)]
        pub struct Table {
            pub hook: Option<unsafe extern "C" fn(offset: u32) -> i32>,
            pub count: u64,
            pub more: u32,
        }
    }

    /// spec: LOAD-5
    #[test]
    fn layout_differences_are_told_one_line_per_leaf_and_seen_from_both_sides() {
        let (ours, theirs) = (<ours::Table as StableAbi>::LAYOUT, <theirs::Table as StableAbi>::LAYOUT);
        assert_eq!(compare(ours, ours), Ok(()));
        let (forward, backward) = (compare(ours, theirs).unwrap_err(), compare(theirs, ours).unwrap_err());
        let forward: Vec<&str> = forward.lines().map(str::trim).collect();
        assert_eq!(
            forward,
            [
                "Table: expected 16 bytes, found 24",
                "Table: expected 2 fields, found 3",
                "Table.hook.offset: expected u64, found u32",
                "Table.count: expected u32, found u64",
            ]
        );
        assert!(backward.contains("Table.hook.offset: expected u32, found u64"), "{backward}");
    }

    /// spec: LOAD-5
    #[test]
    fn the_abi_compared_with_itself_is_the_same() {
        assert_eq!(compare(layout::root_layout(), layout::root_layout()), Ok(()));
    }
}
