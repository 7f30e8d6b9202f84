//! Figures in Prometheus' text form.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use session::engine::Engine;

use crate::request::Api;
use crate::wiring::Figures;

/// Seconds at which the buckets of histograms end.
const BUCKETS: [f64; 12] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0];

type Histograms = Family<OfApi, Histogram, fn() -> Histogram>;

/// What has happened, counted.
pub struct Metrics {
    registry: Registry,
    answers: Family<Answer, Counter>,
    first_bytes: Histograms,
    durations: Histograms,
    disconnects: Counter,
    recoveries: Counter,
    records_failed: Counter,
}

/// Labels of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answer {
    api: &'static str,
    status: u16,
}

/// The label of an API.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfApi {
    api: &'static str,
}

impl Metrics {
    /// Counters at zero.
    pub fn new(engine: Engine, figures: Arc<dyn Fn() -> Figures + Send + Sync>) -> Metrics {
        let mut registry = Registry::with_prefix("infall");
        let histograms = || Histograms::new_with_constructor(|| Histogram::new(BUCKETS));
        let metrics = Metrics {
            answers: Family::default(),
            first_bytes: histograms(),
            durations: histograms(),
            disconnects: Counter::default(),
            recoveries: Counter::default(),
            records_failed: Counter::default(),
            registry: Registry::default(),
        };
        registry.register("answers", "Answers by API and HTTP status", metrics.answers.clone());
        let help = "From a request's arrival to the first text of its answer";
        registry.register_with_unit("first_text", help, Unit::Seconds, metrics.first_bytes.clone());
        let help = "From a request's arrival to the end of its answer";
        registry.register_with_unit("request", help, Unit::Seconds, metrics.durations.clone());
        registry.register(
            "disconnects",
            "Clients that left before their answer was complete",
            metrics.disconnects.clone(),
        );
        registry.register("recoveries", "Malformed calls that were tried again", metrics.recoveries.clone());
        let help = "Turns and responses that could not be recorded";
        registry.register("records_failed", help, metrics.records_failed.clone());
        registry.register_collector(Box::new(OfEngine { engine, figures }));
        Metrics { registry, ..metrics }
    }

    /// An answer was given.
    pub fn answered(&self, api: Api, status: u16) {
        self.answers.get_or_create(&Answer { api: api.name(), status }).inc();
    }

    /// An answer's first text came.
    pub fn first_text(&self, api: Api, after: Duration) {
        self.first_bytes.get_or_create(&OfApi { api: api.name() }).observe(after.as_secs_f64());
    }

    /// An answer was complete.
    pub fn ended(&self, api: Api, after: Duration) {
        self.durations.get_or_create(&OfApi { api: api.name() }).observe(after.as_secs_f64());
    }

    /// A client left.
    pub fn disconnected(&self) {
        self.disconnects.inc();
    }

    /// A malformed call was tried again.
    pub fn recovered(&self) {
        self.recoveries.inc();
    }

    /// A turn or a response could not be recorded.
    pub fn record_failed(&self) {
        self.records_failed.inc();
    }

    /// All of it as text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail, and nothing else can.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}

/// What the engine counts itself, asked when somebody looks.
struct OfEngine {
    engine: Engine,
    figures: Arc<dyn Fn() -> Figures + Send + Sync>,
}

impl fmt::Debug for OfEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OfEngine")
    }
}

impl Collector for OfEngine {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let stats = self.engine.stats();
        let Figures { experts_hits, experts_misses, experts_read_bytes, memory_bytes } = (self.figures)();
        let gauges = [
            ("requests_waiting", "Requests that wait", stats.waiting as u64),
            ("requests_active", "Requests that read or generate", stats.active as u64),
            ("sessions_idle", "Sessions that wait for their conversation to go on", stats.idle_sessions as u64),
            ("memory_bytes", "Bytes of memory in use", memory_bytes),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value as i64);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let counters = [
            ("requests_ended", "Requests that ended with a turn", stats.ended),
            ("requests_failed", "Requests that failed", stats.failed),
            ("requests_cancelled", "Requests cancelled", stats.cancelled),
            ("prefill_tokens", "Tokens of prompts that were read", stats.prefill_tokens),
            ("cached_tokens", "Tokens of prompts that sessions held already", stats.cached_tokens),
            ("decode_tokens", "Tokens generated", stats.decode_tokens),
            ("decode_passes", "Passes that decoded", stats.decode_passes),
            ("decode_rows", "Rows of the passes that decoded", stats.decode_rows),
            ("snapshots_saved", "Sessions that were saved", stats.saved_snapshots),
            ("snapshots_failed", "Sessions that could not be saved", stats.failed_snapshots),
            ("snapshots_loaded", "Sessions that were loaded", stats.loaded_snapshots),
            ("prefill_milliseconds", "Time spent reading prompts", stats.prefill_time.as_millis() as u64),
            ("decode_milliseconds", "Time spent decoding", stats.decode_time.as_millis() as u64),
            ("experts_hits", "Experts that were in memory when they were chosen", experts_hits),
            ("experts_misses", "Experts that were not", experts_misses),
            ("experts_read_bytes", "Bytes read from disk for experts", experts_read_bytes),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        Ok(())
    }
}
