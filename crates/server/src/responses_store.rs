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
        let (mut links, mut next) = (Vec::new(), Some(id.to_owned()));
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
            links.push(items);
            next = previous;
        }
        Ok(links.into_iter().rev().flatten().collect())
    }
}

/// What a client is told. The error itself names files.
fn broken(error: DatabaseError) -> ApiError {
    tracing::error!(%error, "stored responses cannot be used");
    ApiError::new(500, "stored responses cannot be used: see the server's log")
}
