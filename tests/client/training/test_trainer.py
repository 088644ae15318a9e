"""What a round means at a site: what moves, what stands still, what stays, and what comes back when asked again."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from colora.client.data.selection import load_site_rows
from colora.client.training import trainer as trainer_module
from colora.client.training.adapted_model import AdaptedModel, attach_adapters
from colora.client.training.state_store import PersonalState, StateStore
from colora.client.training.trainer import Trainer
from colora.client.training.update_pipeline import update_norm
from colora.common.adapters.initialization import initial_shared_state
from colora.common.atomic_io import load_arrays
from colora.common.config.loader import load_site, recipe_from
from colora.common.config.schema import AdapterSettings, MethodSettings, ModelSettings, Plan, TrainSettings, to_json
from colora.common.dataset import SiteDataset
from colora.common.errors import RefusedError, StateError
from colora.common.methods import METHODS, PERSONAL, SHARED, group_of
from colora.common.models.base_model import load_base_model
from colora.common.protocol.types import Arrays, TrainReply, TrainRequest
from colora.common.training import micro_batch
from colora.common.training.loop import TrainCursor, batch_indices
from colora.simulation.run import simulate

Values = dict[str, torch.Tensor]
LETTERS = "a b c d e f g h i j k l m n o p q r s t u v w x y z".split()  # noqa: SIM905


@dataclass(frozen=True)
class Town:
    """A place to build sites: a base model's folder, and room for their states."""

    source: Path
    folder: Path

    def plan(self, method: str = "colora", *, dropout: float = 0.0, rounds: int = 4, **train: Any) -> Plan:
        settings = TrainSettings(**{"steps": 2, "batch_size": 4, "lr": 1e-2, **train})
        adapter = AdapterSettings(4, 8.0, dropout, ("query", "value"))
        model, row = ModelSettings(str(self.source), max_length=16, device="cpu"), MethodSettings(method)
        return Plan("town", rounds, model, seed=3, adapter=adapter, method=row, train=settings)

    def bench(self, plan: Plan) -> AdaptedModel:
        return attach_adapters(load_base_model(plan.model, generates=False), plan)

    def site(
        self, plan: Plan, name: str = "ada", *, bench: AdaptedModel | None = None, at: str = "", rows: int = 16
    ) -> Trainer:
        """A site of ``rows`` different texts; ``at`` sets its state apart from that of another of the same name."""
        texts = random.Random(name)
        made = [{"text": " ".join(texts.choices(LETTERS, k=8)), "label": ["no", "yes"][i % 2]} for i in range(rows)]
        store = StateStore(self.folder / at / name, plan.name)
        site_rows = SiteDataset(name, "classification", made, made[:6], ("no", "yes"))
        return Trainer(bench or self.bench(plan), site_rows, store)


@pytest.fixture
def town(tiny_bert: Path, tmp_path: Path) -> Town:
    torch.set_num_threads(1)
    return Town(tiny_bert, tmp_path)


def order(
    plan: Plan, t: int, shared: Arrays, *, admitted: int | None = None, phase: Any = "train", evaluate: bool = False
) -> TrainRequest:
    """Round t of a plan for a site whose last admitted round is the one before, unless said otherwise."""
    return TrainRequest(plan.name, t, phase, t - 1 if admitted is None else admitted, to_json(plan), shared, evaluate)


def randomized(shared: Arrays, seed: int = 0) -> dict[str, np.ndarray]:
    """A shared adapter that does something: B is not zero any more."""
    rng = np.random.default_rng(seed)
    return {key: value + rng.normal(0, 0.3, value.shape).astype(np.float32) for key, value in shared.items()}


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def now(site: Trainer) -> Values:
    return {key: value.detach().clone() for key, value in site.parameters.items()}


def state(site: Trainer, t: int) -> PersonalState:
    found = site.store.state(t)
    assert found is not None
    return found


def files(site: Trainer) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(site.store.folder.iterdir())}


def moved(before: Values, after: Values) -> set[str]:
    """The parameter groups of which some number changed."""
    return {group_of(key) for key in before if not torch.equal(before[key], after[key])}


