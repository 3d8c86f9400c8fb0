//! Reads and writes of regions.

use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE};

use super::config::Permission;
use super::device::MediatedDevice;
use super::error::{MediationError, Result};
use super::gate::{Class, Reason};
use super::mediator::{CallFrame, HostCalls, Mediator, Origin, Verdict};
use super::tables::{Segment, first_piece};
use crate::device::CONFIG_REGION;

/// Longest access of configuration space: all of it.
const CONFIG_MAX: usize = 4096;

impl MediatedDevice {
    /// Reads `data.len()` bytes at `offset`. An access that straddles claims goes piece by piece, ascending; when a piece
    /// fails, [`MediationError::bytes_done`] says how many bytes before it were read.
    #[inline]
    pub fn region_read(&self, index: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        self.with_pass(class(index), || self.read_in(index, offset, data))
    }

    /// Writes `data` at `offset`; as [`Self::region_read`].
    #[inline]
    pub fn region_write(&self, index: u32, offset: u64, data: &[u8]) -> Result<()> {
        if index == CONFIG_REGION {
            return self.config_write(offset, data);
        }
        self.with_pass(Class::Memory, || self.write_in(index, offset, data))
    }

    #[inline]
    fn segments(&self, index: u32) -> &[Segment] {
        // Constant while the caller has its pass.
        self.tables[self.selector.load(Ordering::Relaxed)].segments(index)
    }

    #[inline]
    fn read_in(&self, index: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let segments = self.segments(index);
        match &self.plugin {
            Some(plugin) if !segments.is_empty() => self.read_pieces(&**plugin, segments, index, offset, data),
            Some(plugin) if index >= self.own_regions() => self.read_extra(&**plugin, index, offset, data),
            _ => Ok(self.device().region_read(index, offset, data)?),
        }
    }

    #[inline]
    fn write_in(&self, index: u32, offset: u64, data: &[u8]) -> Result<()> {
        let segments = self.segments(index);
        match &self.plugin {
            Some(plugin) if !segments.is_empty() => self.write_pieces(&**plugin, segments, index, offset, data),
            Some(plugin) if index >= self.own_regions() => self.write_extra(&**plugin, index, offset, data),
            _ => Ok(self.device().region_write(index, offset, data)?),
        }
    }

    fn read_pieces(
        &self,
        plugin: &dyn Mediator,
        segments: &[Segment],
        index: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<()> {
        self.check_range(index, offset, data.len())?;
        let frame = self.frame(Origin::Client);
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let piece = first_piece(segments, at, data.len() - done);
            let part = &mut data[done..done + piece.length];
            self.read_piece(plugin, frame, piece.claim, index, at, part).map_err(|error| error.after(done as u64))?;
            done += piece.length;
        }
        Ok(())
    }

