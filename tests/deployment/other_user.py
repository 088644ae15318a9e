"""Run a command as another user, also when this Python is in a folder that other users cannot enter.

Runs as a script, by root, in its own mount namespace: closed folders are covered by an empty folder into which only the
folders that the command needs are mounted. This is invisible outside the namespace and ends with the command.
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
    """Return the command that root must run; ``hold`` is an empty folder."""
    closed = {str(path): str(lid) for path in needed() if (lid := closed_above(path))}
    own = [sys.executable, str(Path(__file__).resolve()), json.dumps({"uid": uid, "hold": str(hold), "closed": closed})]
    return [*(["unshare", "--mount", "--propagation", "private"] if closed else []), *own, *command]


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of such a command, which contains nothing of this process's environment."""
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    return {"PATH": path, "HOME": str(home), "USER": "site", "LOGNAME": "site", "LANG": "C.UTF-8", **more}


def why_not(uid: int, home: Path) -> str | None:
    """Return why no command can run as another user here, or None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "only root on Linux can run processes as other users"
    home.mkdir(parents=True, exist_ok=True)
    command = as_user(uid, [sys.executable, "-c", "import flwr, colora.cli"], home)
    done = subprocess.run(command, env=environment(home), cwd="/", capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"another user cannot run this Python: {done.stderr.strip()[-300:]}"


def needed() -> set[Path]:
    """Return the folders of this Python and this project."""
    return {Path(sys.base_prefix).resolve(), Path(sys.prefix), ROOT}


def closed_above(path: Path) -> Path | None:
    """Return the first parent folder of a path that other users may not enter."""
    return next((folder for folder in reversed(path.parents) if not folder.stat().st_mode & 0o001), None)


def main(order: Mapping[str, object], command: Sequence[str]) -> None:
    """In the namespace, as root: mount the needed folders, switch to the user and execute the command."""
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
