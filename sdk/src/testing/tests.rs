//! The shims, through the fake host.

use super::*;
use crate::state::{DeviceState, MigrationFlags};
use crate::*;

/// 4 KiB of plain registers.
struct Registers(Vec<u8>);

impl Model for Registers {
    fn read(&mut self, _: &mut Bus, _: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let end = offset as usize + data.len();
        data.copy_from_slice(self.0.get(offset as usize..end).ok_or(Errno::EINVAL)?);
        Ok(())
    }

    fn write(&mut self, _: &mut Bus, _: u32, offset: u64, data: &[u8]) -> Result<()> {
        let end = offset as usize + data.len();
        self.0.get_mut(offset as usize..end).ok_or(Errno::EINVAL)?.copy_from_slice(data);
        Ok(())
    }

    fn tick(&mut self, _: &mut Bus) {}
}

struct Odd;
struct OddDevice {
    closed: std::sync::Arc<AtomicBool>,
}

thread_local! {
    static CLOSED: std::sync::Arc<AtomicBool> = std::sync::Arc::default();
}

impl Plugin for Odd {
    const NAME: &'static str = "odd";
    const VERSION: &'static str = "1.0.0";
    const VENDOR: &'static str = "nobody";
    const MATCHES: &'static [DeviceMatch] = &[];
    type Device = OddDevice;

    fn init() -> Result<Self> {
        Ok(Self)
    }

    fn probe(&self, identity: &Identity<'_>) -> Result<Probe> {
        match identity.device_id() {
            1 => Ok(Probe::Claim),
            2 => Err(Errno::EPERM),
            _ => Ok(Probe::Decline),
        }
    }

    fn open(&self, _: &Context<'_>, identity: &Identity<'_>, layout: &mut Layout<OddDevice>) -> Result<OddDevice> {
        assert_eq!(identity.name(), "odd0");
        layout
            .claim(Claim::new(0, 0x10..0x14).rw(|_, _, _| panic!("a hook that panics")))
            .claim(Claim::new(0, 0x20..0x24).rw(|_, _, access| {
                if access.is_write() {
                    access.data_mut().fill(0x77);
                }
                Verdict::Forward
            }))
            .claim(Claim::new(0, 0x30..0x34).rw(|_, cx, access| {
                let seen = cx.default_rw(access);
                access.data_mut().iter_mut().for_each(|byte| *byte = !*byte);
                seen.into()
            }))
            .claim(Claim::new(0, 0x40..0x44).in_maps(Maps::TRACKING).rw(|_, _, _| Verdict::Deny(Errno::EPERM)))
            .migration(MigrationFlags { p2p: false, pre_copy: false })
            .events();
        Ok(OddDevice { closed: CLOSED.with(std::sync::Arc::clone) })
    }
}

impl Device for OddDevice {
    fn close(&self, _: &Context<'_>) {
        self.closed.store(true, Ordering::SeqCst);
        panic!("a close that panics");
    }
}

impl Events for OddDevice {
    fn event(&self, cx: &Context<'_>, event: Event) -> Result<()> {
        match event {
            Event::Timer { cookie: 7 } => cx.irq_inject(1, 0),
            Event::ClientAttach => cx.timer_arm(7, Duration::from_millis(3)),
            _ => Err(Errno::EIO),
        }
    }
}

impl Migration for OddDevice {
    fn match_data(&self, _: &Context<'_>) -> Result<Vec<u8>> {
        Ok(vec![1; (64 << 10) + 1])
    }

    fn check_match(&self, _: &Context<'_>, _: &[u8]) -> Result<(), Refusal> {
        Err(Refusal::differs("ä".repeat(200)))
    }

    fn set_state(&self, _: &Context<'_>, _: DeviceState, to: DeviceState) -> Result<(), ArcFailed> {
        match to {
            DeviceState::Stop => panic!("an arc that panics"),
            _ => Err(ArcFailed { errno: Errno::EBUSY, actual: DeviceState::Running }),
        }
    }

