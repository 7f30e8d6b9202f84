//! Which tensor of the file is which weight of the model (docs/spec/model.md §4.2 and §4.3).
//!
//! [`Tensors`] is generic over what stands for a weight: [`TensorRef`] while binding, and whatever a backend loads it
//! into afterwards ([`Tensors::try_map`]). Routed experts are apart: they belong to the expert store.

use gguf::{Gguf, TensorType};
use store::{ExpertExtents, Extent};

use crate::{Config, Error};

/// A weight in a file: `rows` rows of `cols` elements, each row contiguous.
#[derive(Clone, Debug)]
pub struct TensorRef {
    /// Its name in the file.
    pub name: String,
    /// Type of its elements.
    pub ty: TensorType,
    /// Rows: outputs of a matrix.
    pub rows: usize,
    /// Elements of a row: inputs of a matrix.
    pub cols: usize,
    /// Where its bytes are.
    pub extent: Extent,
}

/// One hyper-connection (or the output head's, whose `function` has only `S` rows).
#[derive(Clone, Debug)]
pub struct HyperConnection<T> {
    /// `[2S + S², S·D]`.
    pub function: T,
    /// `[3]`: of `pre`, `post` and the mix.
    pub scale: T,
    /// `[2S + S²]`.
    pub base: T,
}

/// A compressor; `w` is twice its row's width at ratio 4 and its row's width at ratio 128.
#[derive(Clone, Debug)]
pub struct Compressor<T> {
    /// `[w, D]`.
    pub kv: T,
    /// `[w, D]`.
    pub gate: T,
    /// `[ratio, w]`.
    pub positions: T,
    /// `[row width]`.
    pub norm: T,
}

/// The indexer of a ratio-4 layer.
#[derive(Clone, Debug)]
pub struct Indexer<T> {
    /// `[index heads · index width, q_rank]`.
    pub q_b: T,
    /// `[index heads, D]`.
    pub weights: T,
    /// Makes its key rows.
    pub compressor: Compressor<T>,
}

/// The attention half of a layer.
#[derive(Clone, Debug)]
pub struct Attention<T> {
    /// Around the half.
    pub hc: HyperConnection<T>,
    /// `[D]`.
    pub norm: T,
    /// `[q_rank, D]`.
    pub q_a: T,
    /// `[q_rank]`.
    pub q_a_norm: T,
    /// `[H · head_dim, q_rank]`.
    pub q_b: T,
    /// `[head_dim, D]`.
    pub kv: T,
    /// `[head_dim]`.
    pub kv_norm: T,
    /// `[H]`.
    pub sinks: T,
    /// `[groups · o_rank, H · head_dim / groups]`.
    pub output_a: T,
    /// `[D, groups · o_rank]`.
    pub output_b: T,
    /// In layers of ratio 4 and 128.
    pub compressor: Option<Compressor<T>>,
    /// In layers of ratio 4.
    pub indexer: Option<Indexer<T>>,
}

/// How a layer chooses its experts.
#[derive(Clone, Debug)]
pub enum Routing<T> {
    /// By token id: `[V, K]` expert numbers.
    Hash(T),
    /// By score plus this bias `[E]`, which counts for the choice only.
    Bias(T),
}

/// The mixture-of-experts half of a layer, routed experts apart.
#[derive(Clone, Debug)]
pub struct Moe<T> {
    /// Around the half.
    pub hc: HyperConnection<T>,
    /// `[D]`.
    pub norm: T,
    /// `[E, D]`.
    pub router: T,
    /// How experts are chosen.
    pub routing: Routing<T>,
    /// Shared expert, `[F, D]`.
    pub shared_gate: T,
    /// Shared expert, `[F, D]`.
    pub shared_up: T,
    /// Shared expert, `[D, F]`.
    pub shared_down: T,
}

