"""Real coding agents from npm, each in an environment of its own that holds nothing but its configuration, against nano on loopback.

The configuration is what docs/server.md tells people to copy, with another address and context. Each agent is told to read a file with
its own tool and to report what is in it. The turn is complete if the agent ends well with an answer that the server gave; the tool was
used if the agent sent its result to the server.

Agents write long instructions. nano's context of 8,192 tokens holds those of Pi; the others get a copy of nano whose header allows
131,072. nano was trained on 4,096, so what it says after more than that is not to be expected to make sense; that it is carried
right, and that the next turn reads only what is new, is.

Everything runs in a network namespace that has a loopback device and nothing else. Where strace is installed, the table says which other
addresses an agent tried to reach.
"""
import json, os, re, shutil, struct, subprocess, sys, tempfile, time
from pathlib import Path

from harness import ROOT, Report, Server, arguments

PACKAGES, MANUAL = ROOT / "target/server-npm", ROOT / "docs/server.md"
NANO, WIDE = ROOT / "models/nano.gguf", 131_072
ANSWER_TOKENS = 256
FILE_NAME, FILE_TEXT = "list.txt", '["EDNES.js","mp5.csv","package"]'
MODEL = "deepseek-v4-flash"


class Agent:
    """An agent: its section of the manual, its package, and its command line for one turn. `{work}` stands for its folder."""

    def __init__(self, section, package, version, program, options, ask, environment=None, fits_nano=False):
        self.section, self.package, self.version, self.program = section, package, version, program
        self.options, self.ask, self.environment, self.fits_nano = options, ask, environment or {}, fits_nano

    @property
    def folder(self):
        return PACKAGES / self.program

    def install(self):
        manifest = self.folder / "node_modules" / self.package / "package.json"
        if manifest.exists() and json.loads(manifest.read_text())["version"] == self.version:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ["--no-audit", "--no-fund", "--no-save", "--no-package-lock", "--loglevel=error", f"--prefix={self.folder}"]
        subprocess.run(["npm", "install", *options, f"{self.package}@{self.version}"], check=True, stdout=subprocess.DEVNULL)

    def configure(self, home, port, context):
        """Writes the files of the manual's section into `home`; the variables that it exports."""
        variables = {}
        text = MANUAL.read_text().split(f"### {self.section}\n")[1].split("\n### ")[0]
        for _, name, block in re.findall(r"^```(\w+) (\S+)\n(.*?)^```", text, re.M | re.S):
            block = block.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("131072", str(context)).replace("32768", str(ANSWER_TOKENS))
            if name.startswith("~/"):
                path = home / name[2:]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block)
            else:
                variables |= dict(re.findall(r"^export (\w+)=(.*)$", block, re.M))
        return variables


AGENTS = [
    Agent("Pi", "@mariozechner/pi-coding-agent", "0.73.1", "pi",
          ["-p", "--provider", "infall", "--model", MODEL, "--thinking", "off"],
          f"Use the read tool with path {FILE_NAME} exactly once, then report the result and stop.",
          {"PI_OFFLINE": "1"}, fits_nano=True),
    Agent("opencode", "opencode-ai", "1.18.33", "opencode", ["run", "--print-logs", "--log-level", "WARN"],
          f"Use the read tool with filePath {{work}}/{FILE_NAME} exactly once, then report the result and stop.",
          {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}),
    Agent("Codex CLI", "@openai/codex", "0.169.0", "codex", ["exec", "--skip-git-repo-check", "--sandbox", "danger-full-access"],
          f"Use the exec_command tool with cmd set to \"cat {FILE_NAME}\" exactly once, then report the result and stop."),
    Agent("Claude Code", "@anthropic-ai/claude-code", "2.1.330", "claude", ["-p", "--allowedTools", "Read", "--"],
          f"Use the Read tool with file_path {{work}}/{FILE_NAME} exactly once, then report the result and stop.",
          {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(ANSWER_TOKENS)}),
]


def widened(path):
    """Writes nano with a larger context in its header."""
    data = bytearray(NANO.read_bytes())
    key = b"deepseek4.context_length"
    at = data.index(key) + len(key)
    kind, tokens = struct.unpack_from("<II", data, at)
    assert kind == 4, f"the context is of type {kind}, expected a 32-bit number"
    struct.pack_into("<I", data, at + 4, WIDE)
    path.write_bytes(data)
    return path


