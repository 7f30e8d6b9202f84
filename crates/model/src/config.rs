//! The model's dimensions, read from a GGUF file's metadata (docs/spec/model.md §1 and §4.1).
//!
//! Nothing is assumed about sizes: Flash, PRO and anything consistent loads. What the forward pass has no code for is
//! refused here, with the key named.

use gguf::Gguf;

use crate::Error;

/// YaRN scaling of the rotary frequencies in layers with compression.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// By how much slow pairs are slowed.
    pub factor: f64,
    /// Context the frequencies were made for, in tokens.
    pub original_context: u64,
    /// Pairs that turn more often than this in the original context are left alone.
    pub beta_fast: f64,
    /// Pairs that turn less often than this are slowed by the whole factor.
    pub beta_slow: f64,
}

/// Dimensions and constants of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `general.name`, if the file has one.
    pub name: Option<String>,
    /// Layers of the trunk, multi-token-prediction layers not counted.
    pub layers: usize,
    /// Multi-token-prediction layers that follow the trunk in the file; they are left alone.
    pub prediction_layers: usize,
    /// Model width `D`.
    pub d_model: usize,
    /// Tokens in the vocabulary `V`.
    pub vocab_size: usize,
    /// Tokens of context the model was made for.
    pub context_length: usize,
    /// Query heads `H`; keys and values have one head.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rotated values at the end of each head.
    pub rope_dim: usize,
    /// Width of the low-rank query.
    pub q_rank: usize,
    /// Groups of the output projection.
    pub o_groups: usize,
    /// Width of each group's low-rank output.
    pub o_rank: usize,
    /// Tokens in the sliding window, the query's own included.
    pub window: usize,
    /// Compression ratio of each layer: 0 (none), 4 or 128.
    pub compress_ratios: Vec<usize>,
    /// Indexer heads.
    pub index_heads: usize,
    /// Width of an indexer head.
    pub index_head_dim: usize,
    /// Compressed rows an indexer keeps for a query.
    pub index_top_k: usize,
    /// Routed experts of a layer `E`.
    pub experts: usize,
    /// Routed experts a token uses `K`.
    pub experts_used: usize,
    /// Inner width of a routed expert `F`.
    pub expert_width: usize,
    /// Inner width of the shared expert.
    pub shared_width: usize,
    /// Factor on the normalised expert weights.
    pub route_scale: f32,
    /// Leading layers whose experts follow from the token id.
    pub hash_layers: usize,
    /// SwiGLU clamp of each layer's routed experts.
    pub swiglu_limits: Vec<f32>,
    /// SwiGLU clamp of each layer's shared expert.
    pub shared_swiglu_limits: Vec<f32>,
    /// Residual streams `S`.
    pub streams: usize,
    /// Sinkhorn iterations of the hyper-connections.
    pub sinkhorn_iterations: usize,
    /// Epsilon of the hyper-connections.
    pub hc_eps: f32,
    /// Epsilon of every RMS norm.
    pub rms_eps: f32,
    /// Rotary base of layers without compression.
    pub rope_base: f64,
    /// Rotary base of layers with compression.
    pub compress_rope_base: f64,
    /// Scaling of the latter.
    pub yarn: Yarn,
}

impl Config {
    /// Reads and checks the metadata of `file`.
    ///
    /// # Errors
    /// [`Error::Metadata`] for a missing or mistyped key, [`Error::Unsupported`] for a value without code behind it.
    pub fn from_gguf(file: &Gguf) -> Result<Config, Error> {
        let keys = Keys { file };
        keys.require("general.architecture", file.metadata.str("general.architecture")?, &["deepseek4"])?;
        keys.refuse_v4_1()?;
        let (layers, prediction_layers) = keys.layers()?;
        let compress_ratios = keys.compress_ratios(layers)?;
        let head_dim = keys.size("attention.key_length", &[])?;
        let expert_width = keys.size("expert_feed_forward_length", &[])?;
        let swiglu_limits = keys.per_layer("swiglu_clamp_exp", layers)?;
        let shared_swiglu_limits = match keys.find("swiglu_clamp_shexp", &[]) {
            Some(_) => keys.per_layer("swiglu_clamp_shexp", layers)?,
            None => swiglu_limits.clone(),
        };
        let config = Config {
            name: file.metadata.str("general.name").ok().map(Into::into),
            layers,
            prediction_layers,
            d_model: keys.size("embedding_length", &[])?,
            vocab_size: keys.vocab_size()?,
            context_length: keys.size("context_length", &[])?,
            heads: keys.size("attention.head_count", &[])?,
            head_dim,
            rope_dim: keys.size("rope.dimension_count", &[])?,
            q_rank: keys.size("attention.q_lora_rank", &[])?,
            o_groups: keys.size("attention.output_group_count", &[])?,
            o_rank: keys.size("attention.output_lora_rank", &["attention.o_lora_rank"])?,
            window: keys.size("attention.sliding_window", &[])?,
            compress_ratios,
            index_heads: keys.size("attention.indexer.head_count", &[])?,
            index_head_dim: keys.size("attention.indexer.key_length", &[])?,
            index_top_k: keys.size("attention.indexer.top_k", &[])?,
            experts: keys.size("expert_count", &[])?,
            experts_used: keys.size("expert_used_count", &[])?,
            expert_width,
            shared_width: expert_width,
            route_scale: keys.float("expert_weights_scale", &[])? as f32,
            hash_layers: keys.required_count("hash_layer_count")?.min(layers),
            swiglu_limits,
            shared_swiglu_limits,
            streams: keys.size("hyper_connection.count", &["hyper_connection.mult"])?,
            sinkhorn_iterations: keys
                .size("hyper_connection.sinkhorn_iterations", &["hyper_connection.sinkhorn_iters"])?,
            hc_eps: keys.float("hyper_connection.epsilon", &["hyper_connection.eps"])? as f32,
            rms_eps: keys.float("attention.layer_norm_rms_epsilon", &[])? as f32,
            rope_base: keys.float("rope.freq_base", &[])?,
            compress_rope_base: keys.float("attention.compress_rope_freq_base", &["rope.freq_base_compress"])?,
            yarn: keys.yarn()?,
        };
        keys.check(&config)?;
        Ok(config)
    }

