//! A backend whose logits a test writes itself, so that a turn goes exactly as the test wants.

use std::io::{Read, Write};
use std::sync::Mutex;

use gguf::Gguf;
use model::{Activation, Backend, Batch, Cancel, Config, Error, Model, SubLayer};
use session::{Context, Session};
use text::{Tokenizer, TokenizerData};

static NANO: &[u8] = include_bytes!("../../../../models/nano.gguf");

/// Says after any tokens which logits follow.
type Rule = Box<dyn Fn(&[u32]) -> Vec<f32> + Send + Sync>;

/// Runs no model: a session's state is its tokens, and the logits are the test's.
pub struct Scripted {
    config: Config,
    rule: Rule,
    /// A token that no pass can be computed with.
    poison: Option<u32>,
    /// Rows of each pass so far.
    pub passes: Mutex<Vec<usize>>,
}

/// A pass: its rows, and the logits wanted.
pub struct Pass {
    batch: Batch,
    /// The tokens of each session.
    past: Vec<Vec<u32>>,
}

/// nano's tokenizer, whose control tokens have V4's names.
pub fn tokenizer() -> Tokenizer {
    let metadata = Gguf::parse("nano", NANO).unwrap().metadata;
    let strings = |key: &str| metadata.str_array(key).unwrap().iter().map(str::to_owned).collect();
    let types = metadata.i64_array("tokenizer.ggml.token_type").unwrap();
    Tokenizer::new(TokenizerData {
        tokens: strings("tokenizer.ggml.tokens"),
        token_types: types.into_iter().map(|kind| kind as i32).collect(),
        merges: strings("tokenizer.ggml.merges"),
        pre: metadata.str("tokenizer.ggml.pre").unwrap().to_owned(),
        bos: metadata.u32("tokenizer.ggml.bos_token_id").unwrap(),
        eos: metadata.u32("tokenizer.ggml.eos_token_id").unwrap(),
    })
    .unwrap()
}

impl Scripted {
    /// A backend with these logits.
    pub fn new(rule: impl Fn(&[u32]) -> Vec<f32> + Send + Sync + 'static) -> Scripted {
        let config = Model::from_gguf(&Gguf::parse("nano", NANO).unwrap()).unwrap().config;
        Scripted { config, rule: Box::new(rule), poison: None, passes: Mutex::default() }
    }

    /// The same for another vocabulary than nano's.
    #[allow(dead_code, reason = "not every test program has another vocabulary")]
    pub fn with_vocabulary(mut self, size: usize) -> Scripted {
        self.config.vocab_size = size;
        self
    }

    /// The same, but every pass with `token` in it fails.
    #[allow(dead_code, reason = "not every test program has passes that fail")]
    pub fn failing_on(mut self, token: u32) -> Scripted {
        self.poison = Some(token);
        self
    }

    /// The logits after `tokens`.
    #[allow(dead_code, reason = "not every test program asks for them")]
    pub fn rule(&self, tokens: &[u32]) -> Vec<f32> {
        (self.rule)(tokens)
    }

    /// A backend that says `script` after `prompt` tokens and then ends the turn.
    #[allow(dead_code, reason = "not every test program says a script")]
    pub fn saying(prompt: usize, script: Vec<u32>, eos: u32) -> Scripted {
        let vocab = tokenizer().vocab_size();
        Scripted::new(move |tokens| one_hot(vocab, script.get(tokens.len() - prompt).copied().unwrap_or(eos)))
    }

    /// A session that has read `prompt`, and the logits after it.
    #[allow(dead_code, reason = "not every test program reads a prompt itself")]
    pub fn read(&self, prompt: &[u32], context: usize) -> (Session<Scripted>, Vec<f32>) {
        let mut session = Session::new(self, Context::new(&self.config, Some(context)).unwrap()).unwrap();
        let logits = session.prefill(self, prompt, 512, &Cancel::default(), &mut |_| ()).unwrap();
        self.passes.lock().unwrap().clear();
        (session, logits)
    }
}

/// Logits that make one token all but certain.
pub fn one_hot(vocab: usize, token: u32) -> Vec<f32> {
    let mut logits = vec![0.0; vocab];
    logits[token as usize] = 40.0;
    logits
}

impl Backend for Scripted {
    const PASS_ROWS: usize = 256;

