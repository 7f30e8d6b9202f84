"""Requests to the four APIs that nano answers, each with a way to read what came back, streamed or whole.

A request's answer follows from the request alone: it is greedy, or it has a seed. So the same request must bring the same answer
whatever else runs.
"""
import json, random

MODEL = "deepseek-v4-flash"
NAMES = ["Kradrul", "Sharkis", "Texbrim", "Pekral", "Gulsond", "Zurshi", "Naxzand", "Gertru", "Bremtuk", "Thikil"]
PLACES = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
SCHEMA = {"type": "object", "properties": {"sender": {"type": "string"}, "label": {"type": "string"}}, "required": ["sender", "label"]}
TOOL = {"name": "rename_alarm", "description": "Rename alarms and return the result.", "parameters": SCHEMA}


class Request:
    """A body for an API's place."""

    def __init__(self, api, body):
        self.api, self.path, self.body = api, PLACES[api], {"model": MODEL, **body}
        self.stream = bool(body.get("stream"))

    @property
    def bytes(self):
        return json.dumps(self.body).encode()

    def __repr__(self):
        return f"{self.api} {json.dumps(self.body)[:200]}"


def user_texts(draw):
    """What users say: sums, calls, facts to remember, words to rewrite."""
    a, b = draw.randint(10, 49), draw.randint(10, 49)
    name = draw.choice(NAMES)
    facts = " ".join(f"{other}={draw.randint(100, 999)}" for other in draw.sample(NAMES, 6))
    return [
        (f"What is {a} + {b}?", False),
        (f"Use rename_alarm with sender {name.lower()}@example.com and label timer exactly once, then report the result and stop.", True),
        (f"{facts} " * draw.randint(1, 4) + f"What is {NAMES[0]}?", False),
        (f"Write these words backwards: stone garden {name.lower()} cloud", False),
        (f"Tell me a story about {name}.", False),
    ]


def conversation(draw):
    """Messages, and whether there are tools. Some have a history, in words that the model would not choose."""
    text, tools = draw.choice(user_texts(draw))
    history = [("user", f"My name is {draw.choice(NAMES)}."), ("assistant", "So noted, friend.")] if draw.random() < 0.3 else []
    return [*history, ("user", text)], tools


def make(api, draw, stream=None):
    """One request."""
    messages, tools = conversation(draw)
    thinking = draw.random() < 0.25
    body = {"stream": draw.random() < 0.5 if stream is None else stream, "seed": draw.randint(0, 2**31)}
    if not thinking:
        body["temperature"] = draw.choice([0, 0, 1])
    limit = draw.choice([24, 48])
    if api == "completions":
        body |= {"prompt": "Once there was " + messages[-1][1], "max_tokens": limit, "raw": draw.random() < 0.5}
        return Request(api, with_usage(body | thinks(thinking)))
    if api == "chat":
        body |= {"messages": [{"role": role, "content": text} for role, text in messages], "max_completion_tokens": limit}
        body |= {"tools": [{"type": "function", "function": TOOL}]} if tools else {}
        return Request(api, with_usage(body | thinks(thinking)))
    if api == "responses":
        body |= {"input": [{"role": role, "content": text} for role, text in messages], "max_output_tokens": limit, "store": False}
        body |= {"tools": [{"type": "function", **TOOL}]} if tools else {}
        return Request(api, body | {"reasoning": {"effort": "high", "summary": "auto"} if thinking else {"effort": "none"}})
    body |= {"messages": [{"role": role, "content": text} for role, text in messages], "max_tokens": limit}
    body |= {"tools": [{"name": TOOL["name"], "description": TOOL["description"], "input_schema": SCHEMA}]} if tools else {}
    return Request(api, body | {"thinking": {"type": "enabled", "budget_tokens": 1024} if thinking else {"type": "disabled"}})


def thinks(thinking):
    return {"thinking": {"type": "enabled" if thinking else "disabled"}}


def with_usage(body):
    return body | ({"stream_options": {"include_usage": True}} if body["stream"] else {})


def mixed(count, seed, stream=None):
    """So many requests, the APIs in turn."""
    draw = random.Random(seed)
    return [make(list(PLACES)[index % len(PLACES)], draw, stream) for index in range(count)]


class WrongBody(Exception):
    """An answer that no server should give."""


def frames(body):
    """The events of a stream as (name, data); data is None for what is no JSON."""
    for block in body.decode().split("\n\n"):
        name, data = None, []
        for line in block.split("\n"):
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                data.append(line[6:])
        if data:
            yield name, None if data == ["[DONE]"] else json.loads("\n".join(data))


def read(request, body):
    """What an answer says: reasoning, text, calls, how it ended, prompt tokens, completion tokens. The same for a stream as for a whole.

    Raises WrongBody if the answer is not complete and in order."""
    answer = read_any(request.api, request.stream, body)
    if answer["prompt"] is None:
        raise WrongBody(f"no usage: {body[:300]!r}")
    return answer