    #[inline]
    fn read_piece(
        &self,
        plugin: &dyn Mediator,
        frame: CallFrame<'_>,
        claim: Option<usize>,
        index: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<()> {
        let Some(claim) = claim else {
            return Ok(self.device().region_read(index, offset, data)?);
        };
        // Whatever a hook leaves unwritten is nobody's old data.
        data.fill(0);
        match plugin.read(claim, frame, offset, data) {
            Verdict::Handled => Ok(()),
            Verdict::Forward => Ok(self.device().region_read(index, offset, data)?),
            Verdict::Deny(errno) => Err(MediationError::Plugin { what: "a read", errno }),
        }
    }

    fn write_pieces(
        &self,
        plugin: &dyn Mediator,
        segments: &[Segment],
        index: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<()> {
        self.check_range(index, offset, data.len())?;
        let frame = self.frame(Origin::Client);
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let piece = first_piece(segments, at, data.len() - done);
            let part = &data[done..done + piece.length];
            self.write_piece(plugin, frame, piece.claim, index, at, part).map_err(|error| error.after(done as u64))?;
            done += piece.length;
        }
        Ok(())
    }

    #[inline]
    fn write_piece(
        &self,
        plugin: &dyn Mediator,
        frame: CallFrame<'_>,
        claim: Option<usize>,
        index: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<()> {
        let Some(claim) = claim else {
            return Ok(self.device().region_write(index, offset, data)?);
        };
        // A hook may change the data: they are copied, without an allocation where they are registers.
        let mut near = [0; 64];
        let mut far;
        let copy = match near.get_mut(..data.len()) {
            Some(near) => near,
            None => {
                far = vec![0; data.len()];
                &mut far[..]
            }
        };
        copy.copy_from_slice(data);
        match plugin.write(claim, frame, offset, copy) {
            Verdict::Handled => Ok(()),
            Verdict::Forward => Ok(self.device().region_write(index, offset, copy)?),
            Verdict::Deny(errno) => Err(MediationError::Plugin { what: "a write", errno }),
        }
    }

    /// A hook never sees an access that leaves its region.
    #[inline]
    fn check_range(&self, index: u32, offset: u64, length: usize) -> Result<()> {
        let size = self.shared.regions.get(index as usize).and_then(Option::as_ref).map_or(0, |info| info.size);
        match offset.checked_add(length as u64) {
            Some(end) if end <= size => Ok(()),
            _ => Err(outside(index, offset, length, size)),
        }
    }

    fn read_extra(&self, plugin: &dyn Mediator, index: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let extra = self.extra_region(plugin, index, offset, data.len(), VFIO_REGION_INFO_FLAG_READ)?;
        data.fill(0);
        match plugin.extra_read(extra, index, self.frame(Origin::Client), offset, data) {
            Verdict::Handled => Ok(()),
            Verdict::Forward => Err(forwarded(index)),
            Verdict::Deny(errno) => Err(MediationError::Plugin { what: "a read", errno }),
        }
    }

    fn write_extra(&self, plugin: &dyn Mediator, index: u32, offset: u64, data: &[u8]) -> Result<()> {
        let extra = self.extra_region(plugin, index, offset, data.len(), VFIO_REGION_INFO_FLAG_WRITE)?;
        match plugin.extra_write(extra, index, self.frame(Origin::Client), offset, &mut data.to_vec()) {
            Verdict::Handled => Ok(()),
            Verdict::Forward => Err(forwarded(index)),
            Verdict::Deny(errno) => Err(MediationError::Plugin { what: "a write", errno }),
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
        if !self.shared.filter.may_disable(offset, data.len() as u64) {
            return self.with_pass(Class::Control, || self.config_write_in(offset, data));
        }
        // Refuses at once, for the gate's own reason, what nobody may do now.
        drop(self.enter(Class::Control)?);
        let deadline = Instant::now() + self.limits.access_wait.max(self.limits.drain);
        let done = self.alone(Reason::Reconfiguring, deadline, || {
            let written = self.config_write_in(offset, data);
            self.look_at_command().and(written)
        });
        self.attend();
        done
    }

    fn config_write_in(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.check_range(CONFIG_REGION, offset, data.len())?;
        match self.shared.filter.permission(offset, data.len() as u64) {
            Permission::Ignored => Ok(()),
            Permission::Whole => self.write_in(CONFIG_REGION, offset, data),
            Permission::Merge => {
                let mut current = vec![0; data.len()];
                self.device().region_read(CONFIG_REGION, offset, &mut current)?;
                let mut merged = data.to_vec();
                self.shared.filter.merge(offset, &mut merged, &current);
                self.write_in(CONFIG_REGION, offset, &merged)
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
fn outside(index: u32, offset: u64, length: usize, size: u64) -> MediationError {
    let what = format!("{length:#x} bytes at {offset:#x} of region {index}, which has {size:#x}");
    MediationError::refused(what, Errno::INVAL)
}

#[cold]
fn forwarded(index: u32) -> MediationError {
    MediationError::PluginFault { what: format!("region {index} has no device behind it to forward to") }
}
