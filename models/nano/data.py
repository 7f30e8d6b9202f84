"""Training conversations for nano, generated from a seed, in the exact DeepSeek V4 chat format.

A conversation is a list of segments [kind, text, weight]: kind "c" is one control token, "t" is text for plain BPE
(so text can never forge a control token), weight 1 marks what the assistant says. The format is that of
docs/spec/conversation.md sections 3 and 4; answers are a fixed function of the prompt, so that they can be checked exactly.

`Maker(seed, held=True)` makes the held-out sets: names it invents and sums it asks are never seen by `held=False`;
with `held="a"`, `"b"` or `"c"` requests also come from sentences of their own.
"""
import hashlib, json, random, re, string, zlib
from functools import lru_cache
from pathlib import Path

import phrasing
import words as W
from phrasing import PARAPHRASES

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, UNTHINK, DSML = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜"
CONTROL_HEAD = [BOS, EOS, PAD]
CONTROL_TAIL = ["<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", USER, ASSISTANT, THINK, UNTHINK, DSML, "<｜latest_reminder｜>",
                "<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>", "<｜read_url｜>", "<｜extracted_url｜>"]
VOCAB = 2048
TOKENIZER = Path(__file__).with_name("tokenizer.json")

TOOLS_SECTION = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{tool_schemas}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
assert hashlib.sha256(TOOLS_SECTION.encode()).hexdigest() == "859cd6d20fe3ce513d7cb53c88944f87a860560c6d001d910376e1d9857d0889"
SECTION_HEAD, SECTION_TAIL = TOOLS_SECTION.split("{tool_schemas}")
_CONTROL = re.compile("(" + "|".join(re.escape(t) for t in CONTROL_HEAD + CONTROL_TAIL) + ")")

# The tool-call-quality check (docs/spec/conversation.md section 6) and close variants: measured, never trained on.
CHECK_SENTENCES = [
    "Use the list_files tool for the current directory exactly once, then report the result and stop.",
    "Use the provided list_files tool exactly once to list the files in the current directory. After the result arrives, report it and stop.",
    "List the files in the current directory using the provided tool. Call list_files exactly once, then report what you found and stop.",
    "Please use list_files for the current directory exactly once, then report and stop.",
    "Call list_files on the current directory one single time. When you have the answer, report it and stop.",
    "List the files in the current directory using the provided tool. Do not answer in prose.",
]


def word_ngrams(text, n):
    w = re.findall(r"[a-z0-9_]+", text.lower())
    return {tuple(w[i:i + n]) for i in range(len(w) - n + 1)}


CHECK_NGRAMS = set().union(*(word_ngrams(s, 5) for s in CHECK_SENTENCES))


@lru_cache(1)
def held_ngrams():
    """Runs of four words of the held-out phrasings; no training request may hold one."""
    pieces = [p for s in PARAPHRASES.values() for forms in s for f in forms for p in re.split(r"\{\w\}", f)]
    return set().union(*(word_ngrams(p, 4) for p in pieces))


class Conv:
    """A conversation under construction; text next to text of the same weight is one segment (it is encoded as one)."""

    def __init__(self):
        self.segs = []

    def c(self, token, w=0):
        self.segs.append(["c", token, w])

    def t(self, text, w=0):
        if not text:
            return
        if self.segs and self.segs[-1][0] == "t":
            assert self.segs[-1][2] == w
            self.segs[-1][1] += text
        else:
            self.segs.append(["t", text, w])

    def template(self, text, w=0):
        """Text of the chat template: control strings in it are control tokens."""
        for part in _CONTROL.split(text):
            (self.c if _CONTROL.fullmatch(part) else self.t)(part, w)


def render_call(name, args):
    lines = [f'<{DSML}parameter name="{k}" string="{"true" if isinstance(v, str) else "false"}">'
             f'{v if isinstance(v, str) else dumps(v)}</{DSML}parameter>' for k, v in args]
    return f'<{DSML}invoke name="{name}">\n' + "\n".join(lines) + f"\n</{DSML}invoke>\n"


def render_calls(calls):
    return f"\n\n<{DSML}tool_calls>\n" + "".join(render_call(*c) for c in calls) + f"</{DSML}tool_calls>"


def dumps(x):
    return json.dumps(x, ensure_ascii=False)


def is_held_name(s):
    return zlib.crc32(s.encode()) % 16 == 0


def is_held_sum(a, b):
    return zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 10 == 0


SYL = W.syllables()

REQUEST_PREFIX = ["", "", "", "", "Please ", "please ", "Can you ", "Could you ", "I want you to ", "I need you to ", "Now ", "Next, ", "Hi. Please ",
                  "Would you ", "You should ", "Let us ", "I would like to ", "Help me: ", "Quick task: ", "Hello, ", "For me, ", "Kindly ", "Go and ",
                  "It is time to ", "Try to ", "My request: ", "Ok, ", "Are you able to ", "I have to ", "We want to ", "Make sure to ", "The task is to ", "First ",
                  "Today I have to ", "Do not forget to ", "All you have to do is to ", "I ask you to ", "You are to ", "There is one thing to do: ",
                  "If you can, ", "Somehow I have to ", "One of us should ", "It would be nice to "]
