//! Which files are understood, and what is said of those that are not: a small model's header with one thing changed.

use std::path::PathBuf;

use gguf::{Gguf, TensorType, Value, Writer};
use model::{Error, Model};

/// A header in parts that can be changed.
#[derive(Clone)]
struct Header {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, Vec<u64>, TensorType)>,
}

impl Header {
    fn of(name: &str) -> Header {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/test-data/oracle").join(name);
        let file = Gguf::open(&path).unwrap_or_else(|error| panic!("run scripts/test-data first: {error}"));
        Header {
            metadata: file.metadata.iter().map(|(key, value)| (key.to_owned(), value.clone())).collect(),
            tensors: file.tensors.iter().map(|t| (t.name.clone(), t.dims.clone(), t.ty)).collect(),
        }
    }

    fn set(mut self, key: &str, value: impl Into<Value>) -> Header {
        let key = format!("deepseek4.{key}");
        self.metadata.retain(|(other, _)| *other != key);
        self.metadata.push((key, value.into()));
        self
    }

    fn without(mut self, key: &str) -> Header {
        self.metadata.retain(|(other, _)| *other != format!("deepseek4.{key}"));
        self
    }

    fn rename_key(mut self, from: &str, to: &str) -> Header {
        let (from, to) = (format!("deepseek4.{from}"), format!("deepseek4.{to}"));
        let (key, _) = self.metadata.iter_mut().find(|(key, _)| *key == from).expect("a key to rename");
        *key = to;
        self
    }

    fn tensor(mut self, name: &str, change: impl FnOnce(&mut (String, Vec<u64>, TensorType))) -> Header {
        change(self.tensors.iter_mut().find(|tensor| tensor.0 == name).expect("a tensor to change"));
        self
    }

    fn without_tensor(mut self, name: &str) -> Header {
        self.tensors.retain(|tensor| tensor.0 != name);
        self
    }

    fn with_tensor(mut self, name: &str, dims: &[u64]) -> Header {
        self.tensors.push((name.into(), dims.to_vec(), TensorType::F32));
        self
    }

    /// Binds the header as a file whose data are zeros.
    fn bind(&self) -> Result<Model, Error> {
        let mut writer = Writer::new();
        for (key, value) in &self.metadata {
            writer.set(key, value.clone()).unwrap();
        }
        for (name, dims, ty) in &self.tensors {
            writer.tensor(name, dims, *ty).unwrap();
        }
        let mut bytes = Vec::new();
        let zeros = |info: &gguf::TensorInfo, to: &mut dyn std::io::Write| {
            to.write_all(&vec![0; info.size_bytes().expect("a known type") as usize])
        };
        writer.write(&mut bytes, zeros).unwrap();
        Model::from_gguf(&Gguf::parse("changed.gguf", &bytes).unwrap())
    }
}

/// Shapes and types of all weights, in binding order.
fn shapes(model: &Model) -> Vec<(usize, usize, TensorType)> {
    let mut shapes = Vec::new();
    let visited = model.tensors.try_map(&mut |tensor| {
        shapes.push((tensor.rows, tensor.cols, tensor.ty));
        Ok::<_, std::convert::Infallible>(())
    });
    visited.expect("listing cannot fail");
    shapes
}

