//! `power`: low power of a running host's device.

use super::args::{PowerArgs, PowerWhat};
use super::{CliError, print_json, print_line};
use crate::control::client::Client;
use crate::control::exit::Exit;
use crate::control::protocol::{Power, PowerAction};

pub(super) fn run(args: &PowerArgs, json: bool) -> Result<Exit, CliError> {
    let action = match args.what {
        PowerWhat::Enter => PowerAction::Enter { wakeup: args.wakeup },
        PowerWhat::Exit => PowerAction::Exit,
        PowerWhat::Status => PowerAction::Status,
    };
    if args.wakeup && args.what != PowerWhat::Enter {
        return Err(CliError::new(Exit::Usage, "--wakeup goes with `enter`"));
    }
    let power = Client::connect(&args.control.control)?.power(&args.device, action)?;
    if json {
        print_json(&power)?;
    } else {
        print_line(&format!("{}: {}", power.device, told(&power)))?;
    }
    Ok(Exit::Done)
}

/// In one line, for people.
pub(super) fn told(power: &Power) -> String {
    let entered = match (power.low_power, power.wakeup) {
        (false, _) => "in use",
        (true, false) => "low power, until it is left",
        (true, true) => "low power, until the next request",
    };
    let suspended = match power.suspended {
        Some(true) => ", suspended",
        Some(false) | None => "",
    };
    match &power.state {
        Some(state) => format!("{entered}; {state}{suspended}"),
        None => entered.to_owned(),
    }
}