    fn save(&self, _: &Context<'_>, buffer: &mut [u8]) -> Result<Saved> {
        Ok(Saved { bytes: buffer.len() + 1, end: true })
    }

    fn load(&self, cx: &Context<'_>, _: &[u8]) -> Result<()> {
        cx.poll_until(Duration::from_millis(1), Duration::from_millis(10), || Ok(false))
    }

    fn remaining(&self, _: &Context<'_>) -> Result<Remaining> {
        Ok(Remaining { initial_bytes: 1, dirty_bytes: 2, stop_copy_bytes: None })
    }
}

fn host() -> FakeHost<Registers> {
    FakeHost::new(Registers(vec![0; 4096]), 4096)
}

fn identity(device_id: u16) -> TestIdentity {
    TestIdentity { vendor_id: 1, device_id, revision: 0, name: "odd0" }
}

/// spec: ABI-PROBE
#[test]
fn declining_is_not_failing() {
    let host = host();
    assert!(host.open::<Odd>(&identity(1)).unwrap().is_some());
    assert!(host.open::<Odd>(&identity(3)).unwrap().is_none());
    assert_eq!(host.open::<Odd>(&identity(2)).unwrap_err(), Errno::EPERM);
}

/// spec: ABI-PANIC
#[test]
fn a_panic_denies_with_eio_and_the_device_goes_on() {
    let host = host();
    let mut device = host.open::<Odd>(&identity(1)).unwrap().unwrap();
    assert_eq!(device.write_u32(0, 0x10, 5), Err(Errno::EIO));
    assert_eq!(device.read_u32(0, 0x10), Err(Errno::EIO));
    // Where the arc left the device, nobody knows.
    assert_eq!(
        device.set_state(DeviceState::Running, DeviceState::Stop),
        Err(ArcFailed { errno: Errno::EIO, actual: DeviceState::Error })
    );
    device.write_u32(0, 0x50, 5).unwrap();
    assert_eq!(device.read_u32(0, 0x50), Ok(5));
    drop(device);
    assert!(CLOSED.with(|closed| closed.load(Ordering::SeqCst)));
}

#[test]
fn forwarded_data_are_as_the_hook_left_them() {
    let host = host();
    let device = host.open::<Odd>(&identity(1)).unwrap().unwrap();
    // Straddles the claim: 2 bytes before it, 4 in it, 2 after.
    device.write(0, 0x1e, &[1; 8]).unwrap();
    let mut data = [0; 8];
    device.read(0, 0x1e, &mut data).unwrap();
    assert_eq!(data, [1, 1, 0x77, 0x77, 0x77, 0x77, 1, 1]);
}

#[test]
fn a_hook_can_call_down_and_see_the_result() {
    let host = host();
    let device = host.open::<Odd>(&identity(1)).unwrap().unwrap();
    host.with(|model, _| model.0[0x30..0x34].copy_from_slice(&[1, 2, 3, 4]));
    assert_eq!(device.read_u32(0, 0x30), Ok(!u32::from_le_bytes([1, 2, 3, 4])));
}

#[test]
fn a_claim_of_the_tracking_map_holds_only_there() {
    let host = host();
    let mut device = host.open::<Odd>(&identity(1)).unwrap().unwrap();
    device.write_u32(0, 0x40, 1).unwrap();
    device.set_map(Maps::TRACKING);
    assert_eq!(device.write_u32(0, 0x40, 2), Err(Errno::EPERM));
    assert_eq!(device.read_u32(0, 0x20), Ok(0));
}

/// spec: ABI-NULL
#[test]
fn a_hook_that_was_not_asked_for_is_null() {
    let host = host();
    let device = host.open::<Odd>(&identity(1)).unwrap().unwrap();
    for claim in device.claims() {
        // SAFETY: the device is open.
        let hooks = unsafe { &*claim.hooks };
        assert!(hooks.rw.is_some() && hooks.region_info.is_none() && hooks.mmap.is_none());
    }
    assert!(device.ops_dirty_is_null());
}

