//! Every stage of a backend alone, on the float64 reference's own input (tools/oracle/make_probes.py): where the whole
//! model is wrong, this says which stage is.

use model::{Activation, Backend, Batch, Cancel, Row, Stage, SubLayer};

use crate::common::{References, distance};

/// The reference's values of one run, and which of its positions it kept.
struct Probes {
    references: References,
    tokens: Vec<u32>,
    positions: Vec<usize>,
}

impl Probes {
    fn open() -> Probes {
        let references = References::open("stages");
        let positions = references.ints("positions").into_iter().map(|position| position as usize).collect();
        Probes { tokens: references.tokens(), positions, references }
    }

    fn values(&self, name: &str) -> Vec<f32> {
        self.references.floats(name)
    }

    /// The kept positions' part of a value that has all positions.
    fn kept(&self, values: &[f32]) -> Vec<f32> {
        let width = values.len() / self.tokens.len();
        self.positions.iter().flat_map(|&position| &values[position * width..][..width]).copied().collect()
    }
}

/// A pass of one session from its beginning.
pub fn batch(tokens: impl Iterator<Item = u32>, config: &model::Config) -> Batch {
    let row = |(position, token)| Row { session: 0, position, token, logits: true };
    Batch::new(tokens.enumerate().map(row).collect(), &[0], config).unwrap()
}

/// What was compared, so that no stage can go missing unnoticed.
#[derive(Default)]
pub struct Compared(Vec<(Stage, f64)>);

impl Compared {
    #[track_caller]
    pub fn check(&mut self, stage: Stage, what: &str, ours: &[f32], reference: &[f32]) {
        let error = distance(ours, reference);
        assert!(error.is_finite(), "{what}: {error}");
        self.0.push((stage, error));
    }

    /// Prints the worst error of every stage, and holds it to a range.
    pub fn hold(&self, range: impl Fn(Stage) -> std::ops::RangeInclusive<f64>) {
        for stage in [&[Stage::Embed][..], &Stage::LAYER, &[Stage::Head]].concat() {
            let errors = self.0.iter().filter(|(compared, _)| *compared == stage).map(|(_, error)| *error);
            let (count, worst) = (errors.clone().count(), errors.fold(0.0, f64::max));
            println!("{:<22} {count:>3} comparisons, worst relative L2 error {worst:.1e}", format!("{stage:?}"));
            assert!(count > 0, "{stage:?} was not compared");
            let range = range(stage);
            assert!(range.contains(&worst), "{stage:?}: relative L2 error {worst:e}, expected {range:?}");
        }
    }
}

/// Compares every stage of `backend`, loaded with tiny-iq2 in plain arithmetic.
pub fn stages<B: Backend>(backend: &B) -> Compared {
    let (probes, mut compared) = (Probes::open(), Compared::default());
    let state = backend.new_state().unwrap();
    let kept_tokens = probes.positions.iter().map(|&position| probes.tokens[position]);
    let mut pass = backend.begin(batch(kept_tokens, backend.config()), &[&state]).unwrap();
    backend.embed(&mut pass).unwrap();
    compared.check(Stage::Embed, "embed", &backend.read(&pass, Activation::Streams), &probes.values("embedded"));
    let mut streams = "embedded".to_owned();
    for layer in 0..backend.config().layers {
        let name = |part: &str| format!("L{layer}.{part}");
        backend.write(&mut pass, Activation::Streams, &probes.values(&streams));
        attention(backend, layer, &probes, &mut compared);
        sub_layer(backend, SubLayer::Attention, layer, &mut pass, &probes, &mut compared);
        backend.write(&mut pass, Activation::Streams, &probes.values(&name("mid")));
        sub_layer(backend, SubLayer::Experts, layer, &mut pass, &probes, &mut compared);
        streams = name("hidden");
    }
    backend.write(&mut pass, Activation::Streams, &probes.values(&streams));
    let logits = backend.head(&mut pass).unwrap();
    compared.check(Stage::Head, "head", &backend.read_logits(logits).unwrap(), &probes.values("logits"));
    compared
}

