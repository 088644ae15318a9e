"""The machine of a site, looked at before a training: memory, cores, disk, device and the trainer's socket.

Every check returns what is there in one line, or raises :class:`Wrong` with what is not, in plain words.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import psutil

from ....common.errors import ModelError
from .result import CheckFailed, size

ROOM = 100 << 20  # bytes of disk that personal states and logs need at least
CGROUP = Path("/sys/fs/cgroup")


def check_device(name: str) -> tuple[str, str]:
    """(torch's name of the device, what it is)."""
    import torch

    from ....common.models.precision import resolve_device

    try:
        device = resolve_device(name)
    except ModelError:
        cards = torch.cuda.device_count()
        there = f"cpu and {cards} CUDA device{'s' * (cards > 1)}" if cards else "cpu only"
        raise CheckFailed(
            f"trainer.device is {name!r}, which this machine or its torch does not have: {there}"
        ) from None
    if device.type != "cuda":
        return str(device), str(device) + (" (auto: torch finds no CUDA device)" if name == "auto" else "")
    free, total = torch.cuda.mem_get_info(device)
    return str(device), f"{device}, {torch.cuda.get_device_name(device)}, {size(free)} of {size(total)} free"


def check_threads(wanted: int | None) -> str:
    """Those that torch may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted is None:
        return f"{cores}, one for each core (trainer.threads is not set)"
    return f"{wanted} for {cores} cores" + (", which is slower than one for each" if wanted > cores else "")


def check_state(folder: Path) -> str:
    """Whether the folder can be written to, and how much room there is. Leaves nothing behind."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"colora")
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise CheckFailed(f"{folder} cannot be written to: {error.strerror} ({there})") from None
    if free < ROOM:
        raise CheckFailed(
            f"{folder} has room for {size(free)} only: personal states and logs need {size(ROOM)} or more"
        )
    return f"{folder}{' (not made yet)' if there != folder else ''}, {size(free)} free"


def check_socket(path: Path) -> str:
    """Whether the trainer's Unix socket can have this path."""
    from ...trainer_service.listener import LONGEST

    length = len(os.fsencode(path))
    if length > LONGEST:
        raise CheckFailed(f"trainer.listen: a socket's path has at most {LONGEST} bytes, {path} has {length}")
    return f"{path}, a socket of this user"


def memory_left() -> tuple[int, int]:
    """(free, total) bytes of this machine, or of this container where it has a limit of its own."""
    machine = psutil.virtual_memory()
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, ValueError, KeyError):  # no cgroup, or "max"
        return machine.available, machine.total
    return min(machine.available, limit - used + int(cached)), min(machine.total, limit)
