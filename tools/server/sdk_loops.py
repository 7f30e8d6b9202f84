"""The official SDKs in a tool loop of three turns, on each API: what a client pays for its history.

A conversation asks for a call, gives its result, and asks for another call. In the second and the third turn the server may read
only what is new: `cached_tokens` must be at least the tokens of the turn before, prompt and completion, less the last one, which no
pass has read yet. That must hold however the client sends its history back (with or without the reasoning, with the arguments' keys
in another order), whether it streams, whether its calls were sampled or greedy, and after the server was restarted before each of the two
turns, asked to end or killed.

One answer is read again: one without calls whose reasoning the client leaves out. Nothing in such a history says whose it is, and nobody is
given another's reasoning; then all that came before the answer must be known.

Raw completions have no tools: there the text is continued, once with more of the user's own and once as it stands.
"""
import itertools, json, signal, time
from concurrent.futures import ThreadPoolExecutor

import anthropic, openai

from harness import Report, Server, arguments

SYSTEM = "You are a helpful assistant."
NAME, DESCRIPTION = "rename_alarm", "Rename alarms and return the result."
SCHEMA = {"type": "object", "properties": {"sender": {"type": "string", "description": "Which sender."}, "label": {"type": "string"}},
          "required": ["sender", "label"], "additionalProperties": False}
# Each loop has a sender of its own, so that none finds what another left.
ASK = "Use rename_alarm with sender {}@example.com and label timer exactly once, then report the result and stop."
ASK_AGAIN = "Now use rename_alarm with sender {}@example.org and label clock once, then stop."
# A server that ends saves a session of which 64 tokens are not on the disk; a turn has to bring as many to be known after a restart.
RESULT = '["EDNES.js","mp5.csv","package","garden.txt","winter.csv","TRK7.py","letters","bridge.json","stone.md","ARB2.log","valve.cfg","river"]'
STORY = "{}. " + 4 * "Every candle watched the cold winter at the market, and a bird lost the wheel. " + "Once there was a small star. It burned"
MODEL = "deepseek-v4-flash"
MAX_TOKENS = 200
NAMES = map("".join, itertools.product(["kra", "shar", "tex", "pek", "gul", "zur", "nax"], ["drul", "kis", "brim", "ral", "sond", "shi", "zand"],
                                       ["", "a", "o", "i"]))


class Said:
    """What came of a turn: calls as (id, name, arguments), and what it cost."""

    def __init__(self, calls, text, prompt, cached, completion):
        self.calls, self.text, self.prompt, self.cached, self.completion = calls, text, prompt, cached, completion


class Form:
    """How the client goes about it."""

    def __init__(self, stream=False, thinking=False, send_reasoning=True, reorder=False, by_id=False, temperature=0):
        self.stream, self.thinking, self.send_reasoning = stream, thinking, send_reasoning
        self.reorder, self.by_id, self.temperature = reorder, by_id, temperature

    def __str__(self):
        reasoning = ("sent back" if self.send_reasoning else "left out") if self.thinking else "off"
        words = ["stream" if self.stream else "plain", f"reasoning {reasoning}"]
        words += ["keys reordered"] * self.reorder + ["previous_response_id"] * self.by_id
        return ", ".join(words + ["temperature 1"] * bool(self.temperature))

    def arguments(self, text):
        """Arguments as the client writes them again."""
        if not self.reorder:
            return text
        return json.dumps(dict(reversed(json.loads(text).items())), indent=1)


class Chat:
    """`/v1/chat/completions`."""

    def __init__(self, url, form):
        self.form, self.url, self.client = form, url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        self.messages = [{"role": "system", "content": SYSTEM}]
        function = {"name": NAME, "description": DESCRIPTION, "parameters": SCHEMA}
        # The streaming helper takes strict tools only.
        self.tools = [{"type": "function", "function": function | ({"strict": True} if form.stream else {})}]

    def ask(self, text):
        self.messages.append({"role": "user", "content": text})

    def answer(self, call_id, result):
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": result})

    def turn(self):
        thinking = {"thinking": {"type": "enabled" if self.form.thinking else "disabled"}}
        options = dict(model=MODEL, messages=self.messages, tools=self.tools, max_completion_tokens=MAX_TOKENS,
                       temperature=self.form.temperature, seed=1, extra_body=thinking)
        if self.form.stream:
            with self.client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
                completion = stream.get_final_completion()
        else:
            completion = self.client.chat.completions.create(**options)
        message, usage = completion.choices[0].message, completion.usage
        calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or []]
        back = {"role": "assistant", "content": message.content}
        if self.form.send_reasoning and getattr(message, "reasoning_content", None):
            back["reasoning_content"] = message.reasoning_content
        if calls:
            back["tool_calls"] = [{"id": id, "type": "function", "function": {"name": name, "arguments": self.form.arguments(text)}}
                                  for id, name, text in calls]
        self.messages.append(back)
        assert completion.choices[0].finish_reason == ("tool_calls" if calls else "stop"), completion.choices[0].finish_reason
        return Said(calls, message.content, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens)