/// The attention stages need all positions before the kept ones.
fn attention<B: Backend>(backend: &B, layer: usize, probes: &Probes, compared: &mut Compared) {
    let name = |part: &str| format!("L{layer}.{part}");
    let state = backend.new_state().unwrap();
    let past = [&state];
    let mut pass = backend.begin(batch(probes.tokens.iter().copied(), backend.config()), &past).unwrap();
    backend.write(&mut pass, Activation::Input, &probes.values(&name("attn_h")));
    backend.project(layer, &past, &mut pass).unwrap();
    for (activation, part) in [(Activation::LowQueries, "qr"), (Activation::Queries, "q")] {
        let ours = probes.kept(&backend.read(&pass, activation));
        compared.check(Stage::Project, &name(part), &ours, &probes.values(&name(part)));
    }
    backend.compress(layer, &past, &mut pass).unwrap();
    backend.index(layer, &past, &mut pass).unwrap();
    backend.attend(layer, &past, &mut pass).unwrap();
    let heads = probes.kept(&backend.read(&pass, Activation::Heads));
    // Compressed rows and the indexer's choice have no activation of their own: a wrong one is seen here.
    for stage in [Stage::Compress, Stage::Index, Stage::Attend] {
        compared.check(stage, &name("heads"), &heads, &probes.values(&name("heads")));
    }
    backend.attention_out(layer, &mut pass).unwrap();
    let output = probes.kept(&backend.read(&pass, Activation::Output));
    compared.check(Stage::AttentionOut, &name("attn_out"), &output, &probes.values(&name("attn_out")));
}

/// The stages around a sub-layer, and the experts.
fn sub_layer<B: Backend>(
    backend: &B,
    sub_layer: SubLayer,
    layer: usize,
    pass: &mut B::Pass,
    probes: &Probes,
    compared: &mut Compared,
) {
    let (prefix, after) = match sub_layer {
        SubLayer::Attention => ("attn", "mid"),
        SubLayer::Experts => ("ffn", "hidden"),
    };
    let [h, out, after] =
        [format!("L{layer}.{prefix}_h"), format!("L{layer}.{prefix}_out"), format!("L{layer}.{after}")];
    backend.hc_pre(layer, sub_layer, pass).unwrap();
    let input = match sub_layer {
        SubLayer::Attention => probes.kept(&probes.values(&h)),
        SubLayer::Experts => probes.values(&h),
    };
    compared.check(Stage::HcPre(sub_layer), &h, &backend.read(pass, Activation::Input), &input);
    backend.write(pass, Activation::Input, &input);
    if sub_layer == SubLayer::Experts {
        let selection = backend.route(layer, pass).unwrap();
        same_experts(backend, layer, pass, probes, compared);
        let leases = backend.lease(layer, &selection).unwrap();
        backend.shared_expert(layer, pass).unwrap();
        backend.routed_experts(layer, selection, leases, &Cancel::default(), pass).unwrap();
        for stage in [Stage::SharedExpert, Stage::RoutedExperts] {
            compared.check(stage, &out, &backend.read(pass, Activation::Output), &probes.values(&out));
        }
    }
    backend.write(pass, Activation::Output, &probes.values(&out));
    backend.hc_post(layer, sub_layer, pass).unwrap();
    compared.check(Stage::HcPost(sub_layer), &after, &backend.read(pass, Activation::Streams), &probes.values(&after));
}

/// The same experts with the same weights, in whatever order each side lists them.
fn same_experts<B: Backend>(backend: &B, layer: usize, pass: &B::Pass, probes: &Probes, compared: &mut Compared) {
    let used = backend.config().experts_used;
    let sorted = |experts: &[f32], weights: &[f32]| -> (Vec<f32>, Vec<f32>) {
        let mut sorted = Vec::new();
        for (experts, weights) in experts.chunks_exact(used).zip(weights.chunks_exact(used)) {
            let mut row: Vec<(f32, f32)> = experts.iter().copied().zip(weights.iter().copied()).collect();
            row.sort_by(|a, b| a.0.total_cmp(&b.0));
            sorted.extend(row);
        }
        sorted.into_iter().unzip()
    };
    let ours = sorted(&backend.read(pass, Activation::Experts), &backend.read(pass, Activation::ExpertWeights));
    let ids: Vec<f32> = probes.references.ints(&format!("L{layer}.experts")).iter().map(|&id| id as f32).collect();
    let reference = sorted(&ids, &probes.values(&format!("L{layer}.expert_w")));
    assert_eq!(ours.0, reference.0, "L{layer}.experts");
    compared.check(Stage::Route, &format!("L{layer}.expert_w"), &ours.1, &reference.1);
}
