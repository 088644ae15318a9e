"""The gateway in a process of its own. It may die: the port stays open in the supervisor, which starts it again.

``python -m colora.server.deployment.gateway.process FOLDER DESCRIPTOR`` serves the socket with that file descriptor.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import sys
import time
from pathlib import Path

from ....common.atomic_io import write_atomically
from ....common.processes.file_limit import raise_file_limit
from ....common.processes.supervised import Command, Signals, SupervisedProcess
from .connections import Limits
from .server import GatewayServer, ListenAddress, address_of, bind
from .upstream import Upstream

SETTINGS, HOLD = "gateway.json", "gateway.hold"  # files in the folder
CHECK_INTERVAL = 0.1  # seconds between two looks for a signal
GRACE = 6.0  # seconds in which a stopped gateway answers held requests
logger = logging.getLogger("colora.gateway")


class GatewayProcess:
    """Runs the gateway as a child process, as a context manager; ``address`` and an open port come with it.

    ``folder`` is for files between the two processes. Connections that come while the child is down wait.
    """

    def __init__(self, listen: ListenAddress, upstream: Upstream, folder: Path, log: Path) -> None:
        """Raises StateError for certificates that cannot be used."""
        self.listen, self.folder = listen, folder.resolve()
        self.upstream = dataclasses.replace(upstream, held_by=self.folder / HOLD)
        self.log = log
        GatewayServer(listen, self.upstream)  # raises here what the child could only write into its log

    def __enter__(self) -> GatewayProcess:
        self.socket = bind(self.listen)
        self.address = address_of(self.socket)
        write_settings(self.folder, self.listen, self.upstream)
        words = (sys.executable, "-m", __name__, str(self.folder), str(self.socket.fileno()))
        self.child = SupervisedProcess(Command("gateway", words, self.log, files=(self.socket.fileno(),)))
        self.child.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.child.stop(GRACE)
        self.socket.close()

    def ensure_running(self) -> bool:
        """Start the child again if it has died and the pause is over; return whether it was started."""
        if not self.child.due:
            return False
        self.child.start()
        return True

    def hold(self) -> None:
        """Hold all requests, even if the SuperLink answers: it may not have its sites' keys yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / HOLD).touch()

    def release(self) -> None:
        """Forward requests again."""
        (self.folder / HOLD).unlink(missing_ok=True)


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else sorted(value)  # type: ignore[call-overload]


def write_settings(folder: Path, listen: ListenAddress, upstream: Upstream) -> None:
    """Write the child's settings."""
    settings = {"listen": dataclasses.asdict(listen), "upstream": dataclasses.asdict(upstream)}
    write_atomically(folder / SETTINGS, json.dumps(settings, default=_plain).encode(), lasting=False)


def read_settings(folder: Path) -> tuple[ListenAddress, Upstream]:
    """Read what ``write_settings`` wrote."""
    settings = json.loads((folder / SETTINGS).read_bytes())
    listen, upstream = settings["listen"], settings["upstream"]
    for table, names in ((listen, ("certificate", "key")), (upstream, ("ca", "held_by"))):
        table.update({name: Path(table[name]) for name in names if table[name] is not None})
    if upstream["keys"] is not None:
        upstream["keys"] = frozenset(upstream["keys"])
    return ListenAddress(**listen), Upstream(**upstream)


def main() -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for noisy in ("httpx", "httpcore", "asyncio", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    listen, upstream = read_settings(Path(sys.argv[1]))
    listener = socket.socket(fileno=int(sys.argv[2]))
    files = raise_file_limit()
    limits = Limits.for_files(files)
    logger.info("open files: at most %d; %s", files, limits)
    signals = Signals()
    with GatewayServer(listen, upstream, limits, listener) as gateway:
        while gateway.alive and not signals.count:
            time.sleep(CHECK_INTERVAL)
    sys.exit(0 if signals.count else 1)


if __name__ == "__main__":
    main()
