//! The permission filter of PCI configuration space: what a client may change, before any hook sees the access.
//!
//! **Owns** the table of writable bits and the record of where COMMAND and power state live. **Must never** let a bit that is
//! not writable reach a hook as changed, nor touch the device. Pure.
//!
//! vfio-pci filters too, below us, and virtualises BARs, MSI and MSI-X; this filter exists so that a *hook* sees only what
//! the client was allowed to ask for, with every kind of device. Type 0 header, `PCI_*` of `linux/pci_regs.h`:
//!
//! | bytes | what | writable |
//! |---|---|---|
//! | 0x00-0x03 | vendor, device | - |
//! | 0x04-0x05 | COMMAND | I/O, memory, bus master, parity, SERR, INTx disable (0x0547) |
//! | 0x06-0x07 | STATUS | error bits, by writing 1 (0xf900) |
//! | 0x08-0x0b | revision, class | - |
//! | 0x0c, 0x0d | cache line size, latency timer | all |
//! | 0x0e, 0x0f | header type, BIST | - |
//! | 0x10-0x27 | BARs | all (virtual: sizing works) |
//! | 0x28-0x2f | CIS, subsystem | - |
//! | 0x30-0x33 | ROM BAR | 0xfffff801 |
//! | 0x34-0x3b | capability pointer, reserved | - |
//! | 0x3c | interrupt line | all |
//! | 0x3d-0x3f | pin, grant, latency | - |
//! | 0x40-0xff | capabilities: id and next pointer - , the rest | all (the device or vfio-pci decides), but not function-level reset |
//! | 0x100- | extended capabilities: 4-byte header - , the rest | all |
//!
//! A function-level reset that is asked for here is the host's to do, as any other reset: the bits never reach a hook.

use std::ops::Range;

use crate::device::Identity;

pub const COMMAND: u64 = 0x04;
pub const COMMAND_MEMORY: u16 = 1 << 1;
pub const COMMAND_MASTER: u16 = 1 << 2;
/// Of PMCSR's lower byte; 0: D0
pub const POWER_STATE: u8 = 0b11;
const COMMAND_WRITABLE: u16 = 0x0547;
const STATUS_CLEARED_BY_ONE: u16 = 0xf900;
const HEADER: usize = 0x40;
const SIZE: usize = 0x100;
const CAPABILITY_POINTER: usize = 0x34;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITY_POWER: u8 = 0x01;
/// From the power capability: PMCSR, whose lowest two bits are the power state.
const PMCSR: usize = 4;
const CAPABILITY_EXPRESS: u8 = 0x10;
/// `PCI_EXP_DEVCAP`, and in its highest byte whether there is a function-level reset
const EXPRESS_DEVCAP: usize = 4;
const EXPRESS_DEVCAP_FLR: u8 = 1 << 4;
/// `PCI_EXP_DEVCTL`, and in its higher byte what starts one
const EXPRESS_DEVCTL: usize = 8;
const EXPRESS_DEVCTL_FLR: u8 = 1 << 7;
const CAPABILITY_ADVANCED: u8 = 0x13;
/// `PCI_AF_CAP`
const ADVANCED_CAP: usize = 3;
const ADVANCED_CAP_FLR: u8 = 1 << 1;
/// `PCI_AF_CTRL`
const ADVANCED_CTRL: usize = 4;
const ADVANCED_CTRL_FLR: u8 = 1 << 0;

/// What one write becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permission {
    /// No bit of it may be written: it succeeds and does nothing, as on the bus.
    Ignored,
    /// Every bit may be written.
    Whole,
    /// Some bits may; the rest must come from what is there now.
    Merge,
}

/// The filter of one device.
#[derive(Debug, Clone)]
pub struct ConfigFilter {
    writable: [u8; SIZE],
    /// Bits that a 1 clears: never written back from what was read
    cleared_by_one: [u8; SIZE],
    /// The power capability's PMCSR
    power: Option<u64>,
    /// Byte and bit that ask for a function-level reset
    resets: Vec<(u64, u8)>,
    /// Headers of extended capabilities, read only
    extended_headers: Vec<u64>,
}

impl ConfigFilter {
    /// From configuration space as it was at open; `extended` is what lies from 0x100 on, empty where there is none.
    pub fn new(identity: &Identity, extended: &[u8]) -> Self {
        let mut filter = Self {
            writable: [0; SIZE],
            cleared_by_one: [0; SIZE],
            power: None,
            resets: resets(&identity.config),
            extended_headers: extended_headers(extended),
        };
        let mut allow = |offset: usize, mask: &[u8]| filter.writable[offset..][..mask.len()].copy_from_slice(mask);
        allow(COMMAND as usize, &COMMAND_WRITABLE.to_le_bytes());
        allow(STATUS, &STATUS_CLEARED_BY_ONE.to_le_bytes());
        allow(0x0c, &[0xff; 2]);
        allow(0x10, &[0xff; 24]);
        allow(0x30, &0xffff_f801_u32.to_le_bytes());
        allow(0x3c, &[0xff]);
        allow(HEADER, &[0xff; SIZE - HEADER]);
        filter.cleared_by_one[STATUS..][..2].copy_from_slice(&STATUS_CLEARED_BY_ONE.to_le_bytes());
        for (id, at) in capabilities(&identity.config) {
            filter.writable[at..][..2].fill(0);
            if id == CAPABILITY_POWER && at + PMCSR + 2 <= SIZE {
                filter.power = Some((at + PMCSR) as u64);
            }
        }
        for (at, bit) in &filter.resets {
            filter.writable[*at as usize] &= !bit;
        }
        filter
    }

