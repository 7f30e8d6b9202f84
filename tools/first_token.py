#!/usr/bin/env python3
"""Seconds from starting `infall run "hi"` to the first byte of its answer, as a Markdown table.

    cargo build --release -p infall
    tools/first_token.py [--runs 10] [-m MODEL.gguf] [--most SECONDS]

Without -m the built-in model answers. Standard output is a pipe: an answer is written to it token by token, as to a
terminal. Ends with 1 if the median is above --most.
"""
import argparse, os, pathlib, statistics, subprocess, sys, time

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("-m", "--model")
ap.add_argument("--runs", type=int, default=10)
ap.add_argument("--most", type=float, help="fail above this median, in seconds")
o = ap.parse_args()

INFALL = pathlib.Path(__file__).resolve().parent.parent / "target/release/infall"


def first_byte_seconds():
    """From just before the fork to the first byte; the rest is read too, so that the answer ends by itself."""
    start = time.perf_counter()
    command = [INFALL, "run", *(["-m", o.model] if o.model else []), "hi"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as infall:
        first = os.read(infall.stdout.fileno(), 1)
        seconds = time.perf_counter() - start
        infall.stdout.read()
    assert first and infall.returncode == 0, f"no answer; infall ended with {infall.returncode}"
    return seconds


def main():
    seconds = sorted(first_byte_seconds() for _ in range(o.runs))
    median = statistics.median(seconds)
    print("| | median | fastest | slowest | runs |\n|---|---|---|---|---|")
    print(f"| start to first byte of the answer, s | {median:.3f} | {seconds[0]:.3f} | {seconds[-1]:.3f} | {o.runs} |")
    sys.exit(o.most is not None and median > o.most)


main()