#[test]
fn the_older_dialect_means_the_same_model() {
    let header = Header::of("tiny-q4.gguf");
    let model = header.bind().unwrap();
    let mut other = header
        .rename_key("attention.output_lora_rank", "attention.o_lora_rank")
        .rename_key("attention.compress_ratios", "attention.layer_compress_ratio")
        .rename_key("attention.compress_rope_freq_base", "rope.freq_base_compress")
        .rename_key("hyper_connection.count", "hyper_connection.mult")
        .rename_key("hyper_connection.epsilon", "hyper_connection.eps")
        .rename_key("hyper_connection.sinkhorn_iterations", "hyper_connection.sinkhorn_iters");
    for (name, dims, _) in &mut other.tensors {
        for (new, old) in [
            ("attn_kv.weight", "attn_kv_a_mqa.weight"),
            ("attn_output_a", "attn_o_a"),
            ("attn_output_b", "attn_o_b"),
            ("attn_compressor_kv", "attn_compressor.wkv"),
            ("attn_compressor_gate", "attn_compressor.wgate"),
            ("attn_compressor_ape", "attn_compressor.ape"),
            ("attn_compressor_norm", "attn_compressor.norm"),
            ("indexer_compressor_kv", "indexer.compressor.wkv"),
            ("indexer_compressor_gate", "indexer.compressor.wgate"),
            ("indexer_compressor_ape", "indexer.compressor.ape"),
            ("indexer_compressor_norm", "indexer.compressor.norm"),
            ("output_hc_", "hc_head_"),
        ] {
            *name = name.replace(new, old);
        }
        if name.ends_with("attn_o_a.weight") {
            *dims = vec![dims[0], dims[1] / 4, 4];
        }
    }
    let other = other.bind().unwrap();
    assert_eq!(model.config, other.config);
    assert_eq!(shapes(&model), shapes(&other));
    assert!(other.unused.is_empty(), "{:?}", other.unused);
}

#[test]
fn keys_that_some_writers_leave_out_are_not_needed() {
    let header = Header::of("tiny-q4.gguf");
    let model = header.bind().unwrap();
    for key in ["vocab_size", "expert_group_count", "expert_gating_func", "expert_weights_norm", "feed_forward_length"]
    {
        assert_eq!(header.clone().without(key).bind().unwrap().config, model.config, "without {key}");
    }
    let scalar = header.clone().set("swiglu_clamp_exp", Value::F32(10.0));
    assert_eq!(scalar.bind().unwrap().config, model.config);
    let wide = header.set("block_count", Value::U64(5)).set("rope.freq_base", Value::F64(10_000.0));
    assert_eq!(wide.bind().unwrap().config, model.config);
}

#[test]
fn multi_token_prediction_is_recognised_and_left_alone() {
    let header = Header::of("tiny-q4.gguf");
    let trunk = header.bind().unwrap();
    // antirez files: the count is there, the layer is not.
    let counted = header.clone().set("nextn_predict_layers", Value::U32(1)).bind().unwrap();
    assert_eq!((counted.config, counted.unused.len()), (trunk.config.clone(), 0));
    // llama.cpp files: block_count includes the layer.
    let included = header
        .clone()
        .set("block_count", Value::U32(6))
        .set("nextn_predict_layers", Value::U32(1))
        .with_tensor("blk.5.nextn.eh_proj.weight", &[512, 256])
        .with_tensor("blk.5.attn_norm.weight", &[256])
        .bind()
        .unwrap();
    assert_eq!(included.config, model::Config { prediction_layers: 1, ..trunk.config });
    assert_eq!(included.unused, ["blk.5.nextn.eh_proj.weight", "blk.5.attn_norm.weight"]);
    // ds4's own names.
    let ds4 = header.with_tensor("mtp.0.e_proj.weight", &[256, 256]).bind().unwrap();
    assert_eq!(ds4.unused, ["mtp.0.e_proj.weight"]);
}

#[test]
fn arrays_with_entries_for_prediction_layers_are_cut_to_the_trunk() {
    let clamps = vec![10.0f32, 9.0, 8.0, 7.0, 6.0, 5.0];
    let header = Header::of("tiny-q4.gguf")
        .set("attention.compress_ratios", vec![0u32, 0, 4, 128, 4, 0])
        .set("swiglu_clamp_exp", clamps.clone())
        .set("swiglu_clamp_shexp", vec![1.0f32, 2.0, 3.0, 4.0, 5.0]);
    let config = header.bind().unwrap().config;
    assert_eq!(config.compress_ratios, [0, 0, 4, 128, 4]);
    assert_eq!(config.swiglu_limits, clamps[..5]);
    assert_eq!(config.shared_swiglu_limits, [1.0, 2.0, 3.0, 4.0, 5.0]);
}

