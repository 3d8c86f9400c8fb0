//! Reads and writes of regions.

use std::time::Instant;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE};

use super::config::Permission;
use super::device::MediatedDevice;
use super::error::{Access, MediationError, Result, boxed, unboxed};
use super::gate::{Class, GateClosed, Reason};
use super::low_power::Asleep;
use super::mediator::{HostCalls, Mediator, Origin, Verdict};
use super::tables::{Region, first_piece};
use crate::device::CONFIG_REGION;
use crate::lock_order;

/// Longest access of configuration space: all of it.
const CONFIG_MAX: usize = 4096;

impl MediatedDevice {
    /// Reads `data.len()` bytes at `offset`. An access that straddles claims goes piece by piece, ascending; when a piece
    /// fails, [`MediationError::bytes_done`] says how many bytes before it were read.
    #[inline(always)]
    pub fn region_read(&self, index: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        lock_order::entering();
        // In the caller's code, so that nothing is returned through memory; all but the usual cases is out of it.
        let Some(pass) = self.shared.gate.enter_quickly(class(index)) else {
            return self.read_slowly(index, offset, data).map_err(unboxed);
        };
        let done = match self.tables.is_plain(index) {
            true => self.device.region_read(index, offset, data).map_err(boxed),
            false => self.read_in(index, offset, data),
        };
        if pass.leave() {
            self.attend();
        }
        done.map_err(unboxed)
    }

    /// Writes `data` at `offset`; as [`Self::region_read`].
    #[inline(always)]
    pub fn region_write(&self, index: u32, offset: u64, data: &[u8]) -> Result<()> {
        if index == CONFIG_REGION {
            return self.config_write(offset, data);
        }
        lock_order::entering();
        let Some(pass) = self.shared.gate.enter_quickly(Class::Memory) else {
            return self.write_slowly(index, offset, data).map_err(unboxed);
        };
        let done = match self.tables.is_plain(index) {
            true => self.device.region_write(index, offset, data).map_err(boxed),
            false => self.write_in(index, offset, data),
        };
        if pass.leave() {
            self.attend();
        }
        done.map_err(unboxed)
    }

    /// Where the gate is closed, or this thread's first access.
    #[cold]
    #[inline(never)]
    fn read_slowly(&self, index: u32, offset: u64, data: &mut [u8]) -> Access {
        self.with_pass(class(index), || self.read_in(index, offset, data).map_err(unboxed)).map_err(boxed)
    }

    #[cold]
    #[inline(never)]
    fn write_slowly(&self, index: u32, offset: u64, data: &[u8]) -> Access {
        self.with_pass(Class::Memory, || self.write_in(index, offset, data).map_err(unboxed)).map_err(boxed)
    }

    /// The plug-in and what it hooks of a region, if it does. The caller has its pass.
    #[inline(always)]
    fn hooks(&self, index: u32) -> Option<(&dyn Mediator, &Region)> {
        Some((&**self.plugin.as_ref()?, self.tables.hooked(index)?))
    }

    /// Under the caller's pass, through the hooks.
    #[inline(never)]
    fn read_in(&self, index: u32, offset: u64, data: &mut [u8]) -> Access {
        let Some((plugin, region)) = self.hooks(index) else {
            return self.read_unhooked(index, offset, data);
        };
        match region.whole(offset, data.len()) {
            Some(claim) => self.read_piece(plugin, claim, index, offset, data),
            None => self.read_pieces(plugin, region, index, offset, data),
        }
    }

    #[inline(never)]
    pub(super) fn write_in(&self, index: u32, offset: u64, data: &[u8]) -> Access {
        let Some((plugin, region)) = self.hooks(index) else {
            return self.write_unhooked(index, offset, data);
        };
        match region.whole(offset, data.len()) {
            Some(claim) => self.write_piece(plugin, claim, index, offset, data),
            None => self.write_pieces(plugin, region, index, offset, data),
        }
    }

    /// An added region, or one of the device's own.
    #[cold]
    fn read_unhooked(&self, index: u32, offset: u64, data: &mut [u8]) -> Access {
        match &self.plugin {
            Some(plugin) if index >= self.own_regions() => self.read_extra(&**plugin, index, offset, data),
            _ => self.device.region_read(index, offset, data).map_err(boxed),
        }
    }

    #[cold]
    fn write_unhooked(&self, index: u32, offset: u64, data: &[u8]) -> Access {
        match &self.plugin {
            Some(plugin) if index >= self.own_regions() => self.write_extra(&**plugin, index, offset, data),
            _ => self.device.region_write(index, offset, data).map_err(boxed),
        }
    }

