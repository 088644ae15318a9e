"""A simulation treats its sites as a deployment does: each has its own clock, and only trained ones are counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from colora.client.data.selection import load_site_rows
from colora.client.training.adapted_model import attach_adapters
from colora.client.training.state_store import StateStore
from colora.client.training.trainer import Trainer
from colora.common.adapters.initialization import initial_values
from colora.common.adapters.inject import layout_of
from colora.common.config.loader import recipe_from
from colora.common.config.site_schema import SiteSettings
from colora.common.errors import ConfigError
from colora.common.event_log import Event
from colora.common.models.base_model import load_base_model
from colora.common.protocol.types import TrainReply
from colora.server.reporting.report import print_report
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate


def with_seconds(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    """Make the sites report that a round took them so long."""
    handle = Trainer.handle

    def timed(self: Trainer, *arguments: object) -> TrainReply:
        return dataclasses.replace(handle(self, *arguments), seconds=seconds[self.site])  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "handle", timed)


def run(raw: dict, folder: Path) -> list[Event]:
    return simulate(recipe_from(raw), folder / "run", resume=False).events()


def test_the_time_limit_counts_each_sites_own_seconds(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sites of 2 s fit into 3 s although they take 4 s one after the other; a site of 5 s does not."""
    tiny_recipe["server"] = {"quorum": 2, "timeout": 3.0}
    with_seconds(monkeypatch, {"ada": 2.0, "bob": 2.0, "cyd": 5.0})
    events = run(tiny_recipe, tmp_path)
    assert [event["admitted"] for event in events if event["event"] == "round"] == [["ada", "bob"]] * 2
    failed = [(event["site"], event["reason"]) for event in events if event["event"] == "failed"]
    assert failed == [("cyd", "no reply within 3 s")] * 3


def test_the_simulations_own_clock_admits_every_site(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_recipe["server"] = {"quorum": 3, "timeout": 1e-6}
    with_seconds(monkeypatch, dict.fromkeys(("ada", "bob", "cyd"), 0.0))
    events = run(tiny_recipe, tmp_path)
    assert [event["admitted"] for event in events if event["event"] == "round"] == [["ada", "bob", "cyd"]] * 2


def test_sites_that_no_round_asked_have_no_personal_model(
    tiny_recipe: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_recipe |= {"rounds": 1, "server": {"fraction": 0.34, "quorum": 1}}
    events = run(tiny_recipe, tmp_path)
    (asked,) = [event["site"] for event in events if event["event"] == "reply" and event["kind"] == "train"]
    ends = {event["site"]: event["metrics"] for event in events if event["event"] == "reply" and event["round"] == 2}
    assert len(ends) == 3
    for site, metrics in ends.items():
        assert ("personal.accuracy" in metrics) is (site == asked)
        assert "shared.accuracy" in metrics
    summary = summarize(events)
    assert summary.mean("personal") == ends[asked]["personal.accuracy"]
    assert summary.mean("shared") == ends[asked]["shared.accuracy"], "of the same sites"
    others = ", ".join(site for site in ("ada", "bob", "cyd") if site != asked)
    assert f"{others} took part in no round and have no personal model" in _report(summary, tmp_path, capsys)


def _report(summary: object, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    from rich.console import Console

    print_report(summary, folder, Console(width=300))  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_the_sites_of_a_process_share_the_initial_adapter(tiny_recipe: dict, tmp_path: Path) -> None:
    recipe = recipe_from(tiny_recipe)
    model = attach_adapters(load_base_model(recipe.plan.model, generates=False), recipe.plan)
    ada, bob = (
        Trainer(model, load_site_rows(SiteSettings(site.name, site.data), 0), StateStore(tmp_path / site.name, "tiny"))
        for site in recipe.site[:2]
    )
    expected = initial_values(layout_of(model.adapter), recipe.adapter, recipe.seed)
    for key, value in expected.items():
        assert ada.initial[key] is bob.initial[key]
        assert torch.equal(ada.initial[key], value)
    head = "head.classifier.weight"
    assert not torch.equal(ada.initial[head], bob.initial[head]), "heads are each site's own"


def test_ray_that_cannot_start_is_one_sentence(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nMore lines.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    tiny_recipe["simulation"] |= {"engine": "ray"}
    with pytest.raises(ConfigError) as caught:
        run(tiny_recipe, tmp_path)
    assert str(caught.value) == (
        "Ray does not start on this machine: The current node timed out during startup. "
        'Use simulation.engine = "local".'
    )


def test_more_threads_than_ray_has_cpus_are_refused(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    tiny_recipe["simulation"] |= {"engine": "ray", "threads": 3}
    with pytest.raises(ConfigError, match=r"simulation.threads is 3, but Ray has only 2 CPUs"):
        run(tiny_recipe, tmp_path)
