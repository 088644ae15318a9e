"""What starts for every message: Flower's own command, without the half that it does not use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from colora.client.supernode import CLIENT_APP, LIGHT

LOOK = "import atexit, sys; atexit.register(lambda: print(*sorted(m for m in sys.modules if '.' not in m)))\n"


def test_the_light_command_takes_flowers_arguments_and_leaves_its_server_out(tmp_path: Path) -> None:
    command = tmp_path / CLIENT_APP
    command.write_text(LIGHT.format(python=sys.executable).replace("\n", f"\n{LOOK}", 1))
    command.chmod(0o755)
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "--runtime-api-address" in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert {"flwr", "colora"} <= loaded
    assert not {"torch", "transformers", "alembic"} & loaded