#[test]
fn what_has_no_code_behind_it_is_refused_by_name() {
    let header = || Header::of("tiny-q4.gguf");
    let cases: Vec<(Header, &[&str])> = vec![
        (
            header().set("attention.compress_ratios", vec![0u32, 0, 4, 64, 4]),
            &["compress_ratios[3]", "64", "0, 4 or 128"],
        ),
        (header().set("attention.compress_ratios", vec![0u32, 0, 4]), &["compress_ratios", "3 entries", "at least 5"]),
        (header().set("attention.head_count_kv", Value::U32(2)), &["head_count_kv", "2"]),
        (header().set("expert_gating_func", Value::U32(1)), &["expert_gating_func", "4"]),
        (header().set("expert_weights_norm", Value::Bool(false)), &["expert_weights_norm", "true"]),
        (header().set("expert_shared_count", Value::U32(2)), &["expert_shared_count"]),
        (header().set("expert_group_count", Value::U32(8)), &["expert_group_count", "8"]),
        (header().set("attention.indexer.key_length", Value::U32(64)), &["indexer.key_length", "64", "128"]),
        (
            header().set("attention.key_length", Value::U32(200)).without("attention.value_length"),
            &["key_length", "200"],
        ),
        (header().set("rope.scaling.type", Value::String("linear".into())), &["rope.scaling.type", "linear", "yarn"]),
        (header().set("attention.output_group_count", Value::U32(3)), &["output_group_count", "3"]),
        (header().set("expert_used_count", Value::U32(9)), &["expert_used_count", "9", "8"]),
        (header().set("block_count", Value::U32(0)), &["block_count", "0"]),
        (header().set("block_count", Value::String("five".into())), &["block_count", "five"]),
        (header().set("rope.freq_base", Value::F32(-1.0)), &["rope.freq_base", "-1"]),
        (header().without("hash_layer_count"), &["hash_layer_count"]),
        (header().without("attention.q_lora_rank"), &["attention.q_lora_rank"]),
        (header().without_tensor("blk.3.attn_kv.weight"), &["blk.3.attn_kv.weight", "missing"]),
        (header().without_tensor("output_hc_base.weight"), &["output_hc_base.weight", "V4.1"]),
        (
            header().tensor("blk.1.attn_q_a.weight", |t| t.1 = vec![256, 64]),
            &["blk.1.attn_q_a.weight", "[256, 64]", "[256, 128]"],
        ),
        (header().tensor("blk.2.ffn_up_exps.weight", |t| t.1[2] = 4), &["blk.2.ffn_up_exps.weight", "[256, 256, 4]"]),
        (header().tensor("output.weight", |t| t.2 = TensorType::Iq4Nl), &["output.weight", "IQ4_NL", "Q8_0"]),
        (header().tensor("blk.0.ffn_gate_tid2eid.weight", |t| t.2 = TensorType::F32), &["ffn_gate_tid2eid", "I32"]),
        (header().set("attention.sliding_window", Value::U32(0)), &["sliding_window", "0"]),
        (header().with_tensor("blk.1.attn_q_a.bias", &[128]), &["blk.1.attn_q_a.bias", "not one this program knows"]),
        (header().set("block_count", Value::U32(4)), &["blk.4."]),
        (
            header().tensor("blk.2.ffn_up_exps.weight", |t| t.1 = vec![256, 8, 256]),
            &["blk.2.ffn_up_exps.weight", "[256, 256, 8]"],
        ),
    ];
    for (header, words) in cases {
        let message = header.bind().expect_err(words[0]).to_string();
        for word in words {
            assert!(message.contains(word), "{message:?} should say {word:?}");
        }
    }
    let mut other = header();
    other.metadata.iter_mut().find(|(key, _)| key == "general.architecture").unwrap().1 = Value::String("llama".into());
    let message = other.bind().unwrap_err().to_string();
    assert!(message.contains("llama") && message.contains("deepseek4"), "{message}");
}
