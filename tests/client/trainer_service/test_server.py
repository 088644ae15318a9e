"""The resident trainer as a real process: the bits of a trainer in this process, whatever dies, and nothing besides."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from colora.client.trainer_service import serde as parts
from colora.client.trainer_service.client import TrainerError
from colora.client.trainer_service.proto import trainer_pb2 as wire
from colora.common.config.schema import to_json
from tests.forked import run

if TYPE_CHECKING:
    from conftest import House

SLOW = {"steps": 150}  # a second: long enough to be interrupted


@pytest.fixture
def helpers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def steps_of(call: Any) -> Iterator[int]:
    return (part.progress.step for part in call)


# --- the same answers -----------------------------------------------------------------------------------------------


def test_a_reply_through_the_service_is_the_reply_of_a_trainer_in_this_process(standing: House) -> None:
    """Every method of two rounds and a close, bit for bit; then the stored ones again."""
    for method in ("colora", "local", "ffa"):
        plan = standing.plan(f"same-{method}", method=method, final_steps=2, persist_optimizer_state=True)
        only = None if method != "local" else {}
        shared = {} if only is None else {"shared": only}
        asked = [standing.order(plan, t, seed=t, **shared) for t in (1, 2)]
        asked.append(standing.order(plan, 3, kind="finalize", **shared))
        if method == "ffa":
            asked = [dataclasses.replace(o, shared={k: v for k, v in o.shared.items() if "lora_B" in k}) for o in asked]
        site = standing.connection()
        through = [site.handle(order) for order in asked]
        expected = standing.oracle(plan, *asked)
        assert all(standing.alike(*pair) for pair in zip(through, expected, strict=True))
        assert standing.alike(site.handle(asked[2]), expected[2])


def test_a_description_is_that_of_a_trainer_in_this_process(standing: House) -> None:
    from colora.client.data.selection import load_site_rows
    from colora.client.training.adapted_model import attach_adapters
    from colora.client.training.state_store import StateStore
    from colora.client.training.trainer import Trainer
    from colora.common.config.loader import load_site
    from colora.common.models.base_model import load_base_model

    plan = standing.plan("described")
    rows = load_site_rows(load_site(standing.file), plan.seed)
    trainer = Trainer(
        attach_adapters(load_base_model(plan.model, generates=False), plan),
        rows,
        StateStore(standing.folder / "no", plan.name),
    )
    assert standing.connection().site_info(plan.name, to_json(plan)) == trainer.site_info()


def test_arrays_of_several_chunks_come_back_bit_for_bit(standing: House, wide_bert: Path) -> None:
    plan = standing.plan("wide")
    model, adapter = plan.model, dataclasses.replace(plan.adapter, target_modules=("dense",))
    plan = dataclasses.replace(plan, model=dataclasses.replace(model, source=str(wide_bert)), adapter=adapter)
    order = standing.order(plan)
    assert max(array.nbytes for array in order.shared.values()) > 2 * parts.CHUNK
    assert standing.alike(standing.connection().handle(order), standing.oracle(plan, order)[0])


def test_plans_in_turn_share_one_base_model_and_leave_no_trace_on_it(standing: House) -> None:
    """Rank, targets and method change from order to order; the oracle has a fresh model for each."""
    plans = [standing.plan(f"turn-{k}", method=method) for k, method in enumerate(("colora", "fedit", "colora"))]
    adapter = dataclasses.replace(plans[2].adapter, rank=2, target_modules=("dense",))
    plans[2] = dataclasses.replace(plans[2], adapter=adapter)
    asked = [(plan, standing.order(plan)) for plan in (*plans, plans[0])]
    site = standing.connection()
    for plan, order in asked:
        assert standing.alike(site.handle(order), standing.oracle(plan, order)[0])


# --- once, whatever happens -----------------------------------------------------------------------------------------


def test_who_asks_while_the_order_is_at_work_gets_the_same_reply_and_it_is_trained_once(
    standing: House, helpers: ThreadPoolExecutor
) -> None:
    plan, site = standing.plan("twice", **SLOW), standing.connection()
    order = standing.order(plan)
    first = helpers.submit(site.handle, order)
    with standing.call(*parts.request_parts(order)) as watching:
        assert next(step for step in steps_of(watching) if step)  # at work now
        second = helpers.submit(site.handle, order)
        assert standing.alike(first.result(120), second.result(120))
    log = standing.running[0]
    log.wait_for("twice round 1: loss")
    assert sum("twice round 1" in line and "150 steps" in line for line in log.lines) == 1
    assert standing.alike(first.result(), standing.oracle(plan, order)[0])


def test_training_goes_on_when_the_asking_process_goes_away(standing: House) -> None:
    plan = standing.plan("left", **SLOW)
    order = standing.order(plan)
    with standing.call(*parts.request_parts(order)) as call:
        assert next(step for step in steps_of(call) if step)
        call.cancel()
    log = standing.running[0].wait_for("nobody waits")
    reply = standing.connection().handle(order)
    assert not [line for line in log.lines if "left round 1" in line and "steps" in line]
    log.wait_for("left round 1: loss")
    assert standing.alike(reply, standing.oracle(plan, order)[0])
    assert [line["replayed"] for line in standing.audit("left")] == [True]  # what never left is not in the audit


def test_a_trainer_killed_in_the_middle_costs_its_caller_nothing_but_time(
    house: House, helpers: ThreadPoolExecutor
) -> None:
    trainer = house.furnish().start()
    plan = house.plan(**SLOW)
    order, site = house.order(plan), house.connection()
    waiting = helpers.submit(site.handle, order)
    with house.call(*parts.request_parts(order)) as watching:
        assert next(step for step in steps_of(watching) if step)
        assert trainer.end(signal.SIGKILL) == -signal.SIGKILL
    assert not waiting.done()
    assert (house.state / "trainer.sock").exists()  # stale now
    house.start()
    assert house.alike(waiting.result(120), house.oracle(plan, order)[0])


def test_a_reply_stored_before_a_kill_is_replayed_after_it_and_noted_again(house: House) -> None:
    trainer = house.furnish().start()
    order = house.order(house.plan())
    before = house.connection().handle(order)
    trainer.end(signal.SIGKILL)
    house.start()
    after = house.connection().handle(order)
    assert house.alike(before, after)
    assert before.seconds == after.seconds  # stored, not trained again
    assert [line["replayed"] for line in house.audit()] == [False, True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_at_once_in_the_middle_of_a_round(house: House, number: int) -> None:
    trainer = house.furnish().start()
    order = house.order(house.plan(steps=100_000))
    with house.call(*parts.request_parts(order)) as watching:
        assert next(step for step in steps_of(watching) if step)
        assert trainer.end(number) == 0
    assert not (house.state / "trainer.sock").exists()
    assert trainer.lines[-2].endswith("stopped")


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"federation": "../escape", "plan": None}, "ConfigError: name"),
        ({"federation": "elsewhere"}, "RefusedError: federation"),
        ({"plan": "no json"}, "RefusedError: plan"),
        ({"plan": "[" * 100_000}, "RefusedError: plan"),
        ({"plan": "[1, 2]"}, "RefusedError: plan"),
        ({"plan": '{"name": "town"}'}, "ConfigError: rounds"),
        ({"phase": "steal"}, "RefusedError: phase"),
        ({"round": 3, "admitted": 9}, "RefusedError: admitted"),
        ({"shared": {"head.classifier.weight": np.zeros((2, 16), np.float32)}}, "RefusedError: arrays"),
        ({"shared": {}}, "RefusedError: arrays"),
    ],
)
def test_an_order_that_may_not_be_is_refused_by_its_field(standing: House, change: dict, told: str) -> None:
    plan = standing.plan("refused")
    if change.get("plan", "") is None:
        raw = to_json(plan).replace('"name": "refused"', '"name": "../escape"')
        change = {**change, "plan": raw}
    with pytest.raises(TrainerError) as caught:
        standing.connection().handle(standing.order(plan, **change))
    assert caught.value.public() == told
    assert not (standing.folder / "escape").exists()
    assert not list((standing.state / "refused").glob("round-*"))


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ([], "RefusedError: order"),
        ([wire.OrderPart()], "RefusedError: order"),
        ([wire.OrderPart(chunk=wire.Chunk(name="x"))], "RefusedError: order"),
        (["head", "head"], "RefusedError: order"),
        (["head", wire.OrderPart(chunk=wire.Chunk(name="core" * 500))], "RefusedError: arrays"),
        (["other protocol"], "RefusedError: protocol"),
        (["head", "empty", "half"], "RefusedError: encoder.layer.0.attention.self.query.lora_A.weight"),
        (["head", "claim"], "RefusedError: encoder.layer.0.attention.self.query.lora_A.weight"),
        (["head", "twice as much"], "RefusedError: encoder.layer.0.attention.self.query.lora_A.weight"),
        (["head", "over a chunk"], "RefusedError: encoder.layer.0.attention.self.query.lora_A.weight"),
    ],
)
def test_parts_of_no_order_are_refused(standing: House, sent: list, told: str) -> None:
    """What no connection of ours sends, but code that a coordinator ships could."""
    order = standing.order(standing.plan("parts"))
    head, first, *_ = parts.request_parts(order)
    bad = dict.fromkeys(("half", "claim", "empty", "twice as much", "over a chunk"))
    for name in bad:
        bad[name] = wire.OrderPart()
        bad[name].CopyFrom(first)
    bad["half"].chunk.data, bad["claim"].chunk.shape[0] = bytes(8), 1 << 50
    bad["empty"].chunk.data, bad["over a chunk"].chunk.data = b"", bytes(parts.CHUNK + 1)
    bad["twice as much"].chunk.data *= 2
    other = wire.OrderPart()
    other.CopyFrom(head)
    other.head.protocol = 99
    known = {"head": head, "other protocol": other, **bad}
    with standing.call(*(known.get(each, each) if isinstance(each, str) else each for each in sent)) as call:
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.details() == told  # type: ignore[attr-defined]


def test_a_message_beyond_the_limit_does_not_come_in(standing: House) -> None:
    head, *_ = parts.request_parts(standing.order(standing.plan("oversized")))
    big = wire.OrderPart(chunk=wire.Chunk(name="x", data=bytes(2 * parts.CHUNK)))
    with standing.call(head, big) as call, pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]


def test_what_the_site_file_does_not_allow_is_refused_before_anything_is_touched(house: House) -> None:
    house.furnish("[allow]", 'federations = ["town"]', "max_rank = 4").start()
    site = house.connection()
    for plan, told in (
        (house.plan("city"), "RefusedError: federation"),
        (dataclasses.replace(house.plan(), adapter=dataclasses.replace(house.plan().adapter, rank=8)), "adapter.rank"),
    ):
        with pytest.raises(TrainerError) as caught:
            site.site_info(plan.name, to_json(plan))
        assert told in caught.value.public()
        with pytest.raises(TrainerError, match=told):
            site.handle(house.order(plan))
    assert not (house.state / "city").exists()
    assert not (house.state / "town").exists()
    assert site.handle(house.order(house.plan())).examples == 8


def test_training_that_takes_longer_than_allowed_is_stopped_and_leaves_no_trace(house: House) -> None:
    trainer = house.furnish("[allow]", "max_seconds = 1.0").start()
    site, plan, long = house.connection(), house.plan(), house.plan("long", steps=1_000_000)
    first, second = house.order(plan), house.order(plan, 2)
    assert site.handle(first)
    with pytest.raises(TrainerError) as caught:
        site.handle(house.order(long))
    assert caught.value.public() == "RefusedError: allow.max_seconds"
    assert "at most 1 s, found more after" in trainer.wait_for("allow.max_seconds").log
    assert not list((house.state / "long").glob("round-*"))
    assert house.audit("long")[-1]["text"] == "RefusedError: allow.max_seconds"
    assert house.alike(site.handle(second), house.oracle(plan, first, second)[1])


# --- what comes out -------------------------------------------------------------------------------------------------


def test_the_surface_is_two_calls_and_health(standing: House) -> None:
    from colora.client.trainer_service.proto import trainer_pb2

    (service,) = trainer_pb2.DESCRIPTOR.services_by_name.values()
    assert [method.name for method in service.methods] == ["Describe", "Train"]
    with grpc.insecure_channel(parts.target_of(standing.address)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "colora.trainer.v1.Trainer"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflect = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as caught:
            list(reflect(iter([b""])))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


def test_the_audit_holds_what_was_sent_to_the_byte(standing: House) -> None:
    plan, site = standing.plan("audited", final_steps=1), standing.connection()
    described = site.site_info(plan.name, to_json(plan))
    order = standing.order(plan)
    close = standing.order(plan, 2, kind="finalize")
    replies = [site.handle(each) for each in (order, order, close)]
    with pytest.raises(TrainerError):
        site.handle(dataclasses.replace(order, shared={}))
    lines = standing.audit("audited")
    assert [line["kind"] for line in lines] == ["description", "reply", "reply", "reply", "error"]
    assert [line.get("replayed") for line in lines[1:4]] == [False, True, False]
    assert described.site == "ada"
    assert lines[4]["text"] == "RefusedError: arrays"
    for line, reply, asked in zip(lines[1:4], replies, (order, order, close), strict=True):
        assert (line["round"], line["phase"], line["key"]) == (asked.round, asked.phase, asked.key)
        assert line["metrics"] == sorted(reply.metrics)
        noted = {each["name"]: (each["sha256"], each["bytes"], tuple(each["shape"])) for each in line["arrays"]}
        hashes = {k: (hashlib.sha256(v.tobytes()).hexdigest(), v.nbytes, v.shape) for k, v in reply.shared.items()}
        assert noted == hashes
        norms = {each["name"]: each["norm"] for each in line["arrays"]}
        assert norms == {
            k: pytest.approx(float(np.sqrt((v.astype(float) ** 2).sum()))) for k, v in reply.shared.items()
        }


def test_without_an_audit_line_nothing_leaves(house: House) -> None:
    house.furnish().start()
    site, plan = house.connection(), house.plan()
    (house.state / "town" / "audit.jsonl").mkdir(parents=True)  # what nobody can append to, root neither
    for ask in (lambda: site.site_info(plan.name, to_json(plan)), lambda: site.handle(house.order(plan))):
        with pytest.raises(TrainerError) as caught:
            ask()
        assert caught.value.public() == "StateError: audit.jsonl"
    (house.state / "town" / "audit.jsonl").rmdir()
    assert house.alike(site.handle(house.order(plan)), house.oracle(plan, house.order(plan))[0])
    assert [line["replayed"] for line in house.audit()] == [True]


def test_an_error_that_quotes_data_stays_in_the_trainers_log(house: House) -> None:
    data = 'source = "rows.csv"\ntest_source = "test.csv"\n'
    (house.folder / "test.csv").write_text("text,label\nred cat moon sea hill dog,Mrs Miller has gout\n")
    trainer = house.furnish(data=data).start()
    for ask in (
        lambda: house.connection().site_info("town", to_json(house.plan())),
        lambda: house.connection().handle(house.order(house.plan())),
    ):
        with pytest.raises(TrainerError) as caught:
            ask()
        assert caught.value.public() == "DataError: data.label"
        assert "Miller" not in str(caught.value)
    assert "Mrs Miller has gout" in trainer.wait_for("Miller").log
    assert {line["text"] for line in house.audit()} == {"DataError: data.label"}


def test_an_unexpected_error_crosses_by_its_type_alone(house: House) -> None:
    breaking = (
        "from colora.client.training.trainer import Trainer\n"
        "def broken(*_):\n    raise KeyError('Mrs Miller has gout')\n"
        "Trainer.handle = broken"
    )
    trainer = house.furnish().start(breaking)
    with pytest.raises(TrainerError) as caught:
        house.connection().handle(house.order(house.plan()))
    assert caught.value.public() == "KeyError"
    assert "Miller" not in str(caught.value)
    trainer.wait_for("KeyError: 'Mrs Miller has gout'")


def test_the_log_has_a_line_a_round_and_no_row_of_the_data(standing: House) -> None:
    plan = standing.plan("logged")
    standing.connection().handle(standing.order(plan))
    log = standing.running[0].wait_for("logged round 1")
    (line,) = [line for line in log.lines if "logged round 1" in line]
    assert "loss" in line
    assert "2 steps" in line
    assert "bytes out" in line
    rows = (standing.folder / "rows.csv").read_text().splitlines()[1:]
    assert not [row for row in rows if row.partition(",")[0] in log.log]


# --- beginning ------------------------------------------------------------------------------------------------------


def run_service(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run("colora.client.trainer_service.server", *arguments)


@pytest.mark.parametrize(
    ("listen", "more", "told"),
    [
        ("unix:" + "x" * 120, "", "trainer.listen: expected a socket path of at most 100 bytes"),
        ("127.0.0.1:0", "", "trainer.link: expected ca.crt, trainer.crt and trainer.key"),
        ("nowhere", "", "trainer.listen: expected unix:PATH or HOST:PORT, found 'nowhere'"),
        ("unix:state/t.sock", "colour = 1", "colour"),
    ],
)
def test_what_cannot_begin_says_so_in_one_line_and_exits_2(house: House, listen: str, more: str, told: str) -> None:
    done = run_service(house.furnish(more, listen=listen).file)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("colora: ")
    assert told in line


def test_a_device_that_is_not_there_is_named_at_the_start(house: House) -> None:
    house.furnish().file.write_text(house.file.read_text().replace('device = "cpu"', 'device = "warp:9"'))
    done = run_service(house.file)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "site ada: trainer.device: expected a device of this machine, found 'warp:9'" in done.stderr


def test_no_site_file_is_one_line_too(house: House) -> None:
    """The first by the real command, which ends before it imports anything heavy."""
    command = [sys.executable, "-m", "colora.client.trainer_service.server"]
    bare = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    for done in (bare, run_service(house.folder / "missing.toml")):
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_second_trainer_for_the_same_state_is_refused_and_the_first_goes_on(house: House) -> None:
    house.furnish().start()
    done = run_service(house.file)
    assert done.returncode == 2
    assert "expected no other trainer at work here, found process" in done.stderr
    assert house.connection().handle(house.order(house.plan())).examples == 8


def test_the_state_is_this_users_alone(standing: House) -> None:
    standing.connection().handle(standing.order(standing.plan("private")))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (standing.state, *standing.state.rglob("*"))}
    assert modes["state"] == 0o700
    assert modes["trainer.sock"] == 0o600
    assert modes["audit.jsonl"] == 0o600
    assert not [name for name, mode in modes.items() if mode & 0o077]


# --- hard times -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of half a MiB."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root mounts a small tmpfs")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], check=False)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(path: Path) -> None:
    """Until the disk is full."""
    with path.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(512)):
            pass


def test_a_full_disk_is_a_clear_error_and_the_same_order_is_answered_when_there_is_room(
    house: House, small_disk: Path
) -> None:
    house.furnish(trainer=f'state = "{small_disk}/state"', listen=f"unix:{house.folder}/door/t.sock")
    trainer = house.start()
    site, plan = house.connection(), house.plan()
    first, second = house.order(plan), house.order(plan, 2)
    site.handle(first)
    kept = {path.name: path.read_bytes() for path in (small_disk / "state" / "town").glob("round-*")}
    fill(small_disk / "filler")
    with pytest.raises(TrainerError) as caught:
        site.handle(second)
    assert caught.value.public().startswith("StateError: ")
    assert "expected room and permission to write, found No space left" in trainer.wait_for("No space left").log
    assert {path.name: path.read_bytes() for path in (small_disk / "state" / "town").glob("*round-*")} == kept
    (small_disk / "filler").unlink()
    assert house.alike(site.handle(second), house.oracle(plan, first, second)[1])


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
@pytest.mark.endurance
def test_fifty_rounds_take_no_more_memory_than_five(house: House, wide_bert: Path) -> None:
    """With more than 4 MiB of shared arrays in every order and reply."""
    trainer = house.furnish().start()
    plan, site = house.plan(rounds=60, persist_optimizer_state=True), house.connection()
    adapter, model = dataclasses.replace(plan.adapter, target_modules=("dense",)), str(wide_bert)
    plan = dataclasses.replace(plan, adapter=adapter, model=dataclasses.replace(plan.model, source=model))
    order, sizes = house.order(plan), {}
    assert sum(array.nbytes for array in order.shared.values()) > 4 << 20
    for t in range(1, 51):
        site.handle(dataclasses.replace(order, round=t, admitted_round=t - 1))
        site.site_info(plan.name, to_json(plan))  # comes after what the trainer tidies up behind an order
        sizes[t] = resident_bytes(trainer.process.pid)
    print({t: f"{sizes[t] / 2**20:.1f} MiB" for t in (1, 5, 10, 20, 30, 40, 50)})
    assert sizes[50] <= 1.03 * sizes[5]
