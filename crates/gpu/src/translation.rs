//! Every kernel is valid, and can be said in the languages of all APIs: SPIR-V, which spirv-val then takes, MSL and HLSL.

use std::collections::BTreeSet;

use minijinja::{Value, context};

use crate::attend_many::{AttendMany, Tiling};
use crate::kernel::render;
use crate::together::MOST_TOGETHER;

/// Numbers of sessions that kernels are bound to: one, which has a form of its own, and the most.
const SESSIONS: [usize; 2] = [1, MOST_TOGETHER];

/// Each kernel with values that a model has.
fn variants() -> Vec<(&'static str, Value)> {
    let all = ["f32", "f16", "bf16", "q8_0", "q2_k", "q4_k", "iq2_xxs", "mxfp4"];
    let mut variants = Vec::new();
    let ids = context! { f32 => 0, f16 => 1, bf16 => 2, q8_0 => 3, q2_k => 4, q4_k => 5, iq2_xxs => 6, mxfp4 => 7 };
    for rows in [1, 2, 4, 8] {
        for norm in [false, true] {
            for types in [vec!["q8_0"], vec!["q8_0", "f16"], all.to_vec()] {
                for (outputs, digits) in [(2, false), (4, false), (2, true), (4, true)] {
                    for made in if rows > 1 { vec![digits] } else { vec![false, digits] } {
                        let (types, type_ids) = (types.clone(), ids.clone());
                        variants.push(("matvec", context! { types, rows, outputs, norm, digits, made, type_ids }));
                    }
                }
            }
        }
    }
    for post in [false, true] {
        for outputs in [24, 4] {
            variants.push(("hc_mix", context! { streams => 4, outputs, post }));
        }
    }
    for d in [64, 4096, 7168] {
        for digits in [false, true] {
            variants.push(("hc_finish", context! { streams => 4, d, outputs => 24, head => false, digits }));
            variants.push(("hc_finish", context! { streams => 4, d, outputs => 4, head => true, digits }));
        }
    }
    for plain in [false, true] {
        for (ratio, index_heads) in [(0, 0), (4, 64), (128, 0)] {
            for head_dim in [512, 256] {
                let row_words = if plain { head_dim } else { (head_dim - 64) / 4 + 2 + 32 };
                let width = if ratio == 4 { 2 * head_dim } else { head_dim };
                let heads = 64;
                for states in SESSIONS {
                    let context =
                        context! { states, head_dim, rope => 64, plain, heads, index_heads, ratio, width, row_words };
                    variants.push(("settle", context.clone()));
                    for together in [4, 8] {
                        variants.push(("attend", context! { together, ..context.clone() }));
                    }
                    for digits in [false, true] {
                        variants.push(("combine", context! { digits, ..context.clone() }));
                    }
                    if ratio > 0 {
                        let index_words = [0, if plain { 128 } else { 17 }][usize::from(ratio == 4)];
                        variants.push(("pool", context! { dim => head_dim, index_dim => 128, index_words, ..context }));
                    }
                }
                for (heads, subgroups) in [(16, 2), (32, 4), (32, 8), (64, 8)] {
                    for coop in [false, true] {
                        let tiling = Tiling { heads, subgroups };
                        let many = AttendMany { heads: 64, head_dim, plain, row_words, coop, tiling };
                        variants.push(("attend_many", many.context()));
                    }
                }
            }
        }
        let row_words = if plain { 128 } else { 17 };
        for states in SESSIONS {
            for index_heads in [4, 12, 64] {
                variants.push(("index_score", context! { states, index_heads, plain, row_words }));
            }
        }
        for (coop, index_heads) in [(false, 8), (false, 64), (true, 8), (true, 64)] {
            variants.push(("index_score_many", context! { index_heads, plain, row_words, coop }));
        }
    }
    variants.extend(SESSIONS.map(|states| ("index_select", context! { states })));
    variants.push(("expand", context! { streams => 4 }));
    variants.push(("finite", context! {}));
    variants.push(("sweep", context! {}));
    variants.push(("busy", context! {}));
    variants.push(("normalise", context! {}));
    for norm in [false, true] {
        variants.push(("digits", crate::kit::digits_context(norm)));
    }
    variants.push(("copy", context! {}));
    for hashed in [false, true] {
        for (experts, used) in [(256, 6), (30, 1), (3, 2)] {
            for lays_out in [false, true] {
                variants.push(("route", context! { experts, used, hashed, lays_out }));
            }
        }
    }
    for streams in [1, 2, 8] {
        let outputs = 2 * streams + streams * streams;
        variants.push(("hc_mix", context! { streams, outputs, post => true }));
        for d in [7168, 16384] {
            let digits = crate::kit::finish_lays_out(d, streams);
            variants.push(("hc_finish", context! { streams, d, outputs, head => false, digits }));
        }
        variants.push(("hc_finish", context! { streams, d => 192, outputs, head => false, digits => true }));
    }
    for ty in all {
        for digits in [false, true] {
            for makes in [false, digits] {
                let context = context! { gate => ty, up => ty, used => 6, digits, makes, outputs => 2 };
                variants.push(("experts_up", context));
            }
            for (gate, up) in [(ty, "f16"), ("q8_0", ty)] {
                let context = context! { gate, up, used => 6, digits, makes => false, outputs => 2 };
                variants.push(("experts_up", context));
            }
            let context = context! { down => ty, used => 6, digits, made => false, outputs => 4 };
            for (shared_down, shared_made) in [("f16", false), ("q8_0", digits)] {
                variants.push(("experts_down", context! { shared_down, shared_made, ..context.clone() }));
            }
            let made = digits && !["f32", "f16", "bf16"].contains(&ty);
            variants.push((
                "experts_down",
                context! { down => ty, shared_down => "q8_0", used => 6, digits, made, shared_made => digits, outputs => 4 },
            ));
        }
    }
    let tiles =
        [(128, 128, 32, 1, 64, 32), (64, 128, 32, 1, 32, 32), (64, 128, 64, 2, 64, 32), (64, 64, 64, 1, 32, 32)];
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

/// Kernels that have a form with cooperative matrices of 16 by 16. What cannot be said of them, and why: MSL has matrices of
/// 8 by 8 only, and naga's HLSL has none. Neither is ever asked for: only adapters that offer 16 by 16 get that form.
const COOPERATIVE: [&str; 5] = ["attend_many", "experts_down_many", "experts_up_many", "index_score_many", "matmul"];

fn is_cooperative(context: &Value) -> bool {
    context.get_attr("coop").is_ok_and(|coop| coop.is_true())
}

/// Checked and unchecked.
fn policies() -> [naga::proc::BoundsCheckPolicies; 2] {
    let all = |policy| naga::proc::BoundsCheckPolicies { index: policy, buffer: policy, ..Default::default() };
    [all(naga::proc::BoundsCheckPolicy::Restrict), all(naga::proc::BoundsCheckPolicy::Unchecked)]
}

/// The buffers of a kernel: their numbers, and whether it writes to them.
fn buffers(module: &naga::Module) -> impl Iterator<Item = (naga::ResourceBinding, bool)> {
    module.global_variables.iter().filter_map(|(_, variable)| match variable.space {
        naga::AddressSpace::Storage { access } => {
            Some((variable.binding.expect("a buffer has a number"), access.contains(naga::StorageAccess::STORE)))
        }
        _ => None,
    })
}

fn spirv(module: &naga::Module, info: &naga::valid::ModuleInfo, checks: naga::proc::BoundsCheckPolicies) -> Vec<u32> {
    let options = naga::back::spv::Options {
        lang_version: (1, 6),
        bounds_check_policies: checks,
        zero_initialize_workgroup_memory: naga::back::spv::ZeroInitializeWorkgroupMemoryMode::None,
        ..Default::default()
    };
    naga::back::spv::write_vec(module, info, &options, None).unwrap_or_else(|error| panic!("{error}"))
}

/// MSL as wgpu asks for it: 3.0, buffers in the slots of their numbers.
fn msl(module: &naga::Module, info: &naga::valid::ModuleInfo, checks: naga::proc::BoundsCheckPolicies) -> String {
    let target = |(binding, mutable): (naga::ResourceBinding, bool)| {
        let buffer = Some(binding.binding as u8);
        (binding, naga::back::msl::BindTarget { buffer, mutable, ..Default::default() })
    };
    let resources = naga::back::msl::EntryPointResources {
        resources: buffers(module).map(target).collect(),
        immediates_buffer: Some(20),
        sizes_buffer: Some(21),
    };
    let options = naga::back::msl::Options {
        lang_version: (3, 0),
        per_entry_point_map: [("main".to_owned(), resources)].into(),
        fake_missing_bindings: false,
        bounds_check_policies: checks,
        ..Default::default()
    };
    let text = naga::back::msl::write_string(module, info, &options, &Default::default());
    text.unwrap_or_else(|error| panic!("{error}")).0
}

/// HLSL as wgpu asks for it: shader model 6.2, which has halves.
fn hlsl(module: &naga::Module, info: &naga::valid::ModuleInfo) -> String {
    let target = |(binding, _): (naga::ResourceBinding, bool)| {
        let register = binding.binding;
        (binding, naga::back::hlsl::BindTarget { register, ..Default::default() })
    };
    let options = naga::back::hlsl::Options {
        shader_model: naga::back::hlsl::ShaderModel::V6_2,
        binding_map: buffers(module).map(target).collect(),
        fake_missing_bindings: false,
        immediates_target: Some(naga::back::hlsl::BindTarget { space: 1, ..Default::default() }),
        zero_initialize_workgroup_memory: false,
        ..Default::default()
    };
    let (mut text, pipeline) = (String::new(), Default::default());
    let made = naga::back::hlsl::Writer::new(&mut text, &options, &pipeline).write(module, info, None);
    let made = made.unwrap_or_else(|error| panic!("{error}"));
    made.entry_point_names.into_iter().for_each(|name| drop(name.unwrap_or_else(|error| panic!("{error}"))));
    text
}

/// HLSL begins each member of an array at 16 bytes, and naga does not make up for that in parameters.
#[test]
fn parameters_are_numbers_one_after_the_other() {
    for (name, context) in &variants() {
        let (module, _) = validated(name, context);
        let immediates = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::Immediate);
        for (_, variable) in immediates {
            let naga::TypeInner::Struct { members, .. } = &module.types[variable.ty].inner else {
                panic!("{name}: parameters are a struct")
            };
            let is_number = |ty| matches!(module.types[ty].inner, naga::TypeInner::Scalar(scalar) if scalar.width == 4);
            assert!(members.iter().all(|member| is_number(member.ty)), "{name} {context}");
        }
    }
}

