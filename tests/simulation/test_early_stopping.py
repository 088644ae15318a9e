"""``server.keep = "best"`` and ``server.patience``: rounds are compared on validation rows, never on test rows."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from colora.client.artifacts.predict import Predictor
from colora.common.config.loader import recipe_from
from colora.common.errors import ConfigError, DataError, StateError
from colora.common.models.saved import read_saved_model
from colora.server.reporting.conclusions import selection
from colora.server.reporting.report import print_report
from colora.server.reporting.run_folder import RunFolder
from colora.server.reporting.summary import summarize
from colora.server.rounds.early_stopping import is_better
from colora.simulation.run import simulate
from tests.conftest import write_lines


def recipe(raw: dict, rounds: int = 6, **server: object) -> dict:
    """A recipe whose validation loss rises at some time: two training rows, and a large learning rate."""
    train = {**raw["train"], "steps": 3, "final_steps": 2, "lr": 0.05}
    data = {**raw.get("data", {}), "validation_fraction": 0.5}
    return {**raw, "rounds": rounds, "train": train, "data": data, "server": {"quorum": 3, **server}}


def run(raw: dict, folder: Path) -> RunFolder:
    return simulate(recipe_from(raw), folder, resume=False)


def events(folder: RunFolder, name: str) -> list[dict]:
    return [event for event in folder.events() if event["event"] == name and not event.get("baseline")]


def states(folder: RunFolder, round_number: int | None = None) -> dict[str, dict[str, np.ndarray]]:
    """The personal values and the shared adapter of every site."""
    saved = {p.name: read_saved_model(p, round_number=round_number) for p in sorted((folder.path / "sites").iterdir())}
    return {name: {**model.personal, **model.shared} for name, model in saved.items()}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for site, arrays in expected.items():
        assert not [key for key, value in arrays.items() if not np.array_equal(found[site][key], value)], site


def test_the_best_round_is_finalized_as_if_the_run_had_ended_with_it(tiny_recipe: dict, tmp_path: Path) -> None:
    best = run(recipe(tiny_recipe, keep="best"), tmp_path / "best")
    losses = {event["round"]: event["loss"] for event in events(best, "validated")}
    [chosen] = events(best, "selected")
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert chosen == {**chosen, "round": 6, "kept": min(losses, key=lambda t: losses[t]), "early": False}
    assert 1 < chosen["kept"] < 6, "otherwise the test shows nothing"
    short = run(recipe(tiny_recipe, chosen["kept"]), tmp_path / "short")
    assert_same(states(best), states(short))
    rows = [{"text": "red cat"}]
    predicted = [list(Predictor(read_saved_model(f.path / "sites" / "ada")).predict(rows)) for f in (best, short)]
    assert predicted[0] == predicted[1], "the model is used without its validation rows"
    shared = [read_saved_model(folder.path / "checkpoints").shared for folder in (best, short)]
    assert_same({"": dict(shared[0])}, {"": dict(shared[1])})
    assert selection(summarize(best.events())) == [
        f"The final models are those of round {chosen['kept']}, whose validation loss was the lowest."
    ]


def test_a_run_ends_early_when_the_loss_has_not_improved(tiny_recipe: dict, tmp_path: Path) -> None:
    tiny_recipe["simulation"]["baseline"] = True
    stopped = run(recipe(tiny_recipe, 9, patience=2), tmp_path / "stopped")
    losses = [event["loss"] for event in events(stopped, "validated")]
    [chosen] = events(stopped, "selected")
    last = chosen["round"]
    assert (chosen["kept"], chosen["early"], len(losses)) == (last, True, last)
    assert last == losses.index(min(losses)) + 1 + 2 < 9
    short = run(recipe(tiny_recipe, last), tmp_path / "short")
    assert_same(states(stopped), states(short))
    summary, shown = summarize(stopped.events()), io.StringIO()
    assert "ended after round" in selection(summary)[0]
    print_report(summary, stopped.path, Console(file=shown, width=200))
    assert "local-only training, ended by the same rule on validation rows at the same" in shown.getvalue()
    assert "has not converged" not in shown.getvalue()
    page = (stopped.path / "report.html").read_text()
    assert "Mean loss on validation rows" in page
    assert f"The run ended with the models of round {last}." in page
    again = simulate(recipe_from(recipe(tiny_recipe, 9, patience=2)), stopped.path, resume=True)
    assert len(events(again, "validated")) == last, "a finished run is not continued"
    assert all(row.gain is not None for row in summarize(again.events()).rows.values())


def test_test_rows_do_not_matter(tiny_recipe: dict, tmp_path: Path) -> None:
    """The same losses and the same choice with all test rows but one deleted, and the last one changed."""
    found = []
    for rewritten in (False, True):
        if rewritten:
            for site in tiny_recipe["site"]:
                label = json.loads(Path(site["test_source"]).read_text().splitlines()[0])["label"]
                write_lines(Path(site["test_source"]), [{"text": "hill", "label": label}])
        done = run(recipe(tiny_recipe, keep="best", patience=3), tmp_path / str(rewritten))
        found.append([(e["round"], e["losses"], e["best"]) for e in events(done, "validated")])
        assert {event["test"] for event in events(done, "joined")} == {1 if rewritten else 6}
    assert found[0] == found[1]
    assert len(found[0]) > 3


def test_states_of_all_rounds_are_kept_and_found_by_number(tiny_recipe: dict, tmp_path: Path) -> None:
    raw = recipe(tiny_recipe, 6)
    done = run({**raw, "train": {**raw["train"], "keep_states": "all"}}, tmp_path / "all")
    site = next((done.path / "sites").iterdir())
    assert len(list((site / "state").glob("round-*"))) == 7
    assert len(list((done.path / "checkpoints").glob("round-*"))) == 7 - 1
    assert [read_saved_model(site, round_number=t).metadata.round for t in (1, 2, 7)] == [1, 2, 7]
    with pytest.raises(StateError, match="no model of round 9, only of 1, 2, 3, 4, 5, 6, 7"):
        read_saved_model(site, round_number=9)


def test_only_sites_that_measured_both_rounds_are_compared() -> None:
    assert is_better({"a": 1.0, "b": 9.0}, {"a": 1.1})
    assert not is_better({"a": 1.0}, {"a": 1.0, "b": 9.0})
    assert not is_better({"a": 1.0}, {"b": 2.0})
    for bad in (math.nan, math.inf, 1e16, 1e308):  # no site holds the best round, or keeps it, with such a loss
        assert is_better({"a": bad, "b": 0.0}, {"a": 1.0, "b": 1.0})
        assert is_better({"a": 1.0, "b": 0.0}, {"a": bad, "b": 1.0})
        assert not is_better({"a": 1.0, "b": 1.0}, {"a": bad, "b": 0.0})
    assert is_better({"a": 1.0}, {"a": math.inf})
    assert is_better({"a": math.nan, "b": 0.9}, {"a": math.inf, "b": 1.0}), "a diverged site does not end the run"
    assert not is_better({"a": math.nan}, {"a": math.inf})


def test_what_cannot_work_is_told_before_the_run(tiny_recipe: dict, tmp_path: Path) -> None:
    raw = recipe(tiny_recipe, patience=1)
    without = {**raw, "data": {**raw["data"], "validation_fraction": 0.0}}
    with pytest.raises(DataError, match="compare rounds on validation rows, and the site has none"):
        run(without, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"measures models on the rows by which server\.patience compares rounds"):
        recipe_from({**raw, "data": {**raw["data"], "evaluate_on": "validation"}})
