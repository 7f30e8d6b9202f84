"""What a server must survive: being killed while it saves, disks that are full or cannot be written, requests that no client should
send, clients that drip, stall or vanish, and whatever schemathesis makes of its OpenAPI document.

Whatever happens, nothing that was acknowledged is lost, no answer is another's or differs from what a server without snapshots
says, and health and a plain request are answered throughout.
"""
import asyncio, contextlib, functools, http.client, io, json, multiprocessing, os, random, re, signal, socket, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp

import answers, bad_json, bodies, raw_http
from harness import Report, Server, arguments

WORDS = "garden stone cloud river market valve candle winter bottle engine doctor invoice quiet apple storm letter bridge summer".split()


class Talk:
    """A conversation of stored responses, each going on from the one before. Everything is greedy, so it has one course."""

    def __init__(self, seed, filler_words=220):
        draw = random.Random(f"talk {seed}")
        filler = " ".join(draw.choice(WORDS) for _ in range(filler_words))
        name, number = draw.choice(bodies.NAMES), draw.randint(100, 999)
        self.inputs = [f"{name}={number} {filler}. What is {name}?", f"Write these words backwards: {filler[:40]}", "Tell me a story."]
        self.seed, self.instructions = seed, f"You are a helpful assistant. This is talk {seed}."
        self.acknowledged, self.faults = [], []  # responses, and other answers

    def next_body(self, previous=None):
        turn = len(self.acknowledged)
        body = {"model": bodies.MODEL, "instructions": self.instructions, "input": self.inputs[turn], "temperature": 0, "seed": 1,
                "max_output_tokens": 24, "reasoning": {"effort": "none"}, "store": True}
        return body | ({"previous_response_id": previous} if previous else {})

    def is_over(self):
        return len(self.acknowledged) == len(self.inputs)


def text_of(response):
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


def advance(server, talk, stop):
    """Goes on with a talk until it is over or the server is gone, or says that it goes. Only whole answers count as acknowledged."""
    while not talk.is_over() and not stop.is_set():
        previous = talk.acknowledged[-1]["id"] if talk.acknowledged else None
        try:
            status, body = server.post("/v1/responses", talk.next_body(previous))
        except TimeoutError:
            talk.faults.append("no answer in time")
            return
        except (OSError, http.client.HTTPException):
            return  # killed under our feet
        if status == 503:
            return
        if status != 200:
            talk.faults.append(f"status {status}: {body[:300]}")
            return
        try:
            talk.acknowledged.append(json.loads(body))
        except ValueError as error:
            talk.faults.append(f"{error}: {body[:300]}")
            return


class Plain(Server):
    """A server that keeps nothing on the disk: what a talk's turns must be. It is asked once for each."""

    def __init__(self, binary):
        super().__init__(binary)
        self.known = {}

    def texts(self, talk):
        twin = self.known.setdefault(talk.seed, Talk(talk.seed))
        while len(twin.acknowledged) < len(talk.acknowledged):
            status, body = self.post("/v1/responses", twin.next_body(twin.acknowledged[-1]["id"] if twin.acknowledged else None))
            assert status == 200, (status, body[:300])
            twin.acknowledged.append(json.loads(body))
        return [text_of(response) for response in twin.acknowledged]


