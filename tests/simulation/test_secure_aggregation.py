"""Whole runs with secure aggregation: the sum is the plain one, and the coordinator receives nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from flwr.app import Message
from scipy.stats import chisquare

from colora.common.atomic_io import load_arrays
from colora.common.config.loader import recipe_from
from colora.common.config.schema import Recipe
from colora.common.errors import ColoraError, ConfigError, QuorumError
from colora.common.models.saved import SHARED, TRAINED
from colora.common.protocol import flower_messages as messages
from colora.common.protocol.types import SumReply, SumRequest
from colora.common.secure_aggregation import opening, participant
from colora.common.secure_aggregation.fixed_point import FixedPoint
from colora.server.deployment.supervisor import initialize_run
from colora.server.reporting.events import read_events
from colora.server.reporting.page.build import write_page
from colora.server.reporting.run_folder import RunFolder
from colora.server.rounds import secure_sums
from colora.server.rounds.run_options import RosterEntry
from colora.simulation import run as run_module
from colora.simulation.cells import Cell
from colora.simulation.run import simulate
from colora.simulation.site_pool import SimulatedSite

from ..conftest import SIZES, _save, labelled_rows, write_lines

BOUND = 0.05  # of the norm of an update: some are clipped


@pytest.fixture
def raw(tiny_recipe: dict, tmp_path: Path) -> dict:
    """Ten sites with 8 to 12 rows each, whose updates differ in weight, and one round."""
    sites = []
    for k in range(10):
        rows = labelled_rows(["yes", "no"], 8 + k // 2, seed=k)
        source = write_lines(tmp_path / "ten" / f"{k}.jsonl", rows)
        test = write_lines(tmp_path / "ten" / f"{k}-test.jsonl", labelled_rows(["yes", "no"], 4, seed=50 + k))
        sites.append({"name": f"s{k}", "source": str(source), "test_source": str(test)})
    train = {**tiny_recipe["train"], "max_update_norm": BOUND, "epochs": 1.0}
    del train["steps"]
    secure = {"train": train, "site": sites, "privacy": {"secure_aggregation": True}, "server": {"max_attempts": 1}}
    return {**tiny_recipe, **secure, "rounds": 1, "evaluation": {"every": 0}}


def checkpoint(folder: Path) -> dict[str, np.ndarray]:
    return load_arrays(sorted((folder / "checkpoints").glob("round-*"))[-1], prefix=SHARED)[0]


def initial(recipe: Recipe) -> dict[str, np.ndarray]:
    from colora.common.adapters.initialization import initial_shared_state

    return initial_shared_state(recipe.plan, 2)


def event(folder: Path, kind: str) -> dict[str, Any]:
    return [each for each in read_events(folder / "events.jsonl") if each["event"] == kind][-1]


def drop(monkeypatch: pytest.MonkeyPatch, step: str, names: set[str]) -> None:
    """These sites answer with an error from this step on."""
    order = ("train", "share", "mask", "open")
    handle, take = SimulatedSite.handle, SimulatedSite.sum

    def failing(site: SimulatedSite, request: Any) -> Any:
        at = getattr(request, "step", None) or request.kind
        if site.name in names and at in order and order.index(at) >= order.index(step):
            raise RuntimeError("a cable was pulled")
        return take(site, request) if isinstance(request, SumRequest) else handle(site, request)

    monkeypatch.setattr(SimulatedSite, "handle", failing)
    monkeypatch.setattr(SimulatedSite, "sum", failing)


@pytest.mark.parametrize("step", ["none", "train", "share", "mask", "open"])
def test_the_secure_sum_is_the_plain_one_with_three_of_ten_sites_gone_in_any_step(
    raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The oracle is the weighted mean of what the sites of the sum have in their own states."""
    gone = {"s1", "s4", "s9"}
    if step != "none":
        drop(monkeypatch, step, gone)
    recipe, out = recipe_from(raw), tmp_path / "out"
    simulate(recipe, out, resume=False)
    lost = gone if step in ("train", "share", "mask") else set()
    names = [site["name"] for site in raw["site"] if site["name"] not in lost]
    secure = event(out, "secure_sum")
    assert secure["sites"] == event(out, "round")["admitted"] == names
    assert secure["dropped"] == (sorted(lost) if step == "mask" else [])
    start, states = initial(recipe), {}
    for name in names:
        arrays, meta = load_arrays(out / "sites" / name / "state" / "round-000001.safetensors")
        states[name] = {k.removeprefix(TRAINED): v for k, v in arrays.items() if k.startswith(TRAINED)}, meta["reply"]
    weights = {name: reply["terms"] for name, (_, reply) in states.items()}
    assert len(set(weights.values())) > 1
    members = len(names) if step == "train" or step == "share" else 10
    numbers = FixedPoint(BOUND, max(weights.values()), 10 if step == "share" else members)
    step_size = numbers.step * len(names) * max(weights.values()) / sum(weights.values())
    for key, found in checkpoint(out).items():
        updates = [states[name][0][key].astype(np.float64) - start[key] for name in names]
        expected = start[key] + np.average(updates, axis=0, weights=list(weights.values()))
        ulp = np.spacing(np.abs(found).max()) / 2
        assert np.abs(found - expected).max() <= step_size + ulp