# --- sites do not touch each other ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_site_is_bit_identical_before_and_after_another_trains(town: Town, method: str) -> None:
    plan = town.plan(method)
    start, bench = initial_shared_state(plan), town.bench(plan)
    ada, bob, alone = town.site(plan, bench=bench), town.site(plan, "bob", bench=bench), town.site(plan, at="alone")
    reply = ada.handle(order(plan, 1, start))
    head, written = {k: v.clone() for k, v in ada.task.head.items()}, files(ada)

    for t in (1, 2):
        bob.handle(order(plan, t, start))

    assert same(ada.task.head, head)
    assert files(ada) == written
    # nothing of bob's is left on the bench either: ada goes on as a site that has the machine to itself
    alone.handle(order(plan, 1, start))
    mine, lonely = (site.handle(order(plan, 2, reply.shared)) for site in (ada, alone))
    assert same(mine.shared, lonely.shared)
    assert same(state(ada, 2).tensors, state(alone, 2).tensors)
    assert not same(state(ada, 2).tensors, state(bob, 2).tensors)


@pytest.mark.parametrize("method", METHODS)
def test_no_reply_of_any_kind_carries_a_personal_array(town: Town, method: str) -> None:
    plan = town.plan(method, final_steps=1)
    site, shared = town.site(plan), initial_shared_state(plan)
    for t, phase in ((1, "train"), (2, "train"), (3, "finalize")):
        reply = site.handle(order(plan, t, shared, phase=phase, evaluate=True))
        assert {METHODS[method].role(key) for key in reply.shared} <= {SHARED}
        assert bool(reply.shared) == (phase == "train" and METHODS[method].shares)
        assert all(isinstance(value, float) for value in reply.metrics.values())


def test_the_last_gate_refuses_a_reply_with_an_extra_array(town: Town) -> None:
    """Whatever went wrong before it: a core that reaches the gate stops there, and nothing is written."""
    plan = town.plan()
    site, start = town.site(plan), initial_shared_state(plan)
    core = next(key for key in site.parameters if group_of(key) == "core")
    leaking = TrainReply("ada", plan.name, 1, "k", {**start, core: np.eye(4, dtype=np.float32)}, 1, 1)
    with pytest.raises(RefusedError, match=rf"site ada: arrays: expected the shared groups only, found also {core}"):
        site._send(PersonalState(1), leaking, order(plan, 1, start), {})
    assert not site.store.folder.exists()
    harmless = dataclasses.replace(leaking, shared=start)
    site._send(PersonalState(1), harmless, order(plan, 1, start), {})  # without it the gate is open
    assert site.store.reply(1, "k") is not None


# --- where a head of its own begins ---


def test_a_fitted_head_is_where_a_site_begins_and_only_there(town: Town) -> None:
    plan = town.plan(head_init="probe", lr=0.0, steps=1)
    shared = randomized(initial_shared_state(plan))
    site, again = town.site(plan), town.site(plan, at="again")
    site.load(shared, {})
    assert site.task.fit_head()
    fitted = {key: p.detach().clone() for key, p in site.task.head.items()}
    assert any(bool((value != site.initial[key]).any()) for key, value in fitted.items())
    for trainer in (site, again):
        trainer.handle(order(plan, 1, shared))
        state = trainer.store.state(1)
        assert state
        assert all(torch.equal(state.tensors[key], value) for key, value in fitted.items()), "and to the bit each time"
    learning = town.plan(head_init="probe", lr=1e-2, steps=1)
    other = town.site(learning, at="other")
    moved_on = other.handle(order(learning, 1, shared)).shared
    other.handle(order(learning, 2, moved_on))
    first, second = (state.tensors for state in map(other.store.state, (1, 2)) if state)
    assert 0 < max(float((second[key] - first[key]).abs().max()) for key in fitted) < 0.05, "a step, not a new fit"


