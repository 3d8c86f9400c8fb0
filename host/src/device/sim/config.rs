//! PCI configuration space as vfio-pci virtualises it: 256 bytes, of which a mask may be written.

/// `PCI_COMMAND`.
pub(super) const COMMAND: usize = 0x04;
pub(super) const COMMAND_MEMORY: u16 = 1 << 1;
pub(super) const COMMAND_BUS_MASTER: u16 = 1 << 2;
pub(super) const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// The low byte of `PCI_STATUS`, and its bit for an INTx that is asserted.
pub(super) const STATUS: u64 = 0x06;
pub(super) const STATUS_INTX: u8 = 1 << 3;
/// I/O, memory, bus master, parity, SERR, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0547;
const MSI_ENABLE: u8 = 1;

pub(super) const SIZE: usize = 256;

#[derive(Debug, Clone)]
pub(super) struct PciConfig {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Where the MSI capability begins
    msi: usize,
}

/// The parts of a device's identity that config space holds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ids {
    pub(super) vendor: u16,
    pub(super) device: u16,
    pub(super) subsystem_vendor: u16,
    pub(super) subsystem: u16,
    pub(super) class: u32,
    pub(super) revision: u8,
}

impl PciConfig {
    /// A type 0 header with 32-bit memory BARs (index, size) and an MSI capability of one 64-bit vector at 0x40, as vfio-pci
    /// shows a device that has just been opened: memory enabled, bus master off.
    pub(super) fn new(ids: Ids, bars: &[(usize, u32)]) -> Self {
        let mut config = Self { bytes: [0; SIZE], writable: [0; SIZE], msi: 0x40 };
        config.put(0x00, &ids.vendor.to_le_bytes());
        config.put(0x02, &ids.device.to_le_bytes());
        config.put(COMMAND, &COMMAND_MEMORY.to_le_bytes());
        config.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Status: capability list.
        config.put(0x06, &0x0010_u16.to_le_bytes());
        config.put(0x08, &(ids.class << 8 | u32::from(ids.revision)).to_le_bytes());
        // Cache line size, latency timer, interrupt line.
        config.allow(0x0C, &[0xFF, 0xFF]);
        config.allow(0x3C, &[0xFF]);
        for (index, size) in bars {
            config.allow(0x10 + 4 * index, &(!(size - 1)).to_le_bytes());
        }
        config.put(0x2C, &ids.subsystem_vendor.to_le_bytes());
        config.put(0x2E, &ids.subsystem.to_le_bytes());
        config.put(0x34, &[0x40]);
        // Interrupt pin A.
        config.put(0x3D, &[1]);
        // MSI: id 5, last of the chain, 64-bit addresses, one vector; address and data may be written. The enable bit follows
        // SET_IRQS and not the guest's write.
        config.put(0x40, &[0x05, 0x00, 0x80, 0x00]);
        config.allow(0x44, &[0xFC, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]);
        config
    }

    pub(super) fn bytes(&self) -> &[u8; SIZE] {
        &self.bytes
    }

    pub(super) fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]])
    }

    /// Bits that may not be written keep their value. The caller has checked the range.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, value) in (offset..).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
        }
    }

    pub(super) fn set_msi_enabled(&mut self, enabled: bool) {
        let control = &mut self.bytes[self.msi + 2];
        *control = *control & !MSI_ENABLE | u8::from(enabled);
    }

    fn put(&mut self, offset: usize, data: &[u8]) {
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }
}
