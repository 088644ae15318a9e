"""The coordinator with sites that only pretend to train: whom it asks, what it admits, and how it goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from colora.client.client_app import make_app
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.loader import recipe_from
from colora.common.config.schema import CommunicationSettings, Recipe
from colora.common.errors import DataError, QuorumError, RefusedError, StateError
from colora.common.event_log import Event, EventLog
from colora.common.protocol import flower_messages as messages
from colora.common.protocol.codec import DEFAULT, as_received
from colora.common.protocol.types import PROTOCOL, Arrays, SiteInfo, TrainReply, TrainRequest, hash_labels, hash_layout
from colora.common.seeds import seed_from
from colora.server.reporting.events import read_events
from colora.server.rounds.admission import PINNED, admit_site
from colora.server.rounds.agreement import agree_on_pins, agreed_tasks, number_of_classes
from colora.server.rounds.checkpoint import Checkpoints, ServerState
from colora.server.rounds.run_options import RosterEntry
from colora.server.rounds.strategy import AdapterStrategy, sample
from colora.server.server_app import train_federation
from colora.simulation.local_grid import LocalGrid

NAMES = ("ada", "bob", "cyd", "dee")
Misbehaviour = Callable[["Pretender", TrainRequest, TrainReply], TrainReply]


@dataclass
class Pretender:
    """A site whose training is noise seeded by its name and the round; it remembers what it was asked."""

    name: str
    layout: str
    does: Misbehaviour = lambda site, order, reply: reply
    about: dict[str, Any] = field(default_factory=dict)
    asked: list[TrainRequest] = field(default_factory=list)

    def site_info(self, federation: str, plan: str) -> SiteInfo:
        one = SiteInfo(self.name, PROTOCOL, "model", "tokenizer", "template", self.layout, "regression", 20, 5, 0, 0)
        return dataclasses.replace(one, **self.about)

    def handle(self, order: TrainRequest) -> TrainReply:
        self.asked.append(order)
        shared = {} if order.kind == "finalize" else trained(self.name, order)
        terms = 10 * (1 + NAMES.index(self.name))
        reply = TrainReply(
            self.name, order.federation, order.round, order.key, shared, terms, terms // 2, {"personal.loss": 1}
        )
        return self.does(self, order, reply)


def trained(site: str, order: TrainRequest) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed_from(site, order.round))
    return {
        k: order.shared[k] + rng.normal(0, 0.1, order.shared[k].shape).astype(np.float32) for k in sorted(order.shared)
    }


def recipe(rounds: int = 4, **server: Any) -> Recipe:
    sites = [{"name": name, "source": "none.npz"} for name in NAMES]
    model, adapter = {"source": "synthetic:bilinear-6"}, {"rank": 2, "target_modules": ["proj"]}
    data, settings = {"task": "regression"}, {"quorum": 2, **server}
    raw = {"name": "fed", "rounds": rounds, "seed": 1, "model": model, "adapter": adapter, "data": data, "site": sites}
    return recipe_from({**raw, "server": settings})


def with_task(settings: Recipe, task: Any) -> Recipe:
    """The recipe with another task for its first site."""
    first, *others = settings.site
    first = dataclasses.replace(first, data=dataclasses.replace(first.data, task=task))
    return dataclasses.replace(settings, site=(first, *others))


@dataclass
class Hall:
    """A folder in which a federation of pretenders can be run, again and again."""

    folder: Path

    def sites(self, settings: Recipe, does: Mapping[str, Misbehaviour] | None = None) -> list[Pretender]:
        layout = hash_layout({key: value.shape for key, value in initial_shared_state(settings.plan).items()})
        return [Pretender(name, layout, (does or {}).get(name, Pretender.does)) for name in NAMES]

    def run(
        self,
        settings: Recipe,
        sites: Sequence[Pretender] | None = None,
        *,
        roster: Sequence[RosterEntry] = tuple(map(RosterEntry, NAMES)),
        app: ClientApp | None = None,
        grid: type[LocalGrid] = LocalGrid,
    ) -> ServerState:
        nodes = self.sites(settings) if sites is None else sites

        def connect(context: Context) -> Pretender:
            return nodes[int(context.node_config["partition-id"])]

        strategy = AdapterStrategy(
            settings, tuple(roster), EventLog(self.folder / "events.jsonl"), self.folder / "spool"
        )
        return train_federation(grid(app or make_app(connect), len(nodes)), strategy, self.checkpoints(settings))

    def checkpoints(self, settings: Recipe) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints", settings)

    def latest(self, settings: Recipe) -> ServerState:
        state = self.checkpoints(settings).latest()
        assert state is not None
        return state

    def events(self, name: str) -> list[Event]:
        return [event for event in read_events(self.folder / "events.jsonl") if event["event"] == name]

    @property
    def admitted(self) -> dict[int, list[str]]:
        return {event["round"]: event["admitted"] for event in self.events("round")}


@pytest.fixture
def hall(tmp_path: Path) -> Hall:
    return Hall(tmp_path / "hall")


def crash(site: Pretender, order: TrainRequest, reply: TrainReply) -> TrainReply:
    raise RuntimeError("a cable was pulled")


def crash_in(*rounds: int) -> Misbehaviour:
    return lambda site, order, reply: crash(site, order, reply) if order.round in rounds else reply


def poison(site: Pretender, order: TrainRequest, reply: TrainReply) -> TrainReply:
    return dataclasses.replace(reply, shared={k: np.full_like(v, np.nan) for k, v in reply.shared.items()})


def same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(one[key].tobytes() == other[key].tobytes() for key in one)


# --- whom it asks ---------------------------------------------------------------------------------------------------


def test_a_sample_is_seeded_in_order_and_never_empty() -> None:
    sites = [f"s{k}" for k in range(10)]
    for fraction, count in ((0.01, 1), (0.3, 3), (0.5, 5), (1.0, 10)):
        chosen = sample(sites, fraction, seed=4)
        assert len(chosen) == count
        assert chosen == sorted(set(chosen))
        assert chosen == sample(list(sites), fraction, seed=4)
    assert len({tuple(sample(sites, 0.3, seed)) for seed in range(20)}) > 10
    assert {site for seed in range(60) for site in sample(sites, 0.3, seed)} == set(sites)
    assert sample([], 0.5, seed=4) == []


def test_sampling_hangs_on_seed_and_roster_and_not_on_the_network(hall: Hall, tmp_path: Path) -> None:
    """The nodes come in another order and with other ids: the same sites are asked in the same rounds."""
    settings = recipe(rounds=6, fraction=0.5)
    sites = hall.sites(settings)
    there = Hall(tmp_path / "there")
    ends = hall.run(settings, sites), there.run(settings, list(reversed(there.sites(settings))))
    assert hall.admitted == there.admitted
    assert same(ends[0].shared, ends[1].shared)
    assert all(len(chosen) == 2 for chosen in hall.admitted.values())
    assert len({tuple(chosen) for chosen in hall.admitted.values()}) > 1
    for site in sites:  # who is not chosen hears nothing
        rounds = [order.round for order in site.asked if order.kind == "train"]
        assert rounds == [t for t, chosen in hall.admitted.items() if site.name in chosen]
    other = Hall(tmp_path / "other")
    other.run(dataclasses.replace(settings, seed=2))
    assert other.admitted != hall.admitted


def test_replies_are_folded_in_roster_order_however_they_come(hall: Hall, tmp_path: Path) -> None:
    class Contrary(LocalGrid):
        """The last question is answered first."""

        def pull_messages(self, message_ids: Any) -> Any:
            return super().pull_messages(list(reversed(list(message_ids))))

    settings = recipe(optimizer="yogi")
    there = Hall(tmp_path / "there")
    ends = hall.run(settings), there.run(settings, grid=Contrary)
    assert [e["site"] for e in there.events("reply")][:4] == list(reversed(NAMES))
    assert there.admitted == hall.admitted == {t: list(NAMES) for t in (1, 2, 3, 4)}
    assert same(ends[0].shared, ends[1].shared)


def test_a_site_is_asked_from_its_first_round_on(hall: Hall) -> None:
    roster = [
        RosterEntry("ada"),
        RosterEntry("bob"),
        RosterEntry("cyd", from_round=3),
        RosterEntry("dee", from_round=9),
    ]
    settings = recipe()
    sites = hall.sites(settings)
    hall.run(settings, sites, roster=roster)
    asked = {site.name: [order.round for order in site.asked if order.kind == "train"] for site in sites}
    assert asked == {"ada": [1, 2, 3, 4], "bob": [1, 2, 3, 4], "cyd": [3, 4], "dee": []}
    assert sites[2].asked[0].admitted_round == 0
    assert [order.kind for order in sites[3].asked] == ["finalize"]  # it still gets the adapter to personalize on


def test_an_order_names_the_sites_last_admitted_round(hall: Hall) -> None:
    settings = recipe(rounds=5, max_attempts=1)
    sites = hall.sites(settings, {"bob": crash_in(2, 3), "cyd": lambda s, o, r: poison(s, o, r) if o.round == 1 else r})
    hall.run(settings, sites)
    assert [order.admitted_round for order in sites[0].asked] == [0, 1, 2, 3, 4, 5]
    assert [order.admitted_round for order in sites[1].asked] == [0, 1, 1, 1, 4, 5]
    assert [order.admitted_round for order in sites[2].asked] == [0, 0, 2, 3, 4, 5]


def test_evaluation_is_thinned_out_but_never_at_the_start_and_the_end(hall: Hall) -> None:
    settings = recipe(rounds=6)
    settings = dataclasses.replace(settings, evaluation=dataclasses.replace(settings.evaluation, every=3))
    sites = hall.sites(settings)
    hall.run(settings, sites)
    assert [(order.round, order.kind) for order in sites[0].asked if order.evaluate] == [
        (1, "train"),
        (4, "train"),
        (7, "finalize"),
    ]


# --- joining --------------------------------------------------------------------------------------------------------


def test_strangers_and_misfits_are_refused_by_name_and_the_rest_goes_on(hall: Hall) -> None:
    settings = recipe()
    sites = hall.sites(settings)
    sites[1].about, sites[3].about = {"model": "another"}, {"site": "eve"}
    hall.run(settings, sites)
    told = {(e["site"], e["field"], e["expected"], e["found"]) for e in hall.events("refused")}
    assert told == {("bob", "model", "model", "another"), ("node 4", "site", "a name of the roster", "eve")}
    assert [e["site"] for e in hall.events("joined")] == ["ada", "cyd"]
    assert not sites[1].asked
    assert not sites[3].asked


@pytest.mark.parametrize("field", [*PINNED, "layout", "protocol"])
def test_a_site_that_differs_in_anything_agreed_upon_is_refused_in_words(hall: Hall, field: str) -> None:
    """Base model, tokenizer, chat template, the shared arrays' names and shapes, and the protocol's version."""
    settings = recipe(rounds=1)
    sites = hall.sites(settings)
    theirs = getattr(sites[0].site_info("fed", ""), field)
    sites[1].about[field] = 99 if field == "protocol" else "another"
    hall.run(settings, sites)
    (refused,) = hall.events("refused")
    assert refused["reason"] == f"site bob: {field}: expected {str(theirs)[:16]}, found {sites[1].about[field]}"
    assert hall.admitted == {1: ["ada", "cyd", "dee"]}
    assert not sites[1].asked


def test_a_site_that_comes_twice_is_the_same_as_once(hall: Hall, tmp_path: Path) -> None:
    settings = recipe()
    sites = hall.sites(settings)
    twice = hall.run(settings, [*sites, Pretender("ada", sites[0].layout)])
    once = Hall(tmp_path / "once").run(settings)
    assert same(twice.shared, once.shared)
    assert hall.admitted[1] == list(NAMES)


def test_another_base_model_is_refused_after_a_restart_too(hall: Hall) -> None:
    """The fingerprints are pinned in the checkpoint: not even all sites together change the model under way."""
    settings = recipe()
    with pytest.raises(QuorumError):
        hall.run(settings, hall.sites(settings, dict.fromkeys(NAMES, crash_in(3))))
    changed = hall.sites(settings)
    for site in changed:
        site.about = {"model": "another"}
    with pytest.raises(QuorumError, match="quorum was not reached at join"):
        hall.run(settings, changed)
    assert {e["site"] for e in hall.events("refused")} == set(NAMES)


def test_too_few_sites_at_the_start_stop_before_anything_is_written(hall: Hall) -> None:
    settings = recipe(quorum=4)
    with pytest.raises(
        QuorumError,
        match=r"quorum was not reached at join: at least 4 sites are required, 3 took part \(ada, bob, cyd\)",
    ):
        hall.run(settings, hall.sites(settings)[:3])
    assert not (hall.folder / "checkpoints").exists()


def test_a_claimed_task_does_not_change_how_all_sites_are_weighted(hall: Hall) -> None:
    """The recipe says that all sites do regression; one site of four claims another task and so far more loss terms."""

    def lie(site: Pretender, order: TrainRequest, reply: TrainReply) -> TrainReply:
        return dataclasses.replace(reply, terms=reply.examples * settings.model.max_length)

    settings = recipe(rounds=1)
    sites = hall.sites(settings, {"ada": lie})
    sites[0].about = {"task": "generation"}
    hall.run(settings, sites)
    assert hall.events("agreed")[0]["weights"] == "tokens"
    (refused,) = hall.events("refused")
    assert (refused["site"], refused["field"], refused["found"]) == ("ada", "task", "generation")
    assert refused["reason"].startswith("site ada: task: expected regression, found generation. Correct [data] task")
    assert hall.events("round")[0]["weights"] == {"bob": 20.0, "cyd": 30.0, "dee": 40.0}
    assert hall.latest(settings).task == "regression"


def test_loss_terms_decide_weights_only_where_no_site_chooses_its_task() -> None:
    """The recipe decides where it describes most sites, else the run before a restart, else most sites."""
    info = SiteInfo("ada", PROTOCOL, "m", "t", "c", "l", "regression", 20, 5, 0, 0)
    joined = [dataclasses.replace(info, site=name) for name in NAMES]
    odd = [dataclasses.replace(joined[0], task="generation"), *joined[1:]]
    settings, as_generation = recipe(), with_task(recipe(), "generation")
    assert agreed_tasks(settings, "tokens", odd) == dict.fromkeys(NAMES, "regression")
    assert agreed_tasks(as_generation, "tokens", odd) == {**dict.fromkeys(NAMES, "regression"), "ada": "generation"}
    silent = dataclasses.replace(settings, data=dataclasses.replace(settings.data, task="classification"), site=())
    assert agreed_tasks(silent, "tokens", odd) == dict.fromkeys(NAMES, "regression")
    assert agreed_tasks(silent, "tokens", odd[:1], "regression") == {"ada": "regression"}
    for weights in ("uniform", "examples", "benefit"):
        assert agreed_tasks(settings, weights, odd) == {}


def test_a_task_that_does_not_exist_is_refused(hall: Hall) -> None:
    settings = recipe(rounds=1)
    sites = hall.sites(settings)
    sites[0].about = {"task": "poetry"}
    hall.run(settings, sites)
    assert [(e["site"], e["field"]) for e in hall.events("refused")] == [("ada", "task")]


def test_the_recipe_pins_fingerprints_whatever_most_sites_have(hall: Hall) -> None:
    """Three of four sites have another model, and would have been the majority."""
    settings = recipe(rounds=1, quorum=1, fingerprints={"model": "the right one"})
    sites = hall.sites(settings)
    sites[2].about = {"model": "the right one"}
    hall.run(settings, sites)
    assert hall.admitted == {1: ["cyd"]}
    assert {e["site"] for e in hall.events("refused")} == {"ada", "bob", "dee"}


def shared_head(rounds: int = 1, **server: Any) -> Recipe:
    raw = {"name": "fed", "rounds": rounds, "model": {"source": "synthetic:bilinear-6"}, "method": {"head": "shared"}}
    sites = [{"name": name, "source": "none.npz"} for name in NAMES]
    return recipe_from({**raw, "data": {"task": "classification"}, "site": sites, "server": {"quorum": 2, **server}})


@pytest.mark.parametrize("classes", [1000, 10**10, -1])
def test_the_shape_of_a_shared_head_is_not_one_sites_claim(classes: int) -> None:
    info = SiteInfo("ada", PROTOCOL, "m", "t", "c", "l", "classification", 20, 5, 0, 0, 3, "yes|no|maybe")
    liar = dataclasses.replace(info, site="bob", classes=classes)
    misfit = dataclasses.replace(info, site="cyd", classes=7, model="another")
    joined = [liar, info, dataclasses.replace(info, site="dee"), misfit]
    settings = shared_head()
    pins = agree_on_pins(settings, joined, {})
    assert number_of_classes(settings, joined, pins) == 3
    declared = dataclasses.replace(settings, data=dataclasses.replace(settings.data, labels=("a", "b")))
    assert number_of_classes(declared, joined, agree_on_pins(declared, joined, {})) == 2


def test_a_shared_head_needs_the_same_labels_in_the_same_order() -> None:
    names = [hash_labels(("yes", "no")), hash_labels(("no", "yes")), hash_labels(("yes", "no"))]
    info = SiteInfo("ada", PROTOCOL, "m", "t", "c", "l", "classification", 20, 5, 0, 0, 2)
    joined = [dataclasses.replace(info, site=NAMES[k], labels=labels) for k, labels in enumerate(names)]
    pins = agree_on_pins(shared_head(), joined, {})
    with pytest.raises(RefusedError, match="site bob: labels"):
        [admit_site(site, pins) for site in joined]
    assert "labels" not in agree_on_pins(recipe(), joined, {})


# --- what it admits -------------------------------------------------------------------------------------------------


def mean_by_hand(before: Arrays, replies: Mapping[str, float], t: int) -> dict[str, np.ndarray]:
    """Σ w_k S_k / Σ w_k over the named sites' noise."""
    order = TrainRequest("fed", t, "train", 0, "{}", before, True)
    total = sum(replies.values())
    return {
        key: sum((w * trained(site, order)[key].astype(np.float64) for site, w in replies.items()), np.zeros(1)) / total
        for key in before
    }