def read_any(api, is_stream, body):
    """The same for a request that may have asked for no usage."""
    try:
        events = list(frames(body)) if is_stream else None
        whole = None if is_stream else json.loads(body)
        return READERS[api](whole, events)
    except (KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
        raise WrongBody(f"{type(error).__name__} {error}: {body[:300]!r}") from error


def has_content(api, body):
    """Whether the beginning of a stream holds something that the model said: reasoning, text, or a part of a call."""
    ended = body[:body.rfind(b"\n\n") + 2]
    return any(data and IS_CONTENT[api](data) for _, data in frames(ended))


IS_CONTENT = {
    "chat": lambda data: any(choice["delta"].keys() & {"content", "reasoning_content", "tool_calls"} for choice in data["choices"]),
    "completions": lambda data: any(choice["text"] for choice in data["choices"]),
    "responses": lambda data: data["type"].endswith(".delta"),
    "messages": lambda data: data["type"] == "content_block_delta",
}


def read_chat(whole, events):
    if whole:
        choice, usage = whole["choices"][0], whole["usage"]
        message = choice["message"]
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []]
        return said(message.get("reasoning_content"), message["content"], calls, choice["finish_reason"], usage)
    assert events[-1] == (None, None), "no [DONE]"
    text, reasoning, calls, finish, usage = "", "", {}, None, None
    for _, chunk in events[:-1]:
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            assert finish is None, "a delta after the end"
            delta, finish = choice["delta"], choice["finish_reason"]
            text, reasoning = text + (delta.get("content") or ""), reasoning + (delta.get("reasoning_content") or "")
            for call in delta.get("tool_calls") or []:
                name, arguments = calls.get(call["index"], ("", ""))
                function = call["function"]
                calls[call["index"]] = (name + (function.get("name") or ""), arguments + (function.get("arguments") or ""))
    return said(reasoning, text, [calls[index] for index in sorted(calls)], finish, usage)


def read_completions(whole, events):
    if whole:
        choice, usage = whole["choices"][0], whole["usage"]
        return said("", choice["text"], [], choice["finish_reason"], usage)
    assert events[-1] == (None, None), "no [DONE]"
    choices = [choice for _, chunk in events[:-1] for choice in chunk["choices"]]
    usage = next((chunk["usage"] for _, chunk in events[:-1] if chunk.get("usage")), None)
    return said("", "".join(choice["text"] for choice in choices), [], choices[-1]["finish_reason"], usage)


def read_responses(whole, events):
    if events:
        numbers = [data["sequence_number"] for _, data in events]
        assert numbers == list(range(len(numbers))), f"sequence numbers {numbers}"
        deltas = "".join(data["delta"] for name, data in events if name == "response.output_text.delta")
        name, last = events[-1]
        assert name in ("response.completed", "response.incomplete"), name
        whole = last["response"]
    texts, reasoning, calls = [], [], []
    for item in whole["output"]:
        if item["type"] == "message":
            texts += [part["text"] for part in item["content"]]
        elif item["type"] == "reasoning":
            reasoning += [part["text"] for part in item["summary"]]
        elif item["type"] == "function_call":
            calls.append((item["name"], item["arguments"]))
    text = "".join(texts)
    assert not events or deltas == text, "the deltas are not the text"
    usage = whole["usage"]
    usage = {"prompt_tokens": usage["input_tokens"], "completion_tokens": usage["output_tokens"]}
    return said("".join(reasoning), text, calls, whole["status"], usage)


def read_messages(whole, events):
    if whole:
        blocks, stop, usage = whole["content"], whole["stop_reason"], whole["usage"]
    else:
        assert events[0][0] == "message_start" and events[-1][0] == "message_stop", "no beginning or no end"
        usage, blocks, stop = dict(events[0][1]["message"]["usage"]), [], None
        for name, data in events:
            if name == "content_block_start":
                assert data["index"] == len(blocks), "a block out of its place"
                blocks.append({**data["content_block"], "json": ""})
            elif name == "content_block_delta":
                block, delta = blocks[data["index"]], data["delta"]
                keys = {"text_delta": ("text", "text"), "thinking_delta": ("thinking", "thinking"),
                        "input_json_delta": ("json", "partial_json"), "signature_delta": ("signature", "signature")}
                to, source = keys[delta["type"]]
                block[to] = block.get(to, "") + delta[source]
            elif name == "message_delta":
                stop, usage = data["delta"]["stop_reason"], usage | data["usage"]
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = json.loads(block["json"] or "{}")
    texts = "".join(block["text"] for block in blocks if block["type"] == "text")
    reasoning = "".join(block["thinking"] for block in blocks if block["type"] == "thinking")
    calls = [(block["name"], json.dumps(block["input"])) for block in blocks if block["type"] == "tool_use"]
    prompt = sum(usage.get(name) or 0 for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"))
    return said(reasoning, texts, calls, stop, {"prompt_tokens": prompt, "completion_tokens": usage["output_tokens"]})


READERS = {"chat": read_chat, "completions": read_completions, "responses": read_responses, "messages": read_messages}


def said(reasoning, text, calls, finish, usage):
    assert finish is not None, "no reason to have ended"
    return {"reasoning": reasoning or "", "text": text or "", "calls": [list(call) for call in calls], "finish": finish,
            "prompt": usage and usage["prompt_tokens"], "completion": usage and usage["completion_tokens"]}
