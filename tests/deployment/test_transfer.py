"""A federation transfers real models over real processes, and no request contains its artifacts or texts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from colora.client.artifacts.predict import Predictor
from colora.client.data.selection import load_site_rows
from colora.common.config.loader import recipe_from, with_base_model
from colora.common.config.schema import DataSettings
from colora.common.config.site_schema import SiteSettings
from colora.common.event_log import Event
from colora.common.models.saved import read_saved_model
from tests.leaks import personal_tensors, windows_of

from .conftest import Town
from .tap import found_in, replies, tapped

pytestmark = [pytest.mark.slow, pytest.mark.endurance]
OLD, NEW, GENERATOR = "asset:minilm-l6", "asset:paraphrase-minilm-l3", "asset:smollm2-135m-instruct"
LABELS = {
    "comp": ["comp.graphics", "comp.sys.mac.hardware", "comp.windows.x"],
    "rec": ["rec.autos", "rec.sport.baseball", "rec.sport.hockey"],
    "sci": ["sci.electronics", "sci.med", "sci.space"],
}
RECIPE: dict[str, Any] = {
    "name": "news",
    "rounds": 3,
    "model": {"source": OLD, "max_length": 32},
    "adapter": {"rank": 8, "alpha": 16.0, "target_modules": ["query", "value"]},
    "train": {"steps": 8, "batch_size": 8, "lr": 2e-3, "head_lr": 1e-2, "final_steps": 8},
    "evaluation": {"every": 0},
    "server": {"quorum": 3},
    "transfer": {
        "prepare": True,
        "dataset_name": "newsgroups",
        "samples": 48,
        "generator": {
            "model": GENERATOR,
            "mode": "tuned",
            "batch_size": 16,
            "max_calls": 3,
            "max_new_tokens": 200,
            "temperature": 0.7,
            "top_p": 0.9,
        },
        "discriminator": {"steps": 8},
    },
}


@pytest.fixture
def newsroom(place: Path) -> Iterator[Town]:
    """Three sites with 30 real texts for training and 64 for testing."""
    sites = []
    for name, labels in LABELS.items():
        data = DataSettings(
            "asset:20newsgroups/train", "asset:20newsgroups/test", labels=tuple(labels), train=30, test=64
        )
        rows, site = load_site_rows(SiteSettings(name, data), 0), {"name": name}
        for key, part in (("source", rows.train), ("test_source", rows.test)):
            path = place / f"{name}-{key}.jsonl"
            path.write_text("".join(json.dumps({"text": r["text"], "label": r["label"]}) + "\n" for r in part))
            site[key] = str(path)
        sites.append(site)
    town = Town(place / "town", {**RECIPE, "site": sites}).build()
    for site in sites:
        data = {key: site[key] for key in ("source", "test_source")}
        town.write_site(
            site["name"], data=data, trainer={"threads": 1, "seeds": "recipe"}, allow={"tuned_generator": True}
        )
    yield town
    town.stop()


def test_a_federation_transfers_over_real_processes(newsroom: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = {site["name"]: Path(site["test_source"]).read_text().splitlines() for site in newsroom.recipe["site"]}
    newsroom.start()
    assert newsroom.wait("server", 900) == 0
    newsroom.stop()
    for site in newsroom.recipe["site"]:
        Path(site["source"]).unlink()
        Path(site["test_source"]).unlink()

    name = with_base_model(recipe_from(newsroom.recipe), NEW).name
    options = (
        "--transfer-to",
        NEW,
        "--set",
        "transfer.filter=none",
    )  # for a small generator, more texts outweigh the filter
    second = replace(newsroom, recipe={**newsroom.recipe, "name": name}, options=options, out="transferred")
    with tapped(second, monkeypatch) as sent:
        second.start()
        assert second.wait("server", 1200) == 0, second.said("server")
        second.stop()
    states = [path for town in (newsroom, second) for site in LABELS for path in town.state(site).glob("round-*")]
    secrets = list(personal_tensors(states))
    for kind in ("core", "transfer/", "writer/"):
        assert any(kind in secret for secret, _ in secrets)
    assert found_in(sent, secrets, windows_of(texts_of(newsroom, second))) == []
    sent_arrays = list(replies(path for path in states if name in path.parts))
    assert {leak for leak, _ in sent_arrays} <= set(found_in(sent, sent_arrays, {"a text that was not"}))
    assert sent_arrays

    before, after = ({site: accuracy(town.state(site), tests[site]) for site in LABELS} for town in (newsroom, second))
    print(f"accuracy on real texts: {OLD} {before}, mean {statistics.mean(before.values()):.3f}")
    print(f"after the transfer: {NEW} {after}, mean {statistics.mean(after.values()):.3f}")
    print(f"bytes of all sites before: {traffic(newsroom.events('reply'))}")
    print(f"bytes of all sites in the transfer: {traffic(second.events('reply'))}")
    print(f"{len(sent)} requests of {sum(map(len, sent))} bytes searched for {len(secrets)} tensors")


def texts_of(old: Town, new: Town) -> Iterator[str]:
    """Yield the seeds and all generated texts."""
    for site in LABELS:
        metadata = read_saved_model(old.state(site)).transfer_metadata
        assert metadata
        yield from metadata["seeds"]
        generated = json.loads(next(new.state(site).rglob("written.json")).read_text())["verdicts"]
        assert generated
        yield from generated


def accuracy(state: Path, rows: list[str]) -> float:
    labelled = [json.loads(row) for row in rows]
    predictions = Predictor(read_saved_model(state)).predict([{"text": row["text"]} for row in labelled])
    return statistics.mean(p["label"] == row["label"] for p, row in zip(predictions, labelled, strict=True))


def traffic(events: list[Event]) -> str:
    down, up = (sum(event[key] for event in events) for key in ("bytes_down", "bytes_up"))
    return f"{down:,} down, {up:,} up"
