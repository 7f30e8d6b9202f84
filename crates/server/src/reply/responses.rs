//! Responses. Calls are told when the turn is over, each in one piece.

use serde_json::{Value, json};
use session::engine::Usage;
use text::parse::Finish;
use text::prompt::Call;

use super::{About, Delta, Finished, Prompted, Reply, parsed};
use crate::error::ApiError;
use crate::frame::Frame;
use crate::request::{Kind, ResponsesExtra};

/// A response.
pub struct Response {
    about: About,
    id: String,
    extra: ResponsesExtra,
    sequence: u64,
    /// The items that are complete.
    output: Vec<Value>,
    open: Option<Item>,
}

/// The item under way.
struct Item {
    is_reasoning: bool,
    id: String,
    text: String,
}

impl Item {
    /// The item as it stands.
    fn value(&self, status: &str) -> Value {
        let is_new = status == "in_progress";
        if self.is_reasoning {
            let summary = if is_new { json!([]) } else { json!([self.part()]) };
            json!({"id": self.id, "type": "reasoning", "status": status, "summary": summary})
        } else {
            let content = if is_new { json!([]) } else { json!([self.part()]) };
            json!({"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content})
        }
    }

    /// The one part that it has.
    fn part(&self) -> Value {
        if self.is_reasoning {
            json!({"type": "summary_text", "text": self.text})
        } else {
            json!({"type": "output_text", "text": self.text, "annotations": []})
        }
    }

    /// The name of an event about the part, or about its text.
    fn event(&self, moment: Moment) -> &'static str {
        match (self.is_reasoning, moment) {
            (true, Moment::PartAdded) => "response.reasoning_summary_part.added",
            (true, Moment::PartDone) => "response.reasoning_summary_part.done",
            (true, Moment::TextDelta) => "response.reasoning_summary_text.delta",
            (true, Moment::TextDone) => "response.reasoning_summary_text.done",
            (false, Moment::PartAdded) => "response.content_part.added",
            (false, Moment::PartDone) => "response.content_part.done",
            (false, Moment::TextDelta) => "response.output_text.delta",
            (false, Moment::TextDone) => "response.output_text.done",
        }
    }
}

impl Response {
    pub fn new(extra: ResponsesExtra, mut about: About) -> Response {
        let id = about.id("resp_");
        Response { about, id, extra, sequence: 0, output: Vec::new(), open: None }
    }

    /// A frame with the next number.
    fn frame(&mut self, event: &'static str, mut fields: Value) -> Frame {
        let mut data = json!({"type": event, "sequence_number": self.sequence});
        self.sequence += 1;
        if let (Some(data), Some(fields)) = (data.as_object_mut(), fields.as_object_mut()) {
            data.append(fields);
        }
        Frame::Event(event, data)
    }

    /// A frame about the item under way.
    fn item_frame(&mut self, item: &Item, moment: Moment, key: &str, value: Value) -> Frame {
        let index = if item.is_reasoning { "summary_index" } else { "content_index" };
        let mut fields = json!({"item_id": item.id, "output_index": self.output.len(), index: 0, key: value});
        if !item.is_reasoning && matches!(moment, Moment::TextDelta | Moment::TextDone) {
            fields["logprobs"] = json!([]);
        }
        self.frame(item.event(moment), fields)
    }

    /// Adds `text` to an item of the kind, a new one if another is under way.
    fn text(&mut self, is_reasoning: bool, text: &str) -> Vec<Frame> {
        let mut frames = Vec::new();
        if self.open.as_ref().is_none_or(|item| item.is_reasoning != is_reasoning) {
            frames.extend(self.close("completed"));
            let id = self.about.id(if is_reasoning { "rs_" } else { "msg_" });
            let item = Item { is_reasoning, id, text: String::new() };
            let fields = json!({"output_index": self.output.len(), "item": item.value("in_progress")});
            frames.push(self.frame("response.output_item.added", fields));
            frames.push(self.item_frame(&item, Moment::PartAdded, "part", item.part()));
            self.open = Some(item);
        }
        if let Some(mut item) = self.open.take() {
            item.text.push_str(text);
            frames.push(self.item_frame(&item, Moment::TextDelta, "delta", json!(text)));
            self.open = Some(item);
        }
        frames
    }

    /// Ends the item under way.
    fn close(&mut self, status: &str) -> Vec<Frame> {
        let Some(item) = self.open.take() else { return Vec::new() };
        let mut frames = vec![
            self.item_frame(&item, Moment::TextDone, "text", json!(item.text)),
            self.item_frame(&item, Moment::PartDone, "part", item.part()),
        ];
        frames.push(self.item_done(item.value(status)));
        frames
    }

    /// An item is complete.
    fn item_done(&mut self, item: Value) -> Frame {
        let fields = json!({"output_index": self.output.len(), "item": item});
        self.output.push(item);
        self.frame("response.output_item.done", fields)
    }