def test_more_than_a_third_gone_opens_nothing(raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(monkeypatch, "mask", {"s0", "s3", "s5", "s8"})
    with pytest.raises(QuorumError, match="at least 7 sites are required, 6 took part"):
        simulate(recipe_from(raw), tmp_path / "out", resume=False)
    assert not list((tmp_path / "out" / "secure").glob("*.safetensors"))
    for record in (tmp_path / "out" / "sites").glob("*/state/secure-sums.json"):
        assert all(entry["opened"] is None for entry in json.loads(record.read_text())["rounds"].values())


def test_fewer_than_min_sites_open_nothing(raw: dict, tmp_path: Path) -> None:
    raw["privacy"]["min_sites"] = 11
    recipe = recipe_from(raw)
    message = "privacy.min_sites is 11, but the number of sites is 10"
    with pytest.raises(ConfigError, match=message):
        simulate(recipe, tmp_path / "out", resume=False)
    with pytest.raises(ConfigError, match=message):
        initialize_run(RunFolder(tmp_path / "run"), recipe, tuple(RosterEntry(f"s{k}") for k in range(10)))


def test_a_site_that_is_lost_in_training_leaves_fewer_than_min_sites(
    raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw["privacy"]["min_sites"] = 10
    drop(monkeypatch, "train", {"s4"})
    with pytest.raises(QuorumError, match="at least 10 sites are required, 9 took part"):
        simulate(recipe_from(raw), tmp_path / "out", resume=False)


# --- what the coordinator receives ----------------------------------------------------------------------------------


def uploads(wire: list[Message], site: str) -> dict[str, bytes]:
    """The bodies of a site's replies by step, those of all rounds together."""
    found: dict[str, bytes] = {}
    for message in wire:
        if message.has_content() and message.metadata.reply_to_message_id and _is_sum(message):
            reply = messages.sum_reply_from(message)
            if isinstance(reply, SumReply) and reply.site == site:
                found[reply.step] = found.get(reply.step, b"") + reply.body
    return found


def _is_sum(message: Message) -> bool:
    return message.metadata.message_type.endswith(messages.SUM)


def p_value(data: bytes) -> float:
    """χ²: how likely bytes that are uniform deviate as much as these."""
    return float(chisquare(np.bincount(np.frombuffer(data, np.uint8), minlength=256)).pvalue)


def test_the_uploads_of_a_site_cannot_be_told_from_uniform_bytes(
    raw: dict, tmp_path: Path, wire: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also, no reply holds an array or a number of examples. Without masks the same test fails."""
    raw["rounds"] = 4
    simulate(recipe_from(raw), tmp_path / "masked", resume=False)
    assert p_value(uploads(wire, "s3")["mask"]) > 1e-6
    replies = [m for m in wire if m.metadata.reply_to_message_id and m.metadata.message_type == messages.TRAIN]
    assert len(replies) == 10 * (4 + 1)
    for message in replies:
        config = message.content.config_records[messages.CONFIG]
        assert len(message.content.array_records[messages.ARRAYS][messages.ALL].data) < 100
        assert config["terms"] == config["examples"] == 0 or config["round"] == 5  # finalized without an update
    wire.clear()
    for module in (participant, opening):
        monkeypatch.setattr(module, "expand", lambda seed, count: np.zeros(count, np.uint32))
    simulate(recipe_from(raw), tmp_path / "bare", resume=False)
    assert p_value(uploads(wire, "s3")["mask"]) < 1e-6


def test_the_bytes_are_at_most_1_15_times_those_of_a_plain_round(
    raw: dict, tmp_path: Path, wire: list[Message]
) -> None:
    """With 65,536 shared numbers; the keys and shares of ten sites take a few kilobytes whatever the adapter."""
    from transformers import BertConfig, BertModel

    wide = BertConfig(**{**SIZES, "hidden_size": 256})
    raw["model"] = {"source": str(_save(BertModel, wide, tmp_path / "wide", chat=False)), "max_length": 16}
    raw["adapter"]["rank"] = 32
    sizes = []
    for secure in (False, True):
        wire.clear()
        raw["privacy"] = {"secure_aggregation": secure}
        simulate(recipe_from(raw), tmp_path / str(secure), resume=False)
        sizes.append(sum(messages.payload_bytes(message) for message in wire))
    print(f"\nbytes of a run: plain {sizes[0]:,}, secure {sizes[1]:,}, ratio {sizes[1] / sizes[0]:.3f}")
    assert sizes[1] <= 1.15 * sizes[0]


# --- with everything else -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "close"),
    [
        ({"server": {"optimizer": "momentum", "lr": 0.5}}, 1e-6),
        ({"communication": {"codec": "bf16"}}, 1e-3),
        ({"server": {"weights": "uniform", "fraction": 0.5}}, 1e-6),
        ({"server": {"weights": "examples"}, "simulation": {"engine": "batched", "threads": 1}}, 1e-6),
        ({"private": "lora"}, 1e-6),
    ],
)
def test_it_works_with_optimizers_codecs_weights_and_engines(
    raw: dict, tmp_path: Path, changes: dict[str, Any], close: float
) -> None:
    raw = {**raw, **changes, "rounds": 2}
    outs = []
    for secure in (True, False):
        raw["privacy"] = {"secure_aggregation": secure}
        simulate(recipe_from(raw), tmp_path / str(secure), resume=False)
        outs.append(checkpoint(tmp_path / str(secure)))
    assert outs[0].keys() == outs[1].keys()
    assert max(float(np.abs(outs[0][key] - outs[1][key]).max()) for key in outs[0]) <= close


def test_it_works_with_differential_privacy(raw: dict, tmp_path: Path) -> None:
    raw["privacy"] |= {"noise_multiplier": 1.0}
    simulate(recipe_from(raw), tmp_path / "out", resume=False)
    assert len(event(tmp_path / "out", "secure_sum")["sites"]) == 10


def test_the_page_of_a_run_says_why_it_shows_no_weights(raw: dict, tmp_path: Path) -> None:
    run = simulate(recipe_from(raw), tmp_path / "out", resume=False)
    write_page([run.path], tmp_path / "page.html")
    words = "With secure aggregation the coordinator does not learn the weights."
    assert words in (tmp_path / "page.html").read_text()


# --- ends that nobody planned ---------------------------------------------------------------------------------------


@pytest.mark.slow  # three runs each
@pytest.mark.parametrize("moment", ["collect", "write_sum", "open_shares", "decode", "step"])
def test_a_coordinator_that_dies_at_any_moment_ends_with_the_same_bits(
    raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """It dies after the given part of round 2. Sites that were lost in the meantime do not change the sum."""
    raw["rounds"] = 3
    simulate(recipe_from(raw), tmp_path / "calm", resume=False)
    real: Callable[..., Any] = getattr(secure_sums, moment)
    calls = iter(range(100))

    def dies(*arguments: Any) -> Any:
        result = real(*arguments)
        if next(calls) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(secure_sums, moment, dies)
    with pytest.raises(KeyboardInterrupt):
        simulate(recipe_from(raw), tmp_path / "out", resume=False)
    monkeypatch.undo()
    simulate(recipe_from(raw), tmp_path / "out", resume=True)
    ends = checkpoint(tmp_path / "calm"), checkpoint(tmp_path / "out")
    assert all(ends[0][key].tobytes() == ends[1][key].tobytes() for key in ends[0])


def test_after_a_sum_is_opened_no_other_sum_of_the_round_is(
    raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that forgets the sum it has opened, and asks for one without s0: the difference would be s0's."""
    recipe, out = recipe_from(raw), tmp_path / "out"
    monkeypatch.setattr(secure_sums, "step", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        simulate(recipe, out, resume=False)
    monkeypatch.undo()
    for path in (out / "secure").iterdir():
        path.unlink()
    drop(monkeypatch, "mask", {"s0"})
    with pytest.raises(QuorumError):
        simulate(recipe, out, resume=True)
    said = (out / "log.txt").read_text()
    assert "asked to open a second sum of round 1" in said


@pytest.mark.parametrize("kept", [True, False])
def test_all_attempts_at_a_round_name_the_same_sites_also_after_a_restart(
    raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """The first attempt ends after ``share``, and s0 is gone in the second. Without the list, the sites refuse."""
    recipe, out = recipe_from(raw), tmp_path / "out"
    drop(monkeypatch, "mask", {"s1", "s4", "s5", "s9"})
    with pytest.raises(QuorumError):
        simulate(recipe, out, resume=False)
    monkeypatch.undo()
    drop(monkeypatch, "train", {"s0"})
    if kept:
        simulate(recipe, out, resume=True)
        found = event(out, "secure_sum")
        assert (found["threshold"], found["sites"]) == (7, [f"s{k}" for k in range(1, 10)])
        return
    (out / "secure" / "members.json").unlink()
    with pytest.raises(QuorumError):
        simulate(recipe, out, resume=True)
    said = (out / "log.txt").read_text()
    assert "names other sites for the sum of round 1 than before" in said
    assert "It keeps the list of each round in secure/members.json of its run folder." in said
    assert event(out, "failed")["reason"].endswith("list of sites of round 1")


def test_a_damaged_list_of_sites_ends_the_run_in_one_sentence(
    raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(monkeypatch, "mask", {"s1", "s4", "s5", "s9"})
    with pytest.raises(QuorumError):
        simulate(recipe_from(raw), tmp_path / "out", resume=False)
    path = tmp_path / "out" / "secure" / "members.json"
    path.write_text(path.read_text().replace("s0", "s1"))
    with pytest.raises(
        ColoraError, match=r"members\.json is damaged, so the sites of the rounds in progress are unknown"
    ):
        simulate(recipe_from(raw), tmp_path / "out", resume=True)


def test_a_coordinator_that_goes_back_to_an_older_checkpoint_opens_the_same_sums_again(
    raw: dict, tmp_path: Path
) -> None:
    """The sites hold the adapter of round 3 only, until they get the train request of an older round again."""
    recipe, out = recipe_from({**raw, "rounds": 3}), tmp_path / "out"
    simulate(recipe, out, resume=False)
    before = checkpoint(out)
    for path in sorted((out / "checkpoints").iterdir())[-2:]:
        path.write_bytes(path.read_bytes()[:-9])
    simulate(recipe, out, resume=True)
    assert all(array.tobytes() == before[key].tobytes() for key, array in checkpoint(out).items())
    assert event(out, "resumed")["round"] == 1


def test_a_sum_is_opened_without_a_site_that_is_in_it_and_is_gone(
    raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of ten are not even asked in the second attempt, more than ``server.quorum`` allows in a new sum."""
    raw["server"]["quorum"] = 10
    recipe, out = recipe_from(raw), tmp_path / "out"
    simulate(recipe, tmp_path / "calm", resume=False)
    monkeypatch.setattr(secure_sums, "write_sum", interrupted(secure_sums.write_sum))
    with pytest.raises(KeyboardInterrupt):
        simulate(recipe, out, resume=False)
    monkeypatch.undo()
    monkeypatch.setattr(secure_sums, "aggregate", without(secure_sums.aggregate, {"s0", "s5", "s9"}))
    simulate(recipe, out, resume=True)
    assert len(event(out, "secure_sum")["sites"]) == 10
    assert len(event(out, "secure_sum")["bytes_up"]) == 7
    ends = checkpoint(out), checkpoint(tmp_path / "calm")
    assert all(ends[0][key].tobytes() == ends[1][key].tobytes() for key in ends[0])


def interrupted(real: Callable[..., Any], at: int = 1) -> Callable[..., Any]:
    """The same function, after whose ``at``-th call the coordinator dies."""
    calls = iter(range(1, 100))

    def dies(*arguments: Any) -> Any:
        result = real(*arguments)
        if next(calls) == at:
            raise KeyboardInterrupt
        return result

    return dies


def without(real: Callable[..., Any], gone: set[str]) -> Callable[..., Any]:
    """The same ``aggregate``, which does not ask these sites."""
    return lambda strategy, t, state, asked: real(strategy, t, state, {s: a for s, a in asked.items() if s not in gone})


def test_a_run_that_keeps_its_best_round_cannot_be_extended(raw: dict, tmp_path: Path) -> None:
    """It would continue from the best round's adapter and states, and the sites send no update a second time."""
    raw["server"]["keep"], raw["data"] = "best", {**raw.get("data", {}), "validation_fraction": 0.3}
    simulate(recipe_from(raw), tmp_path / "out", resume=False)
    with pytest.raises(ConfigError, match="would train from a past round's adapter again"):
        simulate(recipe_from({**raw, "rounds": 3}), tmp_path / "out", resume=True)


def test_a_run_can_get_more_rounds_while_a_sum_is_opened(
    raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round ends by the plan that it began with, and the oracle is a run that had all rounds from its beginning."""
    simulate(recipe_from({**raw, "rounds": 3}), tmp_path / "calm", resume=False)
    monkeypatch.setattr(secure_sums, "open_shares", interrupted(secure_sums.open_shares, at=2))
    with pytest.raises(KeyboardInterrupt):
        simulate(recipe_from({**raw, "rounds": 2}), tmp_path / "out", resume=False)
    monkeypatch.undo()
    simulate(recipe_from({**raw, "rounds": 3}), tmp_path / "out", resume=True)
    rounds = [each["round"] for each in read_events(tmp_path / "out" / "events.jsonl") if each["event"] == "round"]
    assert rounds == [1, 2, 3]
    ends = checkpoint(tmp_path / "calm"), checkpoint(tmp_path / "out")
    assert all(ends[0][key].tobytes() == ends[1][key].tobytes() for key in ends[0])


# --- sites that do not follow the protocol --------------------------------------------------------------------------


def change(monkeypatch: pytest.MonkeyPatch, step: str, sites: set[str], edit: Callable[[Any], Any]) -> None:
    """These sites edit the JSON that they send in a step."""
    take = SimulatedSite.sum

    def edited(site: SimulatedSite, request: SumRequest) -> SumReply:
        reply = take(site, request)
        if site.name not in sites or request.step != step:
            return reply
        return SumReply(**{**vars(reply), "body": json.dumps(edit(json.loads(reply.body))).encode()})

    monkeypatch.setattr(SimulatedSite, "sum", edited)


def with_offer(**fields: str) -> Callable[[Any], Any]:
    return lambda body: {**body, "offer": {**body["offer"], **fields}}


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (with_offer(public="00" * 32), "mask key of s5"),
        (with_offer(signature="12" * 100), "signature of s5"),
        (lambda body: {**body, "envelopes": body["envelopes"] | {"s5": body["envelopes"]["s1"]}}, "envelopes"),
    ],
)
def test_a_site_whose_keys_others_cannot_use_is_left_out_and_named(
    raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[Any], Any], field: str
) -> None:
    change(monkeypatch, "share", {"s5"}, edit)
    simulate(recipe_from(raw), tmp_path / "out", resume=False)
    assert event(tmp_path / "out", "secure_sum")["sites"] == [f"s{k}" for k in range(10) if k != 5]
    refused = event(tmp_path / "out", "refused")
    assert (refused["site"], refused["field"]) == ("s5", field)


def test_without_public_keys_at_the_coordinator_the_sites_name_the_one_that_signs_wrongly(
    raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "simulated_public_keys", lambda recipe, names: {})
    change(monkeypatch, "share", {"s5"}, with_offer(signature="12" * 100))
    with pytest.raises(QuorumError):
        simulate(recipe_from(raw), tmp_path / "out", resume=False)
    failed = {e["site"]: e["reason"] for e in read_events(tmp_path / "out" / "events.jsonl") if e["event"] == "failed"}
    assert len(failed) == 10
    assert all("signature of s5" in reason for site, reason in failed.items() if site != "s5")


def test_sites_that_reveal_wrong_shares_are_named_and_cost_nothing(
    raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, "open", {"s2"}, lambda body: {**body, "self_masks": dict.fromkeys(body["self_masks"], "7")})
    simulate(recipe_from(raw), tmp_path / "out", resume=False)
    assert len(event(tmp_path / "out", "round")["admitted"]) == 10
    refused = event(tmp_path / "out", "refused")
    assert (refused["site"], refused["field"]) == ("s2", "share of s0")
    assert "Either s2 or s0 has changed it" in refused["reason"]


def test_a_site_that_reveals_nothing_does_not_count_among_those_that_open(
    raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the sum could not be opened, and the round would end without it instead of waiting for other sites."""
    change(monkeypatch, "open", {"s1", "s3", "s5", "s7"}, lambda body: {"self_masks": {}, "mask_keys": {}})
    with pytest.raises(QuorumError, match="at least 7 sites are required, 6 took part"):
        simulate(recipe_from(raw), tmp_path / "out", resume=False)


def test_a_wrong_vector_costs_its_round_and_not_the_run(
    raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that was lost in that round takes part in the next one, which begins with the same adapter."""
    raw["rounds"] = 2
    take = SimulatedSite.sum

    def poisoned(site: SimulatedSite, request: SumRequest) -> SumReply:
        reply = take(site, request)
        if request.step == "mask" and request.round == 1 and site.name in ("s1", "s5"):
            return SumReply(**{**vars(reply), "body": bytes(len(reply.body) if site.name == "s5" else 0)})
        return reply

    monkeypatch.setattr(SimulatedSite, "sum", poisoned)
    simulate(recipe_from(raw), tmp_path / "out", resume=False)
    rounds = [e for e in read_events(tmp_path / "out" / "events.jsonl") if e["event"] == "round"]
    assert [len(each["admitted"]) for each in rounds] == [0, 10]
    assert event(tmp_path / "out", "refused")["field"] in ("norm of the sum", "weight of the sum")


@pytest.mark.slow  # fifteen runs
@pytest.mark.parametrize("step", ["share", "mask", "open"])
@pytest.mark.parametrize("kind", ["bytes", "envelopes", "long", "empty", "named"])
def test_a_site_that_sends_nonsense_in_a_step_ends_no_run(
    raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, kind: str
) -> None:
    take = SimulatedSite.sum

    def nonsense(site: SimulatedSite, request: SumRequest) -> SumReply:
        reply = take(site, request)
        if site.name != "s5" or request.step != step:
            return reply
        if kind == "named":
            return SumReply(**{**vars(reply), "site": "s6"})
        body = {"bytes": b"\xff[{" * 9, "long": b"[" * 5_000_000, "empty": b""}.get(kind, reply.body)
        if kind == "envelopes" and step != "mask":
            found = json.loads(reply.body)
            body = json.dumps({key: dict.fromkeys(value, "no digits") for key, value in found.items()}).encode()
        return SumReply(**{**vars(reply), "body": body})

    monkeypatch.setattr(SimulatedSite, "sum", nonsense)
    simulate(recipe_from(raw), tmp_path / "out", resume=False)
    expected = 10 if step == "open" or (kind == "envelopes" and step == "mask") else 9
    assert len(event(tmp_path / "out", "secure_sum")["sites"]) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"max_update_norm": None}}, "train.max_update_norm is unset"),
        ({"communication": {"update_bits": 8}}, "communication.update_bits is 8"),
        ({"communication": {"broadcast_bits": 8}}, "communication.broadcast_bits is 8"),
        ({"server": {"privacy": {"epsilon": 8.0}}}, r"privacy.secure_aggregation is True, .* with \[server.privacy\]"),
        ({"adapter": {"init": "spectral"}}, "adapter.init is spectral"),
        ({"method": {"name": "local"}}, "method is one without shared parameters"),
        *(({"server": {"aggregator": rule}}, f"server.aggregator is {rule}") for rule in ("median", "krum", "product")),
        ({"server": {"aggregator": "trimmed_mean"}}, "server.aggregator is trimmed_mean"),
        ({"server": {"weights": "benefit"}}, "server.weights is benefit"),
        ({"server": {"groups": "similarity"}}, "server.groups is similarity"),
        ({"server": {"max_relative_norm": 2.0}}, "server.max_relative_norm is 2.0"),
        ({"server": {"max_update_norm": 2.0}}, "server.max_update_norm is 2.0"),
        ({"privacy": {"secure_aggregation": False, "min_sites": 4}}, "privacy.min_sites has no effect without"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(raw: dict, changes: dict[str, Any], message: str) -> None:
    for table, values in changes.items():
        raw[table] = {**raw.get(table, {}), **values} if isinstance(values, dict) else values
    raw["train"] = {key: value for key, value in raw["train"].items() if value is not None}
    with pytest.raises(ColoraError, match=message):
        recipe_from(raw)


def test_a_comparison_has_a_local_arm_without_a_sum(raw: dict, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(raw))
    assert Cell("colora", (), 0).recipe(path, ()).privacy.secure_aggregation
    assert not Cell("local", (), 0).recipe(path, ()).privacy.secure_aggregation


def test_the_local_baseline_of_a_secure_run_needs_no_sum(raw: dict) -> None:
    assert not run_module.local_only(recipe_from(raw)).privacy.secure_aggregation
