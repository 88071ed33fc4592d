//! The `labpipe` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    labpipe::cli::main()
}
