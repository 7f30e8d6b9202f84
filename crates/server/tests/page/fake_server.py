"""A server that plays the part of `infall serve` for the page: it serves the page's files and answers by a script.

The last message of a request chooses the script: its first word is a name in SCRIPTS. All requests are kept in `requests`.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "src" / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
}
CSP = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
       "base-uri 'none'; form-action 'none'")
KEY = "open sesame"

HOSTILE = """# Hostile <img src=x onerror="window.hit = 1">

<script>window.hit = 1</script> and <img src=x onerror="window.hit = 1">

[click](javascript:window.hit=1) [data](data:text/html,<script>window.hit=1</script>) [upper](JaVaScRiPt:window.hit=1)
![image](javascript:window.hit=1) [tab](java\tscript:window.hit=1) [quote](https://a.example/"onmouseover="window.hit=1)

```<script>window.hit = 1</script>
</code></pre><script>window.hit = 1</script>
```

| <script>window.hit = 1</script> | <b onclick="window.hit = 1">b</b> |
|---|---|
| <svg onload="window.hit = 1"> | [x](vbscript:window.hit=1) |
"""

MARKDOWN = """# Title

A paragraph with **bold**, *italic*, `code <b>` and [a link](https://example.com/a_(b)), 2 * 3 * 4, snake_case_name,
https://example.com/bare. A \\*star\\*.  
After a break.

- one
- two, with `code`
  - nested

    more of *nested*
- three

3. third
4. fourth

> quoted
> text

```python
def f():
    return "**not bold**"
```

| name | value |
|---|---:|
| a | **1** |
| b | a long value that makes the table wider than a phone is, much wider than that |

---

## End
"""

HEAVY = ["**", "*a ", "`", "[", "[a](", "> " * 20 + "x", "_", "https://", "- " * 20 + "\n", "|"]

CALL = {"index": 0, "id": "call_0123", "type": "function", "function": {"name": "weather", "arguments": ""}}


def content(text):
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def reasoning(text):
    return {"choices": [{"index": 0, "delta": {"reasoning_content": text}}]}


def arguments(text):
    return {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}}]}


def finish(reason="stop"):
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def pieces(text, size=7):
    return [text[at:at + size] for at in range(0, len(text), size)]


# What a script is made of: a chunk (dict), a pause in seconds (number), a raw line (str), or DROP.
DROP = object()
SCRIPTS = {
    "hello": [*map(content, ["Hel", "lo, ", "world", "!"]), finish()],
    "think": [*(step for n in range(12) for step in (reasoning(f"Step {n}. "), 0.05)), content("Thought "), content("through."), finish()],
    "slow": [*(step for n in range(400) for step in (content(f"word{n} "), 0.05)), finish()],
    "prefill": [": prefill\n\n", 0.6, ": prefill\n\n", 0.6, content("At last."), finish()],
    "markdown": [*map(content, pieces(MARKDOWN)), finish()],
    "hostile": [reasoning("<script>window.hit = 1</script>"), *map(content, pieces(HOSTILE)), finish()],
    "heavy": [*(content(text * 2000) for text in HEAVY), finish()],
    "weather": [content("Let me look."), {"choices": [{"index": 0, "delta": {"tool_calls": [CALL]}}]},
                *map(arguments, ['{"place":', ' "Rome",', ' "days": [1, 2]}']), finish("tool_calls")],
    "cut": [{"choices": [{"index": 0, "delta": {"tool_calls": [CALL]}}]}, arguments('{"pla'), finish("length")],
    "fail": [content("Half of"), 'event: error\ndata: {"error": {"message": "the disk is gone", "type": "server_error"}}\n\n', DROP],
    "lost": [content("Half of"), 0.2, DROP],
    "long": [*map(content, pieces("Line after line.\n\n" * 200, 400)), finish()],
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body, kind="application/json", **headers):
        body = body if isinstance(body, bytes) else body.encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), "Content-Security-Policy": CSP, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            pass                                    # the page was left

    def refuse(self, status, message, **headers):
        self.reply(status, json.dumps({"error": {"message": message, "type": "some_error"}}), **headers)

    def is_allowed(self):
        return not self.server.wants_key or self.headers.get("Authorization") == f"Bearer {KEY}"

    def do_GET(self):
        fake = self.server
        if self.path in FILES:
            name, kind = FILES[self.path]
            self.reply(200, (PAGE / name).read_bytes(), kind)
        elif self.path not in ("/props", "/metrics"):
            self.refuse(404, "no such path")
        elif not self.is_allowed():
            self.refuse(401, "an API key is required")
        elif self.path == "/props":
            self.reply(200, json.dumps({"model": "fake", "device": "cpu", "precision": "exact", "experts": "streamed",
                                        "context_tokens": 32768, "version": "0.0.0"}))
        else:
            fake.polls += 1
            figures = {"experts_hits_total": 9000 + fake.polls, "experts_misses_total": 1000, "experts_read_bytes_total": fake.polls << 31,
                       "memory_bytes": 6 << 30, "requests_active": 1, "requests_waiting": 0, "decode_tokens_total": 10 * fake.polls}
            lines = [f"# HELP infall_{name} text\n# TYPE infall_{name} gauge\ninfall_{name} {value}\n" for name, value in figures.items()]
            self.reply(200, "".join(lines) + 'infall_requests_active{api="chat"} 1\n', "text/plain; version=0.0.4")

    def do_POST(self):
        fake = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake.requests.append((dict(self.headers), body))
        if not self.is_allowed():
            return self.refuse(401, "an API key is required")
        if fake.busy > 0:
            fake.busy -= 1
            return self.refuse(429, "the queue is full", Retry_After=1)
        said = body["messages"][-1]["content"].split()
        script = SCRIPTS.get(said[0] if said else "")
        if script is None and body["messages"][-1]["role"] == "tool":
            script = [content("The tool said: " + " ".join(said)), finish()]
        if script is None:
            return self.refuse(400, f"messages: no script for {said}")
        try:
            self.stream(script, body)
        except (BrokenPipeError, ConnectionResetError):
            fake.disconnects += 1

    def stream(self, script, body):
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.say({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
        for step in script:
            if step is DROP:
                return
            if isinstance(step, (int, float)):
                time.sleep(step)
            elif isinstance(step, str):
                self.wfile.write(step.encode())
            else:
                self.say(step)
        if body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": 1234, "completion_tokens": 56, "total_tokens": 1290, "prompt_tokens_details": {"cached_tokens": 1000}}
            self.say({"choices": [], "usage": usage, "timings": {"predicted_per_second": 12.34, "prompt_per_second": 99.0}})
        self.wfile.write(b"data: [DONE]\n\n")

    def say(self, chunk):
        data = json.dumps({"id": "chatcmpl-1", "object": "chat.completion.chunk", **chunk}, ensure_ascii=False)
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()


class FakeServer(ThreadingHTTPServer):
    """Listens on a free port of loopback, in a thread of its own."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self):
        self.requests, self.busy, self.wants_key, self.polls, self.disconnects = [], 0, False, 0, 0


if __name__ == "__main__":
    server = FakeServer()
    print(server.url)
    threading.Event().wait()
