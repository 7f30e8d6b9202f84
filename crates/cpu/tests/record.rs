//! Recorded routes against the reference's choices.

mod common;

use common::{References, load, plain, rows, test_data};
use gguf::Gguf;
use model::{Backend, Cancel, Model, Recorder, forward, trace_header};
use store::{Source, TraceReader};

#[test]
fn routes_are_those_of_the_reference() {
    let name = "tiny-q8";
    let file = Gguf::open(&test_data(&format!("oracle/{name}.gguf"))).unwrap();
    let source = Source::open(file.files.iter().map(|part| (&part.path, part.bytes))).unwrap();
    let header = trace_header(&Model::from_gguf(&file).unwrap(), source.identity().unwrap());
    let tokens = References::open(&format!("{name}.refs")).tokens();
    let backend = load(name, plain());
    let mut state = backend.new_state().unwrap();
    let mut recorder = Recorder::new(Vec::new(), header.clone()).unwrap();
    let mut advance = |tokens: &[u32], cancel: &Cancel| {
        let rows = rows(0, state.position(), tokens);
        forward(&backend, rows, &mut [&mut state], cancel, &mut recorder).map(drop)
    };
    let (cancelled, none) = (Cancel::default(), Cancel::default());
    cancelled.cancel();
    advance(&tokens[..9], &none).unwrap();
    advance(&tokens[9..20], &cancelled).unwrap_err();
    advance(&tokens[9..10], &none).unwrap();
    let bytes = recorder.finish().unwrap();

    let reader = TraceReader::new(bytes.as_slice()).unwrap();
    assert_eq!(reader.header(), &header);
    let passes: Vec<_> = reader.collect::<Result<_, _>>().unwrap();
    let runs: Vec<_> = passes.iter().map(|pass| (pass.runs.clone(), pass.is_prefill())).collect();
    assert_eq!(runs, [(vec![9], true), (vec![1], false)], "the cancelled pass left nothing");
    let used = header.experts_used;
    // Layers before the first learned router choose by token id: the table in the file says what.
    let config = backend.config();
    assert!(config.hash_layers > 0 && passes[0].experts.iter().any(|&expert| expert > 0));
    for layer in 0..config.hash_layers {
        let name = format!("blk.{layer}.ffn_gate_tid2eid.weight");
        let table = file.tensors.get(&name).unwrap();
        let mut listed = vec![0; used * 4];
        for (row, &token) in tokens[..9].iter().enumerate() {
            source.read_exact_at(table.file, table.offset + u64::from(token) * used as u64 * 4, &mut listed).unwrap();
            let listed: Vec<u16> = listed.chunks_exact(4).map(|id| u16::from_le_bytes([id[0], id[1]])).collect();
            assert_eq!(passes[0].experts[(layer * 9 + row) * used..][..used], listed, "layer {layer}, row {row}");
        }
    }
}
