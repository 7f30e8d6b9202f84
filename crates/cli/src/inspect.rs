//! `infall inspect`: what a file holds, and whether this program can run it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use gguf::{Gguf, TensorInfo, Value};
use indicatif::HumanCount;
use model::{Config, Model};
use serde::Serialize;
use serde_json::json;
use store::Source;
use text::prompt::ControlTokens;

use crate::terminal::{self, Stream, Unit};
use crate::{Outcome, flags, load};

/// Arrays of metadata up to this length are listed in JSON; longer ones (vocabularies) are counted.
const LISTED_ELEMENTS: usize = 128;

/// Bytes read and checked at a time.
const CHECKED_BYTES: u64 = 4 << 20;

/// What a tensor is for, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Class {
    Embedding,
    Output,
    Attention,
    Compressors,
    Indexers,
    HyperConnections,
    Router,
    SharedExperts,
    RoutedExperts,
    NormsSinksBiases,
    Drafting,
    Other,
}

/// The tensors of one class.
#[derive(Default, Serialize)]
struct Share {
    tensors: usize,
    /// Tensors of each element type.
    types: BTreeMap<String, usize>,
    bytes: u64,
}

/// A tensor with values that no weight can have.
#[derive(Serialize)]
struct Damage {
    tensor: String,
    not_finite: u64,
    /// Index of the first of them.
    first_element: u64,
}

/// What `--check` found.
#[derive(Default, Serialize)]
struct Check {
    tensors: usize,
    damaged: Vec<Damage>,
    /// Tensors whose elements are whole numbers or of a type that cannot be read.
    unread: Vec<String>,
}

/// Everything there is to tell.
struct Report<'a> {
    header: &'a Gguf,
    shares: BTreeMap<Class, Share>,
    left_alone: Vec<&'a str>,
    refusals: Vec<String>,
    check: Option<Check>,
}

/// Runs the command.
pub fn inspect(flags: &flags::Inspect) -> anyhow::Result<Outcome> {
    let header = Gguf::open(&flags.file)?;
    let name = flags.file.display().to_string();
    let mut report = Report::new(&header, &name);
    if flags.check {
        let check = check(&header)?;
        report.refusals.extend(check.damaged.iter().map(|damage| {
            let Damage { tensor, not_finite, first_element } = damage;
            format!("{name}: tensor {tensor} holds {not_finite} NaN or infinite values, the first at element {first_element}, \
                     expected finite numbers. The file is damaged; download or convert it again")
        }));
        report.check = Some(check);
    }
    let text = if flags.json { report.json_text() } else { report.tables() };
    Stream::Out.write(&text)?;
    match report.refusals.into_iter().next() {
        None => Ok(Outcome::Done),
        Some(first) => Err(anyhow::anyhow!(first)),
    }
}

