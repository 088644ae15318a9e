"""Checks of a site's machine: memory, cores, disk, device and the trainer's socket.

Every check returns one line of detail, or raises ``CheckFailed``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import psutil

from ....common.errors import ModelError
from .result import CheckFailed, size

MIN_DISK = 100 << 20  # bytes of free disk space for personal states and logs
CGROUP = Path("/sys/fs/cgroup")


def check_device(name: str) -> tuple[str, str]:
    """Return (torch's name of the device, its description)."""
    import torch

    from ....common.models.precision import resolve_device

    try:
        device = resolve_device(name)
    except ModelError:
        gpus = torch.cuda.device_count()
        available = f"cpu and {gpus} CUDA device{'s' * (gpus > 1)}" if gpus else "cpu only"
        raise CheckFailed(
            f"trainer.device is {name!r}, which is not available here; torch supports {available}"
        ) from None
    if device.type != "cuda":
        return str(device), str(device) + (" (auto: torch finds no CUDA device)" if name == "auto" else "")
    free, total = torch.cuda.mem_get_info(device)
    return str(device), f"{device}, {torch.cuda.get_device_name(device)}, {size(free)} of {size(total)} free"


def check_threads(threads: int | None) -> str:
    """Compare ``trainer.threads`` with the number of cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads is None:
        return f"{cores}, one per core (trainer.threads is not set)"
    return f"{threads} on {cores} cores" + (", slower than one per core" if threads > cores else "")


def check_state(folder: Path) -> str:
    """Check that the state folder is writable and has enough space. Leaves no files behind."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"colora")
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise CheckFailed(f"{folder} is not writable: {error.strerror} ({existing})") from None
    if free < MIN_DISK:
        raise CheckFailed(
            f"{folder} has only {size(free)} of free space; personal states and logs need at least {size(MIN_DISK)}"
        )
    return f"{folder}{' (not created yet)' if existing != folder else ''}, {size(free)} free"


def check_socket(path: Path) -> str:
    """Check that the path is short enough for a Unix socket."""
    from ...trainer_service.listener import MAX_SOCKET_PATH

    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        raise CheckFailed(
            f"trainer.listen: the socket path {path} has {length} bytes, at most {MAX_SOCKET_PATH} are allowed"
        )
    return f"{path}, accessible to this user only"


def memory_left() -> tuple[int, int]:
    """Return (free, total) bytes of this machine, or of this container when it has a limit."""
    machine = psutil.virtual_memory()
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, ValueError, KeyError):  # no cgroup, or "max"
        return machine.available, machine.total
    return min(machine.available, limit - used + int(cached)), min(machine.total, limit)