def kills(report, options):
    """Killed at random moments while sessions are being saved, and then as soon as the file of one is seen to be written."""
    (at_random, in_saves), draw = (4, 3) if options.smoke else (50, 50), random.Random(options.seed)
    lost, wrong, acknowledged, resumed, cached, prompt, hit, kills = [], [], 0, 0, 0, 0, 0, 0
    talks = [Talk(number) for number in range(4)]
    with Plain(options.binary) as plain, Server(options.binary, "--snapshot-dir", "snapshots", "--sessions", 2) as server:
        # Now and then no save begins in time.
        while kills < at_random or hit < in_saves and kills < at_random + 4 * in_saves:
            stop = threading.Event()
            threads = [threading.Thread(target=advance, args=(server, talk, stop)) for talk in talks]
            [thread.start() for thread in threads]
            is_random = kills < at_random
            time.sleep(draw.uniform(0, 2.5) if is_random else draw.uniform(0, 1))
            # Half of the time it is killed while it saves everything because it was asked to end.
            if draw.random() < 0.5:
                server.process.send_signal(signal.SIGTERM)
                time.sleep(draw.uniform(0, 0.2) if is_random else 0)
            if not is_random:
                stop_saving(server, draw)
            stop.set()
            if server.is_alive():
                server.stop(signal.SIGKILL)
            kills += 1
            # Whoever finishes a save gives the file its name: one that is left was being written.
            hit += any(half_written(server))
            [thread.join() for thread in threads]
            server.start()
            for talk in talks:
                for response in talk.acknowledged:
                    status, body = server.get(f"/v1/responses/{response['id']}")
                    if status != 200 or json.loads(body) != response:
                        lost.append(f"{response['id']}: {status} {body[:200]}")
                if talk.acknowledged and not talk.is_over():
                    resumed += 1
            for index, talk in enumerate(talks):
                if talk.is_over():
                    acknowledged += check_talk(plain, talk, wrong)
                    cached += sum(response["usage"]["input_tokens_details"]["cached_tokens"] for response in talk.acknowledged)
                    prompt += sum(response["usage"]["input_tokens"] for response in talk.acknowledged)
                    talks[index] = Talk(f"{kills} {index}")
        # What was begun goes on to its end.
        for talk in talks:
            advance(server, talk, threading.Event())
            acknowledged += check_talk(plain, talk, wrong)
        unfinished = sum(not talk.is_over() for talk in talks)
        warnings = [line for line in server.log().splitlines() if "WARN" in line or "ERROR" in line]
    print(*lost[:5], *wrong[:5], *warnings[:5], sep="\n")
    report.row(hit >= in_saves, "killed while saving", f"{kills} kills, {at_random} of them at random moments",
               f"{hit} hit a save under way, at least {in_saves} wanted")
    report.row(not lost, "killed while saving", f"{acknowledged} responses acknowledged", f"{len(lost)} lost")
    report.row(not wrong and not unfinished and resumed > 0 and (options.smoke or cached > 0), "killed while saving", f"{resumed} talks went on after a kill",
               f"{len(wrong)} answers differ from a server without snapshots; {cached} of {prompt} prompt tokens were not read again")


def half_written(server):
    """The snapshots whose writing has begun and has not ended."""
    return (server.home / "snapshots").glob("*.partial")


def stop_saving(server, draw, patience_s=5):
    """Stops the server while it writes a snapshot, a random moment after that was seen. Gives up when the server has ended, or nothing of the
    kind happens. A save that was over before the server stood still is let go."""
    deadline = time.monotonic() + patience_s
    while server.is_alive() and time.monotonic() < deadline:
        if any(half_written(server)):
            time.sleep(draw.uniform(0, 0.002))
            server.process.send_signal(signal.SIGSTOP)
            while not is_still(server.process.pid):
                time.sleep(0.001)
            if any(half_written(server)):
                return
            server.process.send_signal(signal.SIGCONT)
        time.sleep(0.0005)


def is_still(pid):
    """Whether all threads of a process have stopped, or ended."""
    try:
        tasks = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:
        return False  # one has ended meanwhile
    return all(task.rsplit(")", 1)[1].split()[0] in "TZX" for task in tasks)


def check_talk(plain, talk, wrong):
    found = [text_of(response) for response in talk.acknowledged]
    wrong += talk.faults
    wrong += [f"expected {one!r}, found {other!r}" for one, other in zip(plain.texts(talk), found) if one != other]
    return len(found)


