//! A conversation to what the engine takes.

use std::collections::HashSet;
use std::sync::Arc;

use session::engine::Prompt;
use session::replay::Replay;
use session::{PreparedTurn, TurnOptions, Vocabulary};
use text::parse::ParseOptions;
use text::prompt::{Message, PromptOptions, render};
use text::{Segment, Tokenizer};

use crate::error::ApiError;
use crate::ids;
use crate::request::{Api, Conversation, Input};
use crate::wiring::Wiring;

/// A request that the engine can take, and take again.
pub struct Job {
    /// What is read.
    pub prompt: Prompt,
    /// How the turn is generated.
    pub options: TurnOptions,
}

/// The prompt of a conversation.
///
/// # Errors
/// [`ApiError`] if it has none.
pub fn prompt(conversation: &mut Conversation, wiring: &Wiring) -> Result<Prompt, ApiError> {
    let tokenizer = wiring.vocabulary.tokenizer();
    let segments = match &mut conversation.input {
        Input::Raw(text) => raw(tokenizer, text),
        Input::Messages(messages) => {
            restore_blocks(messages, &wiring.replay);
            let options =
                PromptOptions { encoding: wiring.facts.encoding, mode: conversation.mode, drop_reasoning: true };
            let rendered = render(tokenizer, messages, &options);
            rendered.map_err(|error| ApiError::field(conversation.api.input_field(), error.to_string()))?
        }
    };
    Ok(wiring.replay.prompt(tokenizer, &segments, &call_ids(&conversation.input)))
}

/// A raw prompt begins with BOS like every other.
fn raw(tokenizer: &Tokenizer, text: &str) -> Vec<Segment> {
    let mut segments = tokenizer.split_control(text);
    let bos = Segment::Control(tokenizer.bos());
    if segments.first() != Some(&bos) {
        segments.insert(0, bos);
    }
    segments
}

/// The ids of all calls: they prove which turns were generated for this client.
fn call_ids(input: &Input) -> HashSet<&str> {
    let Input::Messages(messages) = input else { return HashSet::new() };
    let calls = messages.iter().flat_map(|message| match message {
        Message::Assistant(message) => &message.calls[..],
        _ => &[],
    });
    calls.filter_map(|call| call.id.as_deref()).collect()
}

/// Gives calls back the text that the model wrote, where it is known.
fn restore_blocks(messages: &mut [Message], replay: &Replay) {
    for message in messages {
        if let Message::Assistant(message) = message {
            message.raw_block = replay.block(&message.calls);
        }
    }
}

/// What the engine is to do for a conversation.
///
/// # Errors
/// [`ApiError`] if its options cannot be met, or if the prompt leaves no room.
pub fn job(conversation: &mut Conversation, wiring: &Wiring) -> Result<Job, ApiError> {
    let (api, context) = (conversation.api, wiring.engine.context().tokens());
    let prompt = prompt(conversation, wiring)?;
    if prompt.tokens.len() >= context {
        return Err(ApiError::context(api, prompt.tokens.len(), context));
    }
    let vocab_size = wiring.vocabulary.tokenizer().vocab_size();
    if let Some(&(token, _)) = conversation.logit_bias.iter().find(|(token, _)| *token as usize >= vocab_size) {
        return Err(ApiError::session(api, &session::Error::BiasToken { token, vocab_size }));
    }
    let tools = (!conversation.tools.is_empty()).then(|| conversation.tools.clone());
    let options = TurnOptions {
        parse: ParseOptions { thinking: conversation.opens_thinking(), tools },
        sampling: conversation.sampling,
        seed: conversation.seed.unwrap_or_else(|| ids::random() as u64),
        max_tokens: conversation.max_tokens.min(context - prompt.tokens.len()),
        stop_strings: conversation.stop_strings.clone(),
        choice: conversation.choice.clone(),
        constrain: conversation.constrain.clone(),
        single_call: conversation.single_call,
        logit_bias: conversation.logit_bias.clone(),
        logprobs: conversation.logprobs,
    };
    Ok(Job { prompt, options })
}

/// A turn by the job's options.
///
/// # Errors
/// [`ApiError`] if they cannot be met.
pub fn turn(job: &Job, vocabulary: &Arc<Vocabulary>, api: Api) -> Result<PreparedTurn, ApiError> {
    PreparedTurn::new(vocabulary.clone(), &job.options).map_err(|error| ApiError::session(api, &error))
}
