#!/usr/bin/env python3
"""Streamed decoding under a limit of memory, beside its bound and beside llama.cpp's mmap under the same limit.

    cargo build --release -p infall -p infall-bench
    tools/make_full_gguf.py MODEL.gguf --layers 6
    tools/stream_bench.py MODEL.gguf [--limit 6GiB] [--pairs 3] [--peer DIR] [--steps decode,skewed,start,sweep]

Linux, as root (it makes a memory cgroup, version 1 or 2, and drops the page cache). DIR is where
tools/second-engine has built llama.cpp. The limit holds for everything but the step that measures stages with all
weights in memory. Prints Markdown tables; everything else that programs say goes to standard error.
"""
import argparse, json, os, pathlib, statistics, subprocess, sys, tempfile, time

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("model")
ap.add_argument("--limit", default="6GiB")
ap.add_argument("--pairs", type=int, default=3)
ap.add_argument("--peer", help="where tools/second-engine has built llama.cpp")
ap.add_argument("--steps", default="decode,skewed,start,sweep")
ap.add_argument("--precisions", default="fast,exact")
ap.add_argument("--tokens", type=int, default=40, help="tokens that are measured")
ap.add_argument("--warm", type=int, default=40, help="tokens before them")
o = ap.parse_args()

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = ROOT / "target/release"
WORK = pathlib.Path(tempfile.mkdtemp(prefix="stream-bench-"))
# Of the file that make_full_gguf.py makes: gate and up in IQ2_XXS, down in Q2_K.
EXPERT_BYTES = 7_077_888