def spoilt(report, options):
    """Files of snapshots with a bit flipped or an end missing."""
    draw, wrong, seen = random.Random(options.seed), [], 0
    talks = [Talk(f"spoilt {number}") for number in range(3)]
    with Plain(options.binary) as plain, Server(options.binary, "--snapshot-dir", "snapshots") as server:
        for number in range(2 if options.smoke else 10):
            for talk in talks:
                if len(talk.acknowledged) == number % 3:
                    status, body = server.post("/v1/responses", talk.next_body(talk.acknowledged[-1]["id"] if talk.acknowledged else None))
                    assert status == 200, (status, body[:300])
                    talk.acknowledged.append(json.loads(body))
            server.stop(signal.SIGTERM)
            for path in snapshot_files(server):
                seen += 1
                data = bytearray(path.read_bytes())
                if draw.random() < 0.5:
                    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                else:
                    del data[draw.randrange(len(data)):]
                path.write_bytes(data)
            server.start()
            for index, talk in enumerate(talks):
                if talk.is_over():
                    check_talk(plain, talk, wrong)
                    talks[index] = Talk(f"spoilt {number} {index}")
        for talk in talks:
            check_talk(plain, talk, wrong)
        told = sum("WARN" in line for line in server.log().splitlines())
    print(*wrong[:5], sep="\n")
    report.row(not wrong and seen > 0 and told > 0, "spoilt snapshots", f"{seen} files", f"{len(wrong)} wrong answers, {told} warnings")


def snapshot_files(server):
    """The sessions on the disk, without the index."""
    return [path for path in sorted((server.home / "snapshots").rglob("*")) if path.is_file() and path.suffix not in (".redb", ".lock")]


# What is mounted in the server's own namespace: where its snapshots go before it starts, and over that while it runs.
DISKS = {
    "a disk of 256 KiB": ("-o size=256k", None),
    "a disk of 4 MiB": ("-o size=4m", None),
    "a folder that becomes read-only": ("-o size=64m", "-o ro"),
}


def disks(report, options):
    """A disk that is full, and one that cannot be written."""
    if subprocess.run([*mounting("-o size=64k", Path("/mnt")), "true"], capture_output=True).returncode:
        # The short form runs anywhere; the whole one has nothing to show without this.
        return report.row(None if options.smoke else False, "disks", "this user may not mount")
    with Plain(options.binary) as plain:
        for name, (first, later) in DISKS.items():
            disk(report, options, plain, name, first, later)

    home, folder = folders()
    try:
        Server(options.binary, "--snapshot-dir", folder, home=home, prefix=mounting("-o ro", folder)).start()
        report.row(False, "a folder read-only from the start", "started, and cannot keep what it acknowledges")
    except RuntimeError as error:
        told = str(error).splitlines()[-1]
        report.row("Read-only" in told, "a folder read-only from the start", "refused", re.sub(r"\S*/\S+", "…", told)[:120])


def disk(report, options, plain, name, first, later):
    home, folder = folders()
    with Server(options.binary, "--snapshot-dir", folder, "--sessions", 2, home=home, prefix=mounting(first, folder)) as server:
        if later:
            enter = ["nsenter", f"--target={server.process.pid}", "--mount", *([] if os.geteuid() == 0 else ["--user"])]
            subprocess.run([*enter, "mount", "-t", "tmpfs", *later.split(), "none", folder], check=True)
        wrong, talks = [], [Talk(f"disks {number}") for number in range(6)]
        for talk in talks:
            advance(server, talk, threading.Event())
            check_talk(plain, talk, wrong)
        answered = sum(len(talk.acknowledged) for talk in talks)
        healthy = server.get("/health")[0] == 200
        failed = server.metrics()["infall_snapshots_failed_total"]
        told = [line for line in server.log().splitlines() if re.search("WARN|ERROR", line)]
        code = server.stop(signal.SIGTERM)
    print(*wrong[:3], sep="\n")
    report.row(healthy and not wrong and answered == 18 and code == 0, name, f"{answered} of 18 answers, {len(wrong)} wrong", f"exit {code}")
    report.row(bool(told) and failed > 0, name, f"{failed:.0f} saves failed, {len(told)} warnings",
               re.sub(r"\S*/\S+", "…", told[0][28:])[:120] if told else "")