/// One layer, routed experts apart.
#[derive(Clone, Debug)]
pub struct Layer<T> {
    /// First half.
    pub attention: Attention<T>,
    /// Second half.
    pub moe: Moe<T>,
}

/// Every weight but the routed experts.
#[derive(Clone, Debug)]
pub struct Tensors<T> {
    /// `[V, D]`.
    pub embedding: T,
    /// First to last.
    pub layers: Vec<Layer<T>>,
    /// Streams to one row; its `scale` has one value.
    pub output_hc: HyperConnection<T>,
    /// `[D]`.
    pub output_norm: T,
    /// `[V, D]`.
    pub output: T,
}

impl<T> HyperConnection<T> {
    fn try_map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<HyperConnection<U>, E> {
        Ok(HyperConnection { function: f(&self.function)?, scale: f(&self.scale)?, base: f(&self.base)? })
    }
}

impl<T> Compressor<T> {
    fn try_map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<Compressor<U>, E> {
        let (kv, gate) = (f(&self.kv)?, f(&self.gate)?);
        Ok(Compressor { kv, gate, positions: f(&self.positions)?, norm: f(&self.norm)? })
    }
}

impl<T> Indexer<T> {
    fn try_map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<Indexer<U>, E> {
        let (q_b, weights) = (f(&self.q_b)?, f(&self.weights)?);
        Ok(Indexer { q_b, weights, compressor: self.compressor.try_map(f)? })
    }
}

impl<T> Attention<T> {
    fn try_map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<Attention<U>, E> {
        Ok(Attention {
            hc: self.hc.try_map(f)?,
            norm: f(&self.norm)?,
            q_a: f(&self.q_a)?,
            q_a_norm: f(&self.q_a_norm)?,
            q_b: f(&self.q_b)?,
            kv: f(&self.kv)?,
            kv_norm: f(&self.kv_norm)?,
            sinks: f(&self.sinks)?,
            output_a: f(&self.output_a)?,
            output_b: f(&self.output_b)?,
            compressor: self.compressor.as_ref().map(|compressor| compressor.try_map(f)).transpose()?,
            indexer: self.indexer.as_ref().map(|indexer| indexer.try_map(f)).transpose()?,
        })
    }
}

impl<T> Routing<T> {
    fn try_map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<Routing<U>, E> {
        Ok(match self {
            Routing::Hash(table) => Routing::Hash(f(table)?),
            Routing::Bias(bias) => Routing::Bias(f(bias)?),
        })
    }
}

impl<T> Moe<T> {
    fn try_map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<Moe<U>, E> {
        Ok(Moe {
            hc: self.hc.try_map(f)?,
            norm: f(&self.norm)?,
            router: f(&self.router)?,
            routing: self.routing.try_map(f)?,
            shared_gate: f(&self.shared_gate)?,
            shared_up: f(&self.shared_up)?,
            shared_down: f(&self.shared_down)?,
        })
    }
}

impl<T> Layer<T> {
    fn try_map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<Layer<U>, E> {
        Ok(Layer { attention: self.attention.try_map(f)?, moe: self.moe.try_map(f)? })
    }
}

impl<T> Tensors<T> {
    /// The same weights, each passed through `f`, in the order of the fields.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn try_map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<Tensors<U>, E> {
        Ok(Tensors {
            embedding: f(&self.embedding)?,
            layers: self.layers.iter().map(|layer| layer.try_map(f)).collect::<Result<_, _>>()?,
            output_hc: self.output_hc.try_map(f)?,
            output_norm: f(&self.output_norm)?,
            output: f(&self.output)?,
        })
    }
}

/// The routed experts of a layer: gate `[E, F, D]`, up `[E, F, D]`, down `[E, D, F]`.
#[derive(Clone, Debug)]
pub struct Experts {
    /// Where their bytes are.
    pub extents: ExpertExtents,
    /// Element types of gate, up and down.
    pub types: [TensorType; 3],
}

