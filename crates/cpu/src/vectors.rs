//! The pieces of the forward pass against the golden numbers of docs/spec/model-vectors.json.

use quant::simd::Level;
use serde_json::Value;

use crate::attention::pool_window;
use crate::experts::{best_experts, weigh};
use crate::hyper::{Weights, spread};

fn vectors(name: &str) -> Value {
    let file = include_str!("../../../docs/spec/model-vectors.json");
    serde_json::from_str::<Value>(file).unwrap()[name].take()
}

fn floats(value: &Value) -> Vec<f32> {
    let number = |value: &Value| value.as_f64().expect("a number") as f32;
    value.as_array().expect("an array").iter().map(number).collect()
}

#[track_caller]
fn assert_close(ours: &[f32], expected: &Value, bound: f32) {
    let expected = floats(expected);
    assert_eq!(ours.len(), expected.len());
    let worst = ours.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= bound, "off by {worst:e}: {ours:?}, expected {expected:?}");
}

#[test]
fn hyper_connection_weights() {
    let example = vectors("hc_split_example");
    let [mix, scale, base] = ["mix24", "scale3", "base24"].map(|name| floats(&example[name]));
    let weights = Weights::new(&mix, &scale, &base, 20, 1e-6);
    assert_close(&weights.pre, &example["pre4"], 1e-6);
    assert_close(&weights.post, &example["post4"], 1e-6);
    assert_close(&weights.mix, &example["comb_rowmajor_src_dst"], 1e-6);
}

#[test]
fn hyper_connection_post() {
    let (split, example) = (vectors("hc_split_example"), vectors("hc_post_example"));
    let [post, mix] = ["post4", "comb_rowmajor_src_dst"].map(|name| floats(&split[name]));
    let (mut streams, output) = (floats(&example["residual_4x3"]), floats(&example["block_out3"]));
    spread(Level::Scalar, &post, &mix, &output, &mut streams);
    assert_close(&streams, &example["new_4x3"], 1e-6);
}

#[test]
fn router() {
    let example = vectors("router_example");
    let logits = floats(&example["logits16"]);
    let scores: Vec<f32> = logits.iter().map(|&logit| quant::math::softplus(logit).sqrt()).collect();
    assert_close(&scores, &example["probs"], 1e-6);
    let (mut experts, mut weights) = ([0; 6], [0.0; 6]);
    best_experts(&scores, &floats(&example["bias16"]), &mut experts);
    assert_eq!(experts.map(|expert| expert as f32).to_vec(), floats(&example["top6"]));
    weigh(&scores, &experts, 1.5, &mut weights);
    assert_close(&weights, &example["weights_scale1.5"], 1e-6);
}

#[test]
fn overlapping_windows_pool_first_halves_of_the_window_before() {
    let example = vectors("csa_pool_example");
    let [u, gate, positional] = ["kv_8x4", "gate_8x4", "ape_4x4"].map(|name| floats(&example[name]));
    let z: Vec<f32> = gate.iter().enumerate().map(|(i, gate)| gate + positional[i % 16]).collect();
    let half = |token: usize, from: usize| (&u[token * 4 + from..][..2], &z[token * 4 + from..][..2]);
    let first: Vec<_> = (0..4).map(|token| half(token, 2)).collect();
    let second: Vec<_> = (0..4).map(|token| half(token, 0)).chain((4..8).map(|token| half(token, 2))).collect();
    let pooled = [pool_window(Level::Scalar, &first), pool_window(Level::Scalar, &second)].concat();
    assert_close(&pooled, &example["pooled_2x2"], 1e-6);
}
