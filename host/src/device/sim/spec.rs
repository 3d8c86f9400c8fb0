//! Simulated devices by name: `sim:<model>[?<option>=<value>[&...]]`.

use std::sync::Arc;

use super::{Edu, EduOptions, Sleep, Stateful, StatefulOptions, Time, VirtualClock};
use crate::device::{Device, DeviceError};

/// A name that opens nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SpecError {
    #[error("{spec}: a simulated device's name begins with sim:")]
    NotSim { spec: String },
    #[error("{spec}: no such model; there are sim:edu and sim:stateful")]
    UnknownModel { spec: String },
    #[error("{spec}: option {option}: {model} has {known}")]
    UnknownOption { spec: String, option: String, model: &'static str, known: &'static str },
    #[error("{spec}: option {option}: {expected}")]
    BadValue { spec: String, option: String, expected: &'static str },
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Opens a device of its own, which is gone when the last reference is. Models and options:
///
/// * `sim:edu`: `dma_mask` (decimal, or hexadecimal with 0x), `clock` (`real`, the default, or `virtual`), `sleep`: what low
///   power makes of it (`d3hot`, the default, `d3cold`, `never`, or `none` for a device without low power)
/// * `sim:stateful`: `clock`, `sleep`
pub fn open(spec: &str) -> Result<Arc<dyn Device>, SpecError> {
    let rest = spec.strip_prefix("sim:").ok_or_else(|| SpecError::NotSim { spec: spec.to_owned() })?;
    let (model, options) = rest.split_once('?').unwrap_or((rest, ""));
    let options: Vec<(&str, &str)> = options
        .split('&')
        .filter(|option| !option.is_empty())
        .map(|option| option.split_once('=').unwrap_or((option, "")))
        .collect();
    match model {
        "edu" => open_edu(spec, &options),
        "stateful" => open_stateful(spec, &options),
        _ => Err(SpecError::UnknownModel { spec: spec.to_owned() }),
    }
}

fn open_edu(spec: &str, options: &[(&str, &str)]) -> Result<Arc<dyn Device>, SpecError> {
    let mut edu = EduOptions { name: spec.to_owned(), ..EduOptions::default() };
    for (option, value) in options {
        match *option {
            "dma_mask" => edu.dma_mask = number(spec, option, value)?,
            "clock" => edu.time = time(spec, option, value)?,
            "sleep" => edu.sleep = sleep(spec, option, value)?,
            _ => {
                let (spec, option) = (spec.to_owned(), (*option).to_owned());
                return Err(SpecError::UnknownOption {
                    spec,
                    option,
                    model: "edu",
                    known: "dma_mask, clock and sleep",
                });
            }
        }
    }
    Ok(Edu::new(edu)?)
}

fn open_stateful(spec: &str, options: &[(&str, &str)]) -> Result<Arc<dyn Device>, SpecError> {
    let mut stateful = StatefulOptions { name: spec.to_owned(), ..StatefulOptions::default() };
    for (option, value) in options {
        match *option {
            "clock" => stateful.time = time(spec, option, value)?,
            "sleep" => stateful.sleep = sleep(spec, option, value)?,
            _ => {
                let (spec, option) = (spec.to_owned(), (*option).to_owned());
                return Err(SpecError::UnknownOption { spec, option, model: "stateful", known: "clock and sleep" });
            }
        }
    }
    Ok(Stateful::new(stateful)?)
}

fn number(spec: &str, option: &str, value: &str) -> Result<u64, SpecError> {
    let parsed = match value.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => value.parse(),
    };
    parsed.map_err(|_| bad(spec, option, "a number of 64 bits, decimal or with 0x"))
}

fn time(spec: &str, option: &str, value: &str) -> Result<Time, SpecError> {
    match value {
        "real" => Ok(Time::Real),
        "virtual" => Ok(Time::Virtual(VirtualClock::new())),
        _ => Err(bad(spec, option, "real or virtual")),
    }
}

fn sleep(spec: &str, option: &str, value: &str) -> Result<Sleep, SpecError> {
    match value {
        "d3hot" => Ok(Sleep::D3Hot),
        "d3cold" => Ok(Sleep::D3Cold),
        "never" => Ok(Sleep::Never),
        "none" => Ok(Sleep::Unsupported),
        _ => Err(bad(spec, option, "d3hot, d3cold, never or none")),
    }
}

fn bad(spec: &str, option: &str, expected: &'static str) -> SpecError {
    SpecError::BadValue { spec: spec.to_owned(), option: option.to_owned(), expected }
}
