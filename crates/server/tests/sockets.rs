//! Who may come in, what a client may take, and what happens when one leaves.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use common::{Answer, Running};
use serde_json::{Value, json};
use server::{Limits, Options};

const CHAT: &str = "/v1/chat/completions";

fn slowly(stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "slowly"}], "thinking": false, "stream": stream})
}

#[test]
fn a_client_that_leaves_cancels_its_request() {
    let running = Running::new(Options::default());
    for stream in [true, false] {
        let socket = running.send("POST", CHAT, &[], slowly(stream).to_string().as_bytes());
        let deadline = Instant::now() + Duration::from_secs(30);
        while running.engine.stats().active == 0 {
            assert!(Instant::now() < deadline, "the request never began");
            thread::sleep(Duration::from_millis(5));
        }
        if stream {
            let mut line = String::new();
            BufReader::new(&socket).read_line(&mut line).unwrap();
        }
        drop(socket);
        running.wait_until_idle();
    }
    assert_eq!(running.engine.stats().cancelled, 2);
    assert!(running.get("/metrics").body.contains("infall_disconnects_total 2"));
}

#[test]
fn a_full_queue_is_429() {
    let running = Running::new(Options::default());
    let body = slowly(true).to_string();
    // Two sessions and two places in the queue.
    let sockets: Vec<_> = (0..4)
        .map(|_| {
            let socket = running.send("POST", CHAT, &[], body.as_bytes());
            thread::sleep(Duration::from_millis(300));
            socket
        })
        .collect();
    let refused = running.ask("POST", CHAT, &[], body.as_bytes());
    assert_eq!(refused.status, 429);
    assert!(refused.header("retry-after").is_some());
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    drop(sockets);
    running.wait_until_idle();
    assert_eq!(running.ask("POST", CHAT, &[], b"{\"messages\": [{\"content\": \"hello\"}]}").status, 200);
}

#[test]
fn a_stream_is_kept_alive_while_nothing_comes() {
    let running = Running::new(Options { ping_s: 1, ..Options::default() });
    let body = slowly(true).to_string();
    let busy: Vec<_> = (0..2).map(|_| running.send("POST", CHAT, &[], body.as_bytes())).collect();
    thread::sleep(Duration::from_millis(300));
    let mut waiting = running.send("POST", CHAT, &[], body.as_bytes());
    let message =
        json!({"max_tokens": 5, "stream": true, "messages": [{"role": "user", "content": "slowly"}]}).to_string();
    let mut anthropic = running.send("POST", "/v1/messages", &[], message.as_bytes());
    for (socket, sign) in [(&mut waiting, ": prefill"), (&mut anthropic, "event: ping")] {
        let mut text = String::new();
        let mut lines = BufReader::new(socket);
        while !text.contains(sign) {
            assert!(lines.read_line(&mut text).unwrap() > 0, "{text}");
        }
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    }
    drop((busy, waiting, anthropic));
    running.wait_until_idle();
}

#[test]
fn a_client_that_takes_nothing_is_cut_off() {
    let limits = Limits { buffered_events: 50, write_s: 1, ..Limits::default() };
    let running = Running::new(Options { limits, ..Options::default() });
    let socket = running.send("POST", CHAT, &[], slowly(true).to_string().as_bytes());
    thread::sleep(Duration::from_millis(500));
    // Nothing is read from the socket, while the system's buffers take some megabytes.
    let deadline = Instant::now() + Duration::from_secs(120);
    while running.engine.stats().active > 0 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(50));
    }
    running.wait_until_idle();
    drop(socket);
}

#[test]
fn time_is_limited() {
    let limits = Limits { request_s: 1, ..Limits::default() };
    let running = Running::new(Options { limits, ..Options::default() });
    let answer = running.post(CHAT, &slowly(false)).json();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert!(answer["choices"][0]["message"]["content"].as_str().unwrap().starts_with(" so so"), "{answer}");
}

#[test]
fn keys_hosts_and_origins_are_checked() {
    let options = Options {
        api_key: Some("sesame".into()),
        allowed_origins: vec!["https://good.example".into()],
        ..Options::default()
    };
    let running = Running::new(options);
    let status = |headers: &[(&str, &str)]| running.ask("GET", "/v1/models", headers, b"").status;
    assert_eq!(running.get("/health").status, 200);
    assert_eq!(status(&[]), 401);
    assert_eq!(status(&[("authorization", "Bearer wrong")]), 401);
    assert_eq!(status(&[("authorization", "Bearer sesame")]), 200);
    assert_eq!(status(&[("x-api-key", "sesame")]), 200);
    assert_eq!(status(&[("x-api-key", "sesame"), ("host", "evil.example")]), 403);
    assert_eq!(status(&[("x-api-key", "sesame"), ("origin", "https://evil.example")]), 403);
    let good = [("x-api-key", "sesame"), ("origin", "https://good.example")];
    let allowed = running.ask("GET", "/v1/models", &good, b"");
    assert_eq!(allowed.status, 200);
    assert_eq!(allowed.header("access-control-allow-origin"), Some("https://good.example"));
    assert_eq!(allowed.header("access-control-expose-headers"), Some("retry-after"));
    for headers in [&[][..], &good, &[("origin", "https://evil.example")]] {
        assert_eq!(running.ask("GET", "/health", headers, b"").header("vary"), Some("origin"), "{headers:?}");
    }
    let preflight = running.ask("OPTIONS", CHAT, &good[1..], b"");
    assert_eq!(preflight.status, 204);
    assert!(preflight.header("access-control-allow-headers").is_some());
}