def turn(agent, server, context, home):
    """One turn: how the agent ended, what it wrote, and the addresses that it tried to reach."""
    work = home / "work"
    work.mkdir()
    (work / FILE_NAME).write_text(FILE_TEXT)
    variables = agent.configure(home, server.port, context)
    node = Path(shutil.which("node")).parent
    environment = {"HOME": str(home), "PATH": f"{node}:/usr/bin:/bin", "TERM": "dumb", **variables, **agent.environment}
    calls = home / "connect.strace"
    watch = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect", "-o", calls] if shutil.which("strace") else []
    command = [*watch, agent.folder / "node_modules/.bin" / agent.program, *agent.options, agent.ask.replace("{work}", str(work))]
    with open(home / "stdout", "wb") as out, open(home / "stderr", "wb") as err:
        done = subprocess.run(["timeout", "--kill-after=5", "400", *command], env=environment, cwd=work, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    addresses = re.findall(r"sin6?_port=htons\((\d+)\).*?(?:inet_addr\(|inet_pton\(AF_INET6, )\"([^\"]+)\"", calls.read_text()) if watch else []
    outside = [(port, address) for port, address in addresses if not address.startswith("127.") and address not in ("::1", "0.0.0.0", "::")]
    elsewhere = sorted({"a name server" if port == "53" else f"{address}:{port}" for port, address in outside})
    return done.returncode, (home / "stdout").read_text(errors="replace"), elsewhere if watch else None


def run(report, agent, binary, model, context):
    # Always the same folder: its name is part of the prompt.
    home = Path(tempfile.gettempdir()) / f"infall-{agent.program}"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    trace = home / "trace.jsonl"
    flags = ["--trace", trace] + (["-m", model, "--ctx", context] if model else [])
    with Server(binary, *flags) as server:
        began = time.monotonic()
        code, text, elsewhere = turn(agent, server, context, home)
        took = time.monotonic() - began
        log, alive = server.log(), server.is_alive()
    done = [dict(re.findall(r'(\w+)="?([\w.]+)', line)) for line in log.splitlines() if "generated=" in line]
    refused = [line for line in log.splitlines() if "refused" in line]
    prompts = ", ".join(f"{one['prompt']} ({one['cached']} cached) + {one['generated']}" for one in done)
    requests = [line for line in trace.read_text(errors="replace").splitlines()] if trace.exists() else []
    used_tool = "EDNES.js" in "".join(requests)
    # The escapes of a terminal and the agent's own banner are no answer.
    answer = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    said = answer[-1].strip()[:60] if answer else ""
    ok = code == 0 and alive and bool(done) and bool(said)
    tried = "not watched" if elsewhere is None else ", ".join(elsewhere) or "none"
    report.row(ok, agent.program, agent.version, f"{context:,}", f"exit {code}, {took:.0f} s", prompts or f"{len(refused)} refused",
               "used" if used_tool else "not used", repr(said), tried)
    if not ok:
        print(f"--- {agent.program}", text[-1500:], (home / "stderr").read_text(errors="replace")[-1500:], log[-1500:], sep="\n")


def isolate():
    """Goes on in a network namespace that has nothing but loopback."""
    if os.environ.get("INFALL_ISOLATED") == "1":
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    os.execvpe("unshare", ["unshare", *as_root, "--net", sys.executable, *sys.argv], os.environ | {"INFALL_ISOLATED": "1"})


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="do no more than install them")
    parser.add_argument("programs", nargs="*", choices=[[], *(agent.program for agent in AGENTS)], help="all of them by default")
    options = parser.parse_args()
    names = options.programs or (["pi"] if options.smoke else [agent.program for agent in AGENTS])
    chosen = [agent for agent in AGENTS if agent.program in names]
    if os.environ.get("INFALL_ISOLATED") != "1":
        [agent.install() for agent in chosen]
    if options.install:
        return
    isolate()
    report = Report("Agents", "agent", "version", "context", "ended", "prompt + generated tokens", "its tool", "its last line", "reached for", "")
    with tempfile.TemporaryDirectory(prefix="infall-wide-") as folder:
        wide = widened(Path(folder) / "wide-nano.gguf")
        for agent in chosen:
            if agent.fits_nano:
                run(report, agent, options.binary, None, 8192)
            if not options.smoke or not agent.fits_nano:
                run(report, agent, options.binary, wide, WIDE)
    if not options.smoke:
        report.row(None, "open-webui", "", "", "not installed: several gigabytes of packages")
    report.end()


if __name__ == "__main__":
    main()
