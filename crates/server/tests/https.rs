//! HTTPS with a certificate that `tests/tls` holds for this test alone, and the trace.

mod common;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::Running;
use serde_json::json;
use server::Options;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls").join(name)
}

#[test]
fn https_is_spoken_where_a_certificate_is_given() {
    let tls = |key: &str| Options {
        tls_certificate: Some(file("certificate.pem")),
        tls_key: Some(file(key)),
        ..Options::default()
    };
    let running = Running::new(tls("key.pem"));
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(file("certificate.pem")).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let client = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
    let mut stream = StreamOwned::new(client, running.connect());
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("{\"status\":\"ok\"}"), "{answer}");

    let mut plain = running.connect();
    plain.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    let mut bytes = Vec::new();
    let _ = plain.read_to_end(&mut bytes);
    assert!(!bytes.starts_with(b"HTTP"), "plain HTTP is not answered");
}

#[test]
fn the_trace_holds_request_prompt_and_answer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.txt");
    let running = Running::new(Options { trace: Some(path.clone()), ..Options::default() });
    running.post("/v1/chat/completions", &json!({"messages": [{"content": "hello"}], "thinking": false}));
    drop(running);
    let trace = std::fs::read_to_string(path).unwrap();
    for part in [
        "/v1/chat/completions",
        "\"content\":\"hello\"",
        "<｜User｜>hello<｜Assistant｜></think>",
        "\nHello there!\n",
        "\nstop\n",
    ] {
        assert!(trace.contains(part), "{part:?} in {trace}");
    }
}