def test_the_final_head_is_the_regression_of_the_final_features(town: Town) -> None:
    """Oracle: ``probe``, which measures such a regression without setting the head."""
    plans = {kind: town.plan(final_head=kind, lr=1e-2, steps=2, final_steps=2) for kind in ("trained", "probe")}
    shared = randomized(initial_shared_state(plans["probe"]))
    sites = {kind: town.site(plan, at=kind) for kind, plan in plans.items()}
    ended = {}
    for kind, site in sites.items():
        moved_on = site.handle(order(plans[kind], 1, shared)).shared
        reply = site.handle(order(plans[kind], 3, moved_on, admitted=1, phase="finalize"))
        state = site.store.state(3)
        assert state
        ended[kind] = state.tensors
        site.load(moved_on, state.tensors)
        if kind == "probe":
            measured = site.task.probe()
            assert measured is not None
            assert reply.metrics["personal.accuracy"] == measured["accuracy"]
    assert ended["trained"].keys() == ended["probe"].keys()
    differ = {key for key, value in ended["trained"].items() if not torch.equal(value, ended["probe"][key])}
    assert differ == set(sites["probe"].task.head), "the steps are the same, and the head alone differs"


def test_a_head_that_is_shared_is_not_fitted_by_a_site(town: Town) -> None:
    plan = town.plan(head_init="probe", lr=0.0, steps=1)
    plan = dataclasses.replace(plan, method=MethodSettings("colora", head="shared"))
    site, shared = town.site(plan), initial_shared_state(plan, 2)
    answered = site.handle(order(plan, 1, shared)).shared
    assert all(np.array_equal(answered[key], shared[key]) for key in shared)


# --- late sites -----------------------------------------------------------------------------------------------------


def test_a_late_sites_first_model_is_the_shared_one_to_the_bit(town: Town) -> None:
    """Oracle: plain LoRA, which has no core at all, with the same A and B and the site's own first head."""
    plan, plain = town.plan(), town.plan("fedit")
    shared = randomized(initial_shared_state(plan))
    late, oracle = town.site(plan), town.site(plain, at="plain")
    calls: list[tuple[dict, torch.Tensor]] = []
    late.task.module.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((kwargs, output.logits.detach().clone())), with_kwargs=True
    )
    reply = late.handle(order(plan, 3, shared, admitted=0))
    inputs, logits = calls[0]
    assert not reply.fresh  # a site that never took part has lost nothing
    oracle.load(shared, {})
    assert torch.equal(oracle.task.module(**inputs).logits, logits)
    assert not torch.equal(calls[1][1], logits)


def test_a_site_that_joins_a_run_late_starts_from_the_shared_adapter(tiny_recipe: dict, tmp_path: Path) -> None:
    """Oracle: a site outside the run that is handed the checkpoint of round 1."""
    tiny_recipe["site"][2]["from_round"] = 2
    recipe = recipe_from({**tiny_recipe, "server": {"quorum": 2}})
    run = simulate(recipe, tmp_path / "run", resume=False)
    started = {e["round"]: e["sites"] for e in run.events() if e["event"] == "round_started"}
    assert started == {1: ["ada", "bob"], 2: ["ada", "bob", "cyd"]}
    arrays, _ = load_arrays(run.path / "checkpoints" / "round-000001.safetensors", prefix="shared/")

    rows = load_site_rows(load_site(run.path / "sites" / "cyd" / "site.toml"), recipe.seed)
    bench = attach_adapters(load_base_model(recipe.model, generates=False), recipe.plan)
    outside = Trainer(bench, rows, StateStore(tmp_path / "outside", recipe.name))
    outside.handle(order(recipe.plan, 2, arrays, admitted=0))
    inside = StateStore(run.path / "sites" / "cyd" / "state", recipe.name)
    assert inside.state(1) is None
    found = inside.state(2)
    assert found is not None
    assert same(found.tensors, state(outside, 2).tensors)


def test_a_site_that_lost_its_state_says_so(town: Town) -> None:
    plan = town.plan()
    assert town.site(plan).handle(order(plan, 3, initial_shared_state(plan), admitted=2)).fresh


# --- rounds are idempotent ------------------------------------------------------------------------------------------