    fn writable(&self, at: u64) -> u8 {
        match usize::try_from(at).ok().and_then(|at| self.writable.get(at)) {
            Some(mask) => *mask,
            None if self.extended_headers.contains(&(at & !3)) => 0,
            None => 0xff,
        }
    }

    fn cleared_by_one(&self, at: u64) -> u8 {
        usize::try_from(at).ok().and_then(|at| self.cleared_by_one.get(at)).copied().unwrap_or(0)
    }

    pub fn permission(&self, offset: u64, length: u64) -> Permission {
        let masks = || (offset..offset.saturating_add(length)).map(|at| self.writable(at));
        if masks().all(|mask| mask == 0xff) {
            Permission::Whole
        } else if masks().all(|mask| mask == 0) {
            Permission::Ignored
        } else {
            Permission::Merge
        }
    }

    /// Replaces in `data` every bit that may not be written by the one in `current`; bits that a 1 clears by 0.
    pub fn merge(&self, offset: u64, data: &mut [u8], current: &[u8]) {
        for ((at, byte), now) in (offset..).zip(data).zip(current) {
            let mask = self.writable(at);
            *byte = (*byte & mask) | (now & !mask & !self.cleared_by_one(at));
        }
    }

    /// Whether a write there may disable memory: it touches COMMAND's lower byte or the power state.
    pub fn may_disable(&self, offset: u64, length: u64) -> bool {
        let touched = offset..offset.saturating_add(length);
        touches(&touched, COMMAND) || self.power.is_some_and(|power| touches(&touched, power))
    }

    /// Whether what such a write leaves is disabled memory. `gated`: COMMAND's memory bit counts.
    pub fn disables(&self, offset: u64, data: &[u8], gated: bool) -> bool {
        let byte = |at: u64| at.checked_sub(offset).and_then(|at| data.get(usize::try_from(at).ok()?).copied());
        let off = byte(COMMAND).is_some_and(|low| u16::from(low) & COMMAND_MEMORY == 0);
        let asleep = self.power.and_then(byte).is_some_and(|low| low & POWER_STATE != 0);
        asleep || (off && gated)
    }

    /// Whether a client that writes this asks for a function-level reset.
    pub fn resets(&self, offset: u64, data: &[u8]) -> bool {
        let byte = |at: u64| at.checked_sub(offset).and_then(|at| data.get(usize::try_from(at).ok()?).copied());
        self.resets.iter().any(|(at, bit)| byte(*at).is_some_and(|byte| byte & bit != 0))
    }

    pub fn power(&self) -> Option<u64> {
        self.power
    }
}

fn touches(range: &Range<u64>, at: u64) -> bool {
    range.contains(&at)
}

/// Id and offset of each standard capability. A chain that loops or leaves the space ends there.
fn capabilities(config: &[u8]) -> Vec<(u8, usize)> {
    let mut found = Vec::new();
    let byte = |at: usize| config.get(at).copied();
    if byte(STATUS).is_none_or(|status| status & STATUS_CAPABILITIES == 0) {
        return found;
    }
    let mut next = byte(CAPABILITY_POINTER);
    // 48 capabilities of 4 bytes fill the space.
    while found.len() < 48 {
        let Some(at) = next.map(|at| usize::from(at & !3)).filter(|at| *at >= HEADER) else { break };
        let (Some(id), Some(after)) = (byte(at), byte(at + 1)) else { break };
        found.push((id, at));
        next = Some(after);
    }
    found
}

/// Where a function-level reset is asked for, of a device that has one.
fn resets(config: &[u8]) -> Vec<(u64, u8)> {
    let has = |at: usize, bit: u8| config.get(at).is_some_and(|byte| byte & bit != 0);
    let all = capabilities(config).into_iter().filter_map(|(id, at)| match id {
        CAPABILITY_EXPRESS if has(at + EXPRESS_DEVCAP + 3, EXPRESS_DEVCAP_FLR) => {
            Some((at + EXPRESS_DEVCTL + 1, EXPRESS_DEVCTL_FLR))
        }
        CAPABILITY_ADVANCED if has(at + ADVANCED_CAP, ADVANCED_CAP_FLR) => {
            Some((at + ADVANCED_CTRL, ADVANCED_CTRL_FLR))
        }
        _ => None,
    });
    all.filter(|(at, _)| *at < SIZE).map(|(at, bit)| (at as u64, bit)).collect()
}

fn extended_headers(extended: &[u8]) -> Vec<u64> {
    let mut found = Vec::new();
    let mut at = 0;
    // 960 capabilities of 4 bytes fill the space.
    while found.len() < 960 {
        let Some(header) = extended.get(at..at + 4) else { break };
        let header = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        if header == 0 || header == u32::MAX {
            break;
        }
        found.push((SIZE + at) as u64);
        match ((header >> 20) as usize & !3).checked_sub(SIZE) {
            Some(next) if next > 0 => at = next,
            _ => break,
        }
    }
    found
}

#[cfg(all(test, not(loom)))]
#[path = "config_tests.rs"]
mod tests;
