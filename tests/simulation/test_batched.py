"""The batched engine: sites that train in one batch get the results of training one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from colora.client.training.trainer import Trainer
from colora.common.adapters.stacked import NotStackable, stacked
from colora.common.atomic_io import load_arrays
from colora.common.config.loader import recipe_from
from colora.common.errors import RefusedError
from colora.common.methods import METHODS, PRIVATE_KINDS
from colora.common.training import stacked_loop
from colora.server.reporting.run_folder import RunFolder
from colora.server.reporting.summary import summarize
from colora.simulation import cohort, local_grid
from colora.simulation.rendezvous import Rendezvous
from colora.simulation.run import LocalObserver, simulate

from ..conftest import labelled_rows, write_lines

Arrays = dict[str, np.ndarray]


def run(raw: dict, folder: Path, **simulation: Any) -> RunFolder:
    settings = {**raw["simulation"], **simulation}
    return simulate(recipe_from({**raw, "simulation": settings}), folder, resume=False)


def results(folder: RunFolder) -> dict[str, Arrays]:
    """The last checkpoint and the last state of each site."""
    places = (folder.path / "checkpoints", *sorted(folder.path.glob("sites/*/state")))
    return {
        p.parent.name if p.name == "state" else p.name: load_arrays(sorted(p.glob("round-*"))[-1])[0] for p in places
    }


def twin(folder: Path, name: str, seed: int) -> dict:
    """A site with two labels. Equal seeds give equal rows."""
    sources = {
        key: str(
            write_lines(folder / "rows" / f"{name}-{key}.jsonl", labelled_rows(["yes", "no"], count, seed + count))
        )
        for key, count in (("source", 12), ("test_source", 6))
    }
    return {"name": name, **sources}


def differences(a: dict[str, Arrays], b: dict[str, Arrays]) -> list[float]:
    assert a.keys() == b.keys()
    assert all(a[place].keys() == b[place].keys() for place in a)
    return [float(np.abs(value - b[place][key]).max()) for place in a for key, value in a[place].items() if value.size]


def gone_together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of sites of each training in one batch."""
    sizes: list[int] = []
    together = stacked_loop.train_together

    def counted(sites: list) -> list:
        sizes.append(len(sites))
        return together(sites)

    monkeypatch.setattr(cohort, "train_together", counted)
    return sizes


CASES = [
    pytest.param(method, kind, marks=[] if kind == "none" or method == "colora" else pytest.mark.slow)
    for method in METHODS
    for kind in PRIVATE_KINDS
]


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_every_method_and_private_kind_equals_training_one_after_the_other(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kind: str
) -> None:
    """Two of the sites have two labels, and one has three and trains alone. Their texts have unequal lengths."""
    train = {
        **tiny_recipe["train"],
        "steps": 3,
        "final_steps": 2,
        "max_grad_norm": 0.5,
        "persist_optimizer_state": True,
    }
    raw = {**tiny_recipe, "method": {"name": method}, "private": kind, "train": train}
    sequential = run(raw, tmp_path / "local")
    sizes = gone_together(monkeypatch)
    batched = run(raw, tmp_path / "batched", engine="batched")
    assert sizes == [2, 2, 2]
    assert max(differences(results(sequential), results(batched))) < 1e-5
    rows = [summarize(folder.events()).rows for folder in (sequential, batched)]
    assert [row.metrics.keys() for row in rows[0].values()] == [row.metrics.keys() for row in rows[1].values()]


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": {"core": "diagonal"}},
        {"adapter": {"core": "residual"}},
        {"train": {"schedule": "alternating", "personal_steps": 2, "shared_steps": 2, "steps": None}},
        {"train": {"fallback": "local"}, "data": {"validation_fraction": 0.34}},
        {"train": {"optimizer": "sgd"}},
        {"server": {"weights": "benefit"}},
    ],
    ids=str,
)
def test_options_equal_training_one_after_the_other(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict
) -> None:
    raw = {**tiny_recipe, **{key: {**tiny_recipe.get(key, {}), **value} for key, value in change.items()}}
    raw["train"] = {key: value for key, value in raw["train"].items() if value is not None}
    sequential = run(raw, tmp_path / "local")
    sizes = gone_together(monkeypatch)
    batched = run(raw, tmp_path / "batched", engine="batched")
    assert max(sizes) == 2
    assert max(differences(results(sequential), results(batched))) < 1e-5


