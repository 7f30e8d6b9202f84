//! IQ2_XXS: the whole code book is searched for every eight values, at any scale, by two tables.
//!
//! For eight values x with weights w, a code-book point v at scale g and matching signs costs
//! Σw(|x| − g·v)² = Σwx² − 2g·A + g²·B with A = Σw|x|v and B = Σwv². Signs must have even parity: when x has an odd
//! number of minus signs, one sign is wrong and adds 4g·w|x|v at its place, so that A shrinks by 2·min(w|x|v). A
//! and B do not depend on g: they are made once, and a scale is tried at two operations per point.

use super::scale_to_half;
use crate::blocks::*;
use crate::iq2_grid::{GRID, GRID_COLUMNS};

/// Rounds of group scales and least squares.
const ROUNDS: usize = 4;
/// Scales from which a group's search starts, as fractions of its largest magnitude over the largest point.
const STARTS: [f32; 5] = [1.1, 0.9, 0.75, 0.6, 0.45];

/// A and B of the 256 points for one octet.
#[derive(Clone, Copy)]
struct Tables {
    a: [f32; 256],
    b: [f32; 256],
}

/// The four octets of a group.
type Group = [Tables; 4];

/// One choice of points for a group: Σ of its A and B, and its indices.
#[derive(Clone, Copy, Default)]
struct Choice {
    a: f32,
    b: f32,
    indices: [u8; 4],
}

impl Choice {
    /// The cost at scale `g`, less the constant Σwx².
    fn cost(&self, g: f32) -> f32 {
        g * (g * self.b - 2.0 * self.a)
    }

    /// The best scale for these points.
    fn scale(&self) -> f32 {
        if self.b > 0.0 { (self.a / self.b).max(0.0) } else { 0.0 }
    }
}

#[inline(always)]
pub(super) fn quantize(x: &[f32; QK_K], weights: &[f32; QK_K]) -> Iq2Xxs {
    let (x, weights) = (x.as_chunks::<8>().0, weights.as_chunks::<8>().0);
    let mut groups = [[Tables { a: [0.0; 256], b: [0.0; 256] }; 4]; 8];
    for (tables, (x, weights)) in groups.as_flattened_mut().iter_mut().zip(x.iter().zip(weights)) {
        *tables = octet_tables(x, weights);
    }
    let alone: [f32; 8] = std::array::from_fn(|i| scale_alone(&groups[i], &x[4 * i..][..4]));
    let largest = alone.iter().fold(0f32, |a, &b| a.max(b));
    let mut d = scale_to_half(largest * 8.0 / 31.0);
    let mut targets = alone;

    // All zeros cost nothing here, and are the best that a scale below the smallest half leaves.
    let mut best = (0.0, Half([0; 2]), [0u32; 8], [Choice::default(); 8]);
    for _ in 0..ROUNDS {
        let unit = d.to_f32() / 8.0;
        let chosen: [(u32, Choice); 8] = std::array::from_fn(|i| near(&groups[i], targets[i], unit));
        let cost = chosen.iter().map(|(s, choice)| choice.cost(unit * step(*s))).sum();
        if cost < best.0 {
            best = (cost, d, chosen.map(|c| c.0), chosen.map(|c| c.1));
        }
        let a: f32 = chosen.iter().map(|(s, choice)| step(*s) * choice.a).sum();
        let b: f32 = chosen.iter().map(|(s, choice)| step(*s) * step(*s) * choice.b).sum();
        d = scale_to_half(if b > 0.0 { 8.0 * (a / b).max(0.0) } else { 0.0 });
        targets = chosen.map(|(_, choice)| choice.scale());
    }
    let (_, d, scales, choices) = best;
    let groups = std::array::from_fn(|i| pack(&x[4 * i..][..4], &weights[4 * i..][..4], scales[i], &choices[i]));
    Iq2Xxs { d, groups }
}

/// The factor of a 4-bit scale: the group's scale is d/8 · (2s + 1).
fn step(s: u32) -> f32 {
    (2 * s + 1) as f32
}

