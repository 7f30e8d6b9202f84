"""What the programs here share: a server of their own on loopback, its figures, and a table of what was checked.

Every program starts the built binary itself, with a folder of its own for everything that it writes and an environment that holds
nothing but that, and exits non-zero if a row of its table failed.
"""
import argparse, contextlib, json, os, resource, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.error, urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]


def arguments(description):
    """The options that all programs have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help="the short form, for every change")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/infall")
    return parser


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`infall serve` with the built-in model unless `flags` name another. State that outlives a restart is in `home`."""

    def __init__(self, binary, *flags, home=None, prefix=()):
        self.binary, self.flags, self.prefix = Path(binary).resolve(), [str(flag) for flag in flags], list(prefix)
        self.own_home = home is None
        self.home = Path(home or tempfile.mkdtemp(prefix="infall-server-"))
        self.log_path, self.process, self.port = self.home / "server.log", None, None

    def __enter__(self):
        return self.start()

    def __exit__(self, kind, *_):
        if self.is_alive():
            self.stop(signal.SIGKILL)
        if kind is not None:
            print(f"--- the end of {self.log_path}", *self.log().splitlines()[-30:], sep="\n", file=sys.stderr)
        elif self.own_home:
            shutil.rmtree(self.home, ignore_errors=True)

    def start(self, patience_s=60):
        self.port = free_port()
        command = [*self.prefix, self.binary, "serve", "--host", "127.0.0.1", "--port", str(self.port), *self.flags]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self.home), "TMPDIR": str(self.home)}
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=self.home, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if not self.is_alive():
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log()[-4000:]}")
            with contextlib.suppress(OSError):
                if self.get("/health", timeout=5)[0] == 200:
                    return self
            time.sleep(0.02)
        raise RuntimeError(f"the server did not answer /health within {patience_s} s:\n{self.log()[-4000:]}")

    def is_alive(self):
        return self.process is not None and self.process.poll() is None

    def stop(self, number=signal.SIGTERM, patience_s=60):
        """Sends a signal and waits for the end; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(patience_s)

    def restart(self, number):
        code = self.stop(number)
        self.start()
        return code

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def log(self):
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def get(self, path, timeout=30):
        return self.request("GET", path, timeout=timeout)

    def post(self, path, body, timeout=120):
        return self.request("POST", path, json.dumps(body).encode(), timeout)

    def request(self, method, path, data=None, timeout=30):
        """Status and body, whatever the status."""
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def metrics(self):
        """Every series, by its name and labels, as a Prometheus client reads them."""
        families = text_string_to_metric_families(self.get("/metrics")[1].decode())
        samples = (sample for family in families for sample in family.samples)
        return {name_of(sample): sample.value for sample in samples}

    def wait_idle(self, patience_s=60):
        """Waits until nothing is active or queued; the metrics then."""
        deadline = time.monotonic() + patience_s
        while True:
            metrics = self.metrics()
            busy = {name: value for name, value in metrics.items() if is_busy(name) and value}
            if not busy:
                return metrics
            if time.monotonic() > deadline:
                raise RuntimeError(f"still at work after {patience_s} s: {busy}")
            time.sleep(0.05)

    def rss_bytes(self):
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def open_files(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self):
        return len(os.listdir(f"/proc/{self.process.pid}/task"))


def name_of(sample):
    labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
    return f"{sample.name}{{{labels}}}" if labels else sample.name


def is_busy(name):
    return name.endswith(("_waiting", "_active"))


class Report:
    """A table of what was checked. A row that failed makes the program fail."""

    def __init__(self, title, *heads):
        self.title, self.rows, self.failures = title, [heads], 0

    def row(self, ok, *cells):
        """`ok`: True, False, or None for what was not run."""
        self.failures += ok is False
        self.rows.append((*map(str, cells), {True: "ok", False: "FAILED", None: "not run"}[ok]))
        return ok

    def end(self):
        """Prints the table and ends the program."""
        width = max(map(len, self.rows))
        rows = [[*row, *[""] * (width - len(row))] for row in self.rows]
        sizes = [max(len(row[column]) for row in rows) for column in range(width)]
        print(f"\n## {self.title}\n")
        for number, row in enumerate(rows):
            print("| " + " | ".join(cell.ljust(size) for cell, size in zip(row, sizes)) + " |")
            if number == 0:
                print("|" + "|".join("-" * (size + 2) for size in sizes) + "|")
        print(f"\n{len(self.rows) - 1} rows, {self.failures} failed; {elapsed_s():.1f} s, {processor_s():.1f} s of processor time")
        sys.exit(1 if self.failures else 0)


def elapsed_s():
    """Since this process began, before it had imported anything."""
    began = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def processor_s():
    """Of this process, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def percentile(values, share):
    """The value below which so many lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
