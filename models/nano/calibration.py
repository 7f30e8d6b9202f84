"""Conversations of the training distribution in the form of the held-out sets, for importance matrices.

    python calibration.py OUT.jsonl
"""
import json, sys

from data import Maker
from heldout import item

SEED, ITEMS = 55_000_000, 40


def main():
    kinds = [
        lambda m: item("tool", m.tools_conv(turns=1, think=False, n_calls=1).segs, 0),
        lambda m: item("tools", m.tools_conv(turns=1, think=True, n_calls=2).segs, 0),
        lambda m: item("direct", m.direct_conv(turns=1, think=True).segs, 0),
        lambda m: item("direct", m.direct_conv(turns=1, think=False).segs, 0),
    ]
    with open(sys.argv[1], "w") as out:
        for k, kind in enumerate(kinds):
            for i in range(ITEMS):
                out.write(json.dumps(kind(Maker(SEED + 1000 * k + i)), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