#[test]
fn every_kernel_has_msl_and_hlsl() {
    let (mut made, mut left_out) = (0, BTreeSet::new());
    for (name, context) in &variants() {
        if is_cooperative(context) {
            left_out.insert(*name);
            continue;
        }
        println!("{name} {context}");
        let (module, info) = validated(name, context);
        for checks in policies() {
            let text = msl(&module, &info, checks);
            assert!(text.contains("kernel void main_(") && text.contains("[[buffer(0)]]"), "{name} {context}:\n{text}");
        }
        let text = hlsl(&module, &info);
        assert!(text.contains("[numthreads(") && text.contains("register("), "{name} {context}:\n{text}");
        made += 1;
    }
    println!("{made} variants; of {left_out:?} the cooperative forms are left out (no matrices of 16 by 16)");
    assert_eq!(left_out, BTreeSet::from(COOPERATIVE));
}

/// What of SPIR-V's validator is said about modules.
struct Validator {
    version: String,
    /// Whether it is new enough for cooperative matrices (SPV_KHR_cooperative_matrix).
    knows_cooperative: bool,
}

impl Validator {
    fn find() -> Validator {
        let said = std::process::Command::new("spirv-val").arg("--version").output();
        let said = said.expect("spirv-val is needed: install Debian's spirv-tools, as scripts/test does").stdout;
        let text = String::from_utf8(said).expect("text");
        // "SPIRV-Tools v2023.1 …"
        let version = text.split_whitespace().find_map(|word| word.strip_prefix('v')).unwrap_or_default().to_owned();
        let number = |part: Option<&str>| part.and_then(|part| part.parse::<u32>().ok()).unwrap_or(0);
        let mut parts = version.split('.');
        let knows_cooperative = (number(parts.next()), number(parts.next())) >= (2023, 4);
        Validator { version, knows_cooperative }
    }

