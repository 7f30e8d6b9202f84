#!/usr/bin/env python3
r"""Conversations and what other encoders of DeepSeek V4's prompt format make of them.

Writes the fixtures of crates/text/tests/encoders.rs:

    conversations.jsonl  generated ones: each with the length and a hash of every encoder's prompt
    differences.jsonl    written by hand, one for each rule by which infall's prompt differs: with the whole prompt
                         of an encoder, the edits that make it infall's, and the reason

The encoders are run as published; fetch them (the packages' dependencies are not needed) and unpack what is read:

    pip download --no-deps sglang==0.5.12 && pip download --no-deps sglang==0.5.22
    pip download --no-deps vllm==0.33.0 deepseek-recipe==0.2.0
    python3 -m zipfile -e deepseek_recipe-0.2.0-*.whl recipe/
    PYTHONPATH=recipe python3 tools/encoders/make_conversations.py sglang-0.5.12-*.whl sglang-0.5.22-*.whl vllm-0.33.0-*.whl \
        crates/text/tests/fixtures

sglang 0.5.12 carries DeepSeek's encoder of April, 0.5.22 that of 0731, vllm that of 0731 with changes of its own.
deepseek-recipe is DeepSeek's own library of October, which renders API requests for the weights of 0731. `--show N` prints line N of the
conversations and each encoder's prompt instead of writing.
"""

import argparse
import copy
import hashlib
import json
import pathlib
import random
import types
import zipfile

import deepseek_recipe as recipe

COUNT = 2_300
TASKS = ["action", "query", "authority", "domain", "title", "read_url"]
LEVELS = {"v4-2604": [None, "high", "max"], "v4-0731": [None, "low", "high", "max"]}


# ---------------------------------------------------------------- the encoders

def module_in(wheel, path):
    module = types.ModuleType(pathlib.PurePath(path).stem)
    exec(compile(zipfile.ZipFile(wheel).read(path), path, "exec"), module.__dict__)
    return module


class Sglang:
    def __init__(self, wheel, encoding):
        self.module = module_in(wheel, "sglang/srt/entrypoints/openai/encoding_dsv4.py")
        self.encoding = encoding

    def prompt(self, conversation):
        profile = {} if self.encoding == "v4-2604" else {"reasoning_effort_profile": "official"}
        return self.module.encode_messages(
            copy.deepcopy(conversation["messages"]),
            thinking_mode=conversation["mode"],
            drop_thinking=conversation["drop"],
            reasoning_effort=conversation["effort"],
            **profile,
        )

    def compares(self, conversation):
        """It opens no turn after a system message, and for the later encoding refuses arguments that are no object."""
        found = conversation["messages"]
        return (
            conversation["encoding"] == self.encoding
            and not system_opens(found)
            and (self.encoding == "v4-2604" or has_objects(found))
        )


class Vllm:
    def __init__(self, wheel):
        self.module = module_in(wheel, "vllm/tokenizers/deepseek_v4_encoding.py")

    def prompt(self, conversation):
        messages = copy.deepcopy(conversation["messages"])
        for message in messages:
            if "reasoning_content" in message:
                message["reasoning"] = message.pop("reasoning_content")
        return self.module.encode_messages(
            messages,
            thinking_mode=conversation["mode"],
            drop_thinking=conversation["drop"],
            reasoning_effort=conversation["effort"],
        )

    def compares(self, conversation):
        """It knows the later encoding alone, and refuses arguments that are no JSON object."""
        return conversation["encoding"] == "v4-0731" and has_objects(conversation["messages"])


