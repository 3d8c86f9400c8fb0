//! A plug-in's tables as plain values of the host, checked once.

use vfio_mediate_sdk::abi;

/// A PCI function that a plug-in wants to be asked about; `None` matches everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMatch {
    pub vendor_id: Option<u16>,
    pub device_id: Option<u16>,
    pub subsystem_vendor_id: Option<u16>,
    pub subsystem_device_id: Option<u16>,
}

impl DeviceMatch {
    pub fn matches(&self, identity: &super::ProbeIdentity<'_>) -> bool {
        let fits = |wanted: Option<u16>, found: u16| wanted.is_none_or(|id| id == found);
        fits(self.vendor_id, identity.vendor_id)
            && fits(self.device_id, identity.device_id)
            && fits(self.subsystem_vendor_id, identity.subsystem_vendor_id)
            && fits(self.subsystem_device_id, identity.subsystem_device_id)
    }

    pub(super) fn from_abi(raw: &abi::DeviceMatch) -> Result<Self, String> {
        let id = |value: u32| match value {
            abi::ANY_ID => Ok(None),
            value => u16::try_from(value).map(Some).map_err(|_| format!("device match {value:#x} is no PCI id")),
        };
        Ok(Self {
            vendor_id: id(raw.vendor_id)?,
            device_id: id(raw.device_id)?,
            subsystem_vendor_id: id(raw.subsystem_vendor_id)?,
            subsystem_device_id: id(raw.subsystem_device_id)?,
        })
    }
}

/// A claimed byte range of a region, and which hooks it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    pub region: u32,
    pub offset: u64,
    pub length: u64,
    pub normal: bool,
    pub tracking: bool,
    pub has_rw: bool,
    pub has_region_info: bool,
    pub has_mmap: bool,
}

/// Claimed vectors of an irq index, and which hooks they have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqClaim {
    pub index: u32,
    pub start: u32,
    pub count: u32,
    pub has_irq_info: bool,
    pub has_set_irqs: bool,
    pub has_fired: bool,
}

/// A region that the plug-in adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtraRegion {
    pub flags: u32,
    pub size: u64,
    pub type_: u32,
    pub subtype: u32,
    pub has_mmap: bool,
}

/// An irq index that the plug-in adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtraIrq {
    pub flags: u32,
    pub count: u32,
}

/// How well a plug-in knows which pages its device writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exactness {
    Exact,
    Superset,
}

/// Most entries of each table of one device.
pub const ENTRIES_MAX: usize = 1024;

/// Two claims of one map must not share a byte.
pub fn check_overlap(claims: &[Claim]) -> Result<(), String> {
    for map in [|claim: &Claim| claim.normal, |claim: &Claim| claim.tracking] {
        let mut sorted: Vec<&Claim> = claims.iter().filter(|claim| map(claim)).collect();
        sorted.sort_by_key(|claim| (claim.region, claim.offset));
        for pair in sorted.windows(2) {
            let [first, second] = pair else { continue };
            // Each end was checked for overflow when the claim was read.
            if first.region == second.region && first.offset + first.length > second.offset {
                return Err(format!("two claims overlap in region {} at {:#x}", second.region, second.offset));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Claim, check_overlap};

    fn claim(offset: u64, length: u64, normal: bool, tracking: bool) -> Claim {
        Claim { region: 0, offset, length, normal, tracking, has_rw: true, has_region_info: false, has_mmap: false }
    }

    #[test]
    fn claims_of_one_map_may_touch_but_not_share_a_byte() {
        assert!(check_overlap(&[claim(0, 4, true, true), claim(4, 4, true, true)]).is_ok());
        assert!(check_overlap(&[claim(0, 5, true, true), claim(4, 4, true, true)]).is_err());
        assert!(check_overlap(&[claim(4, 4, true, false), claim(4, 4, false, true)]).is_ok());
        assert!(check_overlap(&[claim(4, 4, false, true), claim(7, 1, true, true)]).is_err());
    }
}
