//! The program `infall`; everything is in the library beside it.

use std::process::ExitCode;

fn main() -> ExitCode {
    infall::main()
}
