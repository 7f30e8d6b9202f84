//! Every kernel is valid, and can be said in the languages of all APIs.

use std::collections::BTreeSet;

use minijinja::{Value, context};
use wgpu::naga;

use crate::attend_many::{AttendMany, Tiling};
use crate::kernel::render;

/// Each kernel with values that a model has.
fn variants() -> Vec<(&'static str, Value)> {
    let all = ["f32", "f16", "bf16", "q8_0", "q2_k", "q4_k", "iq2_xxs", "mxfp4"];
    let mut variants = Vec::new();
    let ids = context! { f32 => 0, f16 => 1, bf16 => 2, q8_0 => 3, q2_k => 4, q4_k => 5, iq2_xxs => 6, mxfp4 => 7 };
    for rows in [1, 2, 4, 8] {
        for norm in [false, true] {
            for types in [vec!["q8_0"], vec!["q8_0", "f16"], all.to_vec()] {
                variants.push(("matvec", context! { types, rows, norm, type_ids => ids.clone() }));
            }
        }
    }
    for post in [false, true] {
        for outputs in [24, 4] {
            variants.push(("hc_mix", context! { streams => 4, outputs, post }));
        }
    }
    variants.push(("hc_finish", context! { streams => 4, outputs => 24, head => false }));
    variants.push(("hc_finish", context! { streams => 4, outputs => 4, head => true }));
    for plain in [false, true] {
        for (ratio, index_heads) in [(0, 0), (4, 64), (128, 0)] {
            for head_dim in [512, 256] {
                let row_words = if plain { head_dim } else { (head_dim - 64) / 4 + 2 + 32 };
                let width = if ratio == 4 { 2 * head_dim } else { head_dim };
                let heads = 64;
                let context = context! { head_dim, rope => 64, plain, heads, index_heads, ratio, width, row_words };
                variants.push(("settle", context.clone()));
                variants.push(("attend", context.clone()));
                for (heads, subgroups) in [(16, 2), (32, 4), (32, 8), (64, 8)] {
                    for coop in [false, true] {
                        let tiling = Tiling { heads, subgroups };
                        let many = AttendMany { heads: 64, head_dim, plain, row_words, coop, tiling };
                        variants.push(("attend_many", many.context()));
                    }
                }
                variants.push(("combine", context));
                if ratio > 0 {
                    let main = context! { ratio, dim => head_dim, rope => 64, plain, indexer => false, row_words };
                    variants.push(("pool", main));
                }
            }
        }
        let row_words = if plain { 128 } else { 17 };
        variants.push(("pool", context! { ratio => 4, dim => 128, rope => 64, plain, indexer => true, row_words }));
        variants.push(("index_score", context! { index_heads => 64, plain, row_words }));
        for (coop, index_heads) in [(false, 8), (false, 64), (true, 8), (true, 64)] {
            variants.push(("index_score_many", context! { index_heads, plain, row_words, coop }));
        }
    }
    variants.push(("index_select", context! {}));
    variants.push(("expand", context! { streams => 4 }));
    variants.push(("finite", context! {}));
    for hashed in [false, true] {
        variants.push(("route", context! { experts => 256, used => 6, hashed }));
    }
    for ty in all {
        variants.push(("experts_up", context! { gate => ty, up => ty, used => 6 }));
        variants.push(("experts_down", context! { down => ty, shared_down => "q8_0", used => 6 }));
    }
    let tiles = [(128, 128, 32, 1, 64, 32), (64, 128, 32, 1, 32, 32), (64, 128, 64, 2, 64, 32)];
    for coop in [false, true] {
        for (rows, outputs, depth, buffers, warp_rows, warp_outputs) in tiles {
            let tile = context! { rows, outputs, depth, buffers, warp_rows, warp_outputs, coop };
            let tile = context! { type_ids => ids.clone(), used => 6, ..tile };
            for types in [vec!["q8_0"], vec!["q8_0", "f16"], all.to_vec()] {
                variants.push(("matmul", context! { types, ..tile.clone() }));
            }
            for ty in all {
                variants.push(("experts_up_many", context! { gate => ty, up => ty, types => [ty], ..tile.clone() }));
                variants.push(("experts_down_many", context! { down => ty, types => [ty], ..tile.clone() }));
            }
            let mixed = context! { gate => "iq2_xxs", up => "q2_k", types => ["q2_k", "iq2_xxs"] };
            variants.push(("experts_up_many", context! { ..mixed, ..tile.clone() }));
        }
    }
    variants.push(("halves", context! {}));
    variants.push(("group", context! { experts => 384, tile => 64 }));
    variants
}

fn validated(name: &str, context: &Value) -> (naga::Module, naga::valid::ModuleInfo) {
    let source = render(&format!("{name}.wgsl"), context);
    let numbered = || source.lines().enumerate().map(|(i, line)| format!("{:4} {line}\n", i + 1)).collect::<String>();
    let module = naga::front::wgsl::parse_str(&source).unwrap_or_else(|error| {
        panic!("{name} {context}: {error:?} {}\n{}", error.emit_to_string(&source), numbered())
    });
    let capabilities = naga::valid::Capabilities::IMMEDIATES
        | naga::valid::Capabilities::SHADER_FLOAT16
        | naga::valid::Capabilities::SHADER_FLOAT16_IN_FLOAT32
        | naga::valid::Capabilities::COOPERATIVE_MATRIX;
    let info = naga::valid::Validator::new(naga::valid::ValidationFlags::all(), capabilities)
        .validate(&module)
        .unwrap_or_else(|error| {
            panic!("{name} {context}: {error:?} {}\n{}", error.emit_to_string(&source), numbered())
        });
    (module, info)
}

#[test]
fn every_kernel_is_valid() {
    let variants = variants();
    for (name, context) in &variants {
        let (module, info) = validated(name, context);
        for policy in [naga::proc::BoundsCheckPolicy::Unchecked, naga::proc::BoundsCheckPolicy::Restrict] {
            let bounds_check_policies =
                naga::proc::BoundsCheckPolicies { index: policy, buffer: policy, ..Default::default() };
            let options =
                naga::back::spv::Options { lang_version: (1, 6), bounds_check_policies, ..Default::default() };
            naga::back::spv::write_vec(&module, &info, &options, None)
                .unwrap_or_else(|error| panic!("{name} {context}: {error}"));
        }
    }
    let used: BTreeSet<&str> = variants.iter().map(|(name, _)| *name).collect();
    println!("{} variants of {} kernels", variants.len(), used.len());
}