    /// Values in a row's residual streams, `S · D`.
    pub fn stream_width(&self) -> usize {
        self.streams * self.d_model
    }

    /// Outputs of a hyper-connection's projection: `pre`, `post` and the `S × S` mix.
    pub fn hc_outputs(&self) -> usize {
        2 * self.streams + self.streams * self.streams
    }
}

/// Look-ups under the architecture's prefix, with the names of other dialects as second choice.
struct Keys<'a> {
    file: &'a Gguf,
}

impl Keys<'_> {
    fn find(&self, key: &str, aliases: &[&str]) -> Option<String> {
        let full = |key: &&str| format!("deepseek4.{key}");
        let mut names = std::iter::once(&key).chain(aliases).map(full);
        names.find(|name| self.file.metadata.get(name).is_some())
    }

    /// The key under which the file has the value, or the preferred one for the error that will follow.
    fn name(&self, key: &str, aliases: &[&str]) -> String {
        self.find(key, aliases).unwrap_or_else(|| format!("deepseek4.{key}"))
    }

    fn unsupported<T>(&self, key: &str, found: impl ToString, expected: impl Into<String>) -> Result<T, Error> {
        Err(Error::Unsupported { key: key.into(), found: found.to_string(), expected: expected.into() })
    }

    fn require(&self, key: &str, found: &str, expected: &[&str]) -> Result<(), Error> {
        if expected.contains(&found) { Ok(()) } else { self.unsupported(key, found, expected.join(" or ")) }
    }

    fn size(&self, key: &str, aliases: &[&str]) -> Result<usize, Error> {
        let name = self.name(key, aliases);
        match self.file.metadata.u64(&name)? {
            value @ 1..=0xffff_ffff => Ok(value as usize),
            value => self.unsupported(&name, value, "a number from 1 to 4294967295"),
        }
    }

    /// A number that may be 0.
    fn required_count(&self, key: &str) -> Result<usize, Error> {
        let name = self.name(key, &[]);
        Ok(usize::try_from(self.file.metadata.u64(&name)?).unwrap_or(usize::MAX))
    }

    /// The same, 0 where the key is absent.
    fn count(&self, key: &str) -> Result<usize, Error> {
        self.find(key, &[]).map_or(Ok(0), |_| self.required_count(key))
    }

    fn float(&self, key: &str, aliases: &[&str]) -> Result<f64, Error> {
        let name = self.name(key, aliases);
        let value = f64::from(self.file.metadata.f32(&name)?);
        if value.is_finite() && value > 0.0 { Ok(value) } else { self.unsupported(&name, value, "a positive number") }
    }

    /// V4.1 shares the architecture's name but is another model.
    fn refuse_v4_1(&self) -> Result<(), Error> {
        let tensors = &self.file.tensors;
        if tensors.get("output_hc_base.weight").or(tensors.get("hc_head_base.weight")).is_some() {
            return Ok(());
        }
        Err(Error::MissingTensor {
            name: "output_hc_base.weight".into(),
            why: "every DeepSeek V4 file has it (V4.1 does not: it is another model, which this program does not run)"
                .into(),
        })
    }

    /// Layers of the trunk and prediction layers after it. In one dialect `block_count` includes the latter; then their
    /// tensors are in the file.
    fn layers(&self) -> Result<(usize, usize), Error> {
        let blocks = self.size("block_count", &[])?;
        let extra = self.count("nextn_predict_layers")?;
        let trunk = blocks.saturating_sub(extra);
        let present = self.file.tensors.get(&format!("blk.{trunk}.nextn.eh_proj.weight")).is_some();
        match trunk {
            0 if present => {
                self.unsupported(&self.name("nextn_predict_layers", &[]), extra, format!("less than {blocks}"))
            }
            _ if extra > 0 && present => Ok((trunk, extra)),
            _ => Ok((blocks, 0)),
        }
    }

    fn vocab_size(&self) -> Result<usize, Error> {
        match self.find("vocab_size", &[]) {
            Some(_) => self.size("vocab_size", &[]),
            None => Ok(self.file.metadata.str_array("tokenizer.ggml.tokens")?.len()),
        }
    }

    fn compress_ratios(&self, layers: usize) -> Result<Vec<usize>, Error> {
        let name = self.name("attention.compress_ratios", &["attention.layer_compress_ratio"]);
        let ratios = self.file.metadata.u64_array(&name)?;
        if ratios.len() < layers {
            return self.unsupported(&name, format!("{} entries", ratios.len()), format!("at least {layers}"));
        }
        let ratio = |(layer, &ratio): (usize, &u64)| match ratio {
            0 | 4 | 128 => Ok(ratio as usize),
            _ => self.unsupported(&format!("{name}[{layer}]"), ratio, "0, 4 or 128"),
        };
        ratios.iter().take(layers).enumerate().map(ratio).collect()
    }

    fn per_layer(&self, key: &str, layers: usize) -> Result<Vec<f32>, Error> {
        let name = self.name(key, &[]);
        let values = self.file.metadata.f32_array_or_scalar(&name, layers)?;
        if values.len() < layers {
            return self.unsupported(
                &name,
                format!("{} entries", values.len()),
                format!("one number, or at least {layers}"),
            );
        }
        match values[..layers].iter().find(|value| !(value.is_finite() && **value > 0.0)) {
            Some(value) => self.unsupported(&name, value, "positive numbers"),
            None => Ok(values[..layers].to_vec()),
        }
    }

    fn yarn(&self) -> Result<Yarn, Error> {
        if let Some(name) = self.find("rope.scaling.type", &[]) {
            self.require(&name, self.file.metadata.str(&name)?, &["yarn"])?;
        }
        Ok(Yarn {
            factor: self.float("rope.scaling.factor", &[])?,
            original_context: self.size("rope.scaling.original_context_length", &[])? as u64,
            beta_fast: self.float("rope.scaling.yarn_beta_fast", &[])?,
            beta_slow: self.float("rope.scaling.yarn_beta_slow", &[])?,
        })
    }

    /// Values that only one choice of has code behind it, and relations between sizes.
    fn check(&self, config: &Config) -> Result<(), Error> {
        for (key, only) in [
            ("attention.head_count_kv", 1),
            ("expert_shared_count", 1),
            ("expert_gating_func", 4),
            ("attention.value_length", config.head_dim as u64),
            ("expert_group_count", 0),
            ("expert_group_used_count", 0),
        ] {
            if let Some(name) = self.find(key, &[]) {
                let found = self.file.metadata.u64(&name)?;
                if found != only {
                    return self.unsupported(&name, found, only.to_string());
                }
            }
        }
        if let Some(name) = self.find("expert_weights_norm", &[])
            && !self.file.metadata.bool(&name)?
        {
            return self.unsupported(&name, false, "true");
        }
        let relations = [
            ("rope.dimension_count", config.rope_dim, config.rope_dim.is_multiple_of(2), "an even number".to_owned()),
            (
                "attention.key_length",
                config.head_dim,
                config.head_dim > config.rope_dim && (config.head_dim - config.rope_dim).is_multiple_of(64),
                format!("rope.dimension_count ({}) plus a multiple of 64", config.rope_dim),
            ),
            (
                "attention.indexer.key_length",
                config.index_head_dim,
                config.index_head_dim == 128 && config.rope_dim <= 128,
                "128".into(),
            ),
            (
                "attention.output_group_count",
                config.o_groups,
                config.heads.is_multiple_of(config.o_groups),
                format!("a divisor of attention.head_count ({})", config.heads),
            ),
            (
                "expert_used_count",
                config.experts_used,
                config.experts_used <= config.experts,
                format!("at most expert_count ({})", config.experts),
            ),
            ("vocab_size", config.vocab_size, config.vocab_size > 1, "at least 2".into()),
            ("attention.sliding_window", config.window, config.window <= 1 << 16, "at most 65536".into()),
            ("hyper_connection.count", config.streams, config.streams <= 16, "at most 16".into()),
            (
                "hyper_connection.sinkhorn_iterations",
                config.sinkhorn_iterations,
                config.sinkhorn_iterations <= 1000,
                "at most 1000".into(),
            ),
        ];
        for (key, found, holds, expected) in relations {
            if !holds {
                return self.unsupported(&self.name(key, &[]), found, expected);
            }
        }
        Ok(())
    }
}