class Responses:
    """`/v1/responses`, with the whole input each time or with `previous_response_id`."""

    def __init__(self, url, form):
        self.form, self.url, self.client = form, url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        self.items, self.previous = [], None
        self.tools = [{"type": "function", "name": NAME, "description": DESCRIPTION, "parameters": SCHEMA, "strict": form.stream}]

    def ask(self, text):
        self.items.append({"role": "user", "content": text})

    def answer(self, call_id, result):
        self.items.append({"type": "function_call_output", "call_id": call_id, "output": result})

    def turn(self):
        effort = {"effort": "high", "summary": "auto"} if self.form.thinking else {"effort": "none"}
        options = dict(model=MODEL, input=self.items, instructions=SYSTEM, tools=self.tools, max_output_tokens=MAX_TOKENS,
                       temperature=self.form.temperature, reasoning=effort, store=self.form.by_id, extra_body={"seed": 1})
        if self.previous:
            options["previous_response_id"] = self.previous
        if self.form.stream:
            with self.client.responses.stream(**options) as stream:
                response = stream.get_final_response()
        else:
            response = self.client.responses.create(**options)
        assert response.status == "completed", response.status
        calls = [(item.call_id, item.name, item.arguments) for item in response.output if item.type == "function_call"]
        if self.form.by_id:
            self.items, self.previous = [], response.id
        else:
            self.items += [self.back(item) for item in response.output if self.form.send_reasoning or item.type != "reasoning"]
        usage = response.usage
        return Said(calls, response.output_text, usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens)

    def back(self, item):
        """An item of the output as the client sends it back."""
        back = item.model_dump(exclude_none=True, exclude={"parsed_arguments"})
        if item.type == "message":
            for part in back["content"]:
                part.pop("parsed", None)
        if item.type == "function_call":
            back["arguments"] = self.form.arguments(item.arguments)
        return back


class Messages:
    """`/v1/messages`."""

    def __init__(self, url, form):
        self.form, self.url, self.client = form, url, anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
        self.messages = []
        self.tools = [{"name": NAME, "description": DESCRIPTION, "input_schema": SCHEMA}]

    def ask(self, text):
        self.messages.append({"role": "user", "content": text})

    def answer(self, call_id, result):
        self.messages.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": call_id, "content": result}]})

    def turn(self):
        thinking = {"type": "enabled", "budget_tokens": 1024} if self.form.thinking else {"type": "disabled"}
        # The seed is this server's; temperature has to be left to the default where the model thinks.
        options = dict(model=MODEL, system=SYSTEM, messages=self.messages, tools=self.tools, max_tokens=MAX_TOKENS, thinking=thinking,
                       extra_body={"seed": 1} | ({} if self.form.thinking else {"temperature": self.form.temperature}))
        if self.form.stream:
            with self.client.messages.stream(**options) as stream:
                message = stream.get_final_message()
        else:
            message = self.client.messages.create(**options)
        calls = [(block.id, block.name, json.dumps(block.input)) for block in message.content if block.type == "tool_use"]
        assert message.stop_reason == ("tool_use" if calls else "end_turn"), message.stop_reason
        back = [self.back(block) for block in message.content if self.form.send_reasoning or block.type != "thinking"]
        self.messages.append({"role": "assistant", "content": back})
        usage = message.usage
        read, written = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
        text = "".join(block.text for block in message.content if block.type == "text")
        return Said(calls, text, usage.input_tokens + read + written, read, usage.output_tokens)

    def back(self, block):
        back = block.model_dump(exclude_none=True)
        if block.type == "tool_use":
            back = {"type": "tool_use", "id": block.id, "name": block.name, "input": json.loads(self.form.arguments(json.dumps(block.input)))}
        if block.type == "text":
            back = {"type": "text", "text": block.text}
        return back