def folders():
    """A home for a server, and the folder of its snapshots."""
    home = temporary_folder()
    (home / "snapshots").mkdir()
    return home, home / "snapshots"


def temporary_folder():
    """A folder that is gone when the part ends."""
    return Path(tempfile.mkdtemp(prefix="infall-server-"))


def mounting(how, folder):
    """A command before another, which then has a file system of its own at `folder`."""
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *as_root, "--mount", "sh", "-c", f'mount -t tmpfs {how} none "{folder}" && exec "$@"', "sh"]


class Probe(threading.Thread):
    """Asks for health and for a plain answer all the time, and remembers how long that took."""

    BODY = {"model": bodies.MODEL, "messages": [{"role": "user", "content": "What is 23 + 45?"}], "max_tokens": 12, "temperature": 0, "thinking": False}

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.stop, self.faults = server, threading.Event(), []
        self.health_s, self.answer_s, self.expected = [0.0], [], self.answer()
        assert not self.expected.startswith("status "), self.expected

    def answer(self):
        status, body = self.server.post("/v1/chat/completions", self.BODY)
        return json.loads(body)["choices"][0]["message"]["content"] if status == 200 else f"status {status}"

    def run(self):
        while not self.stop.wait(0.2):
            try:
                began = time.monotonic()
                status = self.server.get("/health", timeout=30)[0]
                self.health_s.append(time.monotonic() - began)
                began = time.monotonic()
                found = self.answer()
                # A full queue is an answer, too.
                if found != "status 429":
                    self.answer_s.append(time.monotonic() - began)
                    if status != 200 or found != self.expected:
                        self.faults.append(f"health {status}, answer {found!r}, expected {self.expected!r}")
            # Whatever it is: a thread that ends would say nothing more.
            except Exception as error:
                self.faults.append(f"{type(error).__name__} {error}")

    def end(self, report, name):
        self.stop.set()
        self.join()
        self.server.wait_idle()
        last = self.answer()
        if last != self.expected:
            self.faults.append(f"answer {last!r} at the end, expected {self.expected!r}")
        print(*self.faults[:3], sep="\n")
        report.row(not self.faults and self.server.is_alive() and max(self.health_s) < 5, name, "health and an answer throughout",
                   f"{len(self.health_s) - 1} probes, {len(self.faults)} faults, health within {max(self.health_s) * 1e3:.0f} ms, "
                   f"{len(self.answer_s)} answers, within {max(self.answer_s, default=0):.1f} s")


async def send_malformed(server, count, seed):
    """Sends bodies with faults, sixteen at a time; statuses, and what was wrong with answers."""
    counts, faults, draw = {}, [], random.Random(seed)
    pool, numbers = bodies.mixed(64, seed), iter(range(count))
    paths = [*bodies.PLACES.values(), "/v1/messages/count_tokens", "/v1/responses/input_tokens"]

    async def sender(session):
        for number in numbers:
            request = draw.choice(pool)
            text = bad_json.malformed(marked(request.body, number), draw)
            path = request.path if draw.random() < 0.9 else draw.choice(paths)
            try:
                async with session.post(path, data=text, headers={"content-type": "application/json"}) as answer:
                    body = await answer.read()
                    status, kind = answer.status, answer.content_type
            except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                status, kind, body = type(error).__name__, None, b""
            counts[status] = counts.get(status, 0) + 1
            fault = fault_of(path, status, kind, body, number)
            if fault:
                faults.append(f"{path} {text[:300]!r}: {fault}")

    # What survives its faults and asks for a long answer is left after a while.
    patience = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(server.url, timeout=patience) as session:
        await asyncio.gather(*(sender(session) for _ in range(16)))
    return counts, faults


