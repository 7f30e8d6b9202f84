//! `/v1/completions`: the prompt as a user's message, or raw.

use serde_json::{Value, json};
use text::prompt::{Message, Mode};

use super::{Api, Conversation, Defaults, Input, chat};
use crate::error::ApiError;
use crate::fields::{Fields, wrong};

/// The instructions of a wrapped prompt.
const SYSTEM: &str = "You are a helpful assistant";

/// Reads a request.
pub fn read(mut fields: Fields, defaults: &Defaults) -> Result<Conversation, ApiError> {
    let prompt = prompt(&mut fields)?;
    let is_raw = fields.flag("raw")?.unwrap_or(defaults.raw_completions);
    let model = fields.text("model")?;
    let reasoning = chat::reasoning(&mut fields, defaults)?;
    let (input, mode) = if is_raw {
        (Input::Raw(prompt), Mode::Chat)
    } else {
        let messages = vec![Message::system(SYSTEM), Message::user(prompt)];
        (Input::Messages(messages), reasoning.mode(model.as_deref(), defaults))
    };
    let mut conversation = Conversation { model, mode, ..Conversation::new(Api::Completions, input, defaults) };
    chat::common(&mut fields, &mut conversation, defaults)?;

    fields.only("best_of", &json!(1), "is not supported: only one answer is made")?;
    fields.only("echo", &json!(false), "is not supported: the prompt is not repeated")?;
    fields.only("logprobs", &Value::Null, "is not supported here: use /v1/chat/completions")?;
    fields.only("suffix", &json!(""), "is not supported: this model continues texts, it does not fill gaps")?;
    fields.end(&[Api::Completions.ignored()], &defaults.ignored_fields)?;
    Ok(conversation)
}

/// The prompt: a text, or a list of one.
fn prompt(fields: &mut Fields) -> Result<String, ApiError> {
    match fields.need("prompt")? {
        Value::String(text) => Ok(text),
        Value::Array(list) => {
            match <[Value; 1]>::try_from(list) {
                Ok([Value::String(text)]) => Ok(text),
                _ => Err(fields
                    .error("prompt", "is an array, expected one with exactly one string: send one request for each")),
            }
        }
        other => Err(wrong("prompt", &other, "a string")),
    }
}