def run(command, **more):
    """Runs a command; its standard output is returned and shown on ours."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, **more)
    sys.stderr.write(done.stdout)
    assert done.returncode == 0, f"{command} ended with {done.returncode}"
    return done.stdout


class Limit:
    """A limit of memory: each command runs in a memory cgroup of its own, with nothing in the page cache."""

    def __init__(self, size_bytes):
        v1 = pathlib.Path("/sys/fs/cgroup/memory")
        self.is_v1 = v1.is_dir()
        self.root = v1 if self.is_v1 else pathlib.Path("/sys/fs/cgroup")
        if not self.is_v1 and "memory" not in (self.root / "cgroup.subtree_control").read_text().split():
            sys.exit("memory is not among the controllers of /sys/fs/cgroup/cgroup.subtree_control: add it (echo +memory)")
        self.size_bytes = size_bytes

    def run(self, command):
        """The command's standard output, the most memory that it had, and the seconds it took."""
        run(["sync"])
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
        group = self.root / f"stream-bench-{os.getpid()}"
        group.mkdir()
        try:
            (group / ("memory.limit_in_bytes" if self.is_v1 else "memory.max")).write_text(str(self.size_bytes))
            start = time.perf_counter()
            out = run(command, preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
            seconds = time.perf_counter() - start
            return out, int((group / ("memory.max_usage_in_bytes" if self.is_v1 else "memory.peak")).read_text()), seconds
        finally:
            time.sleep(0.5)
            group.rmdir()


def decode(limit, name, *more):
    figures = WORK / f"{name}.json"
    command = [BIN / "streaming", "decode", o.model, "--stages", WORK / f"stages-{more[0]}.json", "--json", figures,
               "--warm", o.warm, "--tokens", o.tokens, f"--{more[0]}", *more[1:]]
    _, peak_bytes, _ = limit.run(command)
    return {**json.loads(figures.read_text()), "peak_bytes": peak_bytes}


def stages(precision):
    run([BIN / "streaming", "stages", o.model, "--out", WORK / f"stages-{precision}.json", "--warm", 8, "--tokens", 24,
         f"--{precision}"])


def plan(*flags):
    out = run([BIN / "infall", "plan", "-m", o.model, "--ctx", o.warm + o.tokens, "--json", *flags])
    return json.loads(out)


def table(title, header, rows):
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def tps(figures):
    return 1e6 / figures["measured_us"]


def row(name, figures, planned):
    reads = figures["misses"] + figures["prefetched"]
    tokens = figures["tokens"]
    return [name, f"{tps(figures):.2f}", f"{1e6 / figures['bound_us']:.2f}",
            f"{figures['bound_us'] / figures['measured_us']:.3f}", f"{reads / tokens:.1f}",
            f"{figures['read_bytes'] / tokens / 1e6:.1f}", f"{figures['read_bytes'] / max(1, reads) / EXPERT_BYTES:.4f}",
            f"{figures['stall_us'] / tokens / 1e3:.1f}", f"{figures['disk_bytes_per_us'] / 1e3:.2f}",
            f"{figures['peak_bytes'] / 1e9:.3f} / {planned / 1e9:.3f}"]


HEADER = ["", "tokens/s", "bound", "share", "experts read/token", "MB/token", "bytes read / (experts read x their bytes)", "stall ms/token",
          "disk GB/s", "peak / planned GB"]


def peer(limit):
    library = pathlib.Path(o.peer)
    package = next(library.glob("src/llama_cpp_python-*/llama_cpp"))
    out, _, _ = limit.run([ROOT / "target/test-venv/bin/python", ROOT / "tools/peer_llama.py", o.model, "--cold", "--prefill", 8, "--decode", 12,
                        "--repeat", 1, "--lib", library / "build/bin", "--pkg", package])
    figures = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return next(figure["tps"] for figure in figures if figure["what"] == "decode")


def step_decode(limit, planned):
    rows, rates, peers = [], {}, []
    for pair in range(o.pairs):
        for precision in o.precisions.split(","):
            figures = decode(limit, "decode", precision, "--stream", "--memory", o.limit)
            rates.setdefault(precision, []).append(tps(figures))
            rows.append(row(f"{precision} {pair + 1}", figures, planned))
        if o.peer:
            peers.append(peer(limit))
            rows.append([f"llama.cpp, mmap {pair + 1}", f"{peers[-1]:.2f}"] + [""] * 8)
    table(f"Decode under {o.limit}", HEADER, rows)
    for precision, measured in rates.items():
        times = f", {statistics.median(measured) / statistics.median(peers):.1f} x llama.cpp's mmap" if peers else ""
        print(f"\n{precision}: median {statistics.median(measured):.2f} tokens/s{times}")


def skewed_routes():
    routes = WORK / "routes"
    run([BIN / "policies", "--generate", "--layers", 6, "--prompt", 0, "--tokens", o.warm + o.tokens, "--out", routes])
    return routes


def step_skewed(limit, planned):
    routes = skewed_routes()
    figures = [decode(limit, "skewed", "fast", "--stream", "--memory", o.limit, "--routes", routes) for _ in range(o.pairs)]
    table(f"Decode under {o.limit}, learned layers routed by generated routes (Zipf 1.3, repeat 0.7)", HEADER,
          [row(f"fast {i + 1}", each, planned) for i, each in enumerate(figures)])


def step_start(limit, _):
    disk = run([BIN / "disk", o.model])
    fresh = next(line for line in disk.splitlines() if line.startswith("| huge | fresh"))
    rate = float(fresh.split("|")[3]) * 1e9
    rows = []
    for pair in range(o.pairs):
        figures = WORK / "start.json"
        _, _, seconds = limit.run([BIN / "infall", "run", "-m", o.model, "--ctx", 4096, "--nothink", "-n", 1, "--stream", "--memory", o.limit,
                   "--stats-json", figures, "Hello"])
        prefill = json.loads(figures.read_text())["prefill"]
        static = next(item["bytes"] for item in plan("--stream", "--memory", o.limit)["items"] if item["for"] == "static_weights")
        bound = (static + prefill["read_bytes"]) / rate * 1.15 + 1
        rows.append([str(pair + 1), f"{seconds:.2f}", f"{bound:.2f}", f"{static / 1e9:.2f}", f"{prefill['read_bytes'] / 1e9:.2f}",
                     f"{rate / 1e9:.2f}"])
    table("Start to first token, seconds", ["", "measured", "allowed", "static GB", "experts GB", "disk into fresh memory GB/s"], rows)


def step_sweep(limit, _):
    routes = skewed_routes()
    rows = []
    for slots in [6, 36, 77, 154, 384, 614]:
        even = decode(limit, "sweep", "fast", "--stream", "--cache", slots, "--memory", o.limit)
        skewed = decode(limit, "sweep", "fast", "--stream", "--cache", slots, "--memory", o.limit, "--routes", routes)
        rows.append([str(slots)] + [f"{tps(f):.2f} | {(f['misses'] + f['prefetched']) / f['tokens']:.1f}" for f in (even, skewed)])
    table("Slots", ["slots of 1,536", "even routes: tokens/s", "experts read/token", "generated routes: tokens/s",
                    "experts read/token"], rows)


def main():
    units = {"GiB": 1 << 30, "MiB": 1 << 20}
    number, unit = o.limit[:-3], o.limit[-3:]
    limit = Limit(int(float(number) * units[unit]))
    planned = plan("--stream", "--memory", o.limit)["total_bytes"]
    for precision in o.precisions.split(","):
        stages(precision)
    for step in o.steps.split(","):
        {"decode": step_decode, "skewed": step_skewed, "start": step_start, "sweep": step_sweep}[step](limit, planned)


main()