    /// A call in one piece.
    fn call(&mut self, call: &Call) -> Vec<Frame> {
        let mut item = self.call_item(call);
        let fields = |this: &Response, item: &Value| json!({"item_id": item["id"], "output_index": this.output.len()});
        let mut begun = item.clone();
        begun["status"] = json!("in_progress");
        let events = match item["type"].as_str() {
            Some("function_call") => {
                begun["arguments"] = json!("");
                Some(("response.function_call_arguments.delta", "response.function_call_arguments.done", "arguments"))
            }
            Some("custom_tool_call") => {
                begun["input"] = json!("");
                Some(("response.custom_tool_call_input.delta", "response.custom_tool_call_input.done", "input"))
            }
            _ => None,
        };
        let added = json!({"output_index": self.output.len(), "item": begun});
        let mut frames = vec![self.frame("response.output_item.added", added)];
        if let Some((delta, done, key)) = events {
            let (mut of_delta, mut of_done) = (fields(self, &item), fields(self, &item));
            of_delta["delta"] = item[key].clone();
            of_done["name"] = item["name"].clone();
            of_done[key] = item[key].clone();
            frames.push(self.frame(delta, of_delta));
            frames.push(self.frame(done, of_done));
        }
        item["status"] = json!("completed");
        frames.push(self.item_done(item));
        frames
    }

    /// A call as the client declared the tool.
    fn call_item(&mut self, call: &Call) -> Value {
        let Call { id: call_id, name, arguments } = call;
        match self.extra.kinds.get(name).cloned().unwrap_or(Kind::Function) {
            Kind::Function => json!({
                "id": self.about.id("fc_"), "type": "function_call", "status": "completed",
                "name": name, "call_id": call_id, "arguments": arguments,
            }),
            Kind::Namespaced { namespace, name } => json!({
                "id": self.about.id("fc_"), "type": "function_call", "status": "completed",
                "name": name, "namespace": namespace, "call_id": call_id, "arguments": arguments,
            }),
            Kind::Custom => {
                let input = match &parsed(arguments)["input"] {
                    Value::String(text) => text.clone(),
                    _ => arguments.clone(),
                };
                json!({
                    "id": self.about.id("ctc_"), "type": "custom_tool_call", "status": "completed",
                    "name": name, "call_id": call_id, "input": input,
                })
            }
            Kind::ToolSearch => json!({
                "id": self.about.id("tsc_"), "type": "tool_search_call", "status": "completed",
                "execution": "client", "call_id": call_id, "arguments": parsed(arguments),
            }),
        }
    }

    /// The response as it stands.
    fn object(&self, status: &str) -> Value {
        let mut response = json!({
            "id": self.id,
            "object": "response",
            "created_at": self.about.created,
            "status": status,
            "error": null,
            "incomplete_details": null,
            "model": self.about.model,
            "output": self.output,
            "parallel_tool_calls": true,
            "tool_choice": "auto",
            "tools": [],
        });
        self.extra.echo.iter().for_each(|(name, value)| response[name] = value.clone());
        response["store"] = json!(self.extra.store);
        response
    }

    /// The response at its end.
    fn final_object(&self, finished: &Finished) -> Value {
        let is_cut = finished.finish == Finish::Length;
        let mut response = self.object(if is_cut { "incomplete" } else { "completed" });
        if is_cut {
            response["incomplete_details"] = json!({"reason": "max_output_tokens"});
        }
        response["usage"] = usage(&finished.usage);
        response
    }

    /// Adds what only the end of a turn tells.
    fn settle(&mut self, finished: &Finished) -> Vec<Frame> {
        let status = if finished.finish == Finish::Length { "incomplete" } else { "completed" };
        let mut frames = self.close(status);
        for call in &finished.calls {
            frames.extend(self.call(call));
        }
        frames
    }
}

/// What an event is about.
#[derive(Clone, Copy)]
enum Moment {
    PartAdded,
    PartDone,
    TextDelta,
    TextDone,
}

fn usage(usage: &Usage) -> Value {
    let cached = usage.cached_tokens.min(usage.prompt_tokens);
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": usage.prompt_tokens - cached},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}

impl Reply for Response {
    fn id(&self) -> &str {
        &self.id
    }

    fn start(&mut self, _: Prompted) -> Vec<Frame> {
        let response = self.object("in_progress");
        vec![self.frame("response.created", json!({"response": response}))]
    }

    fn delta(&mut self, delta: &Delta) -> Vec<Frame> {
        match delta {
            Delta::Reasoning(text) if self.extra.shows_reasoning => self.text(true, text),
            Delta::Content(text) => self.text(false, text),
            _ => Vec::new(),
        }
    }

    fn end(&mut self, finished: &Finished) -> Vec<Frame> {
        let mut frames = self.settle(finished);
        let response = self.final_object(finished);
        let event = if finished.finish == Finish::Length { "response.incomplete" } else { "response.completed" };
        frames.push(self.frame(event, json!({"response": response})));
        frames
    }

    fn fail(&mut self, error: &ApiError) -> Vec<Frame> {
        let mut response = self.object("failed");
        response["error"] = json!({"code": "server_error", "message": error.message});
        vec![self.frame("response.failed", json!({"response": response}))]
    }

    fn whole(&mut self, finished: &Finished) -> Value {
        self.settle(finished);
        self.final_object(finished)
    }

    fn has_told_call(&self) -> bool {
        false
    }
}
