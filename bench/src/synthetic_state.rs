//! A session that nobody computed: random packed rows, valid in their format, so that a context of any length costs seconds.

use cpu::CpuBackend;
use model::kv::{CompressorLayout, LayerLayout, RowFormat};
use model::state::{CompressorDelta, Delta, LayerDelta};
use model::{Backend, Error, State};

use crate::random::Random;

/// Tokens that a session grows by at once.
const GROWTH_TOKENS: usize = 2048;

/// A session of `tokens` tokens, the same in every run.
///
/// # Errors
/// The backend has no memory for it.
pub fn synthetic_state(backend: &CpuBackend, tokens: usize) -> Result<State, Error> {
    let mut state = backend.new_state()?;
    let layout = state.layout().clone();
    let mut random = Random(tokens as u64);
    let widest = layout.layers.iter().flat_map(|layer| layer.main).map(|c| c.width).max().unwrap_or(0);
    // The same for each piece: only those of windows that are still open are kept.
    let inputs: Vec<f32> = (0..GROWTH_TOKENS * 2 * widest).map(|_| random.unit() as f32 - 0.5).collect();
    while state.position() < tokens {
        let (start, end) = (state.position(), tokens.min(state.position() + GROWTH_TOKENS));
        let compressor = |compressor: Option<CompressorLayout>, random: &mut Random| {
            compressor.map_or_else(CompressorDelta::default, |c| CompressorDelta {
                inputs: inputs[..(end - start) * 2 * c.width].to_vec(),
                rows: rows(c.row, end / c.ratio - start / c.ratio, random),
            })
        };
        let layer = |layer: &LayerLayout| LayerDelta {
            raw: rows(layer.raw, end - start, &mut random),
            main: compressor(layer.main, &mut random),
            index: compressor(layer.index, &mut random),
        };
        state.commit(&Delta { tokens: end - start, layers: layout.layers.iter().map(layer).collect() });
    }
    Ok(state)
}

/// `count` packed rows, of values between -2 and 2 (docs/formats.md).
fn rows(format: RowFormat, count: usize, random: &mut Random) -> Vec<u8> {
    let mut rows = vec![0; count * format.row_bytes()];
    random.fill(&mut rows);
    rows.chunks_exact_mut(format.row_bytes()).for_each(|row| make_valid(format, row));
    rows
}

/// Makes a row of random bits one of numbers.
fn make_valid(format: RowFormat, row: &mut [u8]) {
    // The upper byte of an f32 or BF16 from 0.5 to 2, either sign.
    let near_one = |byte: &mut u8| *byte = 0x3f | *byte & 0x80;
    match format {
        RowFormat::F32 { .. } => row.iter_mut().skip(3).step_by(4).for_each(near_one),
        RowFormat::Fp8Bf16 { nope, rope } => {
            let (codes, rest) = row.split_at_mut(nope);
            // 7f and ff are no numbers; the largest is 448, so the scales are 2^-9 and 2^-8.
            codes.iter_mut().filter(|code| **code & 0x7f == 0x7f).for_each(|code| *code ^= 1);
            let (scales, tail) = rest.split_at_mut(rest.len() - 2 * rope);
            let (scales, padding) = scales.split_at_mut(nope / 64);
            scales.iter_mut().for_each(|scale| *scale = 118 + *scale % 2);
            padding.fill(0);
            tail.iter_mut().skip(1).step_by(2).for_each(near_one);
        }
        // Every code is a number up to 6; the scales are 2^-3 and 2^-2.
        RowFormat::HadamardFp4 { width } => row[width / 2..].iter_mut().for_each(|scale| *scale = 124 + *scale % 2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpu::Options;
    use infall::load::ModelFile;
    use model::{Arithmetic, Cancel, NoObserver, Row, forward};

    /// A made session can be saved, loaded, and gone on from, with logits that are numbers.
    #[test]
    fn a_made_session_is_one() {
        let file = ModelFile::open(None).unwrap();
        for arithmetic in [Arithmetic::Official, Arithmetic::Plain] {
            let backend = file.load_with(Options { arithmetic, ..Options::default() }).unwrap();
            for tokens in [1, 127, 1000, GROWTH_TOKENS + 300] {
                let mut state = synthetic_state(&backend, tokens).unwrap();
                let (mut bytes, mut again) = (Vec::new(), Vec::new());
                backend.export(&state, &mut bytes).unwrap();
                backend.export(&backend.import(&mut &bytes[..]).unwrap(), &mut again).unwrap();
                assert!(bytes == again);
                let rows = (tokens..tokens + 130).map(|position| Row { session: 0, position, token: 5, logits: true });
                let logits =
                    forward(&backend, rows.collect(), &mut [&mut state], &Cancel::default(), &mut NoObserver).unwrap();
                assert!(logits.iter().all(|logit| logit.is_finite()), "{tokens} tokens");
            }
        }
    }

    #[test]
    fn values_lie_between_minus_two_and_two() {
        let mut random = Random(1);
        let format = RowFormat::Fp8Bf16 { nope: 448, rope: 64 };
        for row in rows(format, 100, &mut random).chunks_exact(format.row_bytes()) {
            let mut values = [0.0; 64];
            for block in 0..7 {
                let codes = row[block * 64..][..64].try_into().unwrap();
                quant::small_float::fp8_decode(row[448 + block], codes, &mut values);
                assert!(values.iter().all(|value| value.abs() <= 2.0), "{values:?}");
            }
            let bf16 = |bytes: &[u8]| quant::small_float::bf16_decode(u16::from_le_bytes([bytes[0], bytes[1]]));
            assert!(row[456..].chunks_exact(2).all(|bytes| (0.5..2.0).contains(&bf16(bytes).abs())));
        }
    }
}
