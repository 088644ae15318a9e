"""Seconds of a round beyond training, with real Flower processes on one machine: a plain Flower app against colora.

Both run the same federation: two sites, a local MiniLM-L6, two optimizer steps per round, the same rows and threads,
with a small adapter and with 52 MiB of shared arrays. ``plain/`` is an app written with Flower and PEFT alone: FedAvg,
a ClientApp that loads the model, train and evaluate messages. It runs without TLS and keys, which makes it faster.
colora runs as in the README: ``colora provision``, ``colora server``, ``colora client``.

A round lasts from the end of the previous round to its own end, minus the optimizer steps and evaluation of the slowest
site. ``marks/`` records the same points in the processes of both.

    python benchmarks/rounds.py [--rounds 6] [--only plain|ours] [--sizes small,large]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from figures import Figure, ratios, show
from rounds_parts import Round, read_rounds

HERE = Path(__file__).resolve().parent
SITES, STEPS, BATCH, BAR, TIMEOUT = ("north", "south"), 2, 8, 1 / 3, 900.0
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    "PYTHONPATH": str(HERE / "marks"),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}


@dataclass(frozen=True)
class Size:
    """The size of an adapter. ``targets`` are ends of module names."""

    name: str
    rank: int
    targets: tuple[str, ...]


SIZES = {
    "small": Size("0.3 MiB", 8, ("query", "value")),
    "large": Size("52 MiB", 328, ("query", "key", "value", "intermediate.dense", "output.dense")),
}


class Processes:
    """The processes of one measurement, each with its own process group and log file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, []

    def start(self, name: str, command: Sequence[str | Path], **environment: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            variables = {**ENVIRONMENT, "COLORA_MARKS": str(self.folder / "marks.jsonl"), **environment}
            process = subprocess.Popen(
                [str(word) for word in command], stdout=log, stderr=log, env=variables, start_new_session=True
            )
        self.running.append(process)
        return process

    def finish(self, name: str, command: Sequence[str | Path], **environment: str) -> None:
        """Start a process and wait until it exits with code 0."""
        self.until(self.start(name, command, **environment), name)

    def until(self, process: subprocess.Popen[bytes], name: str) -> None:
        """Wait until a process exits with code 0."""
        code = process.wait(TIMEOUT)
        if code:
            raise SystemExit(f"{name} exited with code {code}:\n{(self.folder / f'{name}.log').read_text()[-4000:]}")

    def end(self) -> None:
        for process in reversed(self.running):
            if process.poll() is None:
                process.terminate()
        for process in self.running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    started = Processes(folder)
    try:
        yield started
    finally:
        started.end()


def plain(size: Size, rounds: int, folder: Path) -> list[Round]:
    """Run the plain app on flower-superlink and two flower-supernodes, submitted with ``flwr run``."""
    port = free_port()
    home = folder / "flower"
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    own = {"FLWR_HOME": str(home)}
    link = ["flower-superlink", "--insecure", "--port", str(port), "--disable-runtime-dependency-installation"]
    with processes(folder) as run:
        run.start("superlink", link, **own)
        wait_for(port)
        for site in SITES:
            rows = " ".join(f"{part}='{folder / f'{site}-{part}.jsonl'}'" for part in ("train", "test"))
            place = ["--superlink", f"127.0.0.1:{port}", "--port", str(free_port()), "--node-config", rows]
            run.start(f"supernode-{site}", ["flower-supernode", "--insecure", *place], **own)
        config = f"rounds={rounds} steps={STEPS} rank={size.rank} targets='{' '.join(size.targets)}'"
        run.finish("run", ["flwr", "run", HERE / "plain", "bench", "--stream", "--run-config", config], **own)
    return read_rounds(folder / "marks.jsonl", rounds)


def ours(size: Size, rounds: int, folder: Path) -> list[Round]:
    """Run ``colora provision``, ``colora server`` and two ``colora client``, with TLS and keys."""
    port, keys = free_port(), folder / "keys"
    names = "".join(f'[[site]]\nname = "{site}"\n' for site in SITES)
    (folder / "sites.toml").write_text(f'[coordinator]\naddress = "127.0.0.1:{port}"\n{names}')
    recipe = RECIPE.format(rounds=rounds, steps=STEPS, batch=BATCH, rank=size.rank, targets=list(size.targets))
    (folder / "recipe.toml").write_text(f'{recipe}data = {{ source = "each site has its own data" }}\n{names}')
    allowed = {name: f"{name} = {value}" for name, value in (("max_rank", size.rank), ("min_examples", STEPS * BATCH))}
    with processes(folder) as run:
        run.finish("provision", ["colora", "provision", folder / "sites.toml", "--out", keys])
        place = ["--keys", keys / "coordinator", "--host", "127.0.0.1", "--port", str(port), "--out", folder / "run"]
        server = run.start("server", ["colora", "server", folder / "recipe.toml", *place])
        for site in SITES:
            file = keys / "sites" / site / "site.toml"
            rows = "\n".join(
                f'{key} = "{folder / f"{site}-{part}.jsonl"}"'
                for key, part in (("source", "train"), ("test_source", "test"))
            )
            file.write_text(_filled(file.read_text(), {"source": rows, **allowed}))
            run.start(f"client-{site}", ["colora", "client", file])
        run.until(server, "server")
    return read_rounds(folder / "marks.jsonl", rounds)


def _filled(text: str, lines: dict[str, str]) -> str:
    """A site file with other lines for these keys."""
    for key, line in lines.items():
        text, count = re.subn(rf"(?m)^{key} = .*$", lambda _, new=line: new, text)
        assert count == 1, key
    return text


RECIPE = """\
name = "bench"
rounds = {rounds}
model = {{ source = "asset:minilm-l6", max_length = 32 }}
adapter = {{ rank = {rank}, alpha = 16.0, target_modules = {targets} }}
train = {{ steps = {steps}, batch_size = {batch} }}
server = {{ quorum = 2 }}
"""


def write_rows(folder: Path) -> None:
    """Write 32 training and 32 test texts for each site."""
    words = (HERE.parent / "README.md").read_text(encoding="utf-8").split()
    for site in SITES:
        for part in ("train", "test"):
            rng = random.Random(f"{site} {part}")
            rows = [{"text": " ".join(rng.choices(words, k=30)), "label": ("yes", "no")[i % 2]} for i in range(32)]
            (folder / f"{site}-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int) -> None:
    """Wait until a process listens on a port."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit(f"no process listens on port {port} after 60 s")


KINDS = {"plain": plain, "ours": ours}


def measure(kind: str, size: Size, rounds: int) -> list[Round]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        measured = KINDS[kind](size, rounds, folder)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    seconds = " ".join(f"{r.beyond:.1f}" for r in measured)
    print(f"{kind}, {size.name}: seconds beyond training by round {seconds} (load {load})", file=sys.stderr)
    return measured


def report(size: Size, taken: dict[str, list[Round]]) -> None:
    """Print both tables of one size."""
    figures = []
    for kind, rounds in taken.items():
        figures += [Figure(f"{kind}: whole round", [r.seconds for r in rounds], "s")]
        figures += [Figure(f"{kind}: its training and evaluation", [r.work for r in rounds], "s")]
        figures += [Figure(f"{kind}: beyond training", [r.beyond for r in rounds], "s")]
        figures += [Figure(f"{kind}: CPU of ClientApps and trainers beyond it", [r.cpu for r in rounds], "s")]
    if len(taken) == 2:
        measured = {kind: ([r.beyond for r in rounds], [r.cpu for r in rounds]) for kind, rounds in taken.items()}
        figures.append(
            Figure("ours ÷ plain, beyond training", ratios(measured["ours"][0], measured["plain"][0]), "", BAR)
        )
        figures.append(Figure("ours ÷ plain, that CPU", ratios(measured["ours"][1], measured["plain"][1])))
    show(f"A round at {size.name} of shared arrays, {len(SITES)} sites", figures)
    for kind, rounds in taken.items():
        names = list(dict.fromkeys(name for r in rounds for name in r.parts))
        parts = [Figure(name, [r.parts.get(name, 0.0) for r in rounds], "s") for name in names]
        show(f"Parts of a round: {kind}, {size.name}, along the slower site", parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--sizes", default=",".join(SIZES))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the child processes
    kinds = [options.only] if options.only else list(KINDS)
    for key in options.sizes.split(","):
        report(SIZES[key], {kind: measure(kind, SIZES[key], options.rounds) for kind in kinds})


if __name__ == "__main__":
    main()
