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

/// Bytes of all tensors but the routed experts, and of these.
fn bytes(model: &Model) -> (u64, u64) {
    let mut dense = 0;
    let counted = model.tensors.try_map(&mut |tensor| {
        dense += tensor.extent.bytes;
        Ok::<_, std::convert::Infallible>(())
    });
    counted.expect("counting cannot fail");
    let experts = model.experts.iter().flat_map(|layer| layer.extents.parts).map(|part| part.bytes).sum();
    (dense, experts)
}

#[test]
fn flash_is_bound_whole() {
    let (file, model) = bind("flash.header");
    assert_eq!(model.config, model::Config { name: model.config.name.clone(), ..flash() });
    assert_eq!(bytes(&model), (8_801_384_796, 77_913_391_104));
    assert_eq!((file.tensors.len(), model.unused.len()), (1328, 0));
    assert_eq!(model.experts[0].extents.expert_bytes(), [2_162_688, 2_162_688, 2_752_512]);
}

#[test]
fn pro_is_bound_whole() {
    let (file, model) = bind("pro.header");
    let config = &model.config;
    assert_eq!((config.layers, config.d_model, config.heads, config.o_groups), (61, 7168, 128, 16));
    assert_eq!(config.compress_ratios[..5], [128, 128, 4, 128, 4]);
    assert_eq!(bytes(&model), (29_416_789_388, 435_205_177_344));
    assert_eq!((file.tensors.len(), model.unused.len()), (1894, 0));
    assert_eq!(model.experts[60].extents.expert_bytes().iter().sum::<usize>(), 18_579_456);
}
