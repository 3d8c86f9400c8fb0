//! Turns the safe traits into the tables of the ABI.
//!
//! **Owns** the shims: one `extern "C"` function for each function of the ABI, generic over the plug-in's types, which parse
//! what came, call the trait inside `catch_unwind`, and give the answer its number. **Must never** let a panic, a Rust type or
//! an unparsed number cross.
//!
//! Lifetime: `init` boxes the plug-in, `retire` frees it; `open` boxes an `Instance`, `close` frees it. Tables and hooks
//! live in the instance, so all that the host was given lives until `close` returns, as the ABI asks.
#![allow(unsafe_code)]

mod device;
mod operations;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

pub(crate) use device::event;
pub(crate) use operations::{dirty_ops, migration_ops};

use crate::abi::{self, Bytes, Opaque};
use crate::context::{Context, size32};
use crate::device::{Identity, Plugin, Probe};
use crate::hooks::Layout;
use crate::{Errno, Result};
use device::Instance;

/// The table of a plug-in, for a static. [`export_plugin!`](crate::export_plugin) calls it.
pub const fn plugin<P: Plugin>() -> abi::Plugin {
    abi::Plugin {
        struct_size: size32::<abi::Plugin>(),
        reserved: 0,
        name: Bytes::borrowed(P::NAME.as_bytes()),
        version: Bytes::borrowed(P::VERSION.as_bytes()),
        vendor: Bytes::borrowed(P::VENDOR.as_bytes()),
        matches: P::MATCHES.as_ptr(),
        match_count: P::MATCHES.len(),
        init: Some(init::<P>),
        probe: Some(probe::<P>),
        open: Some(open::<P>),
        retire: Some(retire::<P>),
        get_extension: None,
    }
}

/// The entry of a plug-in, for the exported static. `flags` are `abi::ENTRY_*` of the crate that exports.
pub const fn entry(plugin: &'static abi::Plugin, flags: u32) -> abi::Entry {
    abi::Entry {
        magic: abi::ENTRY_MAGIC,
        struct_size: size32::<abi::Entry>(),
        abi_major: abi::ABI_MAJOR,
        abi_minor: abi::ABI_MINOR,
        fingerprint: crate::layout::ABI_FINGERPRINT,
        flags,
        reserved: 0,
        rust_header: crate::layout::rust_header(),
        plugin,
    }
}

/// Exports a [`Plugin`](crate::Plugin) as the library's one symbol, `vfio_mediate_plugin`. Once in a crate whose `crate-type`
/// has `cdylib`.
///
/// The symbol is there in the crate's rlib too: two plug-in crates do not link into one program.
#[macro_export]
macro_rules! export_plugin {
    ($plugin:ty) => {
        const _: () = {
            static PLUGIN: $crate::abi::Plugin = $crate::export::plugin::<$plugin>();

            #[allow(unsafe_code)]
            // SAFETY: the ABI reserves the name; one library exports one plug-in.
            #[unsafe(no_mangle)]
            #[allow(non_upper_case_globals)]
            pub static vfio_mediate_plugin: $crate::abi::Entry = $crate::export::entry(
                &PLUGIN,
                // Of the crate that this expands in, which decides for the library.
                if cfg!(panic = "abort") { $crate::abi::ENTRY_PANIC_ABORTS } else { 0 },
            );
        };
    };
}

unsafe extern "C" fn init<P: Plugin>(services: *const abi::HostServices, state: *mut Opaque) -> i32 {
    guard("init", || {
        if services.is_null() || state.is_null() {
            return Err(Errno::EINVAL);
        }
        // SAFETY: the two fields that every version of the table begins with.
        let (size, major) = unsafe { ((*services).struct_size, (*services).abi_major) };
        if (size as usize) < size_of::<abi::HostServices>() || major != abi::ABI_MAJOR {
            return Err(Errno::EOPNOTSUPP);
        }
        // SAFETY: large enough, just checked; the host's table lives for ever, by its contract.
        unsafe { crate::log::install(services) };
        let plugin = Box::new(P::init()?);
        // SAFETY: the host's place for it, by the contract of `init`.
        unsafe { state.write(Box::into_raw(plugin).cast()) };
        Ok(0)
    })
}