def marked(body, number):
    """The body with a word that no other has, and an answer of a few tokens."""
    body = json.loads(json.dumps(body).replace("What is", f"zq{number}qz What is").replace("backwards: ", f"backwards: zq{number}qz "))
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if name in body:
            body[name] = 4
    return body


def fault_of(path, status, kind, body, number):
    """What is wrong with an answer to a malformed request, if anything. No other error than 400 is right here: none of these requests goes on
    from a stored response (404) or is longer than the limit (413), and all of them together do not fill the queue (429)."""
    if status not in (200, 400):
        return f"status {status}, {body[:200]!r}"
    others = set(re.findall(rb"zq(\d+)qz", body)) - {b"%d" % number}
    if others:
        return f"the answer holds words of the requests {others}"
    if status == 400 and kind != "application/json":
        return f"an error of the content type {kind}"
    return answers.error_fault(path, body) if status == 400 else answers.answer_fault(path, kind, body)


def malformed(report, options):
    count = 1_000 if options.smoke else 10_000
    with Server(options.binary) as server:
        probe = Probe(server)
        probe.start()
        counts, faults = asyncio.run(send_malformed(server, count, options.seed))
        probe.end(report, "malformed bodies")
        server.wait_idle()
    print(*faults[:10], sep="\n")
    told = ", ".join(f"{number} × {status}" for status, number in sorted(counts.items(), key=lambda item: -item[1]))
    report.row(not faults, "malformed bodies", f"{count} requests", f"{told}; {len(faults)} faults")


def shapes(report, options):
    """HTTP as no client should speak it, each shape with the connection left open and half closed."""
    with Server(options.binary) as server:
        probe = Probe(server)
        probe.start()
        # Most of a shape's time is silence.
        with ThreadPoolExecutor(8) as pool:
            talks = [[pool.submit(raw_http.talk, server.port, data, half_close) for half_close in (False, True)] for _, data, _ in raw_http.SHAPES]
        for (name, _, expected), talks_of_it in zip(raw_http.SHAPES, talks):
            told, ok = [], True
            for half_close, talk in zip((False, True), talks_of_it):
                received, closed = talk.result()
                found = raw_http.statuses(received)
                told.append(f"{found or 'nothing'}{', closed' if closed else ''}")
                ok &= is_good(expected, found, closed, half_close)
                # Whatever follows a request with two lengths must not count as a request of its own.
                ok &= len(found) < 2 or found[0] == 100 or "length" not in name
            report.row(ok and server.is_alive(), "HTTP", name, "; half closed: ".join(told))
        sizes(report, server)
        probe.end(report, "HTTP")


def is_good(expected, found, closed, half_close):
    """Whether the first status is one of those expected. A client that will not speak again may be hung up on without an answer."""
    if expected is None:
        return not found and not closed or half_close
    if not found:
        return closed and (half_close or not expected)
    return found[0] in expected or not expected and found[0] < 500


def sizes(report, server):
    """Bodies at and above the limit, and histories whose reading must not take the square of their length."""
    limit = 64 * 2**20

    def timed(name, expected, send):
        began = time.monotonic()
        try:
            found = send()
        except OSError as error:
            found = type(error).__name__
        report.row(found in expected, "size", name, f"{found} after {time.monotonic() - began:.1f} s")
        return time.monotonic() - began

    def padded(size):
        head, tail = b'{"model":"x","max_tokens":1,"messages":[{"role":"user","content":"', b'"}]}'
        return head + b"a b " * ((size - len(head) - len(tail)) // 4) + tail

    chunks = raw_http.post(raw_http.TE, body=b"") + raw_http.chunked(*[b" " * 2**20] * 64, b"  ")
    timed("chunks of 64 MiB + 2", (413,), lambda: raw_http.statuses(raw_http.talk(server.port, chunks, patience_s=30)[0])[0])
    timed("a body of 64 MiB", (400,), lambda: server.request("POST", "/v1/chat/completions", padded(limit), 300)[0])
    pairs = [timed(f"{count} calls and results", (400,), lambda: server.post("/v1/chat/completions", paired(count))[0]) for count in (1024, 4096)]
    report.row(pairs[1] < 8 * pairs[0] + 0.5, "size", "4 times the history", f"{pairs[1] / max(pairs[0], 1e-3):.1f} times as long")


def paired(count):
    """A history of so many calls and results."""
    messages = [{"role": "user", "content": "Hello"}]
    for number in range(count):
        call = {"id": f"call_{number}", "type": "function", "function": {"name": "rename_alarm", "arguments": '{"sender": "a", "label": "b"}'}}
        messages += [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "tool_call_id": f"call_{number}", "content": "ok"}]
    return {"model": bodies.MODEL, "messages": messages, "tools": [{"type": "function", "function": bodies.TOOL}], "max_tokens": 1}