    type State = Vec<u32>;
    type Pass = Pass;
    type Logits = Vec<f32>;
    type Selection = ();
    type Leases<'s> = ();

    fn config(&self) -> &Config {
        &self.config
    }

    fn passes_are_free(&self) -> bool {
        true
    }

    fn new_state(&self) -> Result<Vec<u32>, Error> {
        Ok(Vec::new())
    }

    fn position(&self, state: &Vec<u32>) -> usize {
        state.len()
    }

    fn reach(&self, state: &Vec<u32>, target: usize) -> usize {
        target.min(state.len())
    }

    fn rewind(&self, state: &mut Vec<u32>, target: usize) -> usize {
        state.truncate(target);
        state.len()
    }

    fn fork(&self, tokens: &Vec<u32>) -> Result<Vec<u32>, Error> {
        Ok(tokens.clone())
    }

    fn export(&self, tokens: &Vec<u32>, to: &mut dyn Write) -> Result<(), Error> {
        let words = std::iter::once(tokens.len() as u32).chain(tokens.iter().copied());
        words.into_iter().try_for_each(|word| to.write_all(&word.to_le_bytes())).map_err(Error::Export)
    }

    fn import(&self, from: &mut dyn Read) -> Result<Vec<u32>, Error> {
        let mut word = || {
            let mut bytes = [0; 4];
            from.read_exact(&mut bytes).expect("a test's reader gives what it has");
            u32::from_le_bytes(bytes)
        };
        let count = word();
        Ok((0..count).map(|_| word()).collect())
    }

    fn begin(&self, batch: Batch, states: &[&Vec<u32>]) -> Result<Pass, Error> {
        self.passes.lock().unwrap().push(batch.rows().len());
        if batch.rows().iter().any(|row| Some(row.token) == self.poison) {
            return Err(Error::Export(std::io::Error::other("poison")));
        }
        Ok(Pass { batch, past: states.iter().map(|&state| state.clone()).collect() })
    }

    fn embed(&self, _: &mut Pass) -> Result<(), Error> {
        Ok(())
    }

    fn hc_pre(&self, _: usize, _: SubLayer, _: &mut Pass) -> Result<(), Error> {
        Ok(())
    }

    fn project(&self, _: usize, _: &[&Self::State], _: &mut Pass) -> Result<(), Error> {
        Ok(())
    }

    fn compress(&self, _: usize, _: &[&Vec<u32>], _: &mut Pass) -> Result<(), Error> {
        Ok(())
    }

    fn index(&self, _: usize, _: &[&Vec<u32>], _: &mut Pass) -> Result<(), Error> {
        Ok(())
    }

    fn attend(&self, _: usize, _: &[&Vec<u32>], _: &mut Pass) -> Result<(), Error> {
        Ok(())
    }

    fn attention_out(&self, _: usize, _: &mut Pass) -> Result<(), Error> {
        Ok(())
    }

    fn hc_post(&self, _: usize, _: SubLayer, _: &mut Pass) -> Result<(), Error> {
        Ok(())
    }

    fn route(&self, _: usize, _: &mut Pass) -> Result<(), Error> {
        Ok(())
    }

    fn lease(&self, _: usize, (): &()) -> Result<(), Error> {
        Ok(())
    }

    fn shared_expert(&self, _: usize, _: &mut Pass) -> Result<(), Error> {
        Ok(())
    }

    fn routed_experts(&self, _: usize, (): (), (): (), _: &Cancel, _: &mut Pass) -> Result<(), Error> {
        Ok(())
    }

    fn head(&self, pass: &mut Pass) -> Result<Vec<f32>, Error> {
        let (mut tokens, mut logits) = (pass.past.clone(), Vec::new());
        for row in pass.batch.rows() {
            tokens[row.session].push(row.token);
            if row.logits {
                logits.extend((self.rule)(&tokens[row.session]));
            }
        }
        Ok(logits)
    }

    fn read_logits(&self, logits: Vec<f32>) -> Result<Vec<f32>, Error> {
        Ok(logits)
    }

    fn commit(&self, pass: Pass, states: &mut [&mut Vec<u32>]) {
        pass.batch.rows().iter().for_each(|row| states[row.session].push(row.token));
    }

    fn read(&self, _: &Pass, _: Activation) -> Vec<f32> {
        Vec::new()
    }

    fn write(&self, _: &mut Pass, _: Activation, _: &[f32]) {}
}