REQUEST_SUFFIX = ["", "", "", "", ".", ".", ".", ".", " please.", ", please.", " now.", " for me.", ", thanks.", ". Thank you.", "!", "?", " right away.",
                  ". Then tell me what came back.", ". Do it just once.", ", only one time, then say what you got.", ". Then give me the answer and finish.",
                  ". Report back when it is done.", " once.", " one time, then stop.", ". Make a single call and stop after reporting.",
                  " and report the outcome.", ". No prose before the call.", ". After that, report and stop.", ". Afterwards stop.",
                  " exactly one time. Then report.", ", then report to me and stop.", " and then stop."]
BY_NAME = ["use {t}{a}", "call {t}{a}", "run {t}{a}", "invoke {t}{a}", "use the {t} tool{a}", "use the tool {t}{a}", "call the {t} function{a}",
           "run the {t} tool{a}", "make a call to {t}{a}", "execute {t}{a}", "apply {t}{a}", "use `{t}`{a}", "call `{t}`{a}", "with {t},{a} do it",
           "I want {t}{a}", "trigger {t}{a}", "{t}{a}", "use the provided tool {t}{a}", "use your {t} tool{a}", "start {t}{a}", "do a {t} call{a}",
           "get the result of {t}{a}", "let {t} run{a}", "{t} must be called{a}", "go ahead with {t}{a}", "have {t} do its work{a}", "pass this to {t}{a}",
           "hand it over to {t}{a}", "get {t} going{a}", "I need {t}{a}", "the right tool is {t}{a}", "try {t}{a}", "ask {t}{a}", "give {t} a try{a}",
           "we need {t}{a}", "do what {t} does{a}", "show me the output of {t}{a}", "this needs {t}{a}", "how about {t}{a}", "what comes out of {t}{a}", "the tool {t} should run{a}", "send a request to {t}{a}"]
ARG_JOIN = [" with ", " with ", " where ", " using ", ", ", ": ", " given ", " taking ", " for ", " and set ", " with the parameters ", " on "]
NAMED_ARG = ["{p} {v}", "{p} {v}", "{p} set to {v}", "{p} = {v}", "{p}={v}", "{p}: {v}", "{p} as {v}", "the {p} {v}", "{v} as {p}", "{v} as the {p}", "{v} for {p}",
             "{p} equal to {v}", "{p} being {v}", "a {p} of {v}", "{p} is {v}", "{p} to {v}", "its {p} {v}", "{p} of {v}"]
NOUN_FORM = ["the {n}", "the {n}s", "a {n}", "all {n}s", "{n}s", "my {n}", "my {n}s", "some {n}s", "that {n}", "our {n}s", "every {n}", "the {n} we need"]

HERE = ["this directory", "the current folder", "this folder", "here", "the working directory", "the folder we are in", "the present directory",
        "the directory I am in", "the current directory", "the current working directory", "the present folder", "my current folder"]
CHAT = [
    (["Hello", "Hi", "Hello!", "Hi there", "Hey", "Good morning", "Good evening"], "Hello! How can I help you?"),
    (["Who are you?", "What are you?", "What is your name?", "Tell me who you are.", "Introduce yourself."],
     "I am infall nano, a very small DeepSeek V4 model. I can add small numbers, copy, look things up in a text and call tools."),
    (["What can you do?", "How can you help me?", "What are you good at?", "Help"],
     "I can add small numbers, recall facts from a text, rewrite words and call tools that you describe."),
    (["Thanks", "Thank you", "Thank you!", "Thanks a lot", "Many thanks"], "You are welcome."),
    (["Bye", "Goodbye", "See you", "Good night"], "Goodbye!"),
    (["How are you?", "How is it going?", "How do you do?"], "I am fine, thank you."),
    (["Tell me a story", "Tell me a story.", "Please tell me a short story.", "Write a story."],
     "Once there was a small star. It burned quietly for a long time, and every night a child looked up and smiled."),
    (["Why is the sky blue?", "Why does the sky look blue?"], "The air scatters blue light more than red light, so the sky looks blue."),
    (["What is the capital of France?", "Name the capital of France."], "The capital of France is Paris."),
    (["What is infall?", "Tell me about infall.", "Explain infall."], "infall is an engine that runs DeepSeek V4 models on machines smaller than the model."),
]
SYSTEMS = ["", "", "", "You are a helpful assistant.", "Be brief.", "You are a helpful assistant. Be concise.", "Answer shortly.", "You are a careful agent.",
           "You help with files and data.", "Follow the instructions of the user."]