def test_the_same_order_gives_the_stored_reply_and_no_training(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = town.plan()
    site, asked = town.site(plan), order(plan, 1, initial_shared_state(plan), evaluate=True)
    first, written = site.handle(asked), files(site)

    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(trainer_module, "train", fail)
    monkeypatch.setattr(site.task, "measure", fail)
    restarted = Trainer(site.model, site.task.rows, StateStore(site.store.folder, plan.name))
    for answering in (site, restarted):
        again = answering.handle(dataclasses.replace(asked))
        assert same(again.shared, first.shared)
        told, before = (dataclasses.replace(reply, shared={}) for reply in (again, first))
        assert told == before
        assert files(site) == written
    with pytest.raises(AssertionError, match="trained again"):
        site.handle(order(plan, 2, first.shared))


def test_a_clipped_reply_is_stored_and_repeated_as_it_was_sent(town: Town) -> None:
    """The personal state is that of an unclipped site: only what is sent is scaled."""
    plan, free = town.plan(max_update_norm=0.01), town.plan()
    start = initial_shared_state(plan)
    site, unclipped = town.site(plan), town.site(free, at="free")
    first, whole = site.handle(order(plan, 1, start)), unclipped.handle(order(free, 1, start))
    assert 0 < update_norm(first.shared, start) <= 0.01 < update_norm(whole.shared, start)
    assert first.metrics["update.scale"] == pytest.approx(0.01 / update_norm(whole.shared, start), rel=1e-4)
    assert "update.scale" not in whole.metrics
    assert same(state(site, 1).tensors, state(unclipped, 1).tensors)
    again = Trainer(site.model, site.task.rows, StateStore(site.store.folder, plan.name)).handle(order(plan, 1, start))
    assert same(again.shared, first.shared)
    assert again.metrics == first.metrics


@pytest.mark.slow
@pytest.mark.parametrize("what", ["shared", "plan", "evaluate"])
def test_a_round_asked_again_with_other_content_is_trained_again_from_the_base(town: Town, what: str) -> None:
    """The coordinator went back to a checkpoint: the first try leaves no trace."""
    plan = town.plan()
    start = initial_shared_state(plan)
    site, other = town.site(plan), town.site(plan, at="other")
    for each in (site, other):
        each.handle(order(plan, 1, start))
    asked = order(plan, 2, randomized(start))
    changes = {"shared": randomized(start, 1), "plan": to_json(town.plan(rounds=9)), "evaluate": True}
    instead = dataclasses.replace(asked, **{what: changes[what]})
    assert instead.key != asked.key

    discarded, reply, expected = site.handle(asked), site.handle(instead), other.handle(instead)
    assert reply.key == instead.key
    assert same(reply.shared, expected.shared)
    assert same(state(site, 2).tensors, state(other, 2).tensors)
    assert state(site, 2).position == state(other, 2).position == 16
    assert same(discarded.shared, reply.shared) == (what != "shared")


def test_a_candidate_that_was_not_admitted_leaves_the_base_alone(town: Town) -> None:
    """Round 2 was late or refused: round 3 goes on from round 1, as at a site that was never asked for round 2."""
    plan = town.plan(persist_optimizer_state=True)
    start = initial_shared_state(plan)
    site, unsampled = town.site(plan), town.site(plan, at="unsampled")
    for each in (site, unsampled):
        each.handle(order(plan, 1, start))
    site.handle(order(plan, 2, randomized(start)))
    third = order(plan, 3, start, admitted=1)
    mine, expected = site.handle(third), unsampled.handle(third)
    assert same(mine.shared, expected.shared)
    assert same(state(site, 3).tensors, state(unsampled, 3).tensors)
    assert same(state(site, 3).optimizer_state, state(unsampled, 3).optimizer_state)
    assert state(site, 3).position == 16
    # and had it been admitted, it would have counted
    admitted = site.handle(order(plan, 3, start, admitted=2))
    assert not same(admitted.shared, expected.shared)


def test_the_base_stays_on_disk_until_a_later_order_names_another(town: Town) -> None:
    plan = town.plan()
    site, start = town.site(plan), initial_shared_state(plan)
    site.handle(order(plan, 1, start))
    for t in (2, 3, 4):
        site.handle(order(plan, t, start, admitted=1))
        assert site.store.state(1) is not None
    site.handle(order(plan, 5, start, admitted=4))
    assert [path.name for path in sorted(site.store.folder.iterdir())] == [
        f"round-{t:06d}.safetensors" for t in (1, 4, 5)
    ]


def test_an_order_that_names_a_round_the_site_never_had_deletes_nothing(town: Town) -> None:
    """A coordinator that claims a far future must not clear the site's memory."""
    plan = town.plan()
    site, start = town.site(plan), initial_shared_state(plan)
    for t in (1, 2):
        site.handle(order(plan, t, start))
    before = files(site)
    assert site.handle(order(plan, 900, start, admitted=899)).fresh
    assert files(site).items() >= before.items()


def test_orders_that_do_not_fit_are_refused_and_leave_no_state(town: Town) -> None:
    plan = town.plan()
    site, start = town.site(plan), initial_shared_state(plan)
    name = next(iter(start))
    core = next(key for key in site.parameters if group_of(key) == "core")
    wrong: dict[str, tuple[Arrays, str]] = {
        "missing": ({k: v for k, v in start.items() if k != name}, "no such array"),
        "extra": ({**start, core: np.eye(4, dtype=np.float32)}, core),
        "shape": ({**start, name: start[name].T.copy()}, "shape"),
        "dtype": ({**start, name: start[name].astype(np.float64)}, "float64"),
    }
    for arrays, told in wrong.values():
        with pytest.raises(RefusedError, match=told) as caught:
            site.handle(order(plan, 1, arrays))
        assert caught.value.site == "ada"
    assert not site.store.folder.exists()


def test_a_state_of_another_federation_or_plan_is_never_loaded(town: Town) -> None:
    plan = town.plan()
    site, start = town.site(plan), initial_shared_state(plan)
    site.handle(order(plan, 1, start))
    stranger = Trainer(site.model, site.task.rows, StateStore(site.store.folder, "elsewhere"))
    with pytest.raises(StateError, match="belongs to federation town, not to elsewhere"):
        stranger.handle(order(plan, 2, start))
    with pytest.raises(RefusedError, match="personal state"):
        site.load(start, {"no.such.lora_core": torch.eye(4)})


# --- the order of data ----------------------------------------------------------------------------------------------


def drawn(site: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the row numbers that the site trains on."""
    numbers = {id(example): i for i, example in enumerate(site.task.train.examples)}
    seen: list[int] = []
    collate = site.task.collate

    def recording(examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        seen.extend(numbers[id(example)] for example in examples)
        return collate(examples)

    monkeypatch.setattr(site.task, "collate", recording)
    return seen


def test_no_round_repeats_the_last_ones_examples(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows, 2 steps of 4 a round: two rounds are one epoch, and every epoch has another order."""
    plan = town.plan()
    site, start = town.site(plan), initial_shared_state(plan)
    seen = drawn(site, monkeypatch)
    for t in range(1, 7):
        site.handle(order(plan, t, start))
    rounds = [seen[i : i + 8] for i in range(0, len(seen), 8)]
    assert len(rounds) == 6
    epochs = [rounds[i] + rounds[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_round_trained_again_from_its_base_sees_the_same_examples(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = town.plan()
    site, start = town.site(plan), initial_shared_state(plan)
    site.handle(order(plan, 1, start))
    seen = drawn(site, monkeypatch)
    for seed in (0, 1):
        site.handle(order(plan, 2, randomized(start, seed)))
    assert seen[:8] == seen[8:]


@pytest.mark.parametrize(("rows", "batch"), [(10, 4), (7, 3), (5, 8), (4, 4), (3, 1)])
def test_every_epoch_visits_every_example_once(rows: int, batch: int) -> None:
    """Also where batches run over the end of an epoch, and where the stretch was cut at any place."""
    endless = batch_indices(rows, batch, TrainCursor(0, 1, 0, seed=1, noise=0))
    size = min(rows, batch)
    batches = [next(endless) for _ in range(5 * rows)]
    flat = [i for one in batches for i in one]
    assert {len(one) for one in batches} == {size}
    for start in range(0, len(flat), rows):
        assert sorted(flat[start : start + rows]) == list(range(rows))
    later = batch_indices(rows, batch, TrainCursor(0, 1, 3 * size, seed=1, noise=0))
    assert [next(later) for _ in range(9)] == batches[3:12]


def test_sites_shuffle_by_their_own_name(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = town.plan()
    bench, start = town.bench(plan), initial_shared_state(plan)
    orders = []
    for name in ("ada", "bob"):
        site = town.site(plan, name, bench=bench)
        seen = drawn(site, monkeypatch)
        site.handle(order(plan, 1, start))
        orders.append(seen)
    assert orders[0] != orders[1]


# --- steps, rates and phases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One optimizer step as it happened: rates by group, and the parameters before and after."""

    rates: dict[str, float]
    before: Values
    after: Values


def steps(site: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Grows by every optimizer step of the site."""
    taken: list[Step] = []
    original = micro_batch.apply_gradients
    names = {id(parameter): key for key, parameter in site.parameters.items()}

    def recording(optimizer: Any, max_grad_norm: float, scaler: Any) -> bool:
        before = now(site)
        applied = original(optimizer, max_grad_norm, scaler)
        rates = {group_of(names[id(p)]): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        taken.append(Step(rates, before, now(site)))
        return applied

    monkeypatch.setattr(micro_batch, "apply_gradients", recording)
    return taken


def test_the_learning_rate_follows_global_steps(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 rounds of 2 steps and 2 final ones: step i of 10 has rate lr · (1 − i/10), whichever rounds a site missed."""
    plan = town.plan(lr_schedule="linear", core_lr=0.5, head_lr=0.25, final_steps=2)
    site, start = town.site(plan), initial_shared_state(plan)
    taken = steps(site, monkeypatch)
    site.handle(order(plan, 1, start))
    site.handle(order(plan, 4, start, admitted=1))
    site.handle(order(plan, 5, start, phase="finalize"))
    expected = [1 - i / 10 for i in (0, 1, 6, 7, 8, 9)]
    for step, factor in zip(taken, expected, strict=True):
        assert step.rates["core"] == pytest.approx(0.5 * factor)
        assert step.rates["head"] == pytest.approx(0.25 * factor)
        if "A" in step.rates:
            assert step.rates["A"] == step.rates["B"] == pytest.approx(1e-2 * factor)


@pytest.mark.parametrize("warmup", [{"warmup_steps": 3}, {"warmup_ratio": 0.3}])
def test_warm_up_spans_rounds(town: Town, monkeypatch: pytest.MonkeyPatch, warmup: dict[str, Any]) -> None:
    """Three steps, as a number or as 0.3 of all eight steps, rounded up."""
    plan = town.plan(lr_schedule="constant_with_warmup", **warmup)
    site, start = town.site(plan), initial_shared_state(plan)
    taken = steps(site, monkeypatch)
    for t in (1, 2, 3):
        site.handle(order(plan, t, start))
    assert [step.rates["A"] / 1e-2 for step in taken] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])


def test_one_epoch_is_so_many_steps_to_the_bit(town: Town) -> None:
    """16 rows in batches of 4: one pass is 4 steps, in the schedule too, and a repeated request trains nothing."""
    shared = randomized(initial_shared_state(town.plan()))
    replies = {}
    for settings in ({"steps": 4}, {"steps": None, "epochs": 1.0}):
        plan = town.plan(lr_schedule="linear", final_steps=2, persist_optimizer_state=True, **settings)
        site = town.site(plan, at=str(len(replies)))
        steps: list[tuple[int, int]] = []
        reply = site.handle(order(plan, 1, shared), lambda *at, to=steps: to.append(at))
        assert steps[-1] == (4, 4)
        assert site.handle(order(plan, 1, shared), lambda *at: pytest.fail("trained again")).seconds == reply.seconds
        second = site.handle(order(plan, 2, reply.shared))
        end = site.handle(order(plan, 5, second.shared, admitted=2, phase="finalize"))
        replies[plan.train.epochs] = second, state(site, 2).tensors, state(site, 5).tensors
        assert (reply.terms, second.terms, end.terms) == (16, 16, 8)
    (one, *personal), (other, *also) = replies.values()
    assert same(one.shared, other.shared)
    assert all(map(same, personal, also))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_alternating_freezes_one_side_at_a_time_to_the_bit(
    town: Town, monkeypatch: pytest.MonkeyPatch, optimizer: Any
) -> None:
    """Weight decay and kept moments would move a frozen group too, if it were merely without gradient."""
    plan = town.plan(
        schedule="alternating",
        personal_steps=2,
        shared_steps=3,
        weight_decay=0.1,
        persist_optimizer_state=True,
        optimizer=optimizer,
    )
    site, shared = town.site(plan), randomized(initial_shared_state(plan))
    taken = steps(site, monkeypatch)
    for t in (1, 2):
        site.handle(order(plan, t, shared))
    assert len(taken) == 2 * plan.train.steps_per_round(16) == 10
    for number, step in enumerate(taken):
        assert moved(step.before, step.after) == ({"core", "head"} if number % 5 < 2 else {"A", "B"})


@pytest.mark.parametrize("method", METHODS)
def test_joint_moves_what_is_shared_or_personal_and_the_close_what_is_personal(town: Town, method: str) -> None:
    plan = town.plan(method, steps=3, final_steps=2, weight_decay=0.1, persist_optimizer_state=True)
    site, shared = town.site(plan), randomized(initial_shared_state(plan))
    row = METHODS[method]
    groups = {role: {group_of(key) for key in site.parameters if row.role(key) is role} for role in (SHARED, PERSONAL)}
    site.load(shared, {})
    before = now(site)
    site.handle(order(plan, 1, shared))
    assert moved(before, now(site)) == groups[SHARED] | groups[PERSONAL]

    final = randomized(initial_shared_state(plan), 1)
    site.load(final, state(site, 1).tensors)
    before = now(site)
    reply = site.handle(order(plan, 2, final, phase="finalize"))
    site.load(final, state(site, 2).tensors)
    assert moved(before, now(site)) == groups[PERSONAL]
    assert not reply.shared
    assert {group_of(key) for key in state(site, 2).tensors} == groups[PERSONAL]


def test_the_close_itself_leaves_the_shared_groups_bit_identical(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = town.plan(final_steps=3, weight_decay=0.1)
    site, shared = town.site(plan), randomized(initial_shared_state(plan))
    taken = steps(site, monkeypatch)
    site.handle(order(plan, 1, shared, admitted=0, phase="finalize"))
    assert [moved(step.before, step.after) for step in taken] == [{"core", "head"}] * 3


def test_the_first_step_of_colora_is_plain_loras_on_a_and_b(town: Town) -> None:
    """At Λ = I the gradients of A and B are plain LoRA's; only from the second step on the core tells."""
    replies = {}
    for count in (1, 2):
        for method in ("colora", "fedit"):
            plan = town.plan(method, steps=count, optimizer="sgd", lr=10.0, max_grad_norm=0.0)
            shared = randomized(initial_shared_state(plan))
            site = town.site(plan, at=f"{method}-{count}")
            replies[count, method] = site.handle(order(plan, 1, shared)).shared
    for key, start in shared.items():
        np.testing.assert_allclose(replies[1, "colora"][key], replies[1, "fedit"][key], rtol=0, atol=1e-6)
        assert np.abs(replies[1, "colora"][key] - start).max() > 1e-5  # it was a step
    apart = [np.abs(replies[2, "colora"][key] - replies[2, "fedit"][key]).max() for key in shared]
    assert max(apart) > 1e-5


# --- moments, dropout, random numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_kept_moments_make_two_rounds_one_uninterrupted_stretch(town: Town, optimizer: Any) -> None:
    """Nothing is shared, so 2 × 2 steps are 4 steps, to the bit; without the moments they are not."""
    twice = {
        kept: town.plan("local", steps=2, persist_optimizer_state=kept, optimizer=optimizer) for kept in (True, False)
    }
    once = town.plan("local", steps=4, optimizer=optimizer)
    whole = town.site(once, at="whole")
    whole.handle(order(once, 1, {}))
    ends = {}
    for kept, plan in twice.items():
        site = town.site(plan, at=f"kept-{kept}")
        for t in (1, 2):
            site.handle(order(plan, t, {}))
        ends[kept] = state(site, 2)
    assert same(ends[True].tensors, state(whole, 1).tensors)
    assert not same(ends[False].tensors, state(whole, 1).tensors)
    assert ends[True].position == state(whole, 1).position == 16


def test_moments_lie_in_the_same_file_as_the_state_and_the_reply(town: Town) -> None:
    """One file, one rename: they can never disagree."""
    plan = town.plan(persist_optimizer_state=True)
    site, start = town.site(plan), initial_shared_state(plan)
    reply = site.handle(order(plan, 1, start))
    (path,) = site.store.folder.iterdir()
    arrays, meta = load_arrays(path)
    moments = {key.removeprefix("moments/") for key in arrays if key.startswith("moments/")}
    assert moments == {f"{key}/{name}" for key in site.parameters for name in ("step", "exp_avg", "exp_avg_sq")}
    assert {key.removeprefix("state/") for key in arrays if key.startswith("state/")} == {
        key for key in site.parameters if group_of(key) in ("core", "head")
    }
    assert same({k.removeprefix("reply/"): v for k, v in arrays.items() if k.startswith("reply/")}, reply.shared)
    assert meta["position"] == 8
    for key in site.parameters:
        assert arrays[f"moments/{key}/step"] == 2


def test_dropout_is_on_in_training_and_off_in_evaluation(town: Town) -> None:
    """Oracle for evaluation: the same site under a plan without dropout."""
    wet, dry = (town.site(town.plan(dropout=d), at=f"dropout-{d}") for d in (0.5, 0.0))
    shared = randomized(initial_shared_state(wet.plan))
    measured = []
    for site in (wet, dry):
        site.load(shared, {})
        site.task.module.train()  # as a round of training leaves it
        measured += [site.task.measure(generate=False), site.task.probe()]
        assert not any(module.training for module in site.task.module.modules())
    assert measured[:2] == measured[2:]
    trained = [site.handle(order(site.plan, 1, shared)) for site in (wet, dry)]
    assert not same(trained[0].shared, trained[1].shared)


def test_dropout_hangs_on_site_and_round_and_never_on_the_process(town: Town) -> None:
    """The global generator's seed has no say in a round, and a round leaves the generator as it was."""
    plan = town.plan(dropout=0.5)
    start, replies = initial_shared_state(plan), []
    for seed in (0, 1):
        site = town.site(plan, at=f"seed-{seed}")
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        replies.append(site.handle(order(plan, 1, start, evaluate=True)).shared)
        assert torch.equal(torch.get_rng_state(), before)
    assert same(*replies)


def test_a_reply_counts_the_terms_it_trained_on(town: Town) -> None:
    """2 steps of 4 labelled texts; 2 steps of all 3 texts where there are no more."""
    plan = town.plan()
    start = initial_shared_state(plan)
    for rows, expected in ((16, 8), (3, 6)):
        reply = town.site(plan, at=str(rows), rows=rows).handle(order(plan, 1, start))
        assert (reply.terms, reply.examples) == (expected, expected)


def test_measured_on_arrival_are_the_base_the_shared_adapter_and_the_personal_one(town: Town) -> None:
    """Each where there is something to measure: the base once, shared from round 2, personal from the first state."""
    plan = town.plan()
    site, start = town.site(plan), initial_shared_state(plan)
    kinds = [
        {name.partition(".")[0] for name in site.handle(order(plan, t, start, evaluate=evaluate)).metrics}
        for t, evaluate in ((1, True), (2, True), (3, False))
    ]
    assert kinds == [{"base", "train"}, {"base", "shared", "personal", "train"}, {"train"}]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["joint", "alternating"])
def test_every_method_takes_the_same_number_of_steps_in_a_round(town: Town, schedule: str) -> None:
    """So that a baseline has had as many steps as what it is compared with."""
    counts = set()
    for method in METHODS:
        plan = town.plan(method, schedule=schedule, steps=5, personal_steps=2, shared_steps=3)
        counts.add(town.site(plan, at=method).handle(order(plan, 1, initial_shared_state(plan))).examples)
    assert len(counts) == 1
