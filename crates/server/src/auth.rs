//! Who may use the server: keys, and pages of other origins.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// The key that clients must show. Only its hash is kept, and comparing takes as long whatever they show.
pub struct Key {
    hash: [u8; 32],
}

impl Key {
    /// The key with this text.
    pub fn new(key: &str) -> Key {
        Key { hash: Sha256::digest(key).into() }
    }

    /// Whether the headers show the key, as `Authorization: Bearer KEY` or `x-api-key: KEY`.
    pub fn is_shown(&self, headers: &HeaderMap) -> bool {
        let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
            let (scheme, key) = value.as_bytes().split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
        });
        let plain = headers.get("x-api-key").map(HeaderValue::as_bytes);
        let hash = |shown: &[u8]| -> [u8; 32] { Sha256::digest(shown).into() };
        let is_key = |shown: &[u8]| bool::from(self.hash.ct_eq(&hash(shown)));
        [bearer, plain].into_iter().flatten().any(is_key)
    }
}

/// Whether a request to a server on loopback names it by a name of loopback, or by one that is allowed. A page whose name was
/// made to point here (DNS rebinding) calls it by its own. A request that names several hosts must name good ones only.
pub fn is_host_allowed(headers: &HeaderMap, uri: &Uri, allowed: &[String]) -> bool {
    let named = headers.get_all(header::HOST).into_iter().map(|host| host.to_str().unwrap_or("?"));
    let is_good = |host: &str| {
        let name = without_port(host);
        let is_loopback = name.trim_matches(['[', ']']).parse().is_ok_and(|address: IpAddr| address.is_loopback());
        is_loopback
            || name.eq_ignore_ascii_case("localhost")
            || allowed.iter().any(|other| name.eq_ignore_ascii_case(other))
    };
    named.chain(uri.host()).all(is_good)
}

/// A host without its port.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

/// What a request's `Origin` means.
#[derive(Debug, PartialEq, Eq)]
pub enum Origin {
    /// There is none, or it is the server's own page.
    Own,
    /// A page that may use the server: what CORS answers.
    Allowed(HeaderValue),
    /// A page that may not.
    Foreign,
}

impl Origin {
    /// Reads it.
    pub fn of(headers: &HeaderMap, allowed: &[String]) -> Origin {
        let Some(origin) = headers.get(header::ORIGIN) else { return Origin::Own };
        let text = origin.to_str().unwrap_or("?");
        if allowed.iter().any(|other| other == "*") {
            return Origin::Allowed(HeaderValue::from_static("*"));
        }
        if allowed.iter().any(|other| other.eq_ignore_ascii_case(text)) {
            return Origin::Allowed(origin.clone());
        }
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let is_own = text.split_once("://").is_some_and(|(_, authority)| Some(authority) == host);
        if is_own { Origin::Own } else { Origin::Foreign }
    }

    /// The headers that let the page read the answer.
    pub fn headers(&self) -> Vec<(HeaderName, HeaderValue)> {
        let Origin::Allowed(origin) = self else { return Vec::new() };
        vec![
            (header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone()),
            (header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE, OPTIONS")),
            (header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("authorization, content-type, *")),
            (header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("retry-after")),
        ]
    }
}

/// Whether a path needs no key: what says nothing of anybody's conversations.
pub fn is_open(method: &Method, path: &str) -> bool {
    matches!(*method, Method::GET | Method::HEAD) && matches!(path, "/" | "/app.js" | "/style.css" | "/health")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(entries: &[(&'static str, &'static str)]) -> HeaderMap {
        let entry = |&(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        entries.iter().map(entry).collect()
    }

    #[test]
    fn the_key_is_taken_from_both_headers() {
        let key = Key::new("sesame");
        for (name, value, is_good) in [
            ("authorization", "Bearer sesame", true),
            ("authorization", "bearer sesame", true),
            ("authorization", "Bearer sesam", false),
            ("authorization", "Basic sesame", false),
            ("authorization", "", false),
            ("x-api-key", "sesame", true),
            ("x-api-key", "sesame1", false),
        ] {
            assert_eq!(key.is_shown(&headers(&[(name, value)])), is_good, "{name}: {value}");
        }
        assert!(!key.is_shown(&HeaderMap::new()));
    }

    #[test]
    fn only_names_of_loopback_are_hosts() {
        let is_allowed =
            |host| is_host_allowed(&headers(&[("host", host)]), &Uri::from_static("/"), &["box".to_owned()]);
        for host in ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.9.9.9", "[::1]:8000", "box:80"] {
            assert!(is_allowed(host), "{host}");
        }
        for host in ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", "", "[::2]:1"] {
            assert!(!is_allowed(host), "{host}");
        }
        let two = headers(&[("host", "localhost"), ("host", "evil.example")]);
        assert!(!is_host_allowed(&two, &Uri::from_static("/"), &[]));
        let absolute = Uri::from_static("http://evil.example/");
        assert!(!is_host_allowed(&headers(&[("host", "localhost")]), &absolute, &[]));
    }

    #[test]
    fn origins_are_opt_in() {
        let of = |origin, allowed: &[&str]| {
            let allowed: Vec<_> = allowed.iter().map(|&text| text.to_owned()).collect();
            Origin::of(&headers(&[("origin", origin), ("host", "localhost:8000")]), &allowed)
        };
        assert_eq!(of("http://localhost:8000", &[]), Origin::Own);
        assert_eq!(of("http://localhost:9000", &[]), Origin::Foreign);
        assert_eq!(of("https://evil.example", &["https://good.example"]), Origin::Foreign);
        assert_eq!(
            of("https://a.example", &["https://a.example"]),
            Origin::Allowed("https://a.example".parse().unwrap())
        );
        assert_eq!(of("null", &["*"]), Origin::Allowed("*".parse().unwrap()));
        assert_eq!(Origin::of(&HeaderMap::new(), &[]), Origin::Own);
    }
}