/// A and B of every point. Loops run over the points, which are the vector.
#[inline(always)]
fn octet_tables(x: &[f32; 8], weights: &[f32; 8]) -> Tables {
    let mut tables = Tables { a: [0.0; 256], b: [0.0; 256] };
    let mut least = [f32::INFINITY; 256];
    for j in 0..8 {
        let (wx, w) = (weights[j] * x[j].abs(), weights[j]);
        for (i, &v) in GRID_COLUMNS[j].iter().enumerate() {
            let wxv = wx * v;
            tables.a[i] += wxv;
            tables.b[i] += w * v * v;
            least[i] = if wxv < least[i] { wxv } else { least[i] };
        }
    }
    if minus_signs(x).count_ones() % 2 == 1 {
        for (a, least) in tables.a.iter_mut().zip(least) {
            *a -= 2.0 * least;
        }
    }
    tables
}

/// The cheapest point of each octet at scale `g`.
#[inline(always)]
fn choose(group: &Group, g: f32) -> Choice {
    let mut choice = Choice::default();
    for (tables, index) in group.iter().zip(&mut choice.indices) {
        // Sixteen running minima with their positions, then the least of them: the first of equals wins.
        let mut costs = [f32::INFINITY; 16];
        let mut at = [0u32; 16];
        for i in 0..16 {
            for j in 0..16 {
                let cost = g * tables.b[16 * i + j] - 2.0 * tables.a[16 * i + j];
                at[j] = if cost < costs[j] { i as u32 } else { at[j] };
                costs[j] = if cost < costs[j] { cost } else { costs[j] };
            }
        }
        let j = (1..16).fold(0, |best, j| if costs[j] < costs[best] { j } else { best });
        let i = 16 * at[j] as usize + j;
        *index = i as u8;
        choice.a += tables.a[i];
        choice.b += tables.b[i];
    }
    choice
}

/// The best scale of a group by itself: points and least-squares scale in turn, from several starts.
#[inline(always)]
fn scale_alone(group: &Group, x: &[[f32; 8]]) -> f32 {
    let start = super::amax(x.as_flattened()) / 43.0;
    let mut best = (0.0, 0.0);
    for fraction in STARTS {
        let mut g = start * fraction;
        for _ in 0..2 {
            g = choose(group, g).scale();
        }
        let cost = choose(group, g).cost(g);
        if cost < best.0 {
            best = (cost, g);
        }
    }
    best.1
}

/// The best of the 4-bit scales around `target`, with its points.
#[inline(always)]
fn near(group: &Group, target: f32, unit: f32) -> (u32, Choice) {
    let center = if unit == 0.0 { 0.0 } else { super::round(((target / unit - 1.0) / 2.0).clamp(0.0, 15.0)) } as u32;
    let mut best: Option<(u32, Choice, f32)> = None;
    for s in center.saturating_sub(1)..=(center + 1).min(15) {
        let choice = choose(group, unit * step(s));
        let cost = choice.cost(unit * step(s));
        if best.is_none_or(|best| cost < best.2) {
            best = Some((s, choice, cost));
        }
    }
    let (s, choice, _) = best.expect("the center is a candidate");
    (s, choice)
}

/// Bit j set where `x[j]` is negative.
#[inline(always)]
fn minus_signs(x: &[f32; 8]) -> u8 {
    x.iter().enumerate().fold(0, |bits, (j, x)| bits | u8::from(x.is_sign_negative()) << j)
}

/// The bytes of a group: indices, then sign patterns (made even where it costs least) and scale.
#[inline(always)]
fn pack(x: &[[f32; 8]], weights: &[[f32; 8]], scale: u32, choice: &Choice) -> [u8; 8] {
    let mut word = scale << 28;
    for l in 0..4 {
        let mut signs = minus_signs(&x[l]);
        if signs.count_ones() % 2 == 1 {
            let point = &GRID[usize::from(choice.indices[l])];
            let penalty = |j: &usize| weights[l][*j] * x[l][*j].abs() * f32::from(point[*j]);
            let cheapest = (0..8).min_by(|a, b| penalty(a).total_cmp(&penalty(b))).expect("eight places");
            signs ^= 1 << cheapest;
        }
        word |= u32::from(signs & 127) << (7 * l);
    }
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&choice.indices);
    bytes[4..].copy_from_slice(&word.to_le_bytes());
    bytes
}