impl<'a> Report<'a> {
    fn new(header: &'a Gguf, name: &str) -> Report<'a> {
        let (model, refusals) = understand(header, name);
        let layers = model.as_ref().map(|model| model.config.layers);
        let mut shares: BTreeMap<Class, Share> = BTreeMap::new();
        let mut left_alone = Vec::new();
        for tensor in header.tensors.iter() {
            let class = class_of(&tensor.name, layers);
            let share = shares.entry(class).or_default();
            share.tensors += 1;
            *share.types.entry(tensor.ty.to_string()).or_default() += 1;
            share.bytes += tensor.size_bytes().unwrap_or(0);
            let is_unused = model.as_ref().is_some_and(|model| model.unused.contains(&tensor.name));
            if is_unused || class == Class::Drafting {
                left_alone.push(tensor.name.as_str());
            }
        }
        Report { header, shares, left_alone, refusals, check: None }
    }

    fn total(&self) -> Share {
        let mut total = Share::default();
        for share in self.shares.values() {
            total.tensors += share.tensors;
            total.bytes += share.bytes;
            for (ty, count) in &share.types {
                *total.types.entry(ty.clone()).or_default() += count;
            }
        }
        total
    }

    fn json(&self) -> serde_json::Value {
        let files = self.header.files.iter().map(|part| json!({"path": part.path, "bytes": part.bytes}));
        let metadata: serde_json::Map<_, _> =
            self.header.metadata.iter().map(|(key, value)| (key.to_owned(), json_value(value))).collect();
        let classes = self.shares.iter().map(|(class, share)| {
            let mut row = json!(share);
            row["class"] = json!(class);
            row
        });
        json!({
            "gguf_version": self.header.version,
            "files": files.collect::<Vec<_>>(),
            "metadata": metadata,
            "classes": classes.collect::<Vec<_>>(),
            "total": self.total(),
            "left_alone": self.left_alone,
            "refusals": self.refusals,
            "check": self.check,
        })
    }

    /// JSON itself leaves DEL and the controls from U+0080 on as they are; its line breaks are layout.
    fn json_text(&self) -> String {
        format!("{:#}", self.json()).lines().map(|line| terminal::escape_controls(line) + "\n").collect()
    }

    /// Names out of the file are escaped, lest they drive the terminal.
    fn tables(&self) -> String {
        let mut text = String::new();
        for part in &self.header.files {
            let _ = writeln!(text, "{}: GGUF {}, {}", part.path.display(), self.header.version, size(part.bytes));
        }
        text += "\nmetadata\n";
        for (key, value) in self.header.metadata.iter() {
            let key = key.escape_debug();
            let _ = match value {
                Value::Array(_) => {
                    writeln!(text, "  {key} = {}", terminal::escape_controls(&json_value(value).to_string()))
                }
                _ => writeln!(text, "  {key} = {value}"),
            };
        }
        text += "\ntensors\n";
        text += &self.tensor_table();
        if !self.left_alone.is_empty() {
            text += "\nleft alone, because plain decoding does not use them\n";
            text.extend(self.left_alone.iter().map(|name| format!("  {}\n", name.escape_debug())));
        }
        if let Some(check) = &self.check {
            let (sound, damaged) = (check.tensors - check.damaged.len(), check.damaged.len());
            let _ = writeln!(text, "\nchecked {} tensors: {sound} finite, {damaged} damaged", check.tensors);
            let damage = |damage: &Damage| {
                format!("  {}: {} values are NaN or infinite\n", damage.tensor.escape_debug(), damage.not_finite)
            };
            text.extend(check.damaged.iter().map(damage));
            if !check.unread.is_empty() {
                text += "no floats that could be checked in\n";
                text.extend(check.unread.iter().map(|name| format!("  {}\n", name.escape_debug())));
            }
        }
        text += if self.refusals.is_empty() {
            "\nthis program can run the file\n"
        } else {
            "\nthis program refuses the file\n"
        };
        text
    }

    fn tensor_table(&self) -> String {
        let mut rows = vec![["class", "tensors", "bytes", "", "types"].map(str::to_owned)];
        let total = self.total();
        let shares = self.shares.iter().map(|(class, share)| (class.title(), share));
        for (title, share) in shares.chain([("total", &total)]) {
            let types = share.types.iter().map(|(ty, count)| format!("{count} {ty}")).collect::<Vec<_>>().join(", ");
            let human = terminal::bytes(share.bytes);
            rows.push([title.into(), share.tensors.to_string(), HumanCount(share.bytes).to_string(), human, types]);
        }
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let [class, tensors, bytes, human] = [0, 1, 2, 3].map(width);
        let line = |[a, b, c, d, e]: &[String; 5]| {
            let line = format!("  {a:class$}  {b:>tensors$}  {c:>bytes$}  {d:>human$}  {e}");
            line.trim_end().to_owned() + "\n"
        };
        rows.iter().map(line).collect()
    }
}

impl Class {
    fn title(self) -> &'static str {
        match self {
            Class::Embedding => "embedding",
            Class::Output => "output",
            Class::Attention => "attention",
            Class::Compressors => "compressors",
            Class::Indexers => "indexers",
            Class::HyperConnections => "hyper-connections",
            Class::Router => "router",
            Class::SharedExperts => "shared experts",
            Class::RoutedExperts => "routed experts",
            Class::NormsSinksBiases => "norms, sinks, biases",
            Class::Drafting => "MTP and DSpark",
            Class::Other => "other",
        }
    }
}