LIMITS = "[server.limits]\nheader_s = 2\nbody_s = 3\nwrite_s = 3\n"


def slow_clients(report, options):
    """Clients that drip, that do not read, and that vanish. The server's patience is set to a few seconds."""
    home = temporary_folder()
    (home / "infall.toml").write_text(LIMITS)
    count = 20 if options.smoke else 200
    with Server(options.binary, "--config", home / "infall.toml", home=home) as server:
        probe = Probe(server)
        probe.start()
        files = server.open_files()
        head, body = raw_http.post(raw_http.length(b"x" * 500), body=b""), b"x" * 500
        drips = {"headers, a byte a second": b"GET /health HTTP/1.1\r\nX-A: " + b"y" * 100, "body, a byte a second": head + body, "nothing at all": b""}

        def drip(name, data):
            # The body's first bytes come at once, with the headers.
            sent = len(head) + 1 if name.startswith("body") else 1
            made = [raw_http.connect(server.port) for _ in range(count)]
            [one.sendall(data[:sent]) for one in made if data]
            return cut_off(made, data[sent:], 12, f"{count} clients: {name}")

        with ThreadPoolExecutor() as pool:
            rows = [pool.submit(drip, *one) for one in drips.items()]
        [report.row(*row.result()) for row in rows]
        report.row(*stalled(server, 4 if options.smoke else 16))
        report.row(*vanished(server, 20 if options.smoke else 200))
        server.wait_idle()
        time.sleep(1)
        left = server.open_files()
        report.row(left <= files + 4, "slow clients", "open files afterwards", f"{files} to {left}")
        probe.end(report, "slow clients")


