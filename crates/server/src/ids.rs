//! Names of answers, items and calls that nobody can guess.

/// 128 random bits.
///
/// Panics if the system has no randomness to give: keys and names could then be guessed.
pub fn random() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
    u128::from_le_bytes(bytes)
}

/// `prefix` and the first `digits` (at most 32) hexadecimal digits of a number.
pub fn id(prefix: &str, digits: usize, number: u128) -> String {
    format!("{prefix}{}", &format!("{number:032x}")[32 - digits..])
}

/// Where ids come from: random numbers, or a test's.
pub type Numbers = Box<dyn FnMut() -> u128 + Send>;
