//! The `infall` program.
fn main() {}
