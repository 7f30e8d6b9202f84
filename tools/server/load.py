"""Many clients at once: whether every answer is what the same request gets alone, and whether anything is left behind.

Each client sends its requests one after another; one in ten it drops: half of the streams among them when their first content has come, the
others at a random moment. A server of its own, one request at a time,
says what each answer must be. After every round the server must be idle, and its memory and open files must not grow from round to round.
"""
import asyncio, random, time

import aiohttp

import bodies
from harness import Report, Server, arguments, percentile

DROPPED = 0.1


class Tally:
    """What happened to the requests of a round."""

    def __init__(self):
        self.answered, self.refused, self.wrong = 0, 0, []
        # Requests that were dropped: while they waited for a first byte or an end, while they were streamed, or not before their end.
        self.dropped_early, self.dropped_streaming, self.dropped_ended = 0, 0, 0
        self.first_s, self.stream_s, self.content_s = [], [], []
        self.completion_tokens, self.prompt_tokens = 0, 0


async def expected_answers(server, requests):
    """What each request gets alone."""
    answers = []
    async with aiohttp.ClientSession(server.url) as http:
        for request in requests:
            async with http.post(request.path, data=request.bytes, headers={"content-type": "application/json"}) as answer:
                body = await answer.read()
                assert answer.status == 200, (answer.status, body[:300], request)
                answers.append(bodies.read(request, body))
    return answers


class Left(Exception):
    """A client has left in the middle of a stream."""


async def exchange(http, request, tally, leaves=False):
    """Sends a request until it is taken; its body. Times are from the first try on: a client that was refused has waited, too."""
    began, chunks, first, content = time.monotonic(), [], None, None
    while True:
        async with http.post(request.path, data=request.bytes, headers={"content-type": "application/json"}) as answer:
            if answer.status == 429:
                tally.refused += 1
                await answer.read()
                await asyncio.sleep(float(answer.headers["retry-after"]))
                continue
            async for chunk in answer.content.iter_any():
                first = first or time.monotonic() - began
                chunks.append(chunk)
                if request.stream and content is None and bodies.has_content(request.api, b"".join(chunks)):
                    content = time.monotonic() - began
                    if leaves:
                        raise Left
            body = b"".join(chunks)
            if answer.status != 200:
                raise bodies.WrongBody(f"status {answer.status}: {body[:300]!r}")
            tally.first_s.append(first)
            if request.stream:
                tally.stream_s.append(first)
            if content is not None:  # an answer may be empty, or all of it reasoning that is not shown
                tally.content_s.append(content)
            return body


async def client(server, work, draw, tally):
    # A connection of its own for each client, as real ones have.
    async with aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(limit=1)) as http:
        for request, expected in work:
            if draw.random() < DROPPED:
                await drop(http, request, draw, tally)
                continue
            try:
                found = bodies.read(request, await exchange(http, request, tally))
            except (bodies.WrongBody, aiohttp.ClientError) as error:
                tally.wrong.append(f"{request}: {type(error).__name__} {error}")
                continue
            tally.answered += 1
            tally.completion_tokens += found["completion"]
            tally.prompt_tokens += found["prompt"]
            if found != expected:
                tally.wrong.append(f"{request}: expected {expected}, found {found}")


async def drop(http, request, draw, tally):
    """Sends a request and leaves before its end."""
    ignored, leaves = Tally(), request.stream and draw.random() < 0.5
    try:
        await asyncio.wait_for(exchange(http, request, ignored, leaves), None if leaves else draw.uniform(0, 2) ** 2)
        tally.dropped_ended += 1
    except asyncio.TimeoutError:
        tally.dropped_early += 1
    except Left:
        tally.dropped_streaming += 1
    tally.refused += ignored.refused


async def round_of(server, pool, clients, each, seed):
    tally, draws = Tally(), [random.Random(f"{seed} {number}") for number in range(clients)]
    await asyncio.gather(*(client(server, [draw.choice(pool) for _ in range(each)], draw, tally) for draw in draws))
    return tally


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--each", type=int, help="requests of each client in a round")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    each, rounds = options.each or (2 if options.smoke else 20), options.rounds or (2 if options.smoke else 4)
    requests = bodies.mixed(24 if options.smoke else 96, options.seed)

    report = Report("Load", "round", "answered", "dropped early, streaming, not before the end", "refused (429)", "wrong", "first byte p50, p99 ms", "of streams", "first content of streams",
                    "generated t/s", "read t/s", "memory MiB", "files", "threads")
    with Server(options.binary) as alone:
        pool = list(zip(requests, asyncio.run(expected_answers(alone, requests))))
    with Server(options.binary) as server:
        sizes, streaming = [], 0
        for number in range(rounds):
            began = time.monotonic()
            tally = asyncio.run(round_of(server, pool, options.clients, each, f"{options.seed} {number}"))
            took = time.monotonic() - began
            server.wait_idle()
            settle(server)
            sizes.append((server.rss_bytes() / 2**20, server.open_files()))
            lists = (tally.first_s, tally.stream_s, tally.content_s)
            times = [f"{percentile(list_s, 0.5) * 1e3:.0f}, {percentile(list_s, 0.99) * 1e3:.0f}" for list_s in lists]
            dropped = (tally.dropped_early, tally.dropped_streaming, tally.dropped_ended)
            streaming += tally.dropped_streaming
            report.row(not tally.wrong, number, tally.answered, ", ".join(map(str, dropped)), tally.refused, len(tally.wrong), *times,
                       f"{tally.completion_tokens / took:.0f}", f"{tally.prompt_tokens / took:.0f}", f"{sizes[-1][0]:.0f}", sizes[-1][1],
                       server.threads())
            for wrong in tally.wrong[:5]:
                print("wrong:", wrong)
        # The first round fills what is meant to be filled: sessions, and the allocator's pools.
        (memory, files), (last_memory, last_files) = sizes[0 if options.smoke else 1], sizes[-1]
        report.row(last_memory <= memory * 1.1 + 8, "memory", f"{memory:.0f} to {last_memory:.0f} MiB, at most 10 % and 8 MiB more")
        report.row(streaming > 0, "dropped while streaming", f"{streaming} requests")
        report.row(last_files <= files, "open files", f"{files} to {last_files}")
    report.end()


def settle(server, patience_s=10):
    """Waits until closed connections are gone."""
    deadline = time.monotonic() + patience_s
    files = server.open_files()
    while time.monotonic() < deadline:
        time.sleep(0.25)
        now = server.open_files()
        if now >= files:
            return
        files = now


if __name__ == "__main__":
    main()