class Recipe:
    """Its control tokens come out between the characters U+0001 and U+0002: it says which texts are meant as such."""

    encoding = recipe.DeepseekV4Encoding()

    def prompt(self, conversation):
        settings = {"thinking_mode": conversation["mode"] == "thinking"}
        if conversation["effort"] or settings["thinking_mode"]:
            settings["reasoning_effort"] = conversation["effort"] or "low"
        messages = []
        for message in conversation["messages"]:
            if message.get("tools"):
                settings["tools"] = [self.tool(tool["function"]) for tool in message["tools"]]
            if message.get("response_format"):
                settings["response_schema"] = message["response_format"]
            messages.append(self.message(message))
        rendered = self.encoding.render_conversation(recipe.Conversation(messages, **settings))
        parts, end = [], 0
        for start, stop in rendered.special_ranges:
            parts += [rendered.prompt[end:start], "\1", rendered.prompt[start:stop], "\2"]
            end = stop
        return "".join(parts) + rendered.prompt[end:]

    @staticmethod
    def tool(function):
        return recipe.ToolDefinition(function["name"], function["description"], function["parameters"])

    @staticmethod
    def message(message):
        match message["role"]:
            case "system":
                return recipe.SystemMessage(message["content"])
            case "user":
                return recipe.UserMessage(message["content"])
            case "tool":
                return recipe.ToolMessage(message["content"], message.get("tool_call_id"))
            case "latest_reminder":
                return recipe.LatestReminderMessage(message["content"])
        calls = [
            recipe.ToolCall(call.get("id", ""), call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls", [])
        ]
        return recipe.AssistantMessage(
            message["content"], message.get("reasoning_content", ""), calls or None, message.get("wo_eos", False)
        )

    def compares(self, conversation):
        """It renders requests: one system message, which it writes first, the usual order of roles, no tasks; its
        numbers are not Python's, it joins no empty texts, writes no empty line in a call without arguments, a call it does not know comes last,
        it always drops reasoning, goes on after a whole assistant message with a new turn, and a message to be continued it
        always opens with reasoning, which it leaves open too if there is no content yet."""
        messages = conversation["messages"]
        roles = [message["role"] for message in messages]
        after = list(zip(roles, roles[1:] + [None]))
        calls = calls_in(messages)
        tools = [tool["function"] for message in messages for tool in message.get("tools", [])]
        ids = {call.get("id") for call in calls}
        return (
            conversation["encoding"] == "v4-0731"
            and (conversation["drop"] or conversation["mode"] == "chat" or bool(tools))
            and "system" not in roles[1:]
            and all(joined_texts(messages))
            and "developer" not in roles
            and not any("task" in message for message in messages)
            and all(following == "user" for role, following in after if role == "latest_reminder")
            and all(following not in ("assistant", None) for role, following in after[:-1] if role == "assistant")
            and (conversation["mode"] == "thinking" or not tools or "assistant" not in roles)
            and (roles[-1] != "assistant" or continues_answer(conversation))
            and roles[0] != "assistant"
            and all(list(function) == ["name", "description", "parameters"] for function in tools)
            and plain_numbers(tools) and plain_numbers([message.get("response_format") for message in messages])
            and has_objects(messages)
            and all(plain_numbers(json.loads(call["function"]["arguments"])) for call in calls)
            and all(json.loads(call["function"]["arguments"]) for call in calls)
            and all(message.get("tool_call_id") in ids for message in messages if message["role"] == "tool")
        )


def calls_in(messages):
    return [call for message in messages for call in message.get("tool_calls", [])]


def continues_answer(conversation):
    last = conversation["messages"][-1]
    return last.get("wo_eos", False) and conversation["mode"] == "thinking" and last["content"] != ""


def joined_texts(messages):
    """The contents of user messages that stand beside another message of a user or a tool."""
    users = ("user", "tool")
    for before, message in zip(messages, messages[1:]):
        if before["role"] in users and message["role"] in users:
            yield from (each["content"] for each in (before, message) if each["role"] == "user")


def has_objects(messages):
    """Whether the arguments of every call are a JSON object."""
    for call in calls_in(messages):
        try:
            if not isinstance(json.loads(call["function"]["arguments"]), dict):
                return False
        except ValueError:
            return False
    return True


def system_opens(messages):
    """Whether an assistant turn follows a system message, or would once developer messages are dropped."""
    roles = [message["role"] for message in messages] + ["assistant"]
    kept = [role for role in roles if role != "developer"]
    return ("system", "assistant") in [*zip(roles, roles[1:]), *zip(kept, kept[1:])]


def plain_numbers(value):
    """Whether every number is written alike by Python and by Rust's serde_json."""
    match value:
        case dict():
            return all(map(plain_numbers, value.values()))
        case list():
            return all(map(plain_numbers, value))
        case float():
            return "e" not in repr(value) and value == 0 or 1e-3 < abs(value) < 1e15
        case int():
            return abs(value) < 1 << 63
    return True


# ---------------------------------------------------------------- the conversations

WORDS = "alpha beta Straße naïve 東京 привет 🙂 👩‍👩‍👧 e\u0301 x=1; a<b && \"quoted\" 'single' back\\slash /path/ {\"k\": [1]} &amp; &lt; 50% |".split()
SPACES = [" ", " ", " ", "\n", "\n\n", "\t", "  ", "\u00a0", "\u2028", "\r\n"]
MARKERS = [
    "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<think>", "</think>", "｜DSML｜", "<｜DSML｜tool_calls>",
    "</｜DSML｜invoke>", "<tool_result>", "<｜latest_reminder｜>", "\u0007", "\u001f", "\u007f",
]
KEYS = ["path", "city", "n", "käse", "a b", "x.y", "項目", "items", "k\\", "it's", "arguments"]
NAMES = ["list_files", "get_weather", "mcp.fetch-url", "f", "g2"]
INTEGERS = ["0", "7", "-1", "42", "-0", "9007199254740993", "18446744073709551616", "123456789012345678901234567890123"]
FLOATS = [
    "0.5", "-0.0", "1.0", "1.50", "3.14159", "100.0", "0.001", "0.0001", "0.00001", "1e5", "1E5", "1e15", "1e16", "1.5e+16", "1e-7",
    "123456789.125", "1e22", "1.7976931348623157e308", "5e-324", "0.1", "-2.5E-3", "9999999999999998.0", "2.5e-10",
]


def text(rng, hostile=True):
    if rng.random() < 0.06:
        return ""
    parts = []
    for _ in range(rng.randint(1, 3)):
        marker = hostile and rng.random() < 0.12
        parts += [rng.choice(MARKERS) if marker else rng.choice(WORDS), rng.choice(SPACES)]
    return "".join(parts if rng.random() < 0.1 else parts[:-1])


def json_text(rng, depth=0):
    """A value as a client might spell it."""
    kind = rng.choices(["string", "integer", "float", "word", "array", "object"], [6, 4, 4, 3, 2 - depth, 2 - depth])[0]
    if kind == "string":
        return json.dumps(text(rng), ensure_ascii=rng.random() < 0.3)
    if kind == "array":
        return "[" + rng.choice([",", ", "]).join(json_text(rng, depth + 1) for _ in range(rng.randint(0, 3))) + "]"
    if kind == "object":
        return object_text(rng, depth + 1)
    return rng.choice({"integer": INTEGERS, "float": FLOATS, "word": ["true", "false", "null"]}[kind])


def object_text(rng, depth):
    keys = rng.sample(KEYS, rng.choice([0, 1, 1, 2, 3]))
    colon = rng.choice([":", ": ", " : "])
    return "{" + rng.choice([",", ", ", ",\n "]).join(json.dumps(k) + colon + json_text(rng, depth) for k in keys) + "}"


def spelt(python_value):
    """JSON with the numbers of `Spelling` as they are."""
    match python_value:
        case Spelling():
            return python_value.json.replace("\n", " ")  # One line; in strings a newline is escaped.
        case dict():
            return "{" + ",".join(f"{spelt(key)}:{spelt(value)}" for key, value in python_value.items()) + "}"
        case list():
            return "[" + ",".join(map(spelt, python_value)) + "]"
    return json.dumps(python_value, ensure_ascii=False)


class Spelling:
    def __init__(self, json_text):
        self.json = json_text


def tool(rng, name):
    function = {"name": name}
    if rng.random() < 0.8:
        function["description"] = text(rng)
    if rng.random() < 0.9:
        properties = {key: {"type": rng.choice(["string", "integer", "number", "array"])} for key in rng.sample(KEYS, 2)}
        if rng.random() < 0.4:
            properties[rng.choice(KEYS)] = {"default": Spelling(json_text(rng, 1))}
        function["parameters"] = {"type": "object", "properties": properties}
    if rng.random() < 0.1:
        function["strict"] = True
    return {"type": "function", "function": function}


def decorated(rng, message, tools):
    if tools:
        message["tools"] = [tool(rng, name) for name in rng.sample(NAMES, rng.randint(1, 2))]
    if rng.random() < 0.08:
        message["response_format"] = Spelling(object_text(rng, 1))
    return message


def assistant(rng, calls):
    message = {"role": "assistant", "content": text(rng, hostile=False)}
    if rng.random() < 0.7:
        message["reasoning_content"] = text(rng, hostile=False)
    if calls:
        message["tool_calls"] = [call(rng, index) for index in range(rng.choice([1, 1, 2, 3]))]
    return message


def call(rng, index):
    arguments = object_text(rng, 0) if rng.random() < 0.97 else rng.choice(["ls -la", "{broken", "[1,"])
    found = {"type": "function", "function": {"name": rng.choice(NAMES), "arguments": arguments}}
    return found if rng.random() < 0.05 else {"id": f"call_{index}", **found}


def results(rng, message):
    ids = [found.get("id") for found in message["tool_calls"]]
    rng.shuffle(ids)
    if rng.random() < 0.1:
        ids.append("unknown")
    for call_id in ids:
        yield {"role": "tool", "content": text(rng), **({"tool_call_id": call_id} if call_id else {})}


def messages(rng):
    with_tools = rng.random() < 0.35
    plain = rng.random() < 0.5
    found = []
    if with_tools or rng.random() < 0.6:
        found.append(decorated(rng, {"role": "system", "content": text(rng)}, with_tools))
    if not plain and rng.random() < 0.05:
        found.append(assistant(rng, False))
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        found += turn(rng, with_tools, plain)
    if not found or rng.random() < 0.6:
        found += question(rng, plain)
    elif found[-1]["role"] == "assistant" and rng.random() < 0.5:
        found[-1]["wo_eos"] = True
    return found


def question(rng, plain):
    if not plain and rng.random() < 0.1:
        yield {"role": "latest_reminder", "content": text(rng)}
    if not plain and rng.random() < 0.08:
        yield decorated(rng, {"role": "developer", "content": text(rng) + "d"}, rng.random() < 0.2)
        return
    users = rng.choice([1, 1, 1, 2])
    for index in range(users):
        message = {"role": "user", "content": text(rng)}
        # A task of a message that joins another one is the subject of a difference.
        if not plain and index == 0 and rng.random() < 0.06:
            message["task"] = rng.choice(TASKS)
        yield message
    if not plain and rng.random() < 0.05:
        yield {"role": "latest_reminder", "content": text(rng)}


def turn(rng, with_tools, plain):
    yield from question(rng, plain)
    if not plain and rng.random() < 0.05:
        yield {"role": "system", "content": text(rng)}
    while rng.random() < (0.45 if with_tools else 0.08):
        message = assistant(rng, calls=True)
        yield message
        yield from results(rng, message)
    message = assistant(rng, calls=False)
    if not plain and rng.random() < 0.03:
        message["task"] = "title"
    yield message


def without_rules(conversation):
    """Whether no rule applies by which infall differs; `DIFFERENCES` shows each."""
    found = conversation["messages"]
    uses_tools = any(message["role"] == "tool" or message.get("tool_calls") for message in found)
    declares_tools = any(message.get("tools") for message in found)
    keeps = not conversation["drop"] or conversation["mode"] == "chat" or declares_tools
    # A message with a task that joins the turn before it, and tools' outputs that join a turn with a task.
    joined = any(
        "task" in message and before["role"] in ("user", "tool") and "task" not in before
        for before, message in zip(found, found[1:])
    )
    return (keeps or not uses_tools) and not joined


def conversations():
    written = 0
    for seed in range(100_000):
        rng = random.Random(f"conversation {seed}")
        encoding = rng.choice(list(LEVELS))
        conversation = {
            "encoding": encoding,
            "mode": rng.choice(["chat", "thinking", "thinking"]),
            "effort": rng.choice(LEVELS[encoding]),
            "drop": rng.random() < 0.8,
            "messages": messages(rng),
        }
        line = spelt(conversation)
        conversation = json.loads(line)
        if without_rules(conversation):
            yield line, conversation
            written += 1
        if written == COUNT:
            return


# ---------------------------------------------------------------- the differences

USER = {"role": "user", "content": "q"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def called(arguments, name="f"):
    function = {"name": name, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)}
    return [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]}]


