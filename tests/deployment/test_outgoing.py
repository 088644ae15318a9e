"""Search everything that the sites' processes send to the coordinator for personal data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.leaks import personal_tensors, text_windows

from .conftest import Town
from .tap import found_in, replies, tapped

pytestmark = [pytest.mark.slow, pytest.mark.endurance]


def test_nothing_personal_leaves_a_site_between_real_processes(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores, heads, optimizer states, a private MultiLoRA and texts. The search finds the shared arrays."""
    with tapped(town, monkeypatch) as sent:
        town.start()
        assert town.wait("server", 300) == 0
        town.stop()
    states = [path for name in town.names for path in town.state(name).glob("round-*")]
    secrets, texts = list(personal_tensors(states)), text_windows(Path(s["source"]) for s in town.recipe["site"])
    assert {kind for name, _ in secrets for kind in ("core", "private.", "moments/") if kind in name} == {
        "core",
        "private.",
        "moments/",
    }
    assert found_in(sent, secrets, texts) == []
    meant = [name for name, _ in replies(states)]
    assert set(found_in(sent, replies(states), texts)) == set(meant)
    assert meant