#[test]
fn bad_http_and_bad_json_are_answered() {
    let limits = Limits { body_bytes: 4096, header_s: 1, body_s: 1, ..Limits::default() };
    let running = Running::new(Options { limits, ..Options::default() });
    let post = |body: &[u8]| running.ask("POST", CHAT, &[], body);
    for body in [&b""[..], b"{", b"[]", b"null", b"NaN", b"{\"messages\": 1}", b"{\"a\":1,\"a\":2}", b"\xff\xfe"] {
        let answer = post(body);
        assert_eq!(answer.status, 400, "{body:?}");
        assert!(answer.json()["error"]["message"].is_string());
    }
    assert_eq!(post("[".repeat(2000).as_bytes()).status, 400);
    assert_eq!(post(&[b' '; 5000]).status, 413);

    let raw = |text: &str| {
        let mut socket = running.connect();
        socket.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        let _ = socket.read_to_string(&mut answer);
        answer
    };
    let chat = format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
    let body = "{\"messages\": [{\"content\": \"hello\"}]}";
    let chunked = format!("{chat}transfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    assert!(raw(&chunked).contains("Hello there!"));
    let slow_body = raw(&format!("{chat}content-length: 100\r\n\r\n{{"));
    assert!(slow_body.starts_with("HTTP/1.1 408"), "{slow_body}");
    let slow_head = raw("POST / HTTP/1.1\r\nhost: loc");
    assert!(slow_head.is_empty() || slow_head.starts_with("HTTP/1.1 408"), "{slow_head}");
    let large_head = raw(&format!("GET /health HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "y".repeat(1 << 17)));
    assert!(large_head.is_empty() || large_head.starts_with("HTTP/1.1 431"), "{large_head}");
    for smuggled in ["content-length: 5\r\ncontent-length: 6\r\n", "content-length: -1\r\n", "content-length: 1e2\r\n"]
    {
        let answer = raw(&format!("{chat}{smuggled}\r\nhello!"));
        assert!(answer.starts_with("HTTP/1.1 400"), "{smuggled}: {answer}");
    }
    assert_eq!(running.get("/health").status, 200);
}

#[test]
fn a_large_body_is_taken_up_to_the_limit() {
    let running = Running::new(Options::default());
    let body = |bytes: usize| json!({"messages": [{"content": "hello"}], "user": "x".repeat(bytes)}).to_string();
    assert_eq!(running.ask("POST", CHAT, &[], body(60 << 20).as_bytes()).status, 200);
    let refused = running.ask("POST", CHAT, &[], body(64 << 20).as_bytes());
    assert_eq!(refused.status, 413);
    assert_eq!(refused.json()["error"]["type"], "request_too_large");
}

#[test]
fn slow_senders_of_large_bodies_hold_up_nobody() {
    let running = Running::new(Options::default());
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", 60 << 20);
    let slow: Vec<_> = (0..10)
        .map(|_| {
            let mut socket = running.connect();
            socket.write_all(head.as_bytes()).unwrap();
            socket.write_all(&vec![b' '; 2 << 20]).unwrap();
            socket
        })
        .collect();
    let begun = Instant::now();
    let body = json!({"messages": [{"content": "hello"}], "user": "x".repeat(2 << 20)});
    assert_eq!(running.post(CHAT, &body).status, 200);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop(slow);
}

#[test]
fn connections_are_kept_alive() {
    let running = Running::new(Options::default());
    let mut socket = running.connect();
    let mut lines = BufReader::new(socket.try_clone().unwrap());
    for _ in 0..3 {
        socket.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(lines.read_line(&mut head).unwrap() > 0, "{head}");
        }
        let mut body = [0; 15];
        lines.read_exact(&mut body).unwrap();
        assert_eq!(&body, b"{\"status\":\"ok\"}");
    }
}

#[test]
fn stopping_ends_streams_with_an_error() {
    let running = Running::new(Options::default());
    let socket = running.send("POST", CHAT, &[], slowly(true).to_string().as_bytes());
    thread::sleep(Duration::from_millis(500));
    running.stop();
    let answer = Answer::read(socket);
    assert_eq!(answer.status, 200);
    assert!(answer.body.contains("event: error\n"), "{}", &answer.body[answer.body.len().saturating_sub(300)..]);
    assert!(answer.body.ends_with("data: [DONE]\n\n"));
}
