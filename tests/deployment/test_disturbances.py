"""What else happens to machines: two kills at once, a frozen process, a wrong clock, a taken port, a full disk.

The run finishes with the same results as an undisturbed one.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from colora.common.config.loader import recipe_from
from colora.simulation.run import simulate

from .conftest import Town, simulated_outcome
from .test_kills import VICTIMS

pytestmark = [pytest.mark.slow, pytest.mark.endurance]
FROZEN = float(os.environ.get("COLORA_FROZEN", "60"))  # seconds
CLOCK = "-120s"  # Flower accepts signatures that are up to 300 s old


@pytest.fixture
def disturbed(place: Path, tiny_recipe: dict) -> Iterator[Town]:
    tiny_recipe["rounds"] = 4
    tiny_recipe["train"] |= {"final_steps": 2, "persist_optimizer_state": True}
    tiny_recipe["server"] |= {"optimizer": "adam"}
    town = Town(place / "town", tiny_recipe).build()
    yield town
    town.stop()
    for process in town.orphans():
        process.kill()


def finish_and_compare(town: Town, folder: Path) -> None:
    assert town.wait("server", 600) == 0
    calm = simulate(recipe_from(town.recipe), folder / "calm", resume=False)
    assert town.outcome() == simulated_outcome(calm.path, town.names)


def process_of(town: Town, command: str, kind: str, seconds: float = 60) -> int:
    """The process id of a command's child, once it runs."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if found := town.below(command, VICTIMS[kind] or ""):
            return found[0].pid
        time.sleep(0.05)
    raise AssertionError(f"no {kind} below {command}")


@pytest.mark.parametrize(
    "victims",
    [(("server", "ServerApp"), ("ada", "trainer")), (("server", "SuperLink"), ("bob", "SuperNode"))],
    ids=["ServerApp and trainer", "SuperLink and SuperNode"],
)
def test_two_kills_at_once(disturbed: Town, tmp_path: Path, victims: tuple[tuple[str, str], ...]) -> None:
    disturbed.start()
    disturbed.wait_for("round", 300, round=1)
    for process in [process_of(disturbed, command, kind) for command, kind in victims]:
        os.kill(process, signal.SIGKILL)
    finish_and_compare(disturbed, tmp_path)


@pytest.mark.parametrize(("command", "kind"), [("ada", "trainer"), ("server", "ServerApp")])
def test_a_process_that_is_frozen_for_a_minute(disturbed: Town, tmp_path: Path, command: str, kind: str) -> None:
    disturbed.start()
    disturbed.wait_for("round", 300, round=1)
    process = process_of(disturbed, command, kind)
    os.kill(process, signal.SIGSTOP)
    time.sleep(FROZEN)
    os.kill(process, signal.SIGCONT)
    finish_and_compare(disturbed, tmp_path)


def start_in_the_past(town: Town, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def in_the_past(words: list[str], **options: object) -> subprocess.Popen[bytes]:
        return start(["faketime", "-m", "-f", CLOCK, *words], **options)  # type: ignore[call-overload]

    with monkeypatch.context() as changed:
        changed.setattr(subprocess, "Popen", in_the_past)
        town.start(command)


@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs faketime")
def test_a_sites_clock_that_is_set_back(disturbed: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed.start()
    disturbed.wait_for("round", 300, round=1)
    kill_all(disturbed, "ada")
    start_in_the_past(disturbed, "ada", monkeypatch)
    finish_and_compare(disturbed, tmp_path)


@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs faketime")
def test_a_coordinators_clock_that_is_set_back(
    disturbed: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower refuses sites whose clock is ahead. They say so, and the run goes on once the clock is right again."""
    disturbed.start()
    disturbed.wait_for("round", 300, round=1)
    kill_all(disturbed, "server")
    start_in_the_past(disturbed, "server", monkeypatch)
    ends = time.monotonic() + 240
    while "ahead of that of" not in disturbed.said("ada") and time.monotonic() < ends:
        time.sleep(0.5)
    assert "this machine's clock is 1" in disturbed.said("ada"), disturbed.said("ada")
    kill_all(disturbed, "server")
    disturbed.start("server")
    finish_and_compare(disturbed, tmp_path)


def kill_all(town: Town, command: str) -> None:
    """Kill a command with all processes below it; those of an earlier clock must not serve the next one."""
    command_process = psutil.Process(town.commands[command].pid)
    family = [command_process, *command_process.children(recursive=True)]
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=20)
    town.commands[command].wait()


def test_a_port_that_another_program_has_taken(disturbed: Town, tmp_path: Path) -> None:
    """The server says so and ends; started again when the port is free, it continues."""
    disturbed.start()
    disturbed.wait_for("round", 300, round=1)
    disturbed.commands["server"].send_signal(signal.SIGTERM)
    assert disturbed.commands["server"].wait(120) == 130
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", disturbed.port))
        taken.listen()
        disturbed.start("server")
        assert disturbed.commands["server"].wait(120) == 2
        assert str(disturbed.port) in disturbed.said("server")
        assert "Traceback" not in disturbed.said("server")
    disturbed.start("server")
    finish_and_compare(disturbed, tmp_path)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Put a file system of this size at a folder, with what the folder holds."""
    kept = folder.with_name(folder.name + ".kept")
    if folder.exists():
        shutil.copytree(folder, kept)
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    if kept.exists():
        shutil.copytree(kept, folder, dirs_exist_ok=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def filled(folder: Path) -> Callable[[], None]:
    """Fill a file system; return what frees it again."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass
    return ballast.unlink


def test_a_full_disk_at_a_site(disturbed: Town, tmp_path: Path) -> None:
    """The site says so, and the coordinator repeats the round until the disk has room."""
    with small_disk(disturbed.state("ada"), 8):
        disturbed.start()
        disturbed.wait_for("round", 300, round=1)
        free = filled(disturbed.state("ada"))
        assert "StateError" in disturbed.wait_for("failed", 240, site="ada")["reason"]
        assert "No space left" in disturbed.said("ada")
        free()
        finish_and_compare(disturbed, tmp_path)
    assert "Traceback" not in disturbed.said("server") + disturbed.said("ada")


def test_a_full_disk_at_the_coordinator(disturbed: Town, tmp_path: Path) -> None:
    """Checkpoints, events and Flower's database are on the disk. The run goes on when it has room."""
    with small_disk(disturbed.run, 600):
        disturbed.start()
        disturbed.wait_for("round", 300, round=1)
        free = filled(disturbed.run)
        time.sleep(30)
        free()
        if (code := disturbed.commands["server"].poll()) is not None:  # a service manager starts it again
            assert code == 2, disturbed.said("server")
            assert "No space left" in disturbed.said("server")
            disturbed.start("server")
        finish_and_compare(disturbed, tmp_path)
        disturbed.stop()
    assert "Traceback" not in disturbed.said("server")