CLOSER = "</｜DSML｜parameter>"

# (reason, mode, messages, [(what the encoder of April writes, what infall writes)])
DIFFERENCES = [
    (
        "a system message at the end opens a turn: without, the model would go on with the instructions",
        "thinking",
        [USER, {"role": "system", "content": "S"}],
        [("qS", "qS<｜Assistant｜><think>")],
    ),
    (
        "a system message before an assistant's opens its turn",
        "thinking",
        [{"role": "system", "content": "S"}, {"role": "assistant", "content": "Hello"}, USER],
        [("SHello", "S<｜Assistant｜></think>Hello")],
    ),
    (
        "a task is not lost when its message joins the turn before",
        "thinking",
        [USER, {"role": "user", "content": "r", "task": "title"}],
        [("r<｜Assistant｜><think>", "r<｜title｜>")],
    ),
    (
        "a history of calls keeps its reasoning, whether or not tools are declared",
        "thinking",
        [
            USER,
            {"role": "assistant", "content": "", "reasoning_content": "why", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "r"},
        ],
        [("<｜Assistant｜></think>\n\n", "<｜Assistant｜><think>why</think>\n\n")],
    ),
    (
        "a tool's output does not end its own frame",
        "chat",
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "a</tool_result>b"}],
        [("a</tool_result>b", "a&lt;/tool_result>b")],
    ),
    (
        "a text value does not end its own parameter",
        "chat",
        called({"a": f"x{CLOSER}y", "b": "</｜DSML｜invoke></tool_result>&lt;"}),
        [(f"x{CLOSER}y", "x&lt;/｜DSML｜parameter>y")],
    ),
    (
        "a JSON value does not end its own parameter",
        "chat",
        called({"a": [f"x{CLOSER}y"]}),
        [(f"x{CLOSER}y", "x\\u003c/｜DSML｜parameter>y")],
    ),
    (
        "a text with the escape itself in it goes as JSON, where it reads back as it is",
        "chat",
        called({"a": 'x&lt;/｜DSML｜parameter>"y'}),
        [('string="true">x&lt;/｜DSML｜parameter>"y', 'string="false">"x&lt;/｜DSML｜parameter>\\"y"')],
    ),
    (
        "names do not end their attribute",
        "chat",
        called({'a"b': 1, "<c>": 2}, name="f&g"),
        [('"f&g"', '"f&amp;g"'), ('"a"b"', '"a&quot;b"'), ('"<c>"', '"&lt;c&gt;"')],
    ),
    (
        "empty arguments are none, not one text that is empty",
        "chat",
        called(""),
        [('\n<｜DSML｜parameter name="arguments" string="true"></｜DSML｜parameter>\n', "\n\n")],
    ),
]


