//! How fast decoding could be at best when experts are streamed: what its stages cost with every weight in memory, and
//! what a disk takes for the experts that are missing.
//!
//! Experts of hash-routed layers are known from the token, so their reads begin with it, one layer after the other. A
//! learned layer's are known after its router: then the shared expert and the present ones are computed while the missing
//! ones are read, and the missing ones are computed when all of them are there. An engine that computes some missing experts
//! while others are still on their way, or guesses what a learned layer will choose, can be faster than this.

use std::time::{Duration, Instant};

pub use infall::median;
use model::{Backend, Error, Observer, Stage, SubLayer};
use serde::{Deserialize, Serialize};

/// What the parts of a layer take, in µs.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct LayerTimes {
    /// Attention, and everything else but the parts below.
    pub attention_us: f64,
    /// Choosing experts.
    pub router_us: f64,
    /// The shared expert.
    pub shared_us: f64,
    /// All routed experts of a token.
    pub experts_us: f64,
}

/// What the parts of a token take, in µs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TokenTimes {
    /// Before the first layer.
    pub embed_us: f64,
    /// Layer by layer.
    pub layers: Vec<LayerTimes>,
    /// After the last layer.
    pub head_us: f64,
}

impl TokenTimes {
    /// The medians of each part.
    pub fn medians(tokens: &[TokenTimes]) -> TokenTimes {
        let median = |of: &dyn Fn(&TokenTimes) -> f64| median(tokens.iter().map(of));
        let layer = |layer: usize| LayerTimes {
            attention_us: median(&|token| token.layers[layer].attention_us),
            router_us: median(&|token| token.layers[layer].router_us),
            shared_us: median(&|token| token.layers[layer].shared_us),
            experts_us: median(&|token| token.layers[layer].experts_us),
        };
        TokenTimes {
            embed_us: median(&|token| token.embed_us),
            layers: (0..tokens.first().map_or(0, |token| token.layers.len())).map(layer).collect(),
            head_us: median(&|token| token.head_us),
        }
    }
}

/// Takes the time of each stage of a token.
pub struct StageClock {
    last: Instant,
    times: TokenTimes,
}

impl StageClock {
    /// A token begins now.
    pub fn begin(layers: usize) -> StageClock {
        let times = TokenTimes { layers: vec![LayerTimes::default(); layers], ..TokenTimes::default() };
        StageClock { last: Instant::now(), times }
    }

    /// What it took.
    pub fn end(self) -> TokenTimes {
        self.times
    }

    fn lap_us(&mut self) -> f64 {
        let lap: Duration = self.last.elapsed();
        self.last += lap;
        lap.as_secs_f64() * 1e6
    }
}

impl<B: Backend> Observer<B> for StageClock {
    fn after(&mut self, layer: Option<usize>, stage: Stage, _: &B, _: &B::Pass) -> Result<(), Error> {
        let lap = self.lap_us();
        let Some(layer) = layer else {
            let part = if stage == Stage::Embed { &mut self.times.embed_us } else { &mut self.times.head_us };
            *part += lap;
            return Ok(());
        };
        let layer = &mut self.times.layers[layer];
        let part = match stage {
            Stage::Route => &mut layer.router_us,
            Stage::SharedExpert => &mut layer.shared_us,
            Stage::RoutedExperts => &mut layer.experts_us,
            _ => &mut layer.attention_us,
        };
        *part += lap;
        debug_assert!(stage != Stage::HcPre(SubLayer::Attention) || layer.router_us == 0.0, "one token at a time");
        Ok(())
    }
}

/// What a layer has to read for a token.
#[derive(Clone, Copy, Debug)]
pub struct LayerReads {
    /// Experts that the layer uses.
    pub used: usize,
    /// How many of them are read, before the layer or in it.
    pub missing: f64,
    /// Bytes of one.
    pub expert_bytes: f64,
    /// Whether they are known when the token is.
    pub is_hashed: bool,
}

/// Where a token's time goes, in µs. The sum is the bound.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Bound {
    /// Embedding, attention and all that is neither router nor expert.
    pub attention_us: f64,
    /// Routers.
    pub router_us: f64,
    /// Shared experts, and experts that are there.
    pub present_us: f64,
    /// The disk, as far as the above does not cover it.
    pub disk_us: f64,
    /// Experts that were read.
    pub missing_us: f64,
    /// The head.
    pub head_us: f64,
}

