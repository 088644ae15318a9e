"""A federation transfers to a new base model: each site trains on synthetic texts, which no message contains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from flwr.app import Message

from colora.common.config.loader import load_recipe, with_base_model
from colora.common.errors import ConfigError, StateError
from colora.common.models.saved import read_saved_model
from colora.simulation.run import simulate
from tests.conftest import write_tiny_recipe
from tests.transfer.conftest import prepare_run

SITES = ("ada", "bob", "cyd")


@pytest.fixture(scope="module")
def federation(tiny_bert: Path, generating_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose sites prepared, with their data deleted."""
    folder = tmp_path_factory.mktemp("federation")
    settings = {"prepare": True, "filter": "none", "generator": {"model": str(generating_llama)}, "samples": 10}
    run = prepare_run({**write_tiny_recipe(tiny_bert, folder), "transfer": settings}, folder / "run")
    for site in SITES:
        shutil.rmtree(run / "sites" / site / "data")
    shutil.rmtree(folder / "rows")
    return run


@pytest.fixture
def first(federation: Path, tmp_path: Path, generator_calls: list[int]) -> Path:
    """A copy of that run."""
    return shutil.copytree(federation, tmp_path / "first")


@pytest.mark.slow
def test_all_sites_transfer_and_no_message_contains_a_synthetic_text(
    first: Path, tiny_bert: Path, tmp_path: Path, wire: list[Message]
) -> None:
    target = tmp_path / "target"
    shutil.copytree(tiny_bert, target)
    old = load_recipe(first / "recipe.toml", (f'simulation.source_run="{first}"',))
    recipe = with_base_model(old, str(target))
    assert recipe.name.startswith("tiny-on-")
    run = simulate(recipe, tmp_path / "second", resume=False)
    texts = set()
    for site in SITES:
        saved, before = read_saved_model(run.path / "sites" / site), read_saved_model(first / "sites" / site)
        assert saved.plan.model.source == str(target)
        assert saved.metadata.labels == before.metadata.labels
        assert saved.transfer_metadata == before.transfer_metadata is not None, "prepared for the next transfer"
        lines = (run.path / "sites" / site / "transfer" / "synthetic.jsonl").read_text().splitlines()
        assert len(lines) == 10
        texts |= {json.loads(line)["text"] for line in lines} | set((before.transfer_metadata or {})["seeds"])
    sent = b"".join(
        repr(message.content).encode() + str(message.content).encode() for message in wire if message.has_content()
    )
    arrays = b"".join(
        entry.data
        for message in wire
        if message.has_content()
        for record in message.content.array_records.values()
        for entry in record.values()
    )
    assert len(wire) > 20
    assert not [text for text in texts if text.encode() in sent + arrays]


def test_errors_of_a_federated_transfer(first: Path, tiny_bert: Path, tmp_path: Path) -> None:
    old = load_recipe(first / "recipe.toml")
    with pytest.raises(ConfigError, match="--transfer-to"):
        with_base_model(old, old.model.source)
    target = tmp_path / "target"
    shutil.copytree(tiny_bert, target)
    with pytest.raises(ConfigError, match=r"simulation.source_run"):
        simulate(with_base_model(old, str(target)), tmp_path / "no", resume=False)
    for path in (first / "sites" / "bob" / "state").iterdir():
        path.unlink()
    states = load_recipe(first / "recipe.toml", (f'simulation.source_run="{first}"',))
    with pytest.raises(StateError, match=r"site bob: "):
        simulate(with_base_model(states, str(target)), tmp_path / "no", resume=False)
    assert not (tmp_path / "no" / "recipe.toml").exists()
