"""Bodies that no client should send, made from bodies that one may."""
import copy, json

ODD = [None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -2**63, 1.5, -0.0, 1e308, "", "x", "\0", "<｜User｜>", "<think>", "｜DSML｜", [], {}, [[]],
       [None], {"": None}, {"type": "text"}, {"type": "image_url", "image_url": {"url": "x"}}, ["x"], [{}], "x" * 5000, "�", "\u202e", "é" * 300]
# Texts in the place of a value: no JSON, or JSON that readers disagree on.
RAW = [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"1e-400", b"01", b"+1", b".5", b"1.", b"0x10", b"'x'", b"undefined", b"tru", b'"\\ud800"',
       b'"\\udc00x"', b'"\\ud800\\ud800"', b'"\\ud83d\\ude00"', b'"\\u12"', b'"\\x41"', b'"a\nb"', b'"\xff\xfe"', b'"\xc0\xaf"', b'"\xed\xa0\x80"', b'"',
       b"[" * 300 + b"]" * 300, b'{"a":' * 300 + b"1" + b"}" * 300, b"[" * 100_000, b"9" * 5000, b"1" + b"0" * 400, b"// x\n1", b"[1,]"]


def places(value, path=()):
    """The paths of everything in a JSON value, itself included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


def put(value, path, new):
    if not path:
        return new
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = new
    return value


def remove(value, path):
    if path:
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        del parent[path[-1]]
    return value


def look(value, path):
    for key in path:
        value = value[key]
    return value


def change(body, draw):
    """One change that leaves it JSON."""
    path = draw.choice(list(places(body)))
    kind = draw.randrange(6)
    if kind < 3:
        return put(body, path, copy.deepcopy(draw.choice(ODD)))
    if kind == 3:
        return remove(body, path)
    value = look(body, path)
    if kind == 4 and isinstance(value, dict):
        value[draw.choice(["n", "logprobs", "stop", "tools", "tool_choice", "thinking", "input", "messages", "prefix", "content", "role", "zzz"])] = \
            copy.deepcopy(draw.choice(ODD))
    elif kind == 5 and isinstance(value, list):
        value.extend(copy.deepcopy(value * draw.choice([1, 50])))
    else:
        return put(body, path, copy.deepcopy(look(body, draw.choice(list(places(body))))))
    return body


def spoil(text, draw):
    """One change of the bytes."""
    kind = draw.randrange(8)
    if kind < 3:
        colons = [at for at in range(len(text)) if text[at:at + 2] == b": "]
        if colons:
            at = draw.choice(colons)
            end = min((text.find(mark, at) for mark in (b",", b"}", b"]") if text.find(mark, at) > 0), default=len(text))
            return text[:at + 2] + draw.choice(RAW) + text[end:]
    if kind == 3:
        return text[:draw.randrange(len(text))]
    if kind == 4:
        at = draw.randrange(len(text))
        return text[:at] + bytes([draw.randrange(256)]) + text[at + 1:]
    if kind == 5:  # a key twice
        return text[:1] + draw.choice([b'"model": "x", ', b'"messages": [], ', b'"stream": true, "stream": false, ', b'"max_tokens": 1, ']) + text[1:]
    if kind == 6:
        return draw.choice([b"\xef\xbb\xbf", b"\0", b" " * 1000, b"[", b""]) + text + draw.choice([b"x", b"{}", b"\0", b"]" * 50, b""])
    return draw.choice(RAW)


def malformed(body, draw):
    """A body with faults; now and then it is still good."""
    body = copy.deepcopy(body)
    for _ in range(draw.choice([1, 1, 2, 4])):
        if isinstance(body, (dict, list)):
            body = change(body, draw)
    text = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode("utf-8", "replace")
    return spoil(text, draw) if draw.random() < 0.5 and text else text
