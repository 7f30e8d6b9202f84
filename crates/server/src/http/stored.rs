//! Responses that are stored.

use std::sync::Arc;

use axum::extract::State;
use axum::http::Uri;
use axum::response::Response;
use serde_json::json;

use super::Id;
use crate::error::ApiError;
use crate::generation::blocking;
use crate::server::Server;

/// `GET /v1/responses/{id}`.
pub async fn get(State(server): State<Arc<Server>>, uri: Uri, id: Id) -> Response {
    let found = blocking(move || {
        let id = super::id(id)?;
        Ok(server.responses.get(&id)?.ok_or_else(|| missing(&id))?.response)
    });
    found.await.map_or_else(|error| super::error(uri.path(), &error), |response| super::json(200, &response))
}

/// `DELETE /v1/responses/{id}`.
pub async fn delete(State(server): State<Arc<Server>>, uri: Uri, id: Id) -> Response {
    let deleted = blocking(move || {
        let id = super::id(id)?;
        match server.responses.delete(&id)? {
            true => Ok(json!({"id": id, "object": "response", "deleted": true})),
            false => Err(missing(&id)),
        }
    });
    deleted.await.map_or_else(|error| super::error(uri.path(), &error), |body| super::json(200, &body))
}

fn missing(id: &str) -> ApiError {
    ApiError::new(404, format!("the response {id:?} is not stored"))
}
