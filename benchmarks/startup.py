"""Start-up seconds: ``colora --help``, and importing the thin ClientApp of a site.

Wall time of whole processes, alternating with an empty Python process.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from figures import Figure, show

BAR, REPEATS = 0.5, 10
COMMANDS = {
    "colora --help": [str(Path(sys.executable).parent / "colora"), "--help"],
    "import colora.client.client_app": [sys.executable, "-c", "import colora.client.client_app"],
    "python -c pass": [sys.executable, "-c", "pass"],
}
HEAVY = (
    "import sys, colora.client.client_app; print(*sorted({'torch', 'transformers', 'peft', 'ray'} & set(sys.modules)))"
)


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    for command in COMMANDS.values():
        seconds(command)  # the first run writes byte code
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(REPEATS):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    bars = {"colora --help": BAR}
    show("Start-up, whole processes", [Figure(name, values, "s", bars.get(name)) for name, values in taken.items()])
    heavy = subprocess.run([sys.executable, "-c", HEAVY], check=True, capture_output=True, text=True).stdout.strip()
    print(f"heavy packages that the client app imports: {heavy or 'none'}")


if __name__ == "__main__":
    main()
