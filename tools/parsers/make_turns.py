#!/usr/bin/env python3
"""Turns as a model may write them, and what SGLang's parser makes of them.

    unzip -q sglang-0.5.23-*.whl 'sglang/srt/function_call/*' -d DIR
    python3 tools/parsers/make_turns.py DIR crates/text/tests/fixtures/sglang_turns.json

The detector for DeepSeek V4 is plain Python. What it imports but does not use here (pydantic models of an HTTP
server, a parser of partial JSON) is replaced below by the little that it needs, so nothing else has to be installed.
"""

import importlib
import json
import random
import re
import sys
import types
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Optional

TURNS_PER_KIND = 16
TOOLS = ["read_file", "run", "search"]


def load_detector(directory):
    """Imports the detector with stand-ins for the server around it."""

    def module(name, **members):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)

    @dataclass
    class ToolCallItem:
        tool_index: int
        name: Optional[str] = None
        parameters: str = ""

    @dataclass
    class StreamingParseResult:
        normal_text: str = ""
        calls: tuple = ()

    for package in ["sglang", "sglang.srt", "sglang.srt.entrypoints", "sglang.srt.entrypoints.openai"]:
        module(package, __path__=[])
    module("sglang.srt.function_call", __path__=[f"{directory}/sglang/srt/function_call"])
    module("sglang.srt.entrypoints.openai.protocol", Tool=object, ToolChoice=object)
    unknown = SimpleNamespace(get=lambda: False)
    module("sglang.srt.environ", envs=SimpleNamespace(SGLANG_FORWARD_UNKNOWN_TOOLS=unknown))
    module(
        "sglang.srt.function_call.core_types",
        ToolCallItem=ToolCallItem,
        StreamingParseResult=StreamingParseResult,
        StructureInfo=object,
        _GetInfoFunc=object,
    )
    names = ["_find_common_prefix", "_is_complete_json", "_partial_json_loads"]
    module("sglang.srt.function_call.utils", **dict.fromkeys(names))
    module("orjson")
    module("partial_json_parser", __path__=[])
    module("partial_json_parser.core", __path__=[])
    module("partial_json_parser.core.exceptions", MalformedJSON=Exception)
    module("partial_json_parser.core.options", Allow=object)
    return importlib.import_module("sglang.srt.function_call.deepseekv4_detector").DeepSeekV4Detector


TEXTS = [
    "src/main.rs", "ls -la | grep -v '^d'", "杭州 🙂", "a\nb\n\nc", "if (a < b && c > d) { return \"x\"; }", "naïve — “quoted”",
    "<div class=\"a\">1</div>", "C:\\temp\\new", "100%", "x", "&lt;b&gt; &amp;", "tab\there", "</invoke>", "$HOME/.config",
]
VALUES = [0, -1, 2.5, True, None, [], {}, [1, "two", None], {"k": {"x": [1, 2]}}, 12345678901234567890, "text", ["a<b", "]"]]
PROSE = ["", "I will look.", "Checking the file now.\nOne moment", "好的", "Use `a < b`:", "See <b>this</b>."]


def string(rng, value=None):
    value = rng.choice(TEXTS) if value is None else value
    return f'<｜DSML｜parameter name="{rng.choice("abc")}" string="true">{value}</｜DSML｜parameter>\n'


def other(rng, name="n"):
    value = json.dumps(rng.choice(VALUES), ensure_ascii=False)
    return f'<｜DSML｜parameter name="{name}" string="false">{value}</｜DSML｜parameter>\n'


def invoke(rng, body=None, name=None, closer="</｜DSML｜invoke>\n"):
    if body is None:
        body = rng.choice([string, other])(rng) + (other(rng, "m") if rng.random() < 0.5 else "")
    return f'<｜DSML｜invoke name="{name or rng.choice(TOOLS)}">\n{body}{closer}'


