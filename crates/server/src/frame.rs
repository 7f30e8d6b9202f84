//! A frame of a stream of server-sent events.

use serde_json::Value;

/// One frame.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// `data: …`, the JSON on one line.
    Data(Value),
    /// `event: …` before the data.
    Event(&'static str, Value),
    /// A line that clients skip.
    Comment(&'static str),
    /// The end of a stream of OpenAI's.
    Done,
}

impl Frame {
    /// Its text, the empty line that ends it included.
    pub fn text(&self) -> String {
        match self {
            Frame::Data(data) => format!("data: {data}\n\n"),
            Frame::Event(event, data) => format!("event: {event}\ndata: {data}\n\n"),
            Frame::Comment(comment) => format!(": {comment}\n\n"),
            Frame::Done => "data: [DONE]\n\n".to_owned(),
        }
    }
}