impl Bound {
    /// Of one token.
    pub fn new(times: &TokenTimes, reads: &[LayerReads], disk_bytes_per_us: f64) -> Bound {
        let mut bound = Bound { attention_us: times.embed_us, ..Bound::default() };
        // When the disk will have read what it was asked for.
        let mut disk_us = 0.0;
        for (times, reads) in times.layers.iter().zip(reads) {
            let asked_us = if reads.is_hashed { 0.0 } else { bound.total_us() + times.attention_us + times.router_us };
            disk_us = f64::max(disk_us, asked_us) + reads.missing * reads.expert_bytes / disk_bytes_per_us;
            assert!(reads.missing <= reads.used as f64, "{} of {} experts are missing", reads.missing, reads.used);
            let expert_us = times.experts_us / reads.used as f64;
            bound.attention_us += times.attention_us;
            bound.router_us += times.router_us;
            bound.present_us += times.shared_us + (reads.used as f64 - reads.missing) * expert_us;
            if reads.missing > 0.0 {
                bound.disk_us += (disk_us - bound.total_us()).max(0.0);
            }
            bound.missing_us += reads.missing * expert_us;
        }
        bound.head_us = times.head_us;
        bound
    }

    /// The bound.
    pub fn total_us(&self) -> f64 {
        self.attention_us + self.router_us + self.present_us + self.disk_us + self.missing_us + self.head_us
    }

    /// The mean of several tokens', term by term.
    pub fn mean(bounds: &[Bound]) -> Bound {
        let mean = |of: fn(&Bound) -> f64| bounds.iter().map(of).sum::<f64>() / bounds.len() as f64;
        Bound {
            attention_us: mean(|bound| bound.attention_us),
            router_us: mean(|bound| bound.router_us),
            present_us: mean(|bound| bound.present_us),
            disk_us: mean(|bound| bound.disk_us),
            missing_us: mean(|bound| bound.missing_us),
            head_us: mean(|bound| bound.head_us),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer_reads(missing: f64, is_hashed: bool) -> LayerReads {
        LayerReads { used: 4, missing, expert_bytes: 100.0, is_hashed }
    }

    #[test]
    fn a_learned_layer_waits_for_what_computing_does_not_cover() {
        let layer = LayerTimes { attention_us: 10.0, router_us: 1.0, shared_us: 5.0, experts_us: 8.0 };
        let times = TokenTimes { embed_us: 2.0, layers: vec![layer], head_us: 3.0 };
        // Two experts of 100 bytes at 10 bytes/µs: 20 µs, of which 5 + 2 · 2 are covered.
        let bound = Bound::new(&times, &[layer_reads(2.0, false)], 10.0);
        assert_eq!((bound.present_us, bound.disk_us, bound.missing_us), (9.0, 11.0, 4.0));
        assert_eq!(bound.total_us(), 2.0 + 10.0 + 1.0 + 20.0 + 4.0 + 3.0);
        let resident = Bound::new(&times, &[layer_reads(0.0, false)], 10.0);
        assert_eq!(resident.total_us(), 2.0 + 10.0 + 1.0 + 5.0 + 8.0 + 3.0);
    }

    #[test]
    fn reads_of_hash_routed_layers_begin_with_the_token() {
        let layer = LayerTimes { attention_us: 10.0, router_us: 0.0, shared_us: 0.0, experts_us: 4.0 };
        let times = TokenTimes { embed_us: 0.0, layers: vec![layer; 2], head_us: 0.0 };
        // The first layer's expert is there at 10, as attention ends; the second's at 20, before its attention does.
        let bound = Bound::new(&times, &[layer_reads(1.0, true); 2], 10.0);
        assert_eq!((bound.disk_us, bound.total_us()), (0.0, 28.0));
        let learned = Bound::new(&times, &[layer_reads(1.0, false); 2], 10.0);
        assert_eq!(learned.disk_us, 2.0 * (10.0 - 3.0));
    }
}
