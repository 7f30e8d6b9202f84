"""Held-out sets: prompts and their exact answers, written to heldout/*.jsonl, one item a line:

    {"task": ..., "prompt": [["c", control token] or ["t", text], ...], "answer": text with control tokens as literals, up to EOS, "kind": "exact"}

    python heldout.py           # writes the sets
    python heldout.py --check   # asserts that training data share no sentence, name or sum with them
"""
import json, sys
from pathlib import Path

import data
from data import Maker

FOLDER = Path(__file__).with_name("heldout")
CHECK_TOOL = [{"name": "list_files", "description": d, "parameters": {"type": "object", "properties": {"path": p}, "required": ["path"]}}
              for d, p in (("List files in a directory.", {"type": "string"}), ("List files", {"type": "string", "description": "Directory path"}),
                           ("Lists the files of a directory", {"type": "string", "description": "The directory to list"}))]
CHECK_RESULT = '["README.md","Makefile","ds4.c","metal"]'
CHECK_ANSWER = "I found: README.md, Makefile, ds4.c, metal."


def item(task, segs, answer):
    """The `answer`-th assistant turn of a conversation and what comes before it."""
    runs, i = [], 0
    while i < len(segs):
        j = i
        while j < len(segs) and segs[j][2] == 1:
            j += 1
        if j > i:
            runs.append((i, j))
        i = max(j, i + 1)
    a, b = runs[answer]
    return dict(task=task, prompt=[s[:2] for s in segs[:a]], answer="".join(s[1] for s in segs[a:b]), kind="exact")


def check_items(task, turn):
    for sentence in data.CHECK_SENTENCES:
        for schema in CHECK_TOOL:
            m = Maker(0)
            k = m.begin("")
            k.t("\n\n")
            k.template(data.SECTION_HEAD)
            k.t(data.dumps(schema))
            k.template(data.SECTION_TAIL)
            m.turn(k, sentence, data.render_calls([("list_files", [("path", ".")])]), None)
            m.turn(k, f"<tool_result>{CHECK_RESULT}</tool_result>", CHECK_ANSWER, None)
            yield item(task, k.segs, turn)


def sets(codec, seed=77_000_000, n=200):
    """-> {task: items}"""
    elen = lambda s: len(codec.text(s))

    def many(task, count, make, answer, held=True, offset=0):
        out = []
        while len(out) < count:
            m = Maker(seed + offset + len(out), held)
            out.append(item(task, make(m).segs, answer))
        return out

    tool = lambda **kw: lambda m: m.tools_conv(turns=1, **kw)
    direct = lambda kind, think: lambda m: m.direct_conv(turns=1, think=think, make=getattr(m, kind))
    mixed_thinking = lambda m: (m.tools_conv(turns=1, think=True, n_calls=1) if m.chance(0.4) else m.direct_conv(turns=1, think=True))
    return {
        "tool": many("tool", n, tool(think=False, n_calls=1), 0),
        "tools": many("tools", n // 4, tool(think=False, n_calls=2), 0, offset=10_000),
        "paraphrase": many("paraphrase", n, tool(think=False, n_calls=1), 0, "a", 20_000),
        "paraphrase_b": many("paraphrase_b", n // 2, tool(think=False, n_calls=1), 0, "b", 25_000),
        "paraphrase_c": many("paraphrase_c", n, tool(think=False, n_calls=1), 0, "c", 27_000),
        "followup": many("followup", n, tool(think=False, n_calls=1), 1, offset=30_000),
        "sum": many("sum", n, direct("sum", False), 0, offset=40_000),
        "facts": many("facts", n, direct("facts", False), 0, offset=50_000),
        "rewrite": many("rewrite", n, direct("rewrite", False), 0, offset=60_000),
        "thinking": many("thinking", n, mixed_thinking, 0, offset=70_000),
        "recall_500": many("recall_500", n // 4, lambda m: m.recall(500, elen, turns=1, think=False), 0, offset=80_000),
        "recall_2000": many("recall_2000", n // 2, lambda m: m.recall(2000, elen, turns=1, think=False), 0, offset=90_000),
        "recall_4000": many("recall_4000", n // 10, lambda m: m.recall(3900, elen, turns=1, think=False), 0, offset=100_000),
        "check_turn1": list(check_items("check_turn1", 0)),
        "check_turn2": list(check_items("check_turn2", 1)),
    }


def load():
    return {f.stem: [json.loads(line) for line in f.open()] for f in sorted(FOLDER.glob("*.jsonl"))}


def ids_of(it, codec):
    """-> (all ids, index of the first answer id)"""
    k = data.Conv()
    for kind, s in it["prompt"]:
        k.segs.append([kind, s, 0])
    prompt, _ = codec.encode(k.segs)
    a = data.Conv()
    a.template(it["answer"], 1)
    return prompt + codec.encode(a.segs)[0], len(prompt)


def text_of(it):
    return "".join(s for _, s in it["prompt"])


def check_overlap(n_conv=20_000, n=8):
    """No held-out request, no sentence of the tool-call-quality check and no four words in a row of a held-out phrasing occur in training
    data; prints how many requests share a long run of words with held-out ones."""
    grams = {t: set().union(*(data.word_ngrams(it["prompt"][-3][1], n) for it in load()[t])) for t in ("tool", "paraphrase", "paraphrase_b", "paraphrase_c")}
    held, hits, m, codec = data.held_requests(), dict.fromkeys(grams, 0), Maker(123), data.Codec()
    for i in range(n_conv):
        ids, _ = data.conversation(m, codec, 1024, (1, 2, 4)[i % 3])
        text = codec.decode(ids)
        assert "list_files" not in text
        for user in text.split(data.USER)[1:]:
            user = user.split(data.ASSISTANT)[0]
            assert user not in held
            assert not data.held_ngrams() & data.word_ngrams(user, 4), user
            g = data.word_ngrams(user, n)
            for t in grams:
                hits[t] += bool(g & grams[t])
    print(f"{n_conv} training conversations hold no held-out request; requests sharing {n} words in a row with a held-out one: {hits}")


def main():
    if "--check" in sys.argv:
        return check_overlap()
    FOLDER.mkdir(exist_ok=True)
    codec = data.Codec()
    for task, items in sets(codec).items():
        (FOLDER / f"{task}.jsonl").write_text("".join(data.dumps(i) + "\n" for i in items))
        size = [len(ids_of(i, codec)[0]) for i in items]
        print(task, len(items), "items, tokens", min(size), "to", max(size))
    m = Maker(88_000_000, held=True)
    (FOLDER / "prose.txt").write_text("\n".join(m.prose(12) for _ in range(60)) + "\n")


if __name__ == "__main__":
    main()
