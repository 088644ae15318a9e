"""A command as another user of this machine, who also finds this Python where it lies below a folder closed to others.

Run as a script, by root in a mount namespace of its own: closed folders get an empty folder over them in which only
what the command needs is put back. Nobody outside the namespace sees that, and it goes with the command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def as_user(uid: int, command: Sequence[str], hold: Path) -> list[str]:
    """The command that root runs for it; ``hold`` is an empty folder."""
    closed = {str(path): str(lid) for path in needed() if (lid := closed_above(path))}
    own = [sys.executable, str(Path(__file__).resolve()), json.dumps({"uid": uid, "hold": str(hold), "closed": closed})]
    return [*(["unshare", "--mount", "--propagation", "private"] if closed else []), *own, *command]


def environment(home: Path, **more: str) -> dict[str, str]:
    """What such a command needs to know, and nothing of this process's own environment."""
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    return {"PATH": path, "HOME": str(home), "USER": "site", "LOGNAME": "site", "LANG": "C.UTF-8", **more}


def why_not(uid: int, home: Path) -> str | None:
    """Why no command of ours can be run as another user here; None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "only root on Linux can run processes as other users"
    home.mkdir(parents=True, exist_ok=True)
    command = as_user(uid, [sys.executable, "-c", "import flwr, colora.cli"], home)
    done = subprocess.run(command, env=environment(home), cwd="/", capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"another user cannot run this Python: {done.stderr.strip()[-300:]}"


def needed() -> set[Path]:
    """Folders that this Python and this project consist of."""
    return {Path(sys.base_prefix).resolve(), Path(sys.prefix), ROOT}


def closed_above(path: Path) -> Path | None:
    """The first folder on the way to a path that others may not enter."""
    return next((folder for folder in reversed(path.parents) if not folder.stat().st_mode & 0o001), None)


def main(order: Mapping[str, object], command: Sequence[str]) -> None:
    """In the namespace, as root: opens the way, becomes the user, and then the command."""
    closed, uid, hold = dict(order["closed"]), int(str(order["uid"])), Path(str(order["hold"]))  # type: ignore[call-overload]
    kept = {path: hold / str(number) for number, path in enumerate(closed)}
    for path, place in kept.items():
        place.mkdir(exist_ok=True)
        subprocess.run(["mount", "--bind", path, place], check=True)
    for lid in set(closed.values()):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", lid], check=True)
    for path, place in kept.items():
        os.makedirs(path, exist_ok=True)
        subprocess.run(["mount", "--bind", place, path], check=True)
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    os.execvp(command[0], list(command))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
