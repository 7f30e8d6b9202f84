//! What the tests share.

use model::{Config, Yarn};

/// The dimensions of Flash.
pub fn flash() -> Config {
    Config {
        name: None,
        layers: 43,
        prediction_layers: 0,
        d_model: 4096,
        vocab_size: 129_280,
        context_length: 1 << 20,
        heads: 64,
        head_dim: 512,
        rope_dim: 64,
        q_rank: 1024,
        o_groups: 8,
        o_rank: 1024,
        window: 128,
        compress_ratios: (0..43).map(|layer| if layer < 2 { 0 } else { [4, 128][layer % 2] }).collect(),
        index_heads: 64,
        index_head_dim: 128,
        index_top_k: 512,
        experts: 256,
        experts_used: 6,
        expert_width: 2048,
        shared_width: 2048,
        route_scale: 1.5,
        hash_layers: 3,
        swiglu_limits: vec![10.0; 43],
        shared_swiglu_limits: vec![10.0; 43],
        streams: 4,
        sinkhorn_iterations: 20,
        hc_eps: 1e-6,
        rms_eps: 1e-6,
        rope_base: 10_000.0,
        compress_rope_base: 160_000.0,
        yarn: Yarn { factor: 16.0, original_context: 65_536, beta_fast: 32.0, beta_slow: 1.0 },
    }
}