unsafe extern "C" fn probe<P: Plugin>(state: Opaque, identity: *const abi::DeviceIdentity) -> i32 {
    guard("probe", || {
        // SAFETY: `init` stored it, `retire` has not been called.
        let plugin = unsafe { &*state.cast::<P>() };
        // SAFETY: by the contract of `probe`.
        let identity = unsafe { parse_identity(identity) }?;
        Ok(match plugin.probe(&identity)? {
            Probe::Claim => abi::PROBE_CLAIM,
            Probe::Decline => abi::PROBE_DECLINE,
        })
    })
}

unsafe extern "C" fn open<P: Plugin>(
    state: Opaque,
    ctx: *const abi::CallContext,
    identity: *const abi::DeviceIdentity,
    ops: *mut abi::DeviceOps,
) -> i32 {
    guard("open", || {
        // SAFETY: `init` stored it, `retire` has not been called.
        let plugin = unsafe { &*state.cast::<P>() };
        // SAFETY: by the contract of `open`.
        let identity = unsafe { parse_identity(identity) }?;
        // SAFETY: by the contract of `open`: zeroed, with its size set.
        if (unsafe { (*ops).struct_size } as usize) < size_of::<abi::DeviceOps>() {
            return Err(Errno::EOPNOTSUPP);
        }
        // SAFETY: the context of this call.
        let cx = unsafe { Context::from_raw(ctx) };
        let mut layout = Layout::new(identity.num_regions(), identity.num_irqs());
        let device = plugin.open(&cx, &identity, &mut layout)?;
        let instance = Box::new(Instance::new(device, layout));
        // SAFETY: large enough, just checked.
        unsafe { ops.write(Instance::publish(instance)) };
        Ok(0)
    })
}

unsafe extern "C" fn retire<P: Plugin>(state: Opaque) {
    guard_unit("retire", || {
        // SAFETY: `init` boxed it; this is the last call, by the contract of `retire`.
        drop(unsafe { Box::from_raw(state.cast::<P>()) });
    });
}

/// # Safety
/// `identity` is readable up to its `struct_size` and lives during the call, with what it points to.
unsafe fn parse_identity<'a>(identity: *const abi::DeviceIdentity) -> Result<Identity<'a>> {
    // SAFETY: by the caller.
    if (unsafe { (*identity).struct_size } as usize) < size_of::<abi::DeviceIdentity>() {
        return Err(Errno::EOPNOTSUPP);
    }
    // SAFETY: large enough, just checked.
    Ok(unsafe { Identity::from_raw(identity) })
}

/// Runs a function of the plug-in: its answer, or `-errno`. A panic is logged and becomes EIO.
pub(crate) fn guard(what: &'static str, call: impl FnOnce() -> Result<i32>) -> i32 {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(answer)) => answer,
        Ok(Err(errno)) => errno.status(),
        Err(payload) => {
            report_panic(what, payload);
            Errno::EIO.status()
        }
    }
}

/// As [`guard`], for functions without an answer.
pub(crate) fn guard_unit(what: &'static str, call: impl FnOnce()) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(call)) {
        report_panic(what, payload);
    }
}

#[cold]
fn report_panic(what: &'static str, payload: Box<dyn Any + Send>) {
    let text = match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text.as_str(),
        _ => "a panic without a text",
    };
    // The panic may have come out of the plug-in's subscriber, so not through `tracing`.
    crate::log::write(abi::LOG_ERROR, "vfio_mediate_sdk", &format!("panic in {what}: {text}"));
    // A payload's destructor may panic in its turn, with nobody left to catch it.
    std::mem::forget(payload);
}