def block(rng, calls=None, before="\n\n", opener="<｜DSML｜tool_calls>", closer="</｜DSML｜tool_calls>"):
    return f"{rng.choice(PROSE)}{before}{opener}\n{invoke(rng) if calls is None else calls}{closer}"


def mangled(rng, old, new):
    return block(rng, invoke(rng, string(rng))).replace(old, new)


KINDS = {
    "no call": lambda rng: rng.choice(PROSE) + " " + rng.choice(TEXTS),
    "canonical": block,
    "several calls": lambda rng: block(rng, "".join(invoke(rng) for _ in range(rng.randint(2, 4)))),
    "no parameters": lambda rng: block(rng, invoke(rng, "\n")),
    "attributes with spaces": lambda rng: mangled(rng, '" string', '"  string'),
    "attributes in another order": lambda rng: re.sub(r'(name="[abc]") (string="true")', r"\2 \1", block(rng, invoke(rng, string(rng)))),
    "one newline before the block": lambda rng: block(rng, before="\n"),
    "space around a string": lambda rng: block(rng, invoke(rng, string(rng, f" {rng.choice(TEXTS)}\n"))),
    "invalid JSON": lambda rng: block(rng, invoke(rng, other(rng).replace("</", rng.choice("[]}x,") + "</", 1))),
    "no string attribute": lambda rng: mangled(rng, ' string="true"', ""),
    "no block closer": lambda rng: block(rng, closer=""),
    "no invoke closer": lambda rng: block(rng, invoke(rng, closer="")),
    "toolcalls": lambda rng: block(rng, opener="<｜DSML｜toolcalls>"),
    "lost first bar": lambda rng: mangled(rng, "｜DSML｜", "DSML｜"),
    "plain XML": lambda rng: mangled(rng, "｜DSML｜", "").replace("</invoke></par", "</par"),
    "bare invoke": lambda rng: rng.choice(PROSE) + "\n\n" + invoke(rng),
    "direct JSON": lambda rng: block(rng, invoke(rng, json.dumps({"a": rng.choice(VALUES)}) + "\n")),
    "self-closing": lambda rng: block(rng, f'<｜DSML｜invoke name="{rng.choice(TOOLS)}"/>\n'),
    "nested parameters": lambda rng: block(
        rng, invoke(rng, f'<｜DSML｜parameter name="o">{string(rng)}</｜DSML｜parameter>\n')
    ),
    "parameter opener in a value": lambda rng: block(
        rng, invoke(rng, string(rng, 'see <｜DSML｜parameter name="x" string="true"> there'))
    ),
    "duplicate names": lambda rng: block(rng, invoke(rng, other(rng) + other(rng))),
    "unknown tool": lambda rng: block(rng, invoke(rng, name="unknown")),
    "prose between tags": lambda rng: block(rng, invoke(rng, string(rng) + "and then\n")),
    "cut inside a value": lambda rng: block(rng, invoke(rng, string(rng)[: -rng.randint(2, 20)], closer=""), closer=""),
    "text after the block": lambda rng: block(rng) + "\n" + rng.choice(TEXTS),
    "orphan closer": lambda rng: rng.choice(PROSE) + "</｜DSML｜tool_calls>",
}


def main(directory, out):
    detector = load_detector(directory)
    tools = [SimpleNamespace(function=SimpleNamespace(name=name)) for name in TOOLS]
    turns = []
    for kind, make in KINDS.items():
        for number in range(TURNS_PER_KIND):
            text = make(random.Random(f"{kind} {number}"))
            result = detector().detect_and_parse(text, tools)
            calls = [[call.name, json.loads(call.parameters)] for call in result.calls]
            turns.append({"kind": kind, "text": text, "content": result.normal_text, "calls": calls})
    with open(out, "w") as file:
        lines = ",\n".join(json.dumps(turn, ensure_ascii=False) for turn in turns)
        file.write(f"[\n{lines}\n]\n")
    print(f"{len(turns)} turns")


if __name__ == "__main__":
    main(*sys.argv[1:])
