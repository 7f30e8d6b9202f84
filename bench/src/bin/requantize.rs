//! Quantises the routed experts of a model anew, with an importance matrix gathered by running it.
//!
//! `cargo run --release -p infall-bench --bin requantize -- IN.gguf OUT.gguf --gate-up IQ2_XXS --down Q2_K --calibration FILE.jsonl`
//!
//! The calibration file has the form of the held-out sets (models/nano/heldout); prompts and answers are run once. A column of
//! an expert's matrix matters as much as the mean square of what it was multiplied with, over the rows that chose the expert.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use bench::heldout::Item;
use clap::Parser;
use cpu::{CpuBackend, Options, Pass};
use gguf::{Gguf, TensorInfo, TensorType, Value, Writer};
use infall::load::ModelFile;
use model::{Activation, Backend, Cancel, Config, Error, Model, Observer, Precision, Row, Stage, forward};
use quant::math;
use store::{Extent, Source};

/// Quantises the routed experts of a model anew.
#[derive(Parser)]
struct Arguments {
    /// The model to start from, GGUF.
    input: PathBuf,
    /// The file to write.
    output: PathBuf,
    /// Type of the experts' gate and up matrices.
    #[arg(long, default_value = "IQ2_XXS", value_parser = parse_type)]
    gate_up: TensorType,
    /// Type of the experts' down matrices.
    #[arg(long, default_value = "Q2_K", value_parser = parse_type)]
    down: TensorType,
    /// What to run to see which columns matter.
    #[arg(long)]
    calibration: PathBuf,
}

fn parse_type(name: &str) -> Result<TensorType, String> {
    let known = TensorType::KNOWN.iter().find(|ty| ty.to_string() == name);
    known.copied().ok_or_else(|| format!("no element type is called {name}"))
}

/// The stacked matrices of one layer, dequantised.
struct Experts {
    gate: Vec<f32>,
    up: Vec<f32>,
}

/// Sums of squares of what each expert's matrices were multiplied with, and over how many rows.
struct Importance<'a> {
    config: &'a Config,
    experts: Vec<Experts>,
    /// `[layer][expert · D + column]`: inputs of gate and up.
    input: Vec<Vec<f32>>,
    /// `[layer][expert · F + column]`: inputs of down.
    inner: Vec<Vec<f32>>,
}

impl<'a> Importance<'a> {
    fn new(model: &'a Model, source: &Source) -> Result<Importance<'a>> {
        let config = &model.config;
        let dequantised = |layer: &model::tensors::Experts, part: usize| -> Result<Vec<f32>> {
            let first = layer.extents.parts[part];
            let bytes = source.read(Extent { bytes: first.bytes * config.experts as u64, ..first })?;
            let mut values = vec![0.0; config.experts * config.expert_width * config.d_model];
            quant::dequantize(layer.types[part], &bytes, &mut values);
            Ok(values)
        };
        let experts = model.experts.iter();
        let experts = experts.map(|layer| Ok(Experts { gate: dequantised(layer, 0)?, up: dequantised(layer, 1)? }));
        Ok(Importance {
            config,
            experts: experts.collect::<Result<_>>()?,
            input: vec![vec![0.0; config.experts * config.d_model]; config.layers],
            inner: vec![vec![0.0; config.experts * config.expert_width]; config.layers],
        })
    }

    /// One row's use of one expert.
    fn add(&mut self, layer: usize, expert: usize, h: &[f32], weight: f32) {
        let (d, f, limit) = (self.config.d_model, self.config.expert_width, self.config.swiglu_limits[layer]);
        self.input[layer][expert * d..][..d].iter_mut().zip(h).for_each(|(sum, x)| *sum += x * x);
        let matrices = &self.experts[layer];
        for row in 0..f {
            let at = (expert * f + row) * d;
            let gate = quant::exact::dot(&matrices.gate[at..][..d], h).min(limit);
            let up = quant::exact::dot(&matrices.up[at..][..d], h).clamp(-limit, limit);
            let inner = math::silu(gate) * up * weight;
            self.inner[layer][expert * f + row] += inner * inner;
        }
    }

    /// The columns' importance for the matrix of one expert; all alike for an expert that was never chosen.
    fn of<'b>(sums: &'b [f32], expert: usize, cols: usize, alike: &'b [f32]) -> &'b [f32] {
        let sums = &sums[expert * cols..][..cols];
        if sums.iter().any(|&sum| sum > 0.0) { sums } else { &alike[..cols] }
    }
}

impl Observer<CpuBackend> for Importance<'_> {
    fn after(&mut self, layer: Option<usize>, stage: Stage, backend: &CpuBackend, pass: &Pass) -> Result<(), Error> {
        let (Some(layer), Stage::Route) = (layer, stage) else { return Ok(()) };
        let (d, used) = (self.config.d_model, self.config.experts_used);
        let inputs = backend.read(pass, Activation::Input);
        let experts = backend.read(pass, Activation::Experts);
        let weights = backend.read(pass, Activation::ExpertWeights);
        for (i, (&expert, &weight)) in experts.iter().zip(&weights).enumerate() {
            self.add(layer, expert as usize, &inputs[i / used * d..][..d], weight);
        }
        Ok(())
    }
}

