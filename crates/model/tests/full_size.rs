//! The real models' layouts, from headers of synthetic files (tools/make_full_gguf.py): every tensor is bound, and bytes
//! add up to docs/spec/model.md §4.2.

mod common;

use std::path::PathBuf;

use common::flash;
use gguf::Gguf;
use model::Model;

/// A header whose tensors lie in a file that is not there.
fn bind(name: &str) -> (Gguf, Model) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/test-data/full").join(name);
    let header = std::fs::read(&path).unwrap_or_else(|error| panic!("run scripts/test-data first: {error}"));
    let file = Gguf::read(name, header.as_slice(), 1 << 40).unwrap();
    let model = Model::from_gguf(&file).unwrap();
    (file, model)
}

/// Bytes of each class of docs/spec/model.md §4.2, and the names that belong to it.
const CLASSES: [(&str, &[&str]); 9] = [
    ("norms, sinks, bias", &["_norm.", "attn_sinks", "exp_probs_b"]),
    ("token_embd", &["token_embd"]),
    ("HC", &["hc_"]),
    ("routed experts", &["_exps."]),
    ("shared experts", &["_shexp."]),
    ("indexers", &["indexer"]),
    ("compressors", &["attn_compressor"]),
    ("router + tid2eid", &["ffn_gate_inp", "ffn_gate_tid2eid"]),
    ("attention projections", &["attn_q_a.", "attn_q_b.", "attn_kv.", "attn_output_"]),
];

/// Bytes by class; what is left over is the output matrix.
fn bytes_by_class(file: &Gguf) -> Vec<(&'static str, u64)> {
    let class = |name: &str| {
        let found = CLASSES.iter().find(|(_, parts)| parts.iter().any(|part| name.contains(part)));
        found.map_or("output", |(class, _)| *class)
    };
    let sum = |of: &'static str| {
        let tensors = file.tensors.iter().filter(|tensor| class(&tensor.name) == of);
        (of, tensors.map(|tensor| tensor.size_bytes().unwrap()).sum())
    };
    CLASSES.iter().map(|(class, _)| *class).chain(["output"]).map(sum).collect()
}

#[test]
fn flash_is_bound_whole() {
    let (file, model) = bind("flash.header");
    assert_eq!(model.config, model::Config { name: model.config.name.clone(), ..flash() });
    assert_eq!(
        bytes_by_class(&file),
        [
            ("norms, sinks, bias", 1_836_288),
            ("token_embd", 1_059_061_760),
            ("HC", 67_773_532),
            ("routed experts", 77_913_391_104),
            ("shared experts", 1_149_763_584),
            ("indexers", 451_454_976),
            ("compressors", 522_887_168),
            ("router + tid2eid", 99_485_696),
            ("attention projections", 4_886_495_232),
            ("output", 562_626_560),
        ]
    );
    assert_eq!(model.weight_bytes(), 86_714_775_900);
    assert_eq!((file.tensors.len(), model.unused.len()), (1328, 0));
    assert_eq!(model.experts[0].extents.expert_bytes(), [2_162_688, 2_162_688, 2_752_512]);
}

#[test]
fn pro_is_bound_whole() {
    let (file, model) = bind("pro.header");
    let config = &model.config;
    assert_eq!((config.layers, config.d_model, config.heads, config.o_groups), (61, 7168, 128, 16));
    assert_eq!(config.compress_ratios[..5], [128, 128, 4, 128, 4]);
    assert_eq!(
        bytes_by_class(&file),
        [
            ("norms, sinks, bias", 4_286_976),
            ("token_embd", 1_853_358_080),
            ("HC", 168_145_804),
            ("routed experts", 435_205_177_344),
            ("shared experts", 4_281_532_416),
            ("indexers", 1_002_762_240),
            ("compressors", 1_340_194_816),
            ("router + tid2eid", 345_114_624),
            ("attention projections", 19_436_797_952),
            ("output", 984_596_480),
        ]
    );
    assert_eq!(model.weight_bytes(), 464_621_966_732);
    assert_eq!((file.tensors.len(), model.unused.len()), (1894, 0));
    assert_eq!(model.experts[60].extents.expert_bytes().iter().sum::<usize>(), 18_579_456);
}
