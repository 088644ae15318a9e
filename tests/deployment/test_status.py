"""``colora status`` for a running federation and for one of its sites."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import tomli_w

from .conftest import COLORA, ROOT, Town

pytestmark = [pytest.mark.slow, pytest.mark.endurance]


def status(path: Path) -> tuple[int, dict]:
    done = subprocess.run([*COLORA, "status", str(path), "--json"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_running_or_gone(town: Town) -> None:  # a short name: sockets have short paths
    (town.folder / "recipe.toml").write_text(tomli_w.dumps({**town.recipe, "rounds": 200}))  # more than the test takes
    town.start()
    town.wait_for("round", 180, round=1)
    code, run = status(town.run)
    assert (code, run["phase"], run["healthy"], run["problems"]) == (0, "training", True, [])
    assert {each["name"]: each["state"] for each in run["services"]} == {"gateway": "serving", "superlink": "serving"}
    assert {each["name"]: each["alive"] for each in run["processes"]} == {"server": True, "superlink": True}
    assert [site["site"] for site in run["sites"]] == town.names
    assert all(site["admitted"] >= 1 and site["seen"] < 120 for site in run["sites"])
    assert run["checkpoint"]["round"] >= 1
    code, site = status(town.site("ada") / "site.toml")
    assert (code, site["problems"]) == (0, [])
    assert {each["name"]: each["state"] for each in site["services"]} == {"trainer": "serving", "supernode": "serving"}
    assert site["federations"][0]["round"] >= 1
    assert site["federations"][0]["audit"]["kind"] == "reply"
    for command in town.commands.values():
        command.kill()
        command.wait()
    code, run = status(town.run)
    assert (code, run["phase"]) == (1, "not running")
    code, site = status(town.site("ada") / "site.toml")
    assert code == 1
    assert "client" in " ".join(site["problems"])