    #[cold]
    fn read_pieces(&self, plugin: &dyn Mediator, region: &Region, index: u32, offset: u64, data: &mut [u8]) -> Access {
        self.check_range(index, offset, data.len())?;
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let piece = first_piece(region.segments(), at, data.len() - done);
            self.go_on(index).map_err(|error| error.after(done))?;
            let part = &mut data[done..done + piece.length];
            self.read_piece(plugin, piece.claim, index, at, part).map_err(|error| error.after(done))?;
            done += piece.length;
        }
        Ok(())
    }

    #[inline(always)]
    fn read_piece(
        &self,
        plugin: &dyn Mediator,
        claim: Option<usize>,
        index: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Access {
        let Some(claim) = claim else {
            return self.device.region_read(index, offset, data).map_err(boxed);
        };
        // Whatever a hook leaves unwritten is nobody's old data. A register's size is one store, not a call.
        match data {
            [_, _, _, _] => data.copy_from_slice(&[0; 4]),
            [_, _, _, _, _, _, _, _] => data.copy_from_slice(&[0; 8]),
            _ => data.fill(0),
        }
        match plugin.read(claim, self.frame(Origin::Client), offset, data) {
            Verdict::Handled => Ok(()),
            Verdict::Forward => self.device.region_read(index, offset, data).map_err(boxed),
            Verdict::Deny(errno) => Err(denied("a read", errno)),
        }
    }

    #[cold]
    fn write_pieces(&self, plugin: &dyn Mediator, region: &Region, index: u32, offset: u64, data: &[u8]) -> Access {
        self.check_range(index, offset, data.len())?;
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let piece = first_piece(region.segments(), at, data.len() - done);
            self.go_on(index).map_err(|error| error.after(done))?;
            let part = &data[done..done + piece.length];
            self.write_piece(plugin, piece.claim, index, at, part).map_err(|error| error.after(done))?;
            done += piece.length;
        }
        Ok(())
    }

    #[inline]
    fn write_piece(&self, plugin: &dyn Mediator, claim: Option<usize>, index: u32, offset: u64, data: &[u8]) -> Access {
        let Some(claim) = claim else {
            return self.device.region_write(index, offset, data).map_err(boxed);
        };
        // A hook may change the data: they are copied, where they are a register without a call.
        match *data {
            [a, b, c, d] => self.write_claim(plugin, claim, index, offset, &mut [a, b, c, d]),
            [a, b, c, d, e, f, g, h] => self.write_claim(plugin, claim, index, offset, &mut [a, b, c, d, e, f, g, h]),
            // Few bytes without an allocation.
            _ => match [0; 64].get_mut(..data.len()) {
                Some(near) => {
                    near.copy_from_slice(data);
                    self.write_claim(plugin, claim, index, offset, near)
                }
                None => self.write_claim(plugin, claim, index, offset, &mut data.to_vec()),
            },
        }
    }

    #[inline]
    fn write_claim(&self, plugin: &dyn Mediator, claim: usize, index: u32, offset: u64, copy: &mut [u8]) -> Access {
        match plugin.write(claim, self.frame(Origin::Client), offset, copy) {
            Verdict::Handled => Ok(()),
            Verdict::Forward => {
                if index == CONFIG_REGION {
                    // The hook may have changed the data.
                    self.revoke_if_disabled(offset, copy).map_err(boxed)?;
                }
                self.device.region_write(index, offset, copy).map_err(boxed)
            }
            Verdict::Deny(errno) => Err(denied("a write", errno)),
        }
    }

    /// Before each piece of an access: a device that has failed since it was let in, or whose memory a hook has disabled, gets
    /// no more of it. What other threads do to the device waits for the whole access.
    fn go_on(&self, index: u32) -> Access {
        match self.shared.gate.cut(class(index)) {
            None => Ok(()),
            Some(reason) => Err(boxed(GateClosed { reason })),
        }
    }

    fn own_region_size(&self, index: u32) -> u64 {
        self.shared.regions.get(index as usize).and_then(Option::as_ref).map_or(0, |info| info.size)
    }

    /// Of one of the device's own or an added one; 0: there is none.
    pub(super) fn region_size(&self, index: u32) -> u64 {
        let extras = self.plugin.as_ref().map_or(&[][..], |plugin| plugin.extra_regions());
        match index.checked_sub(self.own_regions()) {
            None => self.own_region_size(index),
            Some(position) => extras.get(position as usize).map_or(0, |extra| extra.size),
        }
    }

    /// A hook never sees an access that leaves its region.
    #[inline]
    fn check_range(&self, index: u32, offset: u64, length: usize) -> Access {
        let size = self.own_region_size(index);
        match offset.checked_add(length as u64) {
            Some(end) if end <= size => Ok(()),
            _ => Err(boxed(outside(index, offset, length, size))),
        }
    }

    fn read_extra(&self, plugin: &dyn Mediator, index: u32, offset: u64, data: &mut [u8]) -> Access {
        let extra = self.extra_region(plugin, index, offset, data.len(), VFIO_REGION_INFO_FLAG_READ).map_err(boxed)?;
        data.fill(0);
        match plugin.extra_read(extra, index, self.frame(Origin::Client), offset, data) {
            Verdict::Handled => Ok(()),
            Verdict::Forward => Err(boxed(forwarded(index))),
            Verdict::Deny(errno) => Err(denied("a read", errno)),
        }
    }

    fn write_extra(&self, plugin: &dyn Mediator, index: u32, offset: u64, data: &[u8]) -> Access {
        let extra = self.extra_region(plugin, index, offset, data.len(), VFIO_REGION_INFO_FLAG_WRITE).map_err(boxed)?;
        match plugin.extra_write(extra, index, self.frame(Origin::Client), offset, &mut data.to_vec()) {
            Verdict::Handled => Ok(()),
            Verdict::Forward => Err(boxed(forwarded(index))),
            Verdict::Deny(errno) => Err(denied("a write", errno)),
        }
    }

    /// The position of an added region in the plug-in's list, if it has these bytes and allows this access.
    fn extra_region(&self, plugin: &dyn Mediator, index: u32, offset: u64, length: usize, flag: u32) -> Result<usize> {
        let position = (index - self.own_regions()) as usize;
        let Some(extra) = plugin.extra_regions().get(position) else {
            return Err(MediationError::refused(format!("region {index}"), Errno::INVAL));
        };
        if extra.flags & flag == 0 {
            return Err(MediationError::refused(format!("this access to region {index}"), Errno::INVAL));
        }
        match offset.checked_add(length as u64) {
            Some(end) if end <= extra.size => Ok(position),
            _ => Err(outside(index, offset, length, extra.size)),
        }
    }

    /// The permission filter first, then the hooks. What may disable memory is done alone: every access that came before
    /// it has ended, and none comes in between.
    fn config_write(&self, offset: u64, data: &[u8]) -> Result<()> {
        if data.len() > CONFIG_MAX {
            return Err(outside(CONFIG_REGION, offset, data.len(), CONFIG_MAX as u64));
        }
        self.config_write_but_reset(offset, data)?;
        // A function-level reset is one as any other: alone, with nothing mapped, and told to the plug-in.
        if self.shared.filter.resets(offset, data) { self.reset() } else { Ok(()) }
    }

    fn config_write_but_reset(&self, offset: u64, data: &[u8]) -> Result<()> {
        if !self.shared.filter.may_disable(offset, data.len() as u64) {
            return self.with_pass(Class::Control, || self.config_write_in(offset, data));
        }
        // Refuses at once, for the gate's own reason, what nobody may do now.
        drop(self.enter(Class::Control)?);
        let deadline = Instant::now() + self.limits.access_wait.max(self.limits.drain);
        let done = self.alone_if(Asleep::AsAccess, Reason::Reconfiguring, deadline, || {
            self.revoke_if_disabled(offset, data)?;
            let written = self.config_write_in(offset, data);
            self.look_at_command().and(written)
        });
        self.attend();
        done
    }

    fn config_write_in(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.check_range(CONFIG_REGION, offset, data.len()).map_err(unboxed)?;
        match self.shared.filter.permission(offset, data.len() as u64) {
            Permission::Ignored => Ok(()),
            Permission::Whole => self.write_in(CONFIG_REGION, offset, data).map_err(unboxed),
            Permission::Merge => {
                let mut current = vec![0; data.len()];
                self.device().region_read(CONFIG_REGION, offset, &mut current)?;
                let mut merged = data.to_vec();
                self.shared.filter.merge(offset, &mut merged, &current);
                self.write_in(CONFIG_REGION, offset, &merged).map_err(unboxed)
            }
        }
    }

    /// For the plug-in's default handler of an access, and tests: past every hook, under the caller's pass.
    #[doc(hidden)]
    pub fn host_calls(&self) -> &dyn HostCalls {
        &*self.shared
    }
}

#[inline(always)]
fn class(index: u32) -> Class {
    if index == CONFIG_REGION { Class::Control } else { Class::Memory }
}

#[cold]
fn denied(what: &'static str, errno: Errno) -> Box<MediationError> {
    Box::new(MediationError::Plugin { what, errno })
}

#[cold]
fn outside(index: u32, offset: u64, length: usize, size: u64) -> MediationError {
    let what = format!("{length:#x} bytes at {offset:#x} of region {index}, which has {size:#x}");
    MediationError::refused(what, Errno::INVAL)
}

#[cold]
fn forwarded(index: u32) -> MediationError {
    MediationError::PluginFault { what: format!("region {index} has no device behind it to forward to") }
}
