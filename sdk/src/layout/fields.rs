//! Names, sizes, alignments and field offsets of every structure of the ABI, as data.

use crate::abi;

/// One structure, as the compiler laid it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StructLayout {
    pub name: &'static str,
    pub size: usize,
    pub align: usize,
    /// In order of declaration
    pub fields: &'static [FieldLayout],
}

/// One field of a [`StructLayout`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FieldLayout {
    pub name: &'static str,
    pub offset: usize,
    pub size: usize,
}

/// Every structure of the ABI, in order of name.
pub const fn structs() -> &'static [StructLayout] {
    STRUCTS
}

/// A number over [`structs`]: 64-bit FNV-1a of each structure's name, size, alignment, and each field's name, offset and
/// size, names ended by a zero byte and numbers as 8 bytes little-endian. `VFIO_MEDIATE_ABI_FINGERPRINT` in C.
pub const ABI_FINGERPRINT: u64 = fingerprint_of(STRUCTS);

const fn size_of_field<S, F>(_: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! layouts {
    ($($name:ident { $($field:ident),+ $(,)? })+) => {
        const STRUCTS: &[StructLayout] = &[$(StructLayout {
            name: stringify!($name),
            size: size_of::<abi::$name>(),
            align: align_of::<abi::$name>(),
            fields: &[$(FieldLayout {
                name: stringify!($field),
                offset: core::mem::offset_of!(abi::$name, $field),
                size: size_of_field(|s: &abi::$name| &s.$field),
            }),+],
        }),+];

        // A field that is missing above does not compile.
        const _: () = { $({
            #[allow(dead_code)]
            fn complete(abi::$name { $($field: _),+ }: abi::$name) {}
        })+ };
    };
}

layouts! {
    Access { struct_size, region, offset, length, data, write, reserved }
    Bytes { ptr, len }
    CallContext { struct_size, origin, services, host, deadline }
    DeviceIdentity {
        struct_size, backend, vendor_id, device_id, subsystem_vendor_id, subsystem_device_id, class_code, revision,
        reserved, num_regions, num_irqs, name, config,
    }
    DeviceMatch { vendor_id, device_id, subsystem_vendor_id, subsystem_device_id }
    DeviceOps {
        struct_size, reserved, state, regions, region_count, irqs, irq_count, extra_regions, extra_region_count,
        extra_irqs, extra_irq_count, migration, dirty, event, close,
    }
    DirtyOps { struct_size, exactness, start, report, stop }
    Entry {
        magic, struct_size, abi_major, abi_minor, fingerprint, flags, reserved, rust_header, plugin,
    }
    Event { struct_size, kind, args }
    ExtraIrq { struct_size, flags, count, reserved }
    ExtraRegion { struct_size, flags, size, type_, subtype, hooks, data }
    HostServices {
        struct_size, abi_major, abi_minor, log, region_read, region_write, default_rw, default_region_info,
        default_irq_info, default_set_irqs, guest_read, guest_write, mark_dirty, scratch_alloc, scratch_free, irq_inject,
        request, now, wait, cancelled, timer_arm, timer_cancel, get_extension,
    }
    IovaRange { iova, length }
    IrqClaim { struct_size, index, start, count, hooks, data }
    IrqHooks { struct_size, reserved, irq_info, set_irqs, fired }
    IrqInfo { struct_size, index, flags, count }
    IrqRequest { struct_size, index, start, count, action, data_kind, bools, fds }
    MigrationOps {
        struct_size, reserved, flags, match_data, check_match, set_state, save, load, remaining,
    }
    MmapRequest { struct_size, region, offset, length, fd, reserved, fd_offset }
    Plugin {
        struct_size, reserved, name, version, vendor, matches, match_count, init, probe, open, retire, get_extension,
    }
    Reason { text, capacity, length }
    RegionClaim { struct_size, region, offset, length, maps, reserved, hooks, data }
    RegionHooks { struct_size, reserved, rw, region_info, mmap }
    RegionInfo { struct_size, index, flags, reserved, size }
    Remaining { struct_size, reserved, initial_bytes, dirty_bytes, stop_copy_bytes }
    Scratch { struct_size, address_bits, iova, length, ptr }
}

const fn fingerprint_of(structs: &[StructLayout]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let mut s = 0;
    while s < structs.len() {
        let layout = &structs[s];
        hash = hash_name(hash, layout.name);
        hash = hash_number(hash, layout.size);
        hash = hash_number(hash, layout.align);
        let mut f = 0;
        while f < layout.fields.len() {
            let field = &layout.fields[f];
            hash = hash_name(hash, field.name);
            hash = hash_number(hash, field.offset);
            hash = hash_number(hash, field.size);
            f += 1;
        }
        s += 1;
    }
    hash
}

const fn hash_byte(hash: u64, byte: u8) -> u64 {
    (hash ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3)
}

const fn hash_name(mut hash: u64, name: &str) -> u64 {
    let bytes = name.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        hash = hash_byte(hash, bytes[i]);
        i += 1;
    }
    hash_byte(hash, 0)
}

const fn hash_number(mut hash: u64, number: usize) -> u64 {
    let bytes = (number as u64).to_le_bytes();
    let mut i = 0;
    while i < bytes.len() {
        hash = hash_byte(hash, bytes[i]);
        i += 1;
    }
    hash
}