/// The model if it can be run, and what stands in the way.
fn understand(header: &Gguf, name: &str) -> (Option<Model>, Vec<String>) {
    let mut refusals = Vec::new();
    let model = Model::from_gguf(header).map_err(|error| refusals.push(load::in_file(name, error).to_string())).ok();
    if let Some(model) = &model {
        refusals.extend(vocabulary_refusal(header, name, &model.config));
    }
    (model, refusals)
}

fn vocabulary_refusal(header: &Gguf, name: &str, config: &Config) -> Option<String> {
    match load::tokenizer(name, &header.metadata, config) {
        Ok(tokenizer) => ControlTokens::find(&tokenizer).err().map(|error| format!("{name}: {error}")),
        Err(error) => Some(error.to_string()),
    }
}

/// The class of a tensor, by its name (docs/spec/model.md §4.2, §4.3, §6). `layers` is the length of the trunk, where
/// that is known: what lies behind it drafts.
fn class_of(name: &str, layers: Option<usize>) -> Class {
    let block = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let is_behind_trunk = block.and_then(|(number, _)| number.parse::<usize>().ok()).zip(layers);
    let drafts = ["mtp.", "dspark."].iter().any(|prefix| name.starts_with(prefix)) || name.contains(".nextn.");
    if drafts || is_behind_trunk.is_some_and(|(block, layers)| block >= layers) {
        return Class::Drafting;
    }
    match block {
        None => match name {
            "token_embd.weight" => Class::Embedding,
            "output.weight" => Class::Output,
            "output_norm.weight" => Class::NormsSinksBiases,
            _ if name.starts_with("output_hc_") || name.starts_with("hc_head_") => Class::HyperConnections,
            _ => Class::Other,
        },
        Some((_, part)) => class_in_block(part),
    }
}

/// The class of a tensor of a layer, by what follows the layer's number. The first prefix that fits counts.
fn class_in_block(part: &str) -> Class {
    const PREFIXES: [(&str, Class); 27] = [
        ("attn_norm.", Class::NormsSinksBiases),
        ("attn_q_a_norm.", Class::NormsSinksBiases),
        ("attn_kv_a_norm.", Class::NormsSinksBiases),
        ("attn_sinks.", Class::NormsSinksBiases),
        ("ffn_norm.", Class::NormsSinksBiases),
        ("exp_probs_b.", Class::NormsSinksBiases),
        ("attn_compressor_norm.", Class::NormsSinksBiases),
        ("attn_compressor.norm.", Class::NormsSinksBiases),
        ("indexer_compressor_norm.", Class::NormsSinksBiases),
        ("indexer.compressor.norm.", Class::NormsSinksBiases),
        ("attn_compressor", Class::Compressors),
        ("indexer", Class::Indexers),
        ("attn_q_", Class::Attention),
        ("attn_kv", Class::Attention),
        ("attn_output_", Class::Attention),
        ("attn_o_", Class::Attention),
        ("hc_attn_", Class::HyperConnections),
        ("hc_ffn_", Class::HyperConnections),
        ("ffn_gate_inp.", Class::Router),
        ("ffn_gate_tid2eid.", Class::Router),
        ("ffn_gate_shexp.", Class::SharedExperts),
        ("ffn_up_shexp.", Class::SharedExperts),
        ("ffn_down_shexp.", Class::SharedExperts),
        ("ffn_gate_exps.", Class::RoutedExperts),
        ("ffn_up_exps.", Class::RoutedExperts),
        ("ffn_down_exps.", Class::RoutedExperts),
        ("", Class::Other),
    ];
    let found = PREFIXES.iter().find(|(prefix, _)| part.starts_with(prefix));
    found.expect("the last prefix fits everything").1
}