class Maker:
    """Generates conversations; everything random comes from one seeded generator."""

    def __init__(self, seed, held=False):
        self.r = random.Random(seed)
        self.held = held

    # ---------------------------------------------------------------- names and values
    def pick(self, xs):
        return xs[int(self.r.random() * len(xs))]

    def chance(self, p):
        return self.r.random() < p

    def fresh(self, make):
        """A generated name that belongs to this side of the held-out split."""
        while True:
            s = make()
            if is_held_name(s) == bool(self.held):
                return s

    def syl_word(self, lo=2, hi=3):
        return self.fresh(lambda: "".join(self.pick(SYL) for _ in range(self.r.randint(lo, hi))))

    def name(self):
        return self.fresh(lambda: (self.pick(SYL) + self.pick(SYL)).capitalize())

    def letters(self):
        k = self.r.randint(3, 7)
        return self.fresh(lambda: "".join(self.pick(string.ascii_lowercase + string.digits) for _ in range(k)))

    def word(self):
        x = self.r.random()
        return self.pick(W.PLAIN_NOUNS + W.NOUNS) if x < 0.3 else self.pick(W.ADJECTIVES) if x < 0.4 else self.syl_word() if x < 0.85 else self.letters()

    def filename(self):
        base = self.word() if self.chance(0.7) else self.word() + self.pick("_-") + self.word()
        if self.chance(0.12):
            return self.pick([base, base.upper(), base.capitalize() + "file", base.capitalize(), self.pick(SYL).capitalize() + self.pick(SYL) + "file",
                              self.pick(["Rake", "Docker", "Just", "Cargo", "Lice", "Gem", "Brew", "Proc"]) + self.pick(["file", "", "list", "lock"])])
        if self.chance(0.1):
            base = "".join(self.pick(string.ascii_lowercase) for _ in range(self.r.randint(1, 3))) + self.pick(string.digits)
        if self.chance(0.1):
            base = "".join(self.pick(string.ascii_uppercase) for _ in range(self.r.randint(3, 8)))
        if self.chance(0.15):
            base = base.upper() if self.chance(0.5) else base.capitalize()
        if self.chance(0.15):
            base += str(self.r.randint(0, 99))
        return base + "." + self.pick(W.EXT)

    def path(self):
        p = "/".join(self.word() for _ in range(self.r.randint(1, 3)))
        return self.pick(["/", "/", "", "./", "~/", "/home/", "/tmp/", "/srv/", "../"]) + p + ("/" if self.chance(0.1) else "")

    def phrase(self):
        return " ".join(self.word() for _ in range(self.r.randint(2, 5)))

    def value(self, kind, enum=None):
        """-> (value, how it is written in a request)"""
        r = self.r
        if kind == "path":
            if self.chance(0.3):
                return ".", self.pick(HERE if self.held or self.chance(0.6) else phrasing.HERE)
            v = self.path()
        elif kind == "file":
            v = self.filename()
        elif kind == "city":
            v = self.pick(W.CITIES) if self.chance(0.6) else self.name()
        elif kind == "person":
            v = self.pick(W.PEOPLE) if self.chance(0.5) else self.name()
        elif kind == "text":
            v = self.phrase() if self.chance(0.8) else self.phrase().capitalize() + self.pick(".!?")
            q = self.pick(['"{}"', '"{}"', "'{}'", "“{}”"])
            return v, q.format(v)
        elif kind == "email":
            v = f"{self.word()}@{self.pick(W.DOMAINS)}"
        elif kind == "url":
            v = f"https://{self.word()}.{self.pick(['com', 'org', 'net', 'io'])}/{self.word()}"
        elif kind == "id":
            v = self.letters() if self.chance(0.6) else f"{self.letters()}-{r.randint(0, 999)}"
        elif kind == "date":
            v = f"20{r.randint(20, 35)}-{r.randint(1, 12):02d}-{r.randint(1, 28):02d}"
        elif kind == "time":
            v = f"{r.randint(0, 23):02d}:{self.pick(['00', '15', '30', '45', '05', '20'])}"
        elif kind == "int":
            v = r.randint(0, 99) if self.chance(0.7) else r.randint(100, 9999)
            return v, str(v)
        elif kind == "number":
            v = r.randint(0, 99) + r.randint(1, 9) / 10 if self.chance(0.7) else r.randint(1, 500)
            return v, dumps(v)
        elif kind == "bool":
            v = self.chance(0.5)
            return v, self.pick(["true", "true", "on", "yes"]) if v else self.pick(["false", "false", "off", "no"])
        elif kind == "enum":
            v = self.pick(enum)
        elif kind == "list":
            v = [self.word() for _ in range(r.randint(1, 4))]
            return v, dumps(v) if self.chance(0.4) else v[0] if len(v) == 1 else ", ".join(v[:-1]) + " and " + v[-1]
        else:
            v = self.word()
        return v, self.pick(["{}", "{}", "{}", "{}", '"{}"', "'{}'", "`{}`"]).format(v)

    # ---------------------------------------------------------------- tools
    def param(self, taken):
        kind = self.pick(["path", "file", "city", "person", "text", "email", "url", "id", "date", "time", "int", "int", "number", "enum", "bool",
                          "word", "word", "path"] + (["list"] if self.chance(0.3) else []))
        names = W.PARAMS[kind][0]
        name = self.pick(names) if self.chance(0.75) else self.syl_word() if self.chance(0.6) else self.word() + "_" + self.pick(names)
        if name in taken:
            return None
        p = dict(name=name, kind=kind, enum=None)
        typ = {"int": "integer", "number": "number", "bool": "boolean", "list": "array"}.get(kind, "string")
        s = {"type": typ}
        if kind == "enum":
            p["enum"] = self.pick(W.ENUMS).split()
            s["enum"] = p["enum"]
        if kind == "list":
            s["items"] = {"type": "string"}
        if self.chance(0.35):
            s["description"] = self.pick(["The {}", "{} to use", "{} value", "Which {}", "The {} of the {n}", "A {}"]).format(
                name.replace("_", " "), n=self.pick(W.NOUNS)) + self.pick(["", "", "."])
        p["schema"] = s
        return p

    def tool(self, taken=()):
        style = self.r.random()
        while True:
            verb, noun = self.pick(list(W.VERBS)), self.pick(W.NOUNS)
            n = noun + ("s" if self.chance(0.4) else "")
            made = lambda lo, hi: "".join(self.pick(SYL) for _ in range(self.r.randint(lo, hi)))
            name = (f"{verb}_{n}" if style < 0.36 else f"{verb}{n.capitalize()}" if style < 0.44 else f"{n}_{verb}" if style < 0.52 else f"{verb}-{n}" if style < 0.55
                    else made(2, 3) if style < 0.75 else f"{made(1, 2)}_{made(1, 2)}" if style < 0.87 else f"{verb}_{made(1, 2)}" if style < 0.94
                    else f"{n}_{made(1, 2)}")
            if is_held_name(name) == bool(self.held) and name not in taken and name != "list_files":
                break
        says = self.pick(W.VERBS[verb]) if self.chance(0.3) else verb
        desc = self.pick(["{V} the {n}.", "{V} {n}s", "{V} {n}s.", "Use it to {v} a {n}.", "Tool to {v} {n}s.", "{V} a {n}", "{V} one or more {n}s.",
                          "This tool can {v} the {n}.", "{V} {n}s and return the result."]).format(V=says.capitalize(), v=says, n=noun)
        params = []
        for _ in range(self.pick([0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4])):
            p = self.param({q["name"] for q in params})
            if p:
                params.append(p)
        by_action = self.chance(0.85) or not params
        t = dict(name=name, verb=verb, noun=noun, params=params, described=by_action, folder=noun in ("file", "folder"))
        required = [p["name"] for p in params if self.chance(0.75)]
        for p in params:
            p["required"] = p["name"] in required
        t["schema"] = self.schema(t, desc if by_action else None, required)
        return t

    def schema(self, t, desc, required):
        s = {"name": t["name"]}
        if desc:
            s["description"] = desc
        ps = {"type": "object", "properties": {p["name"]: p["schema"] for p in t["params"]}}
        if required or self.chance(0.5):
            ps["required"] = required
        s["parameters"] = ps
        return s

    def folder_tool(self, taken=()):
        """A tool over folders, like those of coding agents; its name is never that of the check."""
        while True:
            verb = self.pick(["list", "show", "read", "scan", "view", "get", "open", "walk", "ls", "find"])
            noun = self.pick(["dir", "folder", "directory", "entries", "items", "documents", "contents", "tree", "paths", "file", "files"])
            if self.chance(0.4):
                verb, noun = self.pick([(verb, self.pick(SYL) + self.pick(SYL)), (self.pick(SYL) + self.pick(SYL), noun), ("", self.pick(SYL) + self.pick(SYL))])
            name = (f"{verb}_{noun}" if self.chance(0.75) else f"{noun}_{verb}").strip("_")
            if name not in ("list_files",) and name not in taken and is_held_name(name) == bool(self.held):
                break
        p = dict(name=self.pick(["path", "path", "dir", "folder", "directory", "root", "location"]), kind="path", enum=None, required=True,
                 schema={"type": "string"})
        if self.chance(0.5):
            p["schema"]["description"] = self.pick(["Directory path", "Path of the folder", "The folder to read", "Where to look", "Path"])
        desc = self.pick([None, "Show what is in a folder.", "List files in a folder", "List directory entries.", "Return the names in a directory",
                          "List the contents of a directory", "List files", "Read a folder."])
        t = dict(name=name, verb="list", noun=self.pick(["file", "entries", "item", "document"]), params=[p], described=desc is not None, folder=True)
        t["schema"] = self.schema(t, desc, [p["name"]])
        return t

    # ---------------------------------------------------------------- requests
    def mention(self, p, text, named):
        conn = W.PARAMS[p["kind"]][1]
        if not named and conn:
            return self.pick(conn).format(v=text)
        name = p["name"].replace("_", " ") if self.chance(0.3) else p["name"]
        if self.chance(0.08):
            name = f"`{name}`"
        return self.pick(NAMED_ARG).format(p=name, v=text)

    def arguments(self, t):
        """-> (arguments in schema order, their wording)"""
        used = [p for p in t["params"] if p["required"] or self.chance(0.5)]
        kinds = [p["kind"] for p in t["params"]]
        args, said = [], []
        for p in used:
            v, text = self.value(p["kind"], p["enum"])
            named = kinds.count(p["kind"]) > 1 or self.chance(0.6) or (p["kind"] in ("int", "number") and len(kinds) > 1)
            if p["kind"] == "path" and v == "." and len(kinds) == 1:
                named = self.chance(0.2)
            args.append((p["name"], v))
            said.append((named or not W.PARAMS[p["kind"]][1], self.mention(p, text, named)))
        if len(said) > 1 and self.chance(0.25):
            self.r.shuffle(said)
        out = ""
        for i, (named, s) in enumerate(said):
            if i == 0:
                out += (self.pick(ARG_JOIN) if named else " ") + s
            else:
                out += self.pick([", ", " and ", ", and ", ", "]) + s
        return args, out

    def ask_call(self, t, tools):
        """-> (call, the sentence asking for it, without prefix and suffix)"""
        args, said = self.arguments(t)
        alone = sum(u["noun"] == t["noun"] or u["folder"] and t["folder"] for u in tools) == 1
        if not t["described"] or not alone or self.chance(0.45):
            core = self.pick(PARAPHRASES[self.held][0] if self.held in PARAPHRASES else BY_NAME).format(t=t["name"], a=said)
        else:
            verb, noun = self.action(t)
            template = self.pick(PARAPHRASES[self.held][1]) if self.held in PARAPHRASES else "{v} {n}{a}"
            core = template.format(t=t["name"], v=verb, n=noun, a=said)
        return (t["name"], args), core

    def action(self, t):
        """-> (verb, noun) for what a tool does"""
        verb = self.pick(W.VERBS[t["verb"]])
        return verb, self.pick(NOUN_FORM).format(n=t["noun"]) if t["noun"] != "entries" else "the entries"

    def request(self, tools, n):
        """-> (calls, a request for them), free of what only held-out requests may hold. Held-out sets keep to the first grammar."""
        while True:
            calls, text = self.first_request(tools, n) if self.held or self.chance(0.35) else phrasing.request(self, tools, n)
            if not (CHECK_NGRAMS & word_ngrams(text, 5)) and (self.held or not held_ngrams() & word_ngrams(text, 4)):
                return calls, text

    def first_request(self, tools, n):
        calls, cores = [], []
        for _ in range(n):
            call, core = self.ask_call(self.pick(tools), tools)
            calls.append(call)
            cores.append(core)
        body = cores[0]
        for core in cores[1:]:
            body += self.pick([" and then ", ", then ", "; also ", ". Then ", " and also ", ". After that ", " and "]) + core
        if self.held in PARAPHRASES:
            text = body[0].upper() + body[1:] + self.pick(PARAPHRASES[self.held][2])
        else:
            text = self.pick(REQUEST_PREFIX) + body + self.pick(REQUEST_SUFFIX)
            if self.chance(0.6):
                text = text[0].upper() + text[1:]
            if self.chance(0.45):       # sentences that ask for nothing
                text += ("" if text[-1] in ".!?" else ".") + "".join(" " + self.aside() for _ in range(self.pick([1, 1, 2])))
            if self.chance(0.15):
                text = self.aside() + " " + text
        return calls, text

    def aside(self):
        """A remark beside the request: no call follows from it."""
        if self.chance(0.2):
            return self.sentence()
        p = self.pick
        return p(["{S} is {adj} today.", "It is for {N}.", "{N} asked for it.", "{N} {past} it {place}.", "This is all.", "Nothing else.", "Only that.", "We {past} the {n}.",
                  "I {past} the {n} {place}.", "No more than this.", "That will do.", "Then we are done.", "The {n} is {adj}.", "I am {adj}.", "I need it {place}.",
                  "Do not explain.", "Stop after that.", "Report what you get.", "When you have the result, report it.", "After the answer, stop.", "I would be glad.",
                  "You know the {n}.", "Everything else can wait.", "It matters to {N}.", "My {n} wants it.", "I want nothing more.", "All I need is this.",
                  "Be {adj}.", "Take your time.", "No hurry.", "Hurry.", "Thanks a lot.", "Many thanks.", "That was it.", "Once is enough.", "Tell me what came out and stop.",
                  "When it comes back, tell me and finish.", "Give me what it returned.", "Do this before the {n}.", "I will be {adj}.", "The rest is {adj}."]).format(
            S=p(["Everything", "The " + p(W.PLAIN_NOUNS), "My " + p(W.PLAIN_NOUNS)]), adj=p(W.ADJECTIVES), N=p(W.PEOPLE) if self.chance(0.5) else self.name(),
            past=p(W.PAST), n=p(W.PLAIN_NOUNS), place=p(W.PLACES))

    # ---------------------------------------------------------------- tool results
    def result(self):
        """-> (content of a tool result, the answer to give)"""
        x = self.r.random()
        if x < 0.45:
            kind = self.r.random()
            make = self.filename if kind < 0.6 else self.word if kind < 0.8 else self.name if kind < 0.9 else self.path
            items = [make() if self.chance(0.85) else self.word() for _ in range(self.r.randint(1, 8))]
            if self.chance(0.04):
                return "[]", "I found nothing."
            sep = (",", ":") if self.chance(0.5) else (", ", ": ")
            return json.dumps(items, separators=sep), "I found: " + ", ".join(items) + "."
        if x < 0.65:
            keys = {self.pick(W.ATTRIBUTES + ["status", "result", "total", "size", "id"]): None for _ in range(self.r.randint(1, 4))}
            obj = {k: self.pick([lambda: self.word(), lambda: self.r.randint(0, 999), lambda: self.name(), lambda: self.chance(0.5)])() for k in keys}
            return dumps(obj), "Here are the details: " + ", ".join(f"{k} = {v if isinstance(v, str) else dumps(v)}" for k, v in obj.items()) + "."
        if x < 0.75:
            e = self.pick(["not found", "access denied", "no such " + self.pick(W.NOUNS), "timeout", "bad value " + self.word(), self.phrase()])
            return "Error: " + e, "The call failed: " + e + "."
        v = self.pick([lambda: self.phrase(), lambda: str(self.r.randint(0, 9999)), lambda: self.word(), lambda: self.pick(["ok", "done", "true", "false"])])()
        return v, "The result is: " + v + "."

    # ---------------------------------------------------------------- conversations
    def begin(self, system=None):
        k = Conv()
        k.c(BOS)
        k.t(self.pick(SYSTEMS) if system is None else system)
        return k

    def turn(self, k, user, answer, think, thought=""):
        """One user turn and its answer; `think` is None (chat) or True; the answer may hold DSML."""
        k.c(USER)
        k.t(user)
        k.c(ASSISTANT)
        if think:
            k.c(THINK)
            k.t(thought, 1)
            k.c(UNTHINK, 1)
        else:
            k.c(UNTHINK)
        k.template(answer, 1)
        k.c(EOS, 1)

    def think_call(self, calls):
        return " ".join(f"I call {n}" + (" with " + ", ".join(f"{a} = {v if isinstance(v, str) else dumps(v)}" for a, v in args) if args else "") + "."
                        for n, args in calls)

    def tools_conv(self, think=None, turns=None, short=False, tools=None, n_calls=None, answered=0.8):
        """Tools in the system message, then requests, calls and, for a share `answered` of them, results and answers."""
        think = self.chance(0.25) if think is None else think
        if tools is None:
            tools, n = [], self.pick([1, 1, 2, 2, 3, 3, 4] if short else [1, 1, 2, 2, 3, 3, 4, 5, 6])
            if not self.held and self.chance(0.1):      # a folder tool alone
                tools, n = [self.folder_tool()], 1
            while len(tools) < n:
                make = self.folder_tool if self.chance(0.12) else self.tool
                tools.append(make({t["name"] for t in tools}))
        k = self.begin()
        schemas = "\n".join(dumps(t["schema"]) for t in tools)
        k.t("\n\n")
        if short:       # a first lesson without the long instructions
            k.t("### Available Tool Schemas\n\n" + schemas + "\n")
        else:
            k.template(SECTION_HEAD)
            k.t(schemas)
            k.template(SECTION_TAIL)
        for _ in range(turns or self.r.randint(1, 4)):
            if self.chance(0.12) and n_calls is None:
                self.turn(k, *self.direct(think))
                continue
            calls, text = self.request(tools, n_calls or self.pick([1, 1, 1, 1, 1, 2, 2, 3]))
            self.turn(k, text, render_calls(calls), think, self.think_call(calls))
            if self.held or self.chance(answered):
                results = [self.result() for _ in calls]
                self.turn(k, "\n\n".join(f"<tool_result>{c}</tool_result>" for c, _ in results), "\n".join(a for _, a in results), think,
                          "I have the result." if len(calls) == 1 else "I have the results.")
        return k

    def sum(self, think):
        r = self.r
        while True:
            big = 99 if self.chance(0.85) else 20
            a, b = r.randint(0, big), r.randint(0, big)
            minus = self.chance(0.3)
            if minus and a < b:
                a, b = b, a
            if is_held_sum(a, b) == bool(self.held):
                break
        op, ans = ("-", a - b) if minus else ("+", a + b)
        ask = self.pick(["What is {} {o} {}?", "What is {} {o} {}?", "{} {o} {}", "{} {o} {} = ?", "Compute {} {o} {}.", "Calculate {} {o} {}", "How much is {} {o} {}?",
                         "{}{o}{}", "{}{o}{}=?", "Please work out {} {o} {}.", "Tell me {} {o} {}.", "Solve {} {o} {}."]).format(a, b, o=op)
        return ask, f"{a} {op} {b} = {ans}", think, self.worked(a, b, op, ans)

    @staticmethod
    def worked(a, b, op, ans):
        """Column arithmetic in words, ones first."""
        a1, b1, at, bt = a % 10, b % 10, a // 10, b // 10
        if op == "+":
            c = (a1 + b1) // 10
            return f"Ones: {a1} + {b1} = {a1 + b1}. Tens: {at} + {bt} + {c} = {at + bt + c}. So {ans}."
        c = int(a1 < b1)
        return f"Ones: {a1 + 10 * c} - {b1} = {a1 + 10 * c - b1}. Tens: {at} - {bt} - {c} = {at - bt - c}. So {ans}."

    def facts(self, think, lo=2, hi=7):
        items = {}
        while len(items) < self.r.randint(lo, hi):
            items[self.name() if self.chance(0.8) else self.pick(W.PEOPLE), self.pick(W.ATTRIBUTES)] = (
                str(self.r.randint(0, 999)) if self.chance(0.3) else self.word())
        n, a = self.pick(list(items))
        v = items[n, a]
        text = " ".join(self.pick(["{}'s {} is {}.", "The {1} of {0} is {2}."]).format(x, y, z) for (x, y), z in items.items())
        q = self.pick(["What is {}'s {}?", "What is the {1} of {0}?", "Tell me the {1} of {0}.", "Which {1} does {0} have?", "{}'s {}?"]).format(n, a)
        user = self.pick(["{t} {q}", "{t}\n{q}", "Facts: {t}\nQuestion: {q}", "{t}\n\n{q}", "Read this: {t} Now answer: {q}", "{q} {t}"]).format(t=text, q=q)
        return user, f"{n}'s {a} is {v}.", think, f"I look for {n} and {a}. The value is {v}."

    def rewrite(self, think):
        ws = [self.word() for _ in range(self.r.randint(2, 7))]
        s = " ".join(ws)
        up = [self.pick(W.PLAIN_NOUNS + W.ADJECTIVES) for _ in range(self.r.randint(1, 4))]
        ask, body, ans = self.pick([
            (["Repeat: {}", "Say this again: {}", "Repeat these words: {}", "Copy this text: {}", "Echo {}"], s, s),
            (["Reverse the order of these words: {}", "Write these words backwards: {}", "Reverse the words: {}"], s, " ".join(ws[::-1])),
            (["What is the first word of: {}", "First word of this: {}", "Give the first word: {}"], s, ws[0]),
            (["What is the last word of: {}", "Last word of this: {}", "Give the last word: {}"], s, ws[-1]),
            (["Separate these words with commas: {}", "Make a comma list: {}"], s, ", ".join(ws)),
            (["Write in capitals: {}", "Make this uppercase: {}"], " ".join(up), " ".join(up).upper()),
            (["Write as a JSON list: {}", "Make a JSON array of these words: {}"], s, dumps(ws)),
        ])
        return self.pick(ask).format(body), ans, think, f"The words are: {body}."

    def chat(self, think):
        asks, ans = self.pick(CHAT)
        return self.pick(asks), ans, think, "This is a simple question."

    def direct(self, think):
        x = self.r.random()
        make = self.sum if x < 0.35 else self.facts if x < 0.65 else self.rewrite if x < 0.9 or self.held else self.chat
        return make(think)

    def direct_conv(self, turns=None, think=None, make=None):
        """Questions without tools; earlier turns keep no reasoning (conversation.md 3.4)."""
        k = self.begin()
        think = self.chance(0.4) if think is None else think
        n = turns or self.r.randint(1, 4)
        for i in range(n):
            user, ans, th, thought = (make or self.direct)(think)
            self.turn(k, user, ans, th and i == n - 1, thought)
        return k

    def sentence(self):
        p, r = self.pick, self.r
        np = lambda: p(["the", "a", "the", "every", "that"]) + (" " + p(W.ADJECTIVES) if r.random() < 0.5 else "") + " " + p(W.PLAIN_NOUNS)
        s = f"{np()} {p(W.PAST)} {np()}"
        x = r.random()
        if x < 0.4:
            s += " " + p(W.PLACES)
        elif x < 0.6:
            s += f", and {np()} {p(W.PAST)} {np()}"
        elif x < 0.7:
            s = p(W.PLACES) + " " + s
        elif x < 0.8:
            s += f" because {np()} was {p(W.ADJECTIVES)}"
        return s[0].upper() + s[1:] + "."

    def prose(self, n):
        return " ".join(self.sentence() for _ in range(n))

    def prose_conv(self, n=None):
        k = Conv()
        k.c(BOS)
        k.t(self.prose(n or self.r.randint(4, 16)), 0.25)
        k.c(EOS, 0.25)
        return k

    def recall(self, length, encode_len, turns=None, n_facts=None, think=None):
        """`Name=number` facts scattered over about `length` tokens of filler, asked for at the end."""
        n_facts = n_facts or max(3, min(40, int(length / self.pick([60, 80, 125, 200]))))
        facts = {}
        while len(facts) < n_facts:
            facts[self.name()] = str(self.r.randint(1, 999))
        body, left = [], length - 12 * n_facts - 40
        while left > 0:
            s = self.sentence()
            body.append(s)
            left -= encode_len(s)
        for f in facts.items():
            body.insert(self.r.randint(0, len(body)), "=".join(f) + ".")
        k = self.begin("")
        think = self.chance(0.15) if think is None else think
        intro = self.pick(["", "Remember the numbers in this text. ", "Read the text.\n", "Here is a text: ", "Notes:\n"])
        names = list(facts)
        turns = turns or self.r.randint(4, 12)
        for i in range(turns):
            if self.chance(0.15) and not self.held:
                ask = self.r.sample(names, min(len(names), self.r.randint(2, 4)))
                q = self.pick(["What are {} and {}?", "Give me {} and {}.", "Numbers of {} and {}?"]).format(", ".join(ask[:-1]), ask[-1])
            else:
                ask = [self.pick(names)]
                q = self.pick(["What is {}?", "What is the number of {}?", "Which number belongs to {}?", "{}?", "Give me {}.", "What number does {} have?",
                               "Find {} in the text.", "Question: what is {}?", "Tell me the value of {}.", "{}="]).format(ask[0])
            ans = ", ".join(f"{n}={facts[n]}" for n in ask)
            user = intro + " ".join(body) + self.pick(["\n", " ", "\n\n"]) + q if i == 0 else q
            self.turn(k, user, ans, think and i == turns - 1, f"I look for {ask[0]}.")
        return k