def cut_off(made, rest, patience_s, name):
    """Drips on until the server has closed every connection."""
    began, open_ones, at = time.monotonic(), list(made), 0
    while open_ones and time.monotonic() - began < patience_s:
        time.sleep(0.5)
        for one in list(open_ones):
            one.settimeout(0.001)
            try:
                if at % 2 and rest:
                    one.sendall(rest[at // 2:at // 2 + 1])
                if one.recv(4096) == b"":
                    open_ones.remove(one)
            except TimeoutError:
                pass
            except OSError:
                open_ones.remove(one)
        at += 1
    took = time.monotonic() - began
    [one.close() for one in made]
    return not open_ones, "slow clients", name, f"{len(made) - len(open_ones)} cut off within {took:.1f} s"


def long_stream(server):
    """A stream of many bytes: every token with its twenty likeliest, and none that could end the turn (nano's control tokens)."""
    ends = [*range(3), *range(2030, 2048)]
    body = {"model": bodies.MODEL, "messages": [{"role": "user", "content": "Tell me a story."}], "stream": True, "max_tokens": 3000, "temperature": 0,
            "thinking": False, "logprobs": True, "top_logprobs": 20, "logit_bias": {str(token): -100 for token in ends}}
    text = json.dumps(body).encode()
    return raw_http.post(raw_http.length(text), body=text)


def stalled(server, count):
    """Clients that ask for a long stream and do not read it."""
    made = [raw_http.connect(server.port, receive_bytes=4096) for _ in range(count)]
    [one.sendall(long_stream(server)) for one in made]
    began = time.monotonic()
    while time.monotonic() - began < 120:
        time.sleep(0.5)
        if server.metrics()["infall_requests_active"] + server.metrics()["infall_requests_waiting"] <= 1:
            break
    took = time.monotonic() - began
    held = [drained(one) for one in made]
    cut = sum(head.startswith(b"HTTP/1.1 200 ") and b"[DONE]" not in end for head, end in held)
    return took < 120 and cut == count, "slow clients", f"{count} streams that nobody reads", f"over after {took:.1f} s, {cut} of them cut off"


def drained(made):
    """The first and the last bytes of what a connection still holds."""
    made.settimeout(5)
    head, end = b"", b""
    try:
        while chunk := made.recv(65536):
            head, end = (head + chunk)[:200], (end + chunk)[-200:]
    except OSError:
        pass
    made.close()
    return head, end


def vanished(server, count):
    """Clients that reset their connection in the middle of a stream."""
    before = server.metrics()
    for number in range(count):
        with raw_http.connect(server.port) as one:
            one.sendall(long_stream(server))
            received = b""
            while number % 2 and b"logprobs" not in received:
                chunk = one.recv(1000)
                assert chunk, f"ended after {received!r}"
                received = received[-100:] + chunk
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    began = time.monotonic()
    server.wait_idle()
    took = time.monotonic() - began
    generated = server.metrics()["infall_decode_tokens_total"] - before["infall_decode_tokens_total"]
    return took < 10, "slow clients", f"{count} clients that vanish", f"idle {took:.1f} s later, {generated:.0f} tokens generated"


def schema(report, options):
    """schemathesis against the OpenAPI document that the server publishes."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method"
    with Server(options.binary) as server:
        probe = Probe(server)
        probe.start()
        command = [Path(sys.executable).with_name("st"), "run", server.url + "/openapi.json", "--checks", checks, "--seed", str(options.seed),
                   "--workers", "2", "--request-timeout", "60", "--max-examples", "15" if options.smoke else "200", "--no-color",
                   "--phases", "examples,fuzzing" if options.smoke else "examples,coverage,fuzzing", "--continue-on-failure"]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(server.home)}
        done = subprocess.run(command, env=environment, cwd=server.home, capture_output=True, text=True)
        probe.end(report, "schemathesis")
        if done.returncode:
            print(done.stdout[-6000:], done.stderr[-2000:])
        summary = [line.strip() for line in done.stdout.splitlines() if re.search(r"(generated|passed|failed|operations)", line)]
        report.row(done.returncode == 0, "schemathesis", " ".join(summary[-3:])[:160], f"exit {done.returncode}")


# The longest first.
PARTS = {"kills": kills, "schema": schema, "malformed": malformed, "disks": disks, "slow": slow_clients, "shapes": shapes, "spoilt": spoilt}


def run(name, options):
    """A part, in a process of its own: its rows, how many failed, and what it printed."""
    report, printed, began = Report(""), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(printed), tempfile.TemporaryDirectory(prefix="infall-faults-") as tempfile.tempdir:
        try:
            PARTS[name](report, options)
        except Exception as error:
            report.row(False, name, "", f"{type(error).__name__}: {error}"[:300])
        print(f"{name}: {time.monotonic() - began:.1f} s")
    return report.rows[1:], report.failures, printed.getvalue()


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--beside", type=int, help="so many parts at a time; 3 in the short form, else one, which gives the better figures")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all of them by default")
    options = parser.parse_args()
    report = Report("Faults", "what", "of it", "found", "")
    with multiprocessing.get_context("fork").Pool(options.beside or (3 if options.smoke else 1), maxtasksperchild=1) as pool:
        for rows, failures, printed in pool.imap(functools.partial(run, options=options), options.parts or PARTS):
            print(printed, end="")
            report.rows += rows
            report.failures += failures
        pool.close()
        pool.join()
    report.end()


if __name__ == "__main__":
    main()