/// Reads every tensor and looks for values that are not finite.
fn check(header: &Gguf) -> anyhow::Result<Check> {
    let source = Source::open(header.files.iter().map(|part| (&part.path, part.bytes)))?;
    let total = header.tensors.iter().map(|tensor| tensor.size_bytes().unwrap_or(0)).sum();
    let bar = terminal::progress("checking", total, Unit::Bytes);
    let mut check = Check::default();
    for tensor in header.tensors.iter() {
        if quant::is_supported(tensor.ty) {
            check.tensors += 1;
            check.damaged.extend(check_tensor(&source, tensor, &mut |bytes| bar.inc(bytes))?);
        } else {
            check.unread.push(format!("{} ({})", tensor.name, tensor.ty));
        }
    }
    bar.finish_and_clear();
    Ok(check)
}

/// Reads one tensor, some rows at a time.
fn check_tensor(source: &Source, tensor: &TensorInfo, read: &mut dyn FnMut(u64)) -> anyhow::Result<Option<Damage>> {
    let (row_bytes, row_elements) = (tensor.row_bytes()?, tensor.dims[0]);
    let rows = tensor.elements() / row_elements;
    let rows_at_once = (CHECKED_BYTES / row_bytes).max(1);
    let mut damage: Option<Damage> = None;
    for first in (0..rows).step_by(rows_at_once as usize) {
        let count = rows_at_once.min(rows - first);
        let mut bytes = vec![0; (count * row_bytes) as usize];
        source.read_exact_at(tensor.file, tensor.offset + first * row_bytes, &mut bytes)?;
        let mut values = vec![0.0; (count * row_elements) as usize];
        quant::dequantize(tensor.ty, &bytes, &mut values);
        read(bytes.len() as u64);
        let mut bad = (first * row_elements..).zip(&values).filter(|(_, value)| !value.is_finite());
        if let Some((first_element, _)) = bad.next() {
            let new = || Damage { tensor: tensor.name.clone(), not_finite: 0, first_element };
            damage.get_or_insert_with(new).not_finite += 1 + bad.count() as u64;
        }
    }
    Ok(damage)
}

/// A metadata value in JSON. What JSON cannot hold, and long arrays, become text.
fn json_value(value: &Value) -> serde_json::Value {
    let listed = match value {
        Value::String(text) => Some(json!(text)),
        Value::Bool(bool) => Some(json!(bool)),
        Value::Array(array) if array.len() > LISTED_ELEMENTS => None,
        Value::Array(gguf::Array::String(strings)) => Some(strings.iter().collect()),
        Value::Array(array) => match array.as_floats() {
            Some(floats) => Some(floats.into()),
            None => array.as_integers().and_then(|integers| integers.into_iter().map(json_integer).collect()),
        },
        _ => value.as_integer().and_then(json_integer).or_else(|| value.as_float().map(Into::into)),
    };
    listed.unwrap_or_else(|| value.to_string().into())
}

fn json_integer(integer: i128) -> Option<serde_json::Value> {
    i64::try_from(integer).ok().map(Into::into)
}

/// `86,714,775,900 bytes (80.76 GiB)`.
fn size(bytes: u64) -> String {
    format!("{} bytes ({})", HumanCount(bytes), terminal::bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafting_tensors_are_told_from_the_trunk() {
        for name in
            ["mtp.0.e_proj.weight", "dspark.2.norm.weight", "blk.3.nextn.eh_proj.weight", "blk.43.attn_q_a.weight"]
        {
            assert_eq!(class_of(name, Some(43)), Class::Drafting, "{name}");
        }
        assert_eq!(class_of("blk.42.attn_q_a.weight", Some(43)), Class::Attention);
        assert_eq!(class_of("blk.42.attn_o_a.weight", None), Class::Attention);
        assert_eq!(class_of("rope_freqs.weight", Some(43)), Class::Other);
    }
}