/// A model file understood: its dimensions and where each weight lies.
#[derive(Clone, Debug)]
pub struct Model {
    /// Dimensions and constants.
    pub config: Config,
    /// Weights of the trunk.
    pub tensors: Tensors<TensorRef>,
    /// Routed experts, layer by layer.
    pub experts: Vec<Experts>,
    /// Names of tensors that belong to multi-token prediction or drafting and are left alone.
    pub unused: Vec<String>,
}

impl Model {
    /// Binds the tensors of `file` to the weights of the model that its metadata describes.
    ///
    /// # Errors
    /// What [`Config::from_gguf`] refuses; a missing tensor, a wrong shape, or a type without code behind it.
    pub fn from_gguf(file: &Gguf) -> Result<Model, Error> {
        let mut config = Config::from_gguf(file)?;
        if let Some(shared) = file.tensors.get("blk.0.ffn_gate_shexp.weight") {
            config.shared_width = shared.dims.get(1).map_or(0, |&width| width as usize);
        }
        let mut binder = Binder { file, config: &config, used: Vec::new() };
        let (layers, experts) = (0..config.layers)
            .map(|layer| Ok((binder.layer(layer)?, binder.experts(layer)?)))
            .collect::<Result<Vec<_>, Error>>()?
            .into_iter()
            .unzip();
        let tensors = Tensors {
            embedding: binder.matrix(&["token_embd.weight"], config.vocab_size, config.d_model)?,
            layers,
            output_hc: binder.hc(["output_hc", "hc_head"], config.streams, 1)?,
            output_norm: binder.vector(&["output_norm.weight"], config.d_model)?,
            output: binder.matrix(&["output.weight"], config.vocab_size, config.d_model)?,
        };
        let used: std::collections::HashSet<String> = binder.used.into_iter().collect();
        let names = file.tensors.iter().map(|tensor| tensor.name.clone());
        let unused: Vec<String> = names.filter(|name| !used.contains(name)).collect();
        match unused.iter().find(|name| !is_prediction(name, &config)) {
            Some(name) => Err(Error::UnknownTensor { name: name.clone() }),
            None => Ok(Model { config, tensors, experts, unused }),
        }
    }
}

impl Model {
    /// Bytes of all weights that are used, routed experts included.
    pub fn weight_bytes(&self) -> u64 {
        let mut bytes = 0;
        let counted = self.tensors.try_map(&mut |tensor| {
            bytes += tensor.extent.bytes;
            Ok::<_, std::convert::Infallible>(())
        });
        counted.expect("counting cannot fail");
        bytes + self.experts.iter().map(|layer| layer.extents.total_bytes()).sum::<u64>()
    }
}

/// Whether a tensor belongs to multi-token prediction or drafting: by prefix, or a block after the trunk's in a file
/// that has such blocks.
fn is_prediction(name: &str, config: &Config) -> bool {
    let block = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    let after_trunk =
        block.is_some_and(|block| (config.layers..config.layers + config.prediction_layers).contains(&block));
    name.starts_with("mtp.") || name.starts_with("dspark.") || after_trunk
}

/// Looks tensors up under any of their names and checks their shapes and types.
struct Binder<'a> {
    file: &'a Gguf,
    config: &'a Config,
    used: Vec<String>,
}

