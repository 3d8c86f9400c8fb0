//! The binary `vfio-mediate`: see `vfio_mediate::control::cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    vfio_mediate::control::cli::main()
}