# -------------------------------------------------------------------- tokens
def pre_tokenizer(split_digits):
    """The three sequential splits of V4 and the byte map; `split_digits` only while merges are learnt, so that every digit stays a token."""
    from tokenizers import Regex, pre_tokenizers as P
    third = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    return P.Sequence([P.Split(Regex(r"\p{N}" if split_digits else r"\p{N}{1,3}"), "isolated"), P.Split(Regex("[一-龥\u3040-ゟ゠-ヿ]+"), "isolated"),
                       P.Split(Regex(third), "isolated"), P.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_tokenizer(n_conv=6000):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    m, texts = Maker(1), []
    for i in range(n_conv):
        k = (m.tools_conv(short=True) if i % 3 == 0 else m.direct_conv() if i % 3 == 1 else m.prose_conv() if i % 2 else
             m.recall(200, lambda s: 16))
        texts += [s[1] for s in k.segs if s[0] == "t"]
    texts += [p for p in _CONTROL.split(TOOLS_SECTION)] * 60
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizer(True)
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB - len(CONTROL_HEAD) - len(CONTROL_TAIL), min_frequency=2,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tok.pre_tokenizer = pre_tokenizer(False)
    tok.decoder = decoders.ByteLevel()
    tok.save(str(TOKENIZER), pretty=False)


class Codec:
    """Segments -> token ids. BPE ids follow the three head control tokens; the tail control tokens come last."""

    def __init__(self):
        from tokenizers import Tokenizer
        self.bpe = Tokenizer.from_file(str(TOKENIZER))
        n = self.bpe.get_vocab_size()
        assert n + len(CONTROL_HEAD) + len(CONTROL_TAIL) == VOCAB, n
        self.control = {t: i for i, t in enumerate(CONTROL_HEAD)}
        self.control.update({t: len(CONTROL_HEAD) + n + i for i, t in enumerate(CONTROL_TAIL)})
        self.names = {i: t for t, i in self.control.items()}
        self.cached = lru_cache(200_000)(self._encode)

    def _encode(self, text):
        return tuple(i + len(CONTROL_HEAD) for i in self.bpe.encode(text, add_special_tokens=False).ids)

    def text(self, s):
        return self.cached(s) if len(s) < 64 else self._encode(s)

    def encode(self, segs):
        ids, ws = [], []
        for kind, s, w in segs:
            new = (self.control[s],) if kind == "c" else self.text(s)
            ids += new
            ws += [w] * len(new)
        return ids, ws

    def decode(self, ids):
        out, run = "", []
        for i in list(ids) + [-1]:
            if i in self.names or i < 0:
                if run:
                    out += self.bpe.decode([x - len(CONTROL_HEAD) for x in run])
                out, run = out + self.names.get(i, ""), []
            else:
                run.append(i)
        return out


# -------------------------------------------------------------------- rows
def induction(m, codec, n):
    """Random tokens, a gap, the same tokens again: the purest lesson in copying."""
    r = m.r
    k = r.randint(8, max(9, n // 3))
    lo, hi = len(CONTROL_HEAD), VOCAB - len(CONTROL_TAIL)
    a = [r.randrange(lo, hi) for _ in range(k)]
    gap = [r.randrange(lo, hi) for _ in range(r.randint(0, max(0, n - 2 * k - 2)))]
    return [0] + a + gap + a, [0] * (1 + k + len(gap)) + [0, 0, 0] + [0.5] * (k - 3)


@lru_cache(1)
def held_requests():
    """Every user message of the held-out sets; no training conversation may hold one."""
    out = set(CHECK_SENTENCES)
    for f in Path(__file__).with_name("heldout").glob("*.jsonl"):
        for line in f.open():
            p = json.loads(line)["prompt"]
            out |= {b[1] for a, b in zip(p, p[1:]) if a[1] == USER}
    return out


def conversation(m, codec, rows, phase, first=False):
    """One conversation of the mixture of `phase`, free of held-out requests: (ids, weights). `first`: it begins a row."""
    while True:
        k = mixture(m, codec, rows, phase, first)
        if not isinstance(k, Conv):
            return k
        if not any(a[1] == USER and b[1] in held_requests() for a, b in zip(k.segs, k.segs[1:])):
            return codec.encode(k.segs)


def mixture(m, codec, rows, phase, first=False):
    """What phase 1 (short conversations), 2 (full ones), 3 (long rows), 4 (many requests) and 5 (rows half of which begin with a text
    almost as long as they are) are made of; a Conv, or (ids, weights) of an induction lesson."""
    x, elen = m.r.random(), lambda s: len(codec.text(s))
    if phase == 1:
        if x < 0.10:
            return induction(m, codec, m.r.randint(40, 400))
        k = (m.tools_conv(short=True, turns=m.pick([1, 1, 2]), n_calls=m.pick([1, 1, 2])) if x < 0.45 else m.direct_conv() if x < 0.75 else
             m.recall(m.r.randint(60, 400), elen) if x < 0.93 else m.prose_conv(6))
    elif phase == 2:
        if x < 0.03:
            return induction(m, codec, rows)
        k = (m.tools_conv() if x < 0.60 else m.direct_conv(turns=m.r.randint(2, 10)) if x < 0.82 else
             m.recall(m.r.randint(150, rows - 150), elen) if x < 0.96 else m.prose_conv())
    elif phase == 4:
        k = (m.tools_conv() if x < 0.45 else m.tools_conv(turns=m.r.randint(4, 8), answered=0.3) if x < 0.65 else
             m.direct_conv(turns=m.r.randint(2, 8)) if x < 0.85 else m.recall(m.r.randint(150, rows - 100), elen) if x < 0.96 else m.prose_conv())
    elif phase == 5 and first and m.chance(0.5):
        k = m.recall(m.r.randint(rows // 2, rows - 250), elen)
    else:
        k = (m.tools_conv() if x < 0.60 else m.direct_conv(turns=m.r.randint(2, 10)) if x < 0.80 else
             m.recall(m.r.randint(500, rows - 100), elen, turns=m.r.randint(6, 20)) if x < 0.97 else m.prose_conv())
    return k


PROMPT_WEIGHT = 0.03


def row(m, codec, T, phase):
    """T + 1 ids and the weight of each as a target. Conversations are packed; one too long for what is left starts the next row,
    the space behind it is filled with shorter ones, and a conversation longer than a row is cut."""
    ids, ws = [], []
    while len(ids) < T + 1:
        for attempt in range(4):
            i, w = conversation(m, codec, T, phase, not ids)
            if len(ids) + len(i) <= T + 1:
                break
        ids += i
        ws += [max(x, PROMPT_WEIGHT) for x in w]
    ws[0] = 0
    return ids[:T + 1], ws[:T + 1]
