"""The Python API: what a notebook needs, against the command line's own results and stock PEFT."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import colora
from colora.client.artifacts.predict import Predictor
from colora.common.config.loader import recipe_from
from colora.common.errors import ConfigError, StateError
from colora.server.reporting.summary import summarize
from tests.conftest import write_tiny_recipe


@pytest.fixture(scope="module")
def run(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> colora.Run:
    """A finished run of the tiny recipe with its baseline."""
    folder = tmp_path_factory.mktemp("api")
    raw = write_tiny_recipe(tiny_bert, folder)
    raw["simulation"] = {**raw.get("simulation", {}), "baseline": True}
    events: list[dict] = []
    run = colora.simulate(recipe_from(raw), folder / "run", on_event=events.append)
    assert [event["event"] for event in events if not event.get("baseline")][-1] == "finished"
    return run


def test_importing_colora_is_light_and_every_public_name_exists() -> None:
    code = "import sys, colora; print([m for m in ('torch', 'flwr', 'transformers', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert all(callable(getattr(colora, name)) for name in colora.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        colora.nothing  # noqa: B018


def test_results_are_those_of_the_report(run: colora.Run) -> None:
    frame, summary = run.results(), summarize(run.events())
    assert tuple(frame.index) == run.sites == tuple(summary.rows)
    for site, row in summary.rows.items():
        for mode in ("base", "shared", "personal", "alone"):
            value = row.metric(mode)
            assert frame.loc[site, mode] == value if value is not None else math.isnan(frame.loc[site, mode])


def test_the_frame_has_one_row_a_site_round_and_metric(run: colora.Run) -> None:
    frame = run.to_frame()
    assert not frame.duplicated(["site", "round", "mode", "metric"]).any()
    last = frame[(frame["mode"] == "personal") & (frame["metric"] == "accuracy")].groupby("site")["value"].last()
    assert last.to_dict() == run.results()["personal"].to_dict()
    assert set(frame["mode"]) >= {"base", "personal", "alone", "train"}


def test_a_personal_model_is_a_stock_peft_model_with_the_same_predictions(run: colora.Run) -> None:
    site = run.site(run.sites[0])
    model, tokenizer = site.load()
    texts = ["a b c", "red cat sun"]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        stock = model(**batch).logits.softmax(-1)
    labels = site.saved().metadata.labels
    for row, prediction in zip(stock, site.predict(texts), strict=True):
        ours = torch.tensor([prediction["probabilities"][label] for label in labels])
        assert torch.allclose(row, ours, atol=1e-5)
    assert site.predict([{"text": texts[0]}]) == list(Predictor(site.saved()).predict([{"text": texts[0]}]))


def test_export_writes_the_adapter_that_the_command_writes(run: colora.Run, tmp_path: Path) -> None:
    out = run.site(run.sites[0]).export(tmp_path / "adapter")
    assert (out / "adapter_config.json").is_file()
    assert (colora.export(run.path, tmp_path / "shared", only="shared") / "adapter_model.safetensors").is_file()


def test_what_is_not_there_is_named(run: colora.Run, tmp_path: Path) -> None:
    assert colora.open_run(run.path).sites == run.sites
    assert colora.read_events(run.path / "events.jsonl")[0]["event"] == "started"
    with pytest.raises(StateError, match="not a run folder"):
        colora.open_run(tmp_path)
    with pytest.raises(StateError, match="no site 'zed'"):
        run.site("zed")
    with pytest.raises(ConfigError, match="no recipe 'nothing'"):
        colora.load_recipe("nothing")
    assert colora.load_recipe("demo", ["rounds=3"]).rounds == 3