/// Runs every calibration item through the model.
fn calibrate(file: &ModelFile, path: &PathBuf, importance: &mut Importance<'_>) -> Result<usize> {
    let exact = Options { precision: Precision::Exact, ..Options::default() };
    let (tokenizer, backend) = (file.tokenizer()?, file.load_with(exact)?);
    let (text, mut count) = (std::fs::read_to_string(path)?, 0);
    for line in text.lines() {
        let tokens = Item::parse(line)?.whole(&tokenizer)?;
        let row = |(position, &token)| Row { session: 0, position, token, logits: false };
        let rows = tokens.iter().enumerate().map(row).collect();
        let mut state = backend.new_state()?;
        forward(&backend, rows, &mut [&mut state], &Cancel::default(), importance)?;
        count += tokens.len();
    }
    if count == 0 {
        bail!("{} has no items", path.display());
    }
    Ok(count)
}

/// The expert tensors of the new file: their type, and the sums their columns' importance comes from.
fn plan<'a>(arguments: &Arguments, importance: &'a Importance<'_>) -> HashMap<String, (TensorType, &'a [f32])> {
    let layers = (0..importance.config.layers).flat_map(|layer| {
        let name = |part: &str| format!("blk.{layer}.ffn_{part}_exps.weight");
        let (input, inner) = (importance.input[layer].as_slice(), importance.inner[layer].as_slice());
        [
            (name("gate"), (arguments.gate_up, input)),
            (name("up"), (arguments.gate_up, input)),
            (name("down"), (arguments.down, inner)),
        ]
    });
    layers.collect()
}

/// Writes one stacked expert tensor in its new type.
fn write_experts(old: &TensorInfo, bytes: &[u8], ty: TensorType, sums: &[f32], to: &mut dyn Write) -> Result<()> {
    let [cols, rows, experts] = [0, 1, 2].map(|dim| old.dims[dim] as usize);
    let alike = vec![1.0; cols];
    let (row_bytes, new_bytes) = (quant::row_bytes(old.ty, cols), quant::row_bytes(ty, cols) * rows);
    let (mut values, mut out) = (vec![0.0; rows * cols], vec![0; new_bytes]);
    for expert in 0..experts {
        quant::dequantize(old.ty, &bytes[expert * rows * row_bytes..][..rows * row_bytes], &mut values);
        quant::quantize(ty, &values, Some(Importance::of(sums, expert, cols, &alike)), &mut out)?;
        to.write_all(&out)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let file = ModelFile::open(Some(&arguments.input))?;
    let header: &Gguf = &file.header;
    let source = Source::open(header.files.iter().map(|part| (&part.path, part.bytes)))?;
    let mut importance = Importance::new(&file.model, &source)?;
    let tokens = calibrate(&file, &arguments.calibration, &mut importance)?;
    println!("importance from {tokens} tokens");

    let experts = plan(&arguments, &importance);
    let mut writer = Writer::new();
    for (key, value) in header.metadata.iter() {
        writer.set(key, value.clone())?;
    }
    writer.set("quantize.imatrix.file", Value::String(arguments.calibration.display().to_string()))?;
    for tensor in header.tensors.iter() {
        let ty = experts.get(&tensor.name).map_or(tensor.ty, |(ty, _)| *ty);
        writer.tensor(&tensor.name, &tensor.dims, ty)?;
    }
    let out =
        File::create(&arguments.output).with_context(|| format!("cannot create {}", arguments.output.display()))?;
    let data = |new: &TensorInfo, to: &mut dyn Write| -> std::io::Result<()> {
        let old = header.tensors.get(&new.name).expect("the same tensors");
        let bytes = old.size_bytes().map_err(std::io::Error::other)?;
        let extent = store::Extent { file: old.file, offset: old.offset, bytes };
        let bytes = source.read(extent).map_err(std::io::Error::other)?;
        match experts.get(&new.name) {
            Some((ty, sums)) => write_experts(old, &bytes, *ty, sums, to).map_err(std::io::Error::other),
            None => to.write_all(&bytes),
        }
    };
    let bytes = writer.write(&mut BufWriter::new(out), data)?;
    println!("wrote {bytes} bytes to {}", arguments.output.display());
    Ok(())
}