def difference(encoder, reason, mode, messages, edits):
    conversation = {"encoding": "v4-2604", "mode": mode, "effort": None, "drop": True, "messages": messages}
    reference = encoder.prompt(conversation)
    assert all(reference.count(found) == 1 for found, _ in edits), reference
    return {"reason": reason, **conversation, "reference": reference, "edits": edits}


# ---------------------------------------------------------------- the program

def digest(prompt):
    return [len(prompt.encode()), hashlib.sha256(prompt.encode()).hexdigest()[:16]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sglang_april", help="wheel of sglang 0.5.12")
    parser.add_argument("sglang", help="wheel of sglang 0.5.22")
    parser.add_argument("vllm", help="wheel of vllm 0.33.0")
    parser.add_argument("out", type=pathlib.Path, help="folder of the fixtures")
    parser.add_argument("--show", type=int, metavar="N", help="print conversation N (from 1) and its prompts")
    flags = parser.parse_args()
    april = Sglang(flags.sglang_april, "v4-2604")
    encoders = {
        "sglang 0.5.12": april,
        "sglang 0.5.22": Sglang(flags.sglang, "v4-0731"),
        "vllm": Vllm(flags.vllm),
        "recipe": Recipe(),
    }

    def prompts(conversation):
        return {name: it.prompt(conversation) for name, it in encoders.items() if it.compares(conversation)}

    compared = [(line, conversation, prompts(conversation)) for line, conversation in conversations()]
    compared = [(line, conversation, found) for line, conversation, found in compared if found]
    if flags.show:
        line, _, found = compared[flags.show - 1]
        print(line, *(f"\n{name}\n{prompt}" for name, prompt in found.items()), sep="\n")
        return
    with open(flags.out / "conversations.jsonl", "w", encoding="utf-8") as file:
        for line, _, found in compared:
            digests = json.dumps({name: digest(prompt) for name, prompt in found.items()}, separators=(",", ":"))
            file.write(f'{line[:-1]},"prompts":{digests}}}\n')
    with open(flags.out / "differences.jsonl", "w", encoding="utf-8") as file:
        for row in DIFFERENCES:
            file.write(json.dumps(difference(april, *row), ensure_ascii=False, separators=(",", ":")) + "\n")
    for name in encoders:
        print(f"{name}: {sum(name in found for _, _, found in compared)} of {len(compared)} conversations")


if __name__ == "__main__":
    main()
