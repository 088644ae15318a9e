"""Flower's command flwr-clientapp, without the modules that it does not use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from colora.client.deployment.supernode import COMMANDS
from colora.client.flower_compat import CLIENT_APP
from colora.common.processes.supervised import _is_named, _path

LOOK = """
import atexit, sys
from colora.client.deployment.clientapp_main import main

sys.argv[1:] = ["--help"]
atexit.register(lambda: print(*sorted(m for m in sys.modules if "." not in m)))
main()
"""


@pytest.mark.slow
def test_it_is_flowers_command_without_flowers_server() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
    assert "--runtime-api-address" in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert {"flwr", "colora"} <= loaded
    assert not {"torch", "transformers", "alembic", "sqlalchemy"} & loaded


@pytest.mark.slow
def test_it_is_found_first_and_keeps_its_name_when_it_is_a_zombie() -> None:
    path = _path(COMMANDS)
    assert shutil.which(CLIENT_APP, path=path) == str(COMMANDS / CLIENT_APP)
    assert Path(str(shutil.which("python3", path=path))).parent == Path(sys.executable).parent
    environment = {**os.environ, "PATH": path}
    done = subprocess.Popen([CLIENT_APP, "--help"], stdout=subprocess.DEVNULL, env=environment)
    process = psutil.Process(done.pid)
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert _is_named(process, CLIENT_APP)
    assert done.wait() == 0