@pytest.mark.parametrize("weights", ["tokens", "examples", "uniform"])
def test_a_round_is_the_weighted_mean_of_its_replies(hall: Hall, weights: str) -> None:
    """Terms are 10, 20, 30, 40, examples half of them."""
    settings = recipe(rounds=1, weights=weights)
    state = hall.run(settings)
    each = {name: 10.0 * (1 + k) if weights != "uniform" else 1.0 for k, name in enumerate(NAMES)}
    expected = mean_by_hand(initial_shared_state(settings.plan), each, 1)
    for key in expected:
        np.testing.assert_allclose(state.shared[key], expected[key], rtol=0, atol=1e-7)


def test_mixed_tasks_weigh_all_sites_alike_unless_told_otherwise(hall: Hall, tmp_path: Path) -> None:
    """Answer tokens and labelled texts cannot be compared."""
    told = Hall(tmp_path / "told")
    for place, server in ((hall, {}), (told, {"weights": "tokens"})):
        settings = with_task(recipe(rounds=1, **server), "generation")
        sites = place.sites(settings)
        sites[0].about = {"task": "generation"}
        place.run(settings, sites)
    assert hall.events("round")[0]["weights"] == dict.fromkeys(NAMES, 1.0)
    assert told.events("round")[0]["weights"] == {"ada": 10.0, "bob": 20.0, "cyd": 30.0, "dee": 40.0}


