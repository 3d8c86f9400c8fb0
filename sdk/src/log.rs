//! Carries a plug-in's `tracing` events to the host.
//!
//! A library has `tracing`'s statics of its own, so without this its events reach nobody. Events down to DEBUG are
//! forwarded, as one line each; spans are not carried. TRACE stays off: no service of ABI 1 says that the host wants it.
#![allow(unsafe_code)]

use std::fmt::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::abi::{self, Bytes};

type LogFn = unsafe extern "C" fn(level: u32, target: Bytes, message: Bytes);

static LOG: OnceLock<LogFn> = OnceLock::new();

/// Installs the forwarder, once in the library's life: its first `init` wins.
///
/// # Safety
/// `services` is a host's table of at least version 1, which lives for ever.
pub(crate) unsafe fn install(services: *const abi::HostServices) {
    // SAFETY: by the caller.
    let log = unsafe { (*services).log };
    if LOG.set(log).is_ok() {
        // An error says that the plug-in brought a subscriber of its own, which is its right.
        let _ = tracing::subscriber::set_global_default(Forwarder { next_span: AtomicU64::new(1) });
    }
}

/// One line to the host, past `tracing`: for shims that report a panic. Nowhere before `init`.
pub(crate) fn write(level: u32, target: &str, message: &str) {
    if let Some(log) = LOG.get() {
        // SAFETY: a function of the host's table, callable from any thread; both texts live during the call.
        unsafe { log(level, Bytes::borrowed(target.as_bytes()), Bytes::borrowed(message.as_bytes())) };
    }
}

struct Forwarder {
    next_span: AtomicU64,
}

impl Subscriber for Forwarder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::DEBUG
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::DEBUG)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(self.next_span.fetch_add(1, Ordering::Relaxed).max(1))
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        write(level(*event.metadata().level()), event.metadata().target(), &line.finish());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn level(level: Level) -> u32 {
    match level {
        Level::ERROR => abi::LOG_ERROR,
        Level::WARN => abi::LOG_WARN,
        Level::INFO => abi::LOG_INFO,
        Level::DEBUG => abi::LOG_DEBUG,
        Level::TRACE => abi::LOG_TRACE,
    }
}

/// `message name=value name=value`
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Line {
    fn finish(mut self) -> String {
        self.message.push_str(&self.fields);
        self.message
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String fails only when the value's own Debug does; half a line is better than none then.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