def test_generation_equals_training_one_after_the_other(
    generation_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequential = run(generation_recipe, tmp_path / "local")
    sizes = gone_together(monkeypatch)
    batched = run(generation_recipe, tmp_path / "batched", engine="batched")
    assert sizes == [2, 2]
    assert max(differences(results(sequential), results(batched))) < 1e-5


def test_a_cohort_limits_the_number_of_sites_in_a_batch(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = {**tiny_recipe, "site": [twin(tmp_path, f"s{i}", seed=i) for i in range(5)]}
    sizes = gone_together(monkeypatch)
    run(raw, tmp_path / "run", engine="batched", cohort=2)
    assert sizes == [2, 2, 2, 2]  # two rounds of 2 + 2 + 1 sites


def test_a_site_that_fails_does_not_hold_up_the_others(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = Trainer.handle

    def failing(self: Trainer, request: Any, *rest: Any, **more: Any) -> Any:
        if self.site == "bob":
            raise RefusedError("test", "nothing", "something")
        return handle(self, request, *rest, **more)

    monkeypatch.setattr(Trainer, "handle", failing)
    raw = {**tiny_recipe, "server": {"quorum": 2}}
    folder = run(raw, tmp_path / "run", engine="batched")
    rounds = [event["admitted"] for event in folder.events() if event["event"] == "round"]
    assert rounds == [["ada", "cyd"], ["ada", "cyd"]]


def test_a_cohort_runs_again_until_all_of_its_replies_are_on_disk(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends when the second site of round 2 has replied; ``--resume`` gives the bits of an undisturbed run."""
    calm = results(run(tiny_recipe, tmp_path / "calm", engine="batched"))
    recipe = recipe_from({**tiny_recipe, "simulation": {**tiny_recipe["simulation"], "engine": "batched"}})
    answer, answered = local_grid.LocalGrid._answer, []

    def ending(self: Any, message: Any) -> Any:
        reply = answer(self, message)
        answered.append(message)
        if len(answered) == 3 + 3 + 2:  # three joined, and three trained in round 1
            raise KeyboardInterrupt
        return reply

    monkeypatch.setattr(local_grid.LocalGrid, "_answer", ending)
    with pytest.raises(KeyboardInterrupt):
        simulate(recipe, tmp_path / "killed", resume=False)
    states = [p.parent.parent.name for p in (tmp_path / "killed").glob("sites/*/state/round-000002*")]
    assert sorted(states) == ["ada", "bob", "cyd"][: len(states)]
    (tmp_path / "killed" / "sites" / "bob" / "state" / "round-000002.safetensors").unlink()  # as if it came later
    monkeypatch.setattr(local_grid.LocalGrid, "_answer", answer)
    resumed = results(simulate(recipe, tmp_path / "killed", resume=True))
    assert max(differences(calm, resumed)) == 0.0


def test_dropout_gives_each_site_masks_of_its_own_and_repeats(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sites with equal rows draw other masks; a second run draws the same ones again."""
    twins = [twin(tmp_path, name, seed=0) for name in ("one", "two")]
    adapter = {**tiny_recipe["adapter"], "dropout": 0.5}
    raw = {**tiny_recipe, "site": twins, "adapter": adapter, "rounds": 1, "server": {"quorum": 2}}
    first, second = (results(run(raw, tmp_path / name, engine="batched")) for name in ("a", "b"))
    assert max(differences(first, second)) == 0.0
    cores = [next(v for k, v in first[name].items() if k.endswith("lora_core")) for name in ("one", "two")]
    assert np.abs(cores[0] - cores[1]).max() > 0


@pytest.mark.parametrize("reason", ["fp16", "micro_batch"])
def test_what_cannot_be_stacked_trains_one_after_the_other_and_says_why(
    tiny_recipe: dict, tmp_path: Path, reason: str
) -> None:
    change = {"micro_batch": {"train": {**tiny_recipe["train"], "micro_batch": 2}}}.get(reason, {})
    if reason == "fp16":
        change = {"model": {**tiny_recipe["model"], "precision": "fp16"}}
    raw = {**tiny_recipe, **change}
    told: list[str] = []
    recipe = recipe_from({**raw, "simulation": {**raw["simulation"], "engine": "batched"}})
    batched = simulate(recipe, tmp_path / "batched", resume=False, terminal=LocalObserver(on_notice=told.append))
    assert max(differences(results(run(raw, tmp_path / "local")), results(batched))) == 0.0
    assert len(told) == 1
    assert reason in told[0]


def test_a_layer_that_mixes_rows_is_noticed(tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose output for a row depends on the other rows of its batch."""
    from transformers import BertForSequenceClassification

    forward = BertForSequenceClassification.forward

    def mixing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits + out.logits.roll(1, 0)
        return out

    monkeypatch.setattr(BertForSequenceClassification, "forward", mixing)
    sequential, batched = run(tiny_recipe, tmp_path / "local"), run(tiny_recipe, tmp_path / "batched", engine="batched")
    assert max(differences(results(sequential), results(batched))) == 0.0


def test_a_parameter_outside_linear_layers_is_not_stackable() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    parameters = dict(model.named_parameters())
    stacks = {key: nn.Parameter(torch.stack([value, value])) for key, value in parameters.items()}
    with (
        pytest.raises(NotStackable, match=r"1\.bias is not the weight of a linear layer"),
        stacked(model, parameters, stacks),
    ):
        pass
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert isinstance(model[0], nn.Linear)


def test_calls_of_a_rendezvous_run_one_at_a_time_and_share_their_work() -> None:
    meeting, seen = Rendezvous(), []

    def doubled(items: list[int]) -> list[int]:
        seen.append(list(items))
        return [2 * item for item in items]

    def call(number: int) -> int:
        value = number
        for _ in range(number):
            value = meeting.together(doubled, value)
        return value

    assert meeting.run([lambda: call(1), lambda: call(2), lambda: call(0)]) == [2, 8, 0]
    assert seen == [[1, 2], [4]]


def test_an_error_of_shared_work_reaches_every_call() -> None:
    meeting = Rendezvous()

    def broken(items: list[int]) -> list[int]:
        raise ValueError("broken")

    def call() -> str:
        with pytest.raises(ValueError, match="broken"):
            meeting.together(broken, 1)
        return "caught"

    assert meeting.run([call, call]) == ["caught", "caught"]