def test_one_nan_update_does_not_poison_the_mean(hall: Hall) -> None:
    settings = recipe(rounds=1, weights="uniform")
    sites = hall.sites(settings, {"cyd": poison})
    state = hall.run(settings, sites)
    expected = mean_by_hand(initial_shared_state(settings.plan), dict.fromkeys(("ada", "bob", "dee"), 1.0), 1)
    for key in expected:
        np.testing.assert_allclose(state.shared[key], expected[key], rtol=0, atol=1e-7)
    (refused,) = hall.events("refused")
    assert (refused["site"], refused["round"], refused["expected"]) == ("cyd", 1, "finite values")
    assert len([order for order in sites[2].asked if order.kind == "train"]) == 1  # a refusal is no failure


def test_the_median_ignores_one_wild_site_and_reports_no_residual(hall: Hall) -> None:
    """The expected state is the median of what the four sites returned."""

    def wild(site: Pretender, order: TrainRequest, reply: TrainReply) -> TrainReply:
        return dataclasses.replace(reply, shared={k: v + 100 for k, v in reply.shared.items()})

    settings = recipe(rounds=1, aggregator="median")
    state = hall.run(settings, hall.sites(settings, {"cyd": wild}))
    before = initial_shared_state(settings.plan)
    order = TrainRequest("fed", 1, "train", 0, "{}", before, True)
    for key in before:
        returned = [trained(name, order)[key] + (100 if name == "cyd" else 0) for name in NAMES]
        np.testing.assert_array_equal(state.shared[key], np.median(returned, axis=0).astype(np.float32))
    assert [event["residual"] for event in hall.events("round")] == [None]