#[test]
fn answers_that_do_not_fit_are_refused_or_cut() {
    let host = host();
    let mut device = host.open::<Odd>(&identity(1)).unwrap().unwrap();
    assert_eq!(device.match_data(), Err(Errno::ERANGE));
    assert_eq!(device.save(&mut [0; 16]), Err(Errno::EOVERFLOW));
    let refusal = device.check_match(&[]).unwrap_err();
    assert_eq!(refusal, Refusal { errno: Errno::EINVAL, reason: "ä".repeat(128) });
    assert_eq!(device.remaining().unwrap().stop_copy_bytes, None);
}

#[test]
fn polling_ends_at_its_limit_at_the_deadline_and_when_cancelled() {
    let host = host();
    let mut device = host.open::<Odd>(&identity(1)).unwrap().unwrap();
    assert_eq!(device.load(&[]), Err(Errno::ETIMEDOUT));
    assert_eq!(host.now(), Duration::from_millis(10));
    host.set_deadline(Some(Duration::from_millis(14)));
    assert_eq!(device.load(&[]), Err(Errno::ETIMEDOUT));
    assert_eq!(host.now(), Duration::from_millis(14));
    host.set_cancelled(true);
    assert_eq!(device.load(&[]), Err(Errno::ECANCELED));
}

#[test]
fn a_timer_comes_as_an_event() {
    let host = host();
    let mut device = host.open::<Odd>(&identity(1)).unwrap().unwrap();
    assert_eq!(device.fire_timer(), Ok(false));
    device.event(abi::EVENT_CLIENT_ATTACH, [0; 3]).unwrap();
    assert_eq!(device.fire_timer(), Ok(true));
    assert_eq!(host.now(), Duration::from_millis(3));
    assert_eq!(host.injected(), [(1, 0)]);
    // A newer host's kind is nobody's business.
    device.event(999, [0; 3]).unwrap();
    assert_eq!(device.event(abi::EVENT_RESET_DONE, [0; 3]), Err(Errno::EIO));
}

#[test]
fn a_bitmap_marks_what_is_inside_its_range_and_nothing_else() {
    // 65 pages from page 16, so that the second word has one bit.
    let mark = |iova: u64, length: u64| {
        let mut words = [0_u64; 3];
        // SAFETY: 65 bits fit into the first two of the words.
        let mut bitmap = unsafe { DirtyBitmap::from_raw(16 << 12, 65 << 12, 4096, words.as_mut_ptr()) }.unwrap();
        bitmap.mark(iova, length);
        assert_eq!(words[2], 0);
        (words[0], words[1])
    };
    assert_eq!(mark(16 << 12, 0), (0, 0));
    assert_eq!(mark(16 << 12, 1), (1, 0));
    assert_eq!(mark((17 << 12) - 1, 1), (1, 0));
    assert_eq!(mark((17 << 12) - 1, 2), (3, 0));
    assert_eq!(mark(0, 16 << 12), (0, 0));
    assert_eq!(mark(0, (16 << 12) + 1), (1, 0));
    assert_eq!(mark(80 << 12, 4096), (0, 1));
    assert_eq!(mark(81 << 12, 4096), (0, 0));
    assert_eq!(mark(0, u64::MAX), (u64::MAX, 1));
    assert_eq!(mark(u64::MAX, u64::MAX), (0, 0));
    for (iova, length, page) in [(0, 0, 4096), (1, 4096, 4096), (0, 4097, 4096), (0, 4096, 3), (0, 4096, 0)] {
        // SAFETY: refused before anything is touched.
        let refused = unsafe { DirtyBitmap::from_raw(iova, length, page, [0_u64].as_mut_ptr()) };
        assert_eq!(refused.unwrap_err(), Errno::EINVAL, "{iova} {length} {page}");
    }
}
