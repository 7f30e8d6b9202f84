//! Which levels the tests run, held against what the processor says it has.

use quant::simd::Level;

/// [`Level::available`], checked and printed, with what is skipped and why.
pub fn levels() -> Vec<Level> {
    let levels: Vec<Level> = Level::available().collect();
    println!("levels tested: {levels:?}");
    #[cfg(target_arch = "x86_64")]
    assert_eq!(levels, levels_of_x86());
    levels
}

#[cfg(target_arch = "x86_64")]
fn levels_of_x86() -> Vec<Level> {
    macro_rules! features {
        ($($name:tt),*) => { [$(($name, is_x86_feature_detected!($name))),*] };
    }
    let lacks = |features: &[(&'static str, bool)]| -> Vec<&str> {
        features.iter().filter(|feature| !feature.1).map(|feature| feature.0).collect()
    };
    let mut levels = vec![Level::Scalar];
    let mut missing = lacks(&features!("avx2", "fma", "f16c"));
    if missing.is_empty() {
        levels.push(Level::Avx2);
    } else {
        println!("skipped: AVX2, for this machine lacks {missing:?}");
    }
    missing.extend(lacks(&features!(
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512vnni",
        "avx512vbmi",
        "avx512bitalg",
        "gfni"
    )));
    if missing.is_empty() {
        levels.push(Level::Avx512);
    } else {
        println!("skipped: AVX-512, for this machine lacks {missing:?}");
    }
    levels
}