def test_a_failing_site_is_asked_again_and_then_counts(hall: Hall, tmp_path: Path) -> None:
    """Two errors and a third answer: as if nothing had been."""

    def third_time(site: Pretender, order: TrainRequest, reply: TrainReply) -> TrainReply:
        if sum(past.key == order.key for past in site.asked) < 3:
            raise RuntimeError("not yet")
        return reply

    settings = recipe(rounds=2, max_attempts=3)
    sites = hall.sites(settings, {"bob": third_time})
    state = hall.run(settings, sites)
    assert [order.round for order in sites[1].asked] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert not hall.events("failed")
    assert same(state.shared, Hall(tmp_path / "calm").run(settings).shared)


def test_a_site_that_keeps_failing_is_left_out_and_named(hall: Hall) -> None:
    settings = recipe(rounds=2, max_attempts=3)
    sites = hall.sites(settings, {"bob": crash_in(1)})
    hall.run(settings, sites)
    assert [order.round for order in sites[1].asked] == [1, 1, 1, 2, 3]
    (failed,) = hall.events("failed")
    assert (failed["site"], failed["round"], failed["reason"]) == ("bob", 1, "RuntimeError")
    assert hall.admitted == {1: ["ada", "cyd", "dee"], 2: list(NAMES)}


def test_the_coordinator_is_told_the_kind_of_an_error_and_none_of_its_data(hall: Hall) -> None:
    def quote(site: Pretender, order: TrainRequest, reply: TrainReply) -> TrainReply:
        raise DataError("data.label", "a label", "patient 4711 is HIV-positive")

    settings = recipe(rounds=1, max_attempts=1)
    hall.run(settings, hall.sites(settings, {"bob": quote}))
    assert {failed["reason"] for failed in hall.events("failed")} == {"DataError: data.label"}
    assert "4711" not in (hall.folder / "events.jsonl").read_text()


