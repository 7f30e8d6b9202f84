//! Rotary position embedding: frequencies and angles (docs/spec/model.md §2.4).

use std::f64::consts::PI;

use crate::Config;

/// `(cos, sin)` of the angle of each rotated pair at one position.
pub type Rotation = Vec<(f32, f32)>;

/// Angle a position for each pair of rotated values.
#[derive(Clone, Debug)]
pub struct Rope {
    frequencies: Vec<f64>,
}

impl Rope {
    /// Plain frequencies `base^(-2i / dim)`, for layers without compression.
    pub fn plain(config: &Config) -> Rope {
        Rope { frequencies: geometric(config.rope_base, config.rope_dim).collect() }
    }

    /// YaRN frequencies, for layers with compression: pairs that turn often keep their frequency, pairs that turn less
    /// than once in the original context are slowed by the factor, those between are blended. No magnitude scale.
    pub fn yarn(config: &Config) -> Rope {
        let (base, dim, yarn) = (config.compress_rope_base, config.rope_dim, &config.yarn);
        let pair_turning = |turns: f64| {
            dim as f64 * libm::log(yarn.original_context as f64 / (turns * 2.0 * PI)) / (2.0 * libm::log(base))
        };
        let low = pair_turning(yarn.beta_fast).floor().max(0.0);
        let high = pair_turning(yarn.beta_slow).ceil().min(dim as f64 - 1.0);
        let slowed = |(i, frequency): (usize, f64)| {
            let blend = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
            frequency * (1.0 - blend) + frequency / yarn.factor * blend
        };
        Rope { frequencies: geometric(base, dim).enumerate().map(slowed).collect() }
    }

    /// The rotation at `position`. Angles are taken in f64: in f32 the fastest pair is off by 0.06 rad at 1 M tokens.
    pub fn at(&self, position: usize) -> Rotation {
        let turn = |frequency: &f64| {
            let (sin, cos) = libm::sincos(position as f64 * frequency);
            (cos as f32, sin as f32)
        };
        self.frequencies.iter().map(turn).collect()
    }

    /// The frequencies, fastest first, in radians a token.
    pub fn frequencies(&self) -> &[f64] {
        &self.frequencies
    }
}

fn geometric(base: f64, dim: usize) -> impl Iterator<Item = f64> {
    (0..dim / 2).map(move |i| libm::pow(base, -((2 * i) as f64) / dim as f64))
}