    fn check(&self, words: &[u32]) -> Result<(), String> {
        use std::io::Write;
        use std::process::Stdio;
        let mut command = std::process::Command::new("spirv-val");
        command
            .args(["--target-env", "vulkan1.3", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut run = command.spawn().map_err(|error| error.to_string())?;
        let mut stdin = run.stdin.take().expect("piped");
        stdin.write_all(bytemuck::cast_slice(words)).map_err(|error| error.to_string())?;
        drop(stdin);
        let output = run.wait_with_output().map_err(|error| error.to_string())?;
        let said = || String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        if output.status.success() { Ok(()) } else { Err(said()) }
    }
}

/// Whether a module says that it has the instructions of cooperative matrices.
fn declares_cooperative(words: &[u32]) -> bool {
    /// `OpCapability CooperativeMatrixKHR`.
    const CAPABILITY: [u32; 2] = [2 << 16 | 17, 6022];
    let extension = b"SPV_KHR_cooperative_matrix";
    let bytes: &[u8] = bytemuck::cast_slice(words);
    words.windows(2).any(|pair| pair == CAPABILITY) && bytes.windows(extension.len()).any(|bytes| bytes == extension)
}

#[test]
fn every_kernel_is_valid_spirv() {
    use rayon::prelude::*;
    let (validator, variants) = (Validator::find(), variants());
    let unchecked: BTreeSet<&str> = variants
        .par_iter()
        .filter_map(|(name, context)| {
            let (module, info) = validated(name, context);
            let is_cooperative = is_cooperative(context);
            for checks in policies() {
                let words = spirv(&module, &info, checks);
                assert_eq!(declares_cooperative(&words), is_cooperative, "{name} {context}");
                if !is_cooperative || validator.knows_cooperative {
                    validator.check(&words).unwrap_or_else(|said| panic!("{name} {context}: {said}"));
                }
            }
            (is_cooperative && !validator.knows_cooperative).then_some(*name)
        })
        .collect();
    let used: BTreeSet<&str> = variants.iter().map(|(name, _)| *name).collect();
    println!("{} variants of {} kernels, spirv-val {}", variants.len(), used.len(), validator.version);
    if !unchecked.is_empty() {
        println!("not shown to spirv-val, which is older than cooperative matrices: that form of {unchecked:?}");
    }
}

/// Matrices are loaded from multiples of 16 bytes, and a driver lays variables of workgroup memory one after the other in an
/// order of its own: one odd word made the attention of an NVIDIA H200 wrong.
#[test]
fn workgroup_memory_of_cooperative_kernels_lies_at_multiples_of_16_bytes() {
    for (name, context) in variants().iter().filter(|(_, context)| is_cooperative(context)) {
        let (module, _) = validated(name, context);
        let is_workgroup = |variable: &&naga::GlobalVariable| variable.space == naga::AddressSpace::WorkGroup;
        for variable in module.global_variables.iter().map(|(_, variable)| variable).filter(is_workgroup) {
            let bytes = module.types[variable.ty].inner.size(module.to_ctx());
            assert!(bytes.is_multiple_of(16), "{name} {context}: {:?} has {bytes} bytes", variable.name);
        }
    }
}

/// A kernel that is in no list is translated by nobody.
#[test]
fn every_source_is_translated() {
    let used: BTreeSet<String> = variants().iter().map(|(name, _)| format!("{name}.wgsl")).collect();
    let has_entry = |(_, source): &&(&str, &str)| source.contains("@compute");
    let sources: BTreeSet<String> =
        crate::kernel::SOURCES.iter().filter(has_entry).map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(used, sources);
}

/// Kernels that every adapter runs take no more workgroup memory than one must have; those of tiles are chosen by what it has.
#[test]
fn workgroup_memory_is_what_adapters_must_have() {
    let by_tiles = ["matmul", "experts_up_many", "experts_down_many", "attend_many", "index_score_many"];
    for (name, context) in variants().into_iter().filter(|(name, _)| !by_tiles.contains(name)) {
        let (module, _) = validated(name, &context);
        let of_workgroup = |(_, variable): &(_, &naga::GlobalVariable)| variable.space == naga::AddressSpace::WorkGroup;
        let variables = module.global_variables.iter().filter(of_workgroup);
        let bytes: u32 =
            variables.map(|(_, v)| module.types[v.ty].inner.size(module.to_ctx()).next_multiple_of(16)).sum();
        assert!(bytes <= crate::device::WORKGROUP_BYTES, "{name} {context}: {bytes} bytes of workgroup memory");
    }
}