def test_a_silent_site_costs_the_deadline_and_is_named(hall: Hall) -> None:
    class Deaf(LocalGrid):
        """Node 2 joins and then never answers."""

        def pull_messages(self, message_ids: Any) -> Any:
            waiting = {i: self._pending.get(i) for i in message_ids}
            silent = {
                i for i, m in waiting.items() if m and m.metadata.dst_node_id == 2 and m.metadata.group_id != "join"
            }
            return super().pull_messages([i for i in waiting if i not in silent])

    settings = recipe(rounds=1, timeout=0.3)
    hall.run(settings, grid=Deaf)
    assert hall.admitted == {1: ["ada", "cyd", "dee"]}
    assert [(e["site"], e["reason"]) for e in hall.events("failed")] == [("bob", "no reply within 0.3 s")] * 2


def rewritten(change: Callable[[RecordDict], None], sites: Sequence[Pretender]) -> ClientApp:
    """An app in which bob's training replies are changed on the wire."""
    app = ClientApp()

    def answer(content: TrainReply | SiteInfo, message: Message, node: int) -> Message:
        packed = messages.reply_message(content, message)
        if node == 1:
            change(packed.content)
        return packed

    @app.query()
    def join(message: Message, context: Context) -> Message:
        node = int(context.node_config["partition-id"])
        return messages.reply_message(sites[node].site_info(*messages.join_from(message)), message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node = int(context.node_config["partition-id"])
        return answer(sites[node].handle(messages.request_from(message)), message, node)

    return app


def _bytes(data: bytes, stype: str = DEFAULT) -> Callable[[RecordDict], None]:
    return lambda content: content.array_records["shared"].update(
        {messages.ALL: Array("uint8", (len(data),), stype, data)}
    )


def _header(**entry: Any) -> bytes:
    text = json.dumps({"x": {"dtype": "F32", "shape": [2, 6], "data_offsets": [0, 48], **entry}}).encode()
    return len(text).to_bytes(8, "little") + text


def _config(**values: Any) -> Callable[[RecordDict], None]:
    return lambda content: content.config_records["colora"].update(values)


BROKEN: dict[str, Callable[[RecordDict], None]] = {
    "no record at all": lambda content: content.clear(),
    "one record more": lambda content: content.update({"extra": ConfigRecord({})}),
    "a record of another kind": lambda content: content.update({"colora": MetricRecord({"round": 1})}),
    "arrays of another kind": lambda content: content.update({"shared": MetricRecord({"round": 1})}),
    "metrics of another kind": lambda content: content.update({"metrics": ArrayRecord({})}),
    "one field less": lambda content: content.config_records["colora"].pop("seconds"),
    "one field more": _config(labels="yes"),
    "a round in words": _config(round="one"),
    "terms as a fraction": _config(terms=1.5),
    "terms as a truth": _config(terms=True),
    "seconds in words": _config(seconds="long"),
    "fresh in words": _config(fresh="yes"),
    "a list as a metric": lambda content: content.metric_records["metrics"].update({"personal.loss": [1.0, 2.0]}),
    "no bytes": _bytes(b""),
    "half of an array": _bytes(_header() + b"\x00" * 20),
    "bytes of no array": _bytes(b"\x93NUMPY\x01\x00 what"),
    "a pickle": _bytes(b"\x80\x04N."),
    "a header longer than the bytes": _bytes((1 << 60).to_bytes(8, "little") + b"{}"),
    "more numbers than any memory": _bytes(_header(shape=[10**6, 10**6, 10**3], data_offsets=[0, 4 * 10**15])),
    "more numbers than bytes": _bytes(_header(shape=[10**6]) + b"\x00" * 48),
    "an unknown codec": _bytes(b"", "pickle"),
    "arrays one by one": lambda content: content.array_records["shared"].update(
        {"x": Array("float32", (1,), "numpy.ndarray", b"")}
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_reply_is_refused_by_name_and_never_stops_the_coordinator(hall: Hall, name: str) -> None:
    settings = recipe(rounds=1)
    sites = hall.sites(settings)
    hall.run(settings, sites, app=rewritten(BROKEN[name], sites))
    assert hall.admitted == {1: ["ada", "cyd", "dee"]}
    refused = [event for event in hall.events("refused") if event["round"] == 1]
    assert [event["site"] for event in refused] == ["bob"]
    assert all(refused[0][part] for part in ("field", "expected", "found"))


def test_a_broken_introduction_is_refused_and_never_stops_the_coordinator(hall: Hall) -> None:
    settings = recipe(rounds=1)
    sites = hall.sites(settings)
    app = make_app(lambda context: sites[int(context.node_config["partition-id"])])

    def mumble(message: Message, context: Context) -> Message:
        answered = app(message, context)
        if message.metadata.group_id == "join" and context.node_config["partition-id"] == 1:
            answered.content.config_records["colora"].pop("site")
        return answered

    hall.run(settings, sites, app=mumble)  # type: ignore[arg-type]
    assert hall.admitted == {1: ["ada", "cyd", "dee"]}
    (refused,) = hall.events("refused")
    assert (refused["site"], refused["field"]) == ("node 2", "fields")


# --- how it stops and goes on ---------------------------------------------------------------------------------------


def test_a_missing_quorum_stops_and_the_last_checkpoint_stays(hall: Hall) -> None:
    settings = recipe(quorum=3)
    with pytest.raises(QuorumError) as caught:
        hall.run(settings, hall.sites(settings, dict.fromkeys(("ada", "dee"), crash_in(3))))
    assert str(caught.value).startswith(
        "The quorum was not reached at round 3: at least 3 sites are required, 2 took part (bob, cyd)"
    )
    state = hall.latest(settings)
    assert (state.round, state.finalized) == (2, False)
    assert dict(state.admitted) == dict.fromkeys(NAMES, 2)
    assert sorted(hall.admitted) == [1, 2]


def test_without_a_number_the_quorum_is_more_than_half_of_the_asked(hall: Hall) -> None:
    settings = recipe(rounds=2)
    settings = dataclasses.replace(settings, server=dataclasses.replace(settings.server, quorum=None))
    with pytest.raises(QuorumError, match="at least 3 sites"):
        hall.run(settings, hall.sites(settings, dict.fromkeys(("ada", "dee"), crash_in(2))))
    assert hall.admitted == {1: list(NAMES)}


@pytest.mark.parametrize("optimizer", ["mean", "momentum", "adam", "yogi"])
@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_restarted_coordinator_ends_with_the_same_bits(hall: Hall, tmp_path: Path, optimizer: str, at: int) -> None:
    """Stopped in any round: adapter, optimizer memory and records are those of an undisturbed run."""
    settings = recipe(optimizer=optimizer, fraction=0.75)
    calm = Hall(tmp_path / "calm")
    expected = calm.run(settings)
    with pytest.raises(QuorumError):
        hall.run(settings, hall.sites(settings, dict.fromkeys(NAMES, crash_in(at))))
    sites = hall.sites(settings)
    state = hall.run(settings, sites)
    assert min(order.round for site in sites for order in site.asked) == at  # earlier rounds are not asked again
    assert state.finalized
    for found in (state, hall.latest(settings)):
        assert same(found.shared, expected.shared)
        assert same(found.adapters[0].optimizer_state, expected.adapters[0].optimizer_state)
        assert found.admitted == expected.admitted
    assert bool(expected.adapters[0].optimizer_state) == (optimizer != "mean")
    assert hall.admitted == calm.admitted


@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_a_restarted_coordinator_ends_with_the_same_bits_in_a_lossy_codec(
    hall: Hall, tmp_path: Path, codec: Any
) -> None:
    """S_t is what the sites receive: the checkpoint holds it, and its encoding changes nothing any more."""
    settings = dataclasses.replace(recipe(optimizer="adam"), communication=CommunicationSettings(codec))
    expected = Hall(tmp_path / "calm").run(settings)
    with pytest.raises(QuorumError):
        hall.run(settings, hall.sites(settings, dict.fromkeys(NAMES, crash_in(3))))
    sites = hall.sites(settings)
    assert same(hall.run(settings, sites).shared, expected.shared)
    assert same(as_received(codec, expected.shared), expected.shared)
    assert same(sites[0].asked[-1].shared, expected.shared)
    assert not same(Hall(tmp_path / "fp32").run(recipe(optimizer="adam")).shared, expected.shared)


def test_without_its_memory_a_server_optimizer_ends_elsewhere(hall: Hall, tmp_path: Path) -> None:
    """The claim above has teeth."""
    settings = recipe(optimizer="adam")
    expected = Hall(tmp_path / "calm").run(settings)
    with pytest.raises(QuorumError):
        hall.run(settings, hall.sites(settings, dict.fromkeys(NAMES, crash_in(3))))
    last = hall.latest(settings)
    without = dataclasses.replace(last.adapters[0], optimizer_state={})
    hall.checkpoints(settings).write(dataclasses.replace(last, adapters=(without,)))
    assert not same(hall.run(settings).shared, expected.shared)


def test_a_crash_between_replies_and_checkpoint_costs_one_round_and_no_bit(
    hall: Hall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(optimizer="momentum")
    expected = Hall(tmp_path / "calm").run(settings)
    write = Checkpoints.write

    def power_cut(self: Checkpoints, state: ServerState) -> None:
        if state.round == 3:
            raise KeyboardInterrupt
        write(self, state)

    monkeypatch.setattr(Checkpoints, "write", power_cut)
    with pytest.raises(KeyboardInterrupt):
        hall.run(settings)
    monkeypatch.undo()
    assert hall.latest(settings).round == 2
    assert same(hall.run(settings).shared, expected.shared)


def test_a_crash_at_the_close_repeats_the_close_alone(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(rounds=2)
    first, second = hall.sites(settings), hall.sites(settings)

    def power_cut(*_: object) -> ServerState:
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterStrategy, "aggregate_finalize", power_cut)
    with pytest.raises(KeyboardInterrupt):
        hall.run(settings, first)
    monkeypatch.undo()
    assert hall.run(settings, second).finalized
    assert {(order.round, order.kind) for site in second for order in site.asked} == {(3, "finalize")}
    third = hall.sites(settings)
    hall.run(settings, third)  # and a finished federation asks for nothing more
    assert not any(site.asked for site in third)


def test_a_checkpoint_of_another_recipe_is_refused(hall: Hall) -> None:
    hall.run(recipe(rounds=2))
    with pytest.raises(StateError, match="recipe"):
        hall.run(dataclasses.replace(recipe(rounds=2), seed=2))


def test_an_interrupted_round_leaves_no_spooled_reply_behind_in_the_next(hall: Hall) -> None:
    """What waited on disk when the coordinator died is not folded into a later mean."""
    settings = recipe(rounds=2)
    (hall.folder / "spool").mkdir(parents=True)
    (hall.folder / "spool" / "eve.safetensors").write_bytes(b"left over")
    hall.run(settings)
    assert hall.admitted == {1: list(NAMES), 2: list(NAMES)}
    assert not (hall.folder / "spool").exists()


def test_one_site_with_another_model_cannot_shut_out_the_others(hall: Hall) -> None:
    settings = recipe(rounds=1)
    sites = hall.sites(settings)
    sites[0].about["model"] = "another model"
    hall.run(settings, sites)
    assert [event["site"] for event in hall.events("refused")] == ["ada"]
    assert hall.admitted == {1: ["bob", "cyd", "dee"]}


def test_who_is_there_does_not_change_who_else_is_sampled(hall: Hall, tmp_path: Path) -> None:
    settings = recipe(rounds=6, fraction=0.5, quorum=1)
    hall.run(settings)
    fewer = Hall(tmp_path / "fewer")
    fewer.run(settings, [site for site in fewer.sites(settings) if site.name != "bob"])
    for t, sites in hall.admitted.items():
        assert fewer.admitted[t] == [site for site in sites if site != "bob"]


def test_a_metric_that_is_not_on_the_list_is_refused(hall: Hall) -> None:
    settings = recipe(rounds=1)
    sites = hall.sites(settings, {"bob": lambda site, order, reply: dataclasses.replace(reply, metrics={"core[0]": 1})})
    hall.run(settings, sites)
    refused = hall.events("refused")
    assert {(e["site"], e["field"]) for e in refused} == {("bob", "metrics")}
    assert hall.admitted == {1: ["ada", "cyd", "dee"]}


def test_a_close_without_quorum_is_asked_again_after_a_restart(hall: Hall) -> None:
    settings = recipe(rounds=2, quorum=3, max_attempts=1)
    with pytest.raises(QuorumError, match="at finalize"):
        hall.run(settings, hall.sites(settings, {name: crash_in(3) for name in ("ada", "bob")}))
    assert not hall.latest(settings).finalized
    assert hall.run(settings).finalized


def test_the_way_of_weighing_outlives_a_restart_without_the_odd_site(hall: Hall) -> None:
    settings = with_task(recipe(rounds=3, max_attempts=1), "classification")
    mixed = hall.sites(settings, {name: crash_in(2) for name in NAMES})
    mixed[0].about["task"] = "classification"
    with pytest.raises(QuorumError):
        hall.run(settings, mixed)
    hall.run(settings, hall.sites(settings)[1:])
    assert all(weight == 1.0 for event in hall.events("round") for weight in event["weights"].values())
