//! Responses that wait for `previous_response_id`.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use session::database::{Database, DatabaseError, Limits, Records};

use crate::error::ApiError;

/// Most bytes of all stored responses together.
const MAX_BYTES: u64 = 1 << 30;
/// Most bytes of one, with its input items.
const MAX_RECORD_BYTES: usize = 16 << 20;
/// Longest chain of responses that one can go on from.
const MAX_CHAIN: usize = 10_000;
/// Most bytes of memory for the items of a chain: far more than any context holds.
const MAX_CHAIN_BYTES: usize = 256 << 20;
/// Bytes of memory for a JSON value, besides its text.
const VALUE_BYTES: usize = 128;

/// A response and what it answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredResponse {
    /// The response as the client got it.
    pub response: Value,
    /// The input items of its request, without those of earlier responses.
    pub items: Vec<Value>,
    /// The response that it went on from.
    pub previous: Option<String>,
}

/// Keeps responses; those used least recently make way for new ones.
pub struct ResponseStore {
    records: Records,
}

impl ResponseStore {
    /// Room for `count` responses in a database.
    pub fn new(database: &Database, count: usize) -> ResponseStore {
        let limits = Limits { count: count as _, bytes: MAX_BYTES };
        ResponseStore { records: database.records("responses", limits) }
    }

    /// Keeps one; it is on the disk when this returns.
    ///
    /// # Errors
    /// [`DatabaseError`]: it was not kept.
    pub fn put(&self, id: &str, response: &StoredResponse) -> Result<(), DatabaseError> {
        let bytes = serde_json::to_vec(response).expect("a response is plain JSON");
        if bytes.len() > MAX_RECORD_BYTES {
            return Err(DatabaseError::TooLarge { found: bytes.len() as u64, limit: MAX_RECORD_BYTES as u64 });
        }
        self.records.put(id.as_bytes(), &bytes)
    }

    /// One that was kept.
    pub fn get(&self, id: &str) -> Result<Option<StoredResponse>, ApiError> {
        let bytes = self.records.get(id.as_bytes()).map_err(broken)?;
        let read = |bytes: Vec<u8>| serde_json::from_slice(&bytes);
        bytes.map(read).transpose().map_err(|error| ApiError::new(500, format!("the stored response {id:?}: {error}")))
    }

    /// Forgets one; whether it was there.
    pub fn delete(&self, id: &str) -> Result<bool, ApiError> {
        self.records.delete(id.as_bytes()).map_err(broken)
    }

    /// The items of all responses up to `id`, oldest first.
    pub fn chain(&self, id: &str) -> Result<Vec<Value>, ApiError> {
        let name = "previous_response_id";
        let (mut links, mut bytes, mut next) = (Vec::new(), 0, Some(id.to_owned()));
        while let Some(id) = next {
            if links.len() == MAX_CHAIN {
                return Err(ApiError::field(name, format!("stands at the end of more than {MAX_CHAIN} responses")));
            }
            let message = format!("the response {id:?} is not stored (any more): send the whole input instead");
            let missing = || ApiError { status: 404, ..ApiError::field(name, message) };
            let StoredResponse { mut response, mut items, previous } = self.get(&id)?.ok_or_else(missing)?;
            if let Some(output) = response["output"].as_array_mut() {
                items.append(output);
            }
            bytes += items.iter().map(memory_bytes).sum::<usize>();
            if bytes > MAX_CHAIN_BYTES {
                let message =
                    "stands at the end of more items than fit any context: send those that still count as input";
                return Err(ApiError::field(name, message));
            }
            links.push(items);
            next = previous;
        }
        Ok(links.into_iter().rev().flatten().collect())
    }
}

/// About how much memory a value takes.
fn memory_bytes(value: &Value) -> usize {
    let inside = match value {
        Value::String(text) => text.len(),
        Value::Array(list) => list.iter().map(memory_bytes).sum(),
        Value::Object(map) => map.iter().map(|(key, value)| key.len() + memory_bytes(value)).sum(),
        _ => 0,
    };
    VALUE_BYTES + inside
}

/// What a client is told. The error itself names files.
fn broken(error: DatabaseError) -> ApiError {
    tracing::error!(%error, "stored responses cannot be used");
    ApiError::new(500, "stored responses cannot be used: see the server's log")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_chain_that_takes_too_much_memory_is_refused() {
        let store = ResponseStore::new(&Database::in_memory(), 10);
        let mut previous = None;
        for id in ["a", "b", "c"] {
            let items = vec![json!({"role": "user", "content": id, "junk": vec![0; 800_000]})];
            let response = json!({"id": id, "output": [{"type": "message", "content": "so"}]});
            store.put(id, &StoredResponse { response, items, previous }).unwrap();
            previous = Some(id.to_owned());
        }
        let roles: Vec<_> = store.chain("b").unwrap().iter().map(|item| item["content"].clone()).collect();
        assert_eq!(roles, ["a", "so", "b", "so"]);
        assert_eq!(store.chain("c").unwrap_err().param.as_deref(), Some("previous_response_id"));
    }

    #[test]
    fn a_record_that_is_too_large_is_not_kept() {
        let store = ResponseStore::new(&Database::in_memory(), 10);
        let items = vec![json!("x".repeat(MAX_RECORD_BYTES))];
        let error = store.put("a", &StoredResponse { response: json!({}), items, previous: None }).unwrap_err();
        assert!(matches!(error, DatabaseError::TooLarge { .. }), "{error}");
        assert_eq!(store.get("a").unwrap(), None);
    }
}
