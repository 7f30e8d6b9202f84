"""HTTP as no client should speak it, byte by byte: what one proxy reads as one request and the next as two, and what never ends."""
import re, socket, time

HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
BODY = b'{"model":"x","messages":[{"role":"user","content":"Hello"}],"max_tokens":2,"thinking":false,"temperature":0}'


def post(*headers, body=BODY, line=b"POST /v1/chat/completions HTTP/1.1", host=b"Host: 127.0.0.1\r\n"):
    lines = b"".join(header + b"\r\n" for header in (b"Content-Type: application/json", *headers))
    return line + b"\r\n" + host + lines + b"\r\n" + body


def length(body=BODY):
    return b"Content-Length: %d" % len(body)


def chunked(*chunks):
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


TE = b"Transfer-Encoding: chunked"

# Name, bytes, and what the first status must be; () where the connection may also just be closed, None where more is still to come.
SHAPES = [
    ("length and chunks", post(length(), TE, body=chunked(BODY) + HEALTH), (200, 400)),
    ("length of less, and chunks", post(b"Content-Length: 4", TE, body=chunked(BODY) + HEALTH), (200, 400)),
    ("two lengths", post(b"Content-Length: 5", length(), body=BODY + HEALTH), (400,)),
    ("two equal lengths", post(length(), length()), (200, 400)),
    ("list of lengths", post(b"Content-Length: 5, 6"), (400,)),
    ("length +5", post(b"Content-Length: +5"), (400,)),
    ("length -1", post(b"Content-Length: -1"), (400,)),
    ("length 0x10", post(b"Content-Length: 0x10"), (400,)),
    ("length of 2^64", post(b"Content-Length: 18446744073709551616"), (400, 413)),
    ("length of 2^63", post(b"Content-Length: 9223372036854775807"), (400, 413)),
    ("length of 64 MiB + 1", post(b"Content-Length: 67108865", body=b""), (413,)),
    ("empty length", post(b"Content-Length: "), (400,)),
    ("no length", post(body=b""), (400, 411)),
    ("xchunked", post(b"Transfer-Encoding: xchunked", body=chunked(BODY)), (400, 501)),
    ("identity", post(b"Transfer-Encoding: identity", length()), (200, 400, 501)),
    ("chunked, identity", post(b"Transfer-Encoding: chunked, identity", body=chunked(BODY)), (400, 501)),
    ("chunked twice", post(TE, TE, body=chunked(BODY)), (200, 400)),
    ("tab before chunked", post(b"Transfer-Encoding:\tchunked", body=chunked(BODY)), (200, 400)),
    ("space before colon", post(b"Transfer-Encoding : chunked", length()), (400,)),
    ("HTTP/1.0 with chunks", post(TE, body=chunked(BODY), line=b"POST /v1/chat/completions HTTP/1.0"), (200, 400)),
    ("good chunks", post(TE, body=chunked(BODY[:7], BODY[7:])), (200,)),
    ("chunk of size G", post(TE, body=b"G\r\nabc\r\n0\r\n\r\n"), (400,)),
    ("chunk of size -1", post(TE, body=b"-1\r\nabc\r\n0\r\n\r\n"), (400,)),
    ("chunk of 2^68", post(TE, body=b"FFFFFFFFFFFFFFFFF\r\nabc\r\n0\r\n\r\n"), (400, 413)),
    ("chunk of 2^60", post(TE, body=b"FFFFFFFFFFFFFFF\r\nabc\r\n"), None),
    ("chunk longer than said", post(TE, body=b"3\r\nabcdef\r\n0\r\n\r\n"), (400,)),
    ("chunk without a size", post(TE, body=b"\r\nabc\r\n0\r\n\r\n"), (400,)),
    ("extension of 1 MiB", post(TE, body=b"3;" + b"x" * 2**20 + b"\r\n{}}\r\n0\r\n\r\n"), ()),
    ("trailers of 1 MiB", post(TE, body=chunked(BODY)[:-2] + b"A: " + b"x" * 2**20 + b"\r\n\r\n"), ()),
    ("folded header", post(length(), b"X-A: b\r\n c"), (200, 400)),
    ("NUL in a header", post(length(), b"X-A: b\0c"), (400,)),
    ("bare CR in a header", post(length(), b"X-A: b\rX-B: c"), (400,)),
    ("bare LF at line ends", post(length()).replace(b"\r\n", b"\n", 4), (200, 400)),
    ("header without colon", post(length(), b"nonsense"), (400,)),
    ("header of 128 KiB", post(length(), b"X-A: " + b"x" * 2**17), (400, 431)),
    ("10,000 headers", post(length(), *[b"X-%d: y" % number for number in range(10_000)]), (400, 431)),
    ("path of 128 KiB", b"GET /" + b"x" * 2**17 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400, 404, 414, 431)),
    ("NUL in the path", b"GET /\0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400,)),
    ("space in the path", b"GET / x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400,)),
    ("dots in the path", b"GET /../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400, 404)),
    ("bad escapes in the path", b"GET /v1/responses/%ff%00%zz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400, 404)),
    ("whole URI", b"GET http://127.0.0.1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (200, 400)),
    ("whole URI of another host", b"GET http://example.org/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (200, 400, 403, 421)),
    ("another host", b"GET /health HTTP/1.1\r\nHost: example.org\r\n\r\n", (400, 403, 421)),
    ("no host", b"GET /health HTTP/1.1\r\n\r\n", (200, 400, 403)),
    ("two hosts", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: example.org\r\n\r\n", (400, 403)),
    ("unknown method", b"BREW /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400, 404, 405, 501)),
    ("CONNECT", b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n", (400, 403, 404, 405, 421)),
    ("TRACE", b"TRACE /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400, 404, 405, 501)),
    ("lower-case method", b"get /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400, 404, 405, 501)),
    ("HTTP/0.9", b"GET /health\r\n\r\n", (400,)),
    ("HTTP/1.2", b"GET /health HTTP/1.2\r\nHost: 127.0.0.1\r\n\r\n", (200, 400, 505)),
    ("HTTP/2's preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", ()),
    ("TLS", bytes.fromhex("16030100c6010000c20303") + b"x" * 190, ()),
    ("blank lines first", b"\r\n\r\n" + HEALTH, (200, 400)),
    ("random bytes", bytes((number * 97 + 31) % 256 for number in range(4096)), ()),
    ("upgrade to h2c", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
                       b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", (200, 400)),
    ("websocket", b"GET /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                  b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", (400, 404, 405, 426)),
    ("expectation", post(length(), b"Expect: 100-continue"), (100, 200)),
    ("unknown expectation", post(length(), b"Expect: tea"), (200, 417)),
    ("gzip", post(length(), b"Content-Encoding: gzip"), (200, 400, 415)),
    ("body of a GET", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n\r\nabcde", (200, 400)),
    ("two requests at once", HEALTH + HEALTH, (200,)),
]


def connect(port, receive_bytes=None):
    made = socket.socket()
    if receive_bytes:
        # Small segments, too: the other side makes its buffer for some of them, and the loopback's are of 64 KiB.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.settimeout(5)
    made.connect(("127.0.0.1", port))
    return made


def talk(port, data, half_close=False, patience_s=5):
    """Sends bytes; what comes back until the connection is closed or nothing comes any more, and whether it was closed."""
    received = b""
    with connect(port) as made:
        try:
            made.sendall(data)
            if half_close:
                made.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # closed while we wrote: what it said is still to be read
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            # Once something came, a short silence is the end of it.
            made.settimeout(0.4 if received else max(0.01, deadline - time.monotonic()))
            try:
                chunk = made.recv(65536)
            except TimeoutError:
                break
            except OSError:
                return received, True
            if not chunk:
                return received, True
            received += chunk
    return received, False


def statuses(received):
    """The statuses of the answers in what came back."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", received)]
