//! What every request passes first: the host's name, the page's origin, the key.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;

use crate::auth::{self, Origin};
use crate::error::ApiError;
use crate::server::Server;

/// Lets a request through, or answers it.
pub async fn guard(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let origin = Origin::of(request.headers(), &server.options.allowed_origins);
    let path = request.uri().path().to_owned();
    let mut response = match refusal(&server, &request, &origin) {
        Some(error) => super::error(&path, &error),
        None if request.method() == Method::OPTIONS => {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::NO_CONTENT;
            response
        }
        None => next.run(request).await,
    };
    response.headers_mut().extend(origin.headers());
    if !server.options.allowed_origins.is_empty() {
        // A cache must not hand one page's answer to another, whatever either was told.
        response.headers_mut().append(header::VARY, HeaderValue::from_static("origin"));
    }
    response
}

/// Why a request is not let through, if it is not. A preflight shows no key: browsers leave it out.
fn refusal(server: &Server, request: &Request, origin: &Origin) -> Option<ApiError> {
    let headers = request.headers();
    if server.is_loopback && !auth::is_host_allowed(headers, request.uri(), &server.options.allowed_hosts) {
        let message = "the Host header names no loopback host, expected `localhost` or a loopback address: \
                       name it in `allowed_hosts` to allow it";
        return Some(ApiError::new(403, message));
    }
    if *origin == Origin::Foreign {
        let message = "pages of this origin may not use the server: name it in `allowed_origins` to allow it";
        return Some(ApiError::new(403, message));
    }
    let needs_key = *request.method() != Method::OPTIONS && !auth::is_open(request.method(), request.uri().path());
    match &server.key {
        Some(key) if needs_key && !key.is_shown(headers) => {
            let message = "the API key is missing or wrong, expected `Authorization: Bearer KEY` or `x-api-key: KEY`";
            Some(ApiError::new(401, message))
        }
        _ => None,
    }
}