class Completions:
    """`/v1/completions`, raw: the text goes on where it ended."""

    def __init__(self, url, form):
        self.form, self.url, self.client = form, url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        self.text = ""

    def ask(self, text):
        self.text += text

    def turn(self):
        options = dict(model=MODEL, prompt=self.text, max_tokens=16, temperature=self.form.temperature, seed=1,
                       extra_body={"raw": True})
        if self.form.stream:
            chunks = list(self.client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
            said, usage = "".join(choice.text for chunk in chunks for choice in chunk.choices), chunks[-1].usage
        else:
            completion = self.client.completions.create(**options)
            said, usage = completion.choices[0].text, completion.usage
        self.text += said
        return Said([], said, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens)


def loop(api, url, form, name, between):
    """Three turns, with `between` called before each: it may restart the server, and says where it is then."""
    dialog, said = api(url, form), []
    first, then = (STORY, "") if api is Completions else (ASK, ASK_AGAIN)
    for turn in range(3):
        moved = between(turn)
        if moved != dialog.url:
            dialog = rebased(dialog, moved)
        if turn != 1:
            dialog.ask((first if turn == 0 else then).format(name))
        elif api is Completions:
            dialog.ask("\n" + STORY.format(name))
        else:
            assert said[0].calls, f"no call was made; the answer was {said[0].text!r}"
            for call_id, _, _ in said[0].calls:
                dialog.answer(call_id, RESULT)
        said.append(dialog.turn())
    return said


def rebased(dialog, url):
    """The dialog with a client of the server's new address."""
    fresh = type(dialog)(url, dialog.form)
    dialog.client, dialog.url = fresh.client, url
    return dialog


def figures(said, form):
    """Whether each turn read only what was new, and the figures that show it."""
    ok, cells = True, []
    is_left_out = form.thinking and not form.send_reasoning and not form.by_id
    for before, now in zip(said, said[1:]):
        is_known = before.calls or not is_left_out
        least = before.prompt + (before.completion if is_known else 0) - 1
        ok &= now.cached >= least
        cells.append(f"{now.cached} of {now.prompt}, at least {least}")
    return ok, cells


def run_loop(what, api, url, form, name, between=None):
    """A row of the report."""
    try:
        ok, cells = figures(loop(api, url, form, name, between or (lambda turn: url)), form)
    except Exception as error:  # a client library's complaint is a finding, too
        ok, cells = False, [f"{type(error).__name__}: {error}"[:300], ""]
    return ok, what, api.__name__, form, *cells


def forms(api):
    if api is Completions:
        return [Form(), Form(stream=True)]
    some = [Form(), Form(stream=True), Form(reorder=True), Form(stream=True, reorder=True)]
    for stream in (False, True):
        some += [Form(stream, thinking=True), Form(stream, thinking=True, send_reasoning=False), Form(stream, thinking=True, reorder=True)]
    if api is Responses:
        some += [Form(by_id=True), Form(stream=True, by_id=True), Form(thinking=True, by_id=True)]
    return some


APIS = [Chat, Responses, Messages, Completions]


def restart_forms(api, smoke):
    """Sampled calls come first: only what was kept of their ids says how they were written."""
    if api is Completions:
        some = [Form(stream=True, temperature=1), Form()]
    else:
        some = [Form(stream=True, reorder=True, temperature=1), Form(), Form(thinking=True)]
    return some[:1] if smoke else some


def restarts(pool, binary, smoke):
    """The same loops with restarts, each with a server of its own: before the second and the third turn, and before the third alone.
    They mostly wait, and so they run beside each other; their rows are still to come."""
    kinds = {"asked to end": signal.SIGTERM, "killed": signal.SIGKILL}
    turns = ((1, 2),) if smoke else ((1, 2), (2,))
    cases = [(kind, api, form, at) for kind in reversed(kinds) for api in APIS for form in restart_forms(api, smoke) for at in turns]
    return [pool.submit(run_restarts, f"{kind} before {' and '.join(str(turn + 1) for turn in at)}", binary, api, form, next(NAMES), kinds[kind], at)
            for kind, api, form, at in cases]


def run_restarts(what, binary, api, form, name, number, turns):
    try:
        with Server(binary, "--snapshot-dir", "snapshots") as server:
            def between(turn):
                if turn in turns:
                    if number == signal.SIGKILL:
                        wait_saved(server)
                    server.restart(number)
                return server.url
            return run_loop(what, api, server.url, form, name, between)
    except Exception as error:
        return False, what, api.__name__, form, f"{type(error).__name__}: {error}"[:300], ""


def small_endpoints(report, server):
    """Everything besides generating."""
    client, claude = openai.OpenAI(base_url=server.url + "/v1", api_key="none"), anthropic.Anthropic(base_url=server.url, api_key="none")

    def check(name, test):
        try:
            found = test()
        except Exception as error:
            return report.row(False, "endpoint", name, "", f"{type(error).__name__}: {error}"[:300])
        return report.row(True, "endpoint", name, "", found)

    def models():
        listed = [model.id for model in client.models.list()]
        assert listed and client.models.retrieve(listed[0]).id == listed[0]
        return ", ".join(listed)

    def stored():
        response = client.responses.create(model=MODEL, input="Hello", reasoning={"effort": "none"}, extra_body={"temperature": 0})
        again = client.responses.retrieve(response.id)
        assert again.output_text == response.output_text and again.usage == response.usage
        next_one = client.responses.create(model=MODEL, input="Bye", previous_response_id=response.id, reasoning={"effort": "none"})
        assert next_one.usage.input_tokens > response.usage.input_tokens
        client.responses.delete(response.id)
        try:
            client.responses.retrieve(response.id)
        except openai.NotFoundError:
            return f"{response.output_text!r}; deleted, then 404"
        raise AssertionError("a deleted response is still there")

    def counts():
        counted = claude.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "Hello"}], thinking={"type": "disabled"})
        usage = claude.messages.create(model=MODEL, max_tokens=8, messages=[{"role": "user", "content": "Hello"}],
                                       thinking={"type": "disabled"}).usage
        whole = usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
        assert counted.input_tokens == whole, f"counted {counted.input_tokens}, read {whole}"
        other = client.responses.input_tokens.count(model=MODEL, input="Hello", reasoning={"effort": "none"}).input_tokens
        assert other == client.responses.create(model=MODEL, input="Hello", reasoning={"effort": "none"}).usage.input_tokens
        return f"count_tokens {counted.input_tokens}, responses/input_tokens {other}, as read"

    def unknown_field():
        try:
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}], extra_body={"n_probs": 3})
        except openai.BadRequestError as error:
            assert error.param == "n_probs", error.body
            return f"400, param {error.param}"
        raise AssertionError("taken in silence")

    def plain(path):
        def test():
            status, body = server.get(path)
            assert status == 200, status
            return json.dumps(json.loads(body))[:160]
        return test

    check("/v1/models", models)
    check("/v1/responses/{id}", stored)
    check("counting tokens", counts)
    check("a field that is not supported", unknown_field)
    check("/health", plain("/health"))
    check("/props", plain("/props"))
    check("/openapi.json", plain("/openapi.json"))
    check("/metrics", lambda: f"{len(server.metrics())} series, read by prometheus-client")


def wait_saved(server, patience_s=20):
    """Waits until the server has said that the conversation is on the disk. It saves one that has paused for two seconds, and has saved
    the beginning that others may share before: what counts is the last save."""
    deadline, saved, since = time.monotonic() + patience_s, 0, time.monotonic()
    while not saved or time.monotonic() - since < 3:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{saved} sessions saved within {patience_s} s, expected one at least, and then quiet")
        time.sleep(0.1)
        now = server.metrics()["infall_snapshots_saved_total"]
        if now != saved:
            saved, since = now, time.monotonic()


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    report = Report("SDK loops", "what", "API", "form", "second turn: cached", "third turn: cached", "")
    with ThreadPoolExecutor(4) as pool, Server(options.binary) as server:
        rows = restarts(pool, options.binary, options.smoke)
        for api in APIS:
            for form in forms(api):
                report.row(*run_loop("loop", api, server.url, form, next(NAMES)))
        small_endpoints(report, server)
        for row in rows:
            report.row(*row.result())
    report.end()


if __name__ == "__main__":
    main()