impl Binder<'_> {
    /// A tensor of `rows` rows of `cols` elements, whatever number of dimensions its rows are spread over.
    fn tensor(&mut self, names: &[&str], rows: usize, cols: usize) -> Result<TensorRef, Error> {
        let found = names.iter().find_map(|name| self.file.tensors.get(name));
        let Some(info) = found else {
            let config = self.config;
            let why = format!("the metadata describes {} layers of width {}", config.layers, config.d_model);
            return Err(Error::MissingTensor { name: names[0].into(), why });
        };
        let found_cols = info.dims.first().copied().unwrap_or(1);
        let found_rows: u64 = info.dims.iter().skip(1).product();
        if (found_rows, found_cols) != (rows as u64, cols as u64) {
            return Err(Error::Shape {
                name: info.name.clone(),
                found: info.dims.clone(),
                expected: if rows == 1 { vec![cols as u64] } else { vec![cols as u64, rows as u64] },
                why: "which is what the metadata's sizes give".into(),
            });
        }
        self.used.push(info.name.clone());
        let extent = Extent { file: info.file, offset: info.offset, bytes: info.size_bytes()? };
        Ok(TensorRef { name: info.name.clone(), ty: info.ty, rows, cols, extent })
    }

    fn matrix(&mut self, names: &[&str], rows: usize, cols: usize) -> Result<TensorRef, Error> {
        let tensor = self.tensor(names, rows, cols)?;
        if quant::is_supported(tensor.ty) {
            return Ok(tensor);
        }
        let known = TensorType::KNOWN.iter().filter(|&&ty| quant::is_supported(ty)).map(ToString::to_string);
        let expected = known.collect::<Vec<_>>().join(", ");
        Err(Error::Type { name: tensor.name, found: tensor.ty.to_string(), expected: format!("one of {expected}") })
    }

    fn vector(&mut self, names: &[&str], len: usize) -> Result<TensorRef, Error> {
        self.matrix(names, 1, len)
    }

    fn hc(&mut self, prefixes: [&str; 2], outputs: usize, scales: usize) -> Result<HyperConnection<TensorRef>, Error> {
        let names = |part: &str| prefixes.map(|prefix| format!("{prefix}_{part}.weight"));
        let [function, scale, base] = ["fn", "scale", "base"].map(names);
        fn both(names: &[String; 2]) -> [&str; 2] {
            [&names[0], &names[1]]
        }
        Ok(HyperConnection {
            function: self.matrix(&both(&function), outputs, self.config.stream_width())?,
            scale: self.vector(&both(&scale), scales)?,
            base: self.vector(&both(&base), outputs)?,
        })
    }

    /// `prefixes` are of this layout's names and of the older dialect's, whose parts are called `wkv` and `wgate`.
    fn compressor(&mut self, prefixes: [String; 2], ratio: usize, row: usize) -> Result<Compressor<TensorRef>, Error> {
        let names =
            |part: &str, old: &str| [format!("{}{part}.weight", prefixes[0]), format!("{}{old}.weight", prefixes[1])];
        let width = row * if ratio == 4 { 2 } else { 1 };
        let d_model = self.config.d_model;
        let [kv, gate] = [names("kv", "wkv"), names("gate", "wgate")];
        let [ape, norm] = [names("ape", "ape"), names("norm", "norm")];
        Ok(Compressor {
            kv: self.matrix(&[&kv[0], &kv[1]], width, d_model)?,
            gate: self.matrix(&[&gate[0], &gate[1]], width, d_model)?,
            positions: self.matrix(&[&ape[0], &ape[1]], ratio, width)?,
            norm: self.vector(&[&norm[0], &norm[1]], row)?,
        })
    }

    fn attention(&mut self, layer: usize) -> Result<Attention<TensorRef>, Error> {
        let config = self.config;
        let p = format!("blk.{layer}.");
        let name = |part: &str| format!("{p}{part}.weight");
        let (heads_width, ratio) = (config.heads * config.head_dim, config.compress_ratios[layer]);
        let low = config.o_groups * config.o_rank;
        let hc = name("hc_attn");
        let hc = hc.trim_end_matches(".weight");
        let compressor = match ratio {
            0 => None,
            _ => {
                let prefixes = [format!("{p}attn_compressor_"), format!("{p}attn_compressor.")];
                Some(self.compressor(prefixes, ratio, config.head_dim)?)
            }
        };
        let indexer = match ratio {
            4 => Some(Indexer {
                q_b: self.matrix(
                    &[&name("indexer.attn_q_b")],
                    config.index_heads * config.index_head_dim,
                    config.q_rank,
                )?,
                weights: self.matrix(&[&name("indexer.proj")], config.index_heads, config.d_model)?,
                compressor: self.compressor(
                    [format!("{p}indexer_compressor_"), format!("{p}indexer.compressor.")],
                    ratio,
                    config.index_head_dim,
                )?,
            }),
            _ => None,
        };
        Ok(Attention {
            hc: self.hc([hc, hc], config.hc_outputs(), 3)?,
            norm: self.vector(&[&name("attn_norm")], config.d_model)?,
            q_a: self.matrix(&[&name("attn_q_a")], config.q_rank, config.d_model)?,
            q_a_norm: self.vector(&[&name("attn_q_a_norm")], config.q_rank)?,
            q_b: self.matrix(&[&name("attn_q_b")], heads_width, config.q_rank)?,
            kv: self.matrix(&[&name("attn_kv"), &name("attn_kv_a_mqa")], config.head_dim, config.d_model)?,
            kv_norm: self.vector(&[&name("attn_kv_a_norm")], config.head_dim)?,
            sinks: self.vector(&[&name("attn_sinks")], config.heads)?,
            output_a: self.matrix(&[&name("attn_output_a"), &name("attn_o_a")], low, heads_width / config.o_groups)?,
            output_b: self.matrix(&[&name("attn_output_b"), &name("attn_o_b")], config.d_model, low)?,
            compressor,
            indexer,
        })
    }

    fn layer(&mut self, layer: usize) -> Result<Layer<TensorRef>, Error> {
        let attention = self.attention(layer)?;
        let config = self.config;
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let hc = format!("blk.{layer}.hc_ffn");
        let routing = if layer < config.hash_layers {
            let table = self.tensor(&[&name("ffn_gate_tid2eid")], config.vocab_size, config.experts_used)?;
            if table.ty != TensorType::I32 {
                let found = table.ty.to_string();
                return Err(Error::Type { name: table.name, found, expected: "I32".into() });
            }
            Routing::Hash(table)
        } else {
            Routing::Bias(self.vector(&[&format!("blk.{layer}.exp_probs_b.bias")], config.experts)?)
        };
        let moe = Moe {
            hc: self.hc([&hc, &hc], config.hc_outputs(), 3)?,
            norm: self.vector(&[&name("ffn_norm")], config.d_model)?,
            router: self.matrix(&[&name("ffn_gate_inp")], config.experts, config.d_model)?,
            routing,
            shared_gate: self.matrix(&[&name("ffn_gate_shexp")], config.shared_width, config.d_model)?,
            shared_up: self.matrix(&[&name("ffn_up_shexp")], config.shared_width, config.d_model)?,
            shared_down: self.matrix(&[&name("ffn_down_shexp")], config.d_model, config.shared_width)?,
        };
        Ok(Layer { attention, moe })
    }

    fn experts(&mut self, layer: usize) -> Result<Experts, Error> {
        let Config { experts, expert_width, d_model, .. } = *self.config;
        let mut stacked = |part: &str, rows: usize, cols: usize| {
            let name = format!("blk.{layer}.ffn_{part}_exps.weight");
            let expected = vec![cols as u64, rows as u64, experts as u64];
            match self.file.tensors.get(&name) {
                Some(info) if info.dims != expected => Err(Error::Shape {
                    name,
                    found: info.dims.clone(),
                    expected,
                    why: "one matrix for each expert".into(),
                }),
                _ => self.matrix(&[&name], experts * rows, cols),
            }
        };
        let parts = [
            stacked("gate", expert_width, d_model)?,
            stacked("up", expert_width, d_model)?,
            stacked("down", d_model, expert_width)?,
        ];
        let types = [parts[0].ty, parts[1].ty, parts[2].ty];
        Ok(Experts { extents: ExpertExtents::stacked(experts, parts.map(|part| part.extent)), types })
    }
}
