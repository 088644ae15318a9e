"""The trainer process: its replies equal those of a Trainer in this process bit for bit, also after crashes."""

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

from colora.client.trainer_service import serde
from colora.client.trainer_service.client import TrainerError
from colora.client.trainer_service.proto import trainer_pb2 as pb
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.schema import CommunicationSettings, to_json
from colora.common.models.saved import read_saved_model
from colora.common.protocol.types import hash_arrays
from tests.forked import run

if TYPE_CHECKING:
    from conftest import SiteSetup

SLOW = {"steps": 150}  # a second: long enough to be interrupted


@pytest.fixture
def helpers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def steps_of(call: Any) -> Iterator[int]:
    return (part.progress.step for part in call)


# --- equal replies ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reply_through_the_service_is_the_reply_of_a_trainer_in_this_process(running_site: SiteSetup) -> None:
    """Three methods, two rounds and the final request, bit for bit; then a stored reply again."""
    for method in ("colora", "local", "ffa"):
        plan = running_site.plan(f"same-{method}", method=method, final_steps=2, persist_optimizer_state=True)
        only = None if method != "local" else {}
        shared = {} if only is None else {"shared": only}
        asked = [running_site.request(plan, t, seed=t, **shared) for t in (1, 2)]
        asked.append(running_site.request(plan, 3, kind="finalize", **shared))
        if method == "ffa":
            asked = [dataclasses.replace(o, shared={k: v for k, v in o.shared.items() if "lora_B" in k}) for o in asked]
        site = running_site.client()
        replies = [site.handle(request) for request in asked]
        expected = running_site.expected(plan, *asked)
        assert all(running_site.equal(*pair) for pair in zip(replies, expected, strict=True))
        assert running_site.equal(site.handle(asked[2]), expected[2])


def test_a_description_is_that_of_a_trainer_in_this_process(running_site: SiteSetup) -> None:
    from colora.client.data.selection import load_site_rows
    from colora.client.training.adapted_model import attach_adapters
    from colora.client.training.state_store import StateStore
    from colora.client.training.trainer import Trainer
    from colora.common.config.loader import load_site
    from colora.common.models.base_model import load_base_model

    plan = running_site.plan("described")
    rows = load_site_rows(load_site(running_site.file), plan.seed)
    trainer = Trainer(
        attach_adapters(load_base_model(plan.model, generates=False), plan),
        rows,
        StateStore(running_site.folder / "no", plan.name),
    )
    assert running_site.client().site_info(plan.name, to_json(plan)) == trainer.site_info()


@pytest.mark.slow
def test_arrays_of_several_chunks_come_back_bit_for_bit(running_site: SiteSetup, wide_bert: Path) -> None:
    plan = running_site.plan("wide")
    model, adapter = plan.model, dataclasses.replace(plan.adapter, target_modules=("dense",))
    plan = dataclasses.replace(plan, model=dataclasses.replace(model, source=str(wide_bert)), adapter=adapter)
    request = running_site.request(plan)
    assert max(array.nbytes for array in request.shared.values()) > 2 * serde.CHUNK
    assert running_site.equal(running_site.client().handle(request), running_site.expected(plan, request)[0])


@pytest.mark.slow
def test_plans_in_turn_share_one_base_model_and_leave_no_trace_on_it(running_site: SiteSetup) -> None:
    """Rank, targets and method change between requests; the expected replies come from a fresh model each."""
    plans = [running_site.plan(f"turn-{k}", method=method) for k, method in enumerate(("colora", "fedit", "colora"))]
    adapter = dataclasses.replace(plans[2].adapter, rank=2, target_modules=("dense",))
    plans[2] = dataclasses.replace(plans[2], adapter=adapter)
    asked = [(plan, running_site.request(plan)) for plan in (*plans, plans[0])]
    site = running_site.client()
    for plan, request in asked:
        assert running_site.equal(site.handle(request), running_site.expected(plan, request)[0])


# --- each request is trained once -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_who_asks_while_the_order_is_at_work_gets_the_same_reply_and_it_is_trained_once(
    running_site: SiteSetup, helpers: ThreadPoolExecutor
) -> None:
    plan, site = running_site.plan("twice", **SLOW), running_site.client()
    request = running_site.request(plan)
    first = helpers.submit(site.handle, request)
    with running_site.call(*serde.request_parts(request)) as watching:
        assert next(step for step in steps_of(watching) if step)  # at work now
        second = helpers.submit(site.handle, request)
        assert running_site.equal(first.result(120), second.result(120))
    log = running_site.running[0]
    log.wait_for("twice round 1: loss")
    assert sum("twice round 1" in line and "150 steps" in line for line in log.lines) == 1
    assert running_site.equal(first.result(), running_site.expected(plan, request)[0])


@pytest.mark.slow
def test_training_goes_on_when_the_asking_process_goes_away(running_site: SiteSetup) -> None:
    plan = running_site.plan("left", **SLOW)
    request = running_site.request(plan)
    with running_site.call(*serde.request_parts(request)) as call:
        assert next(step for step in steps_of(call) if step)
        call.cancel()
    log = running_site.running[0].wait_for("a job finished after its caller had disconnected")
    reply = running_site.client().handle(request)
    assert not [line for line in log.lines if "left round 1" in line and "steps" in line]
    log.wait_for("left round 1: loss")
    assert running_site.equal(reply, running_site.expected(plan, request)[0])
    assert [line["replayed"] for line in running_site.audit("left")] == [True]  # only the sent reply


@pytest.mark.slow
def test_a_trainer_killed_in_the_middle_costs_its_caller_nothing_but_time(
    site_setup: SiteSetup, helpers: ThreadPoolExecutor
) -> None:
    trainer = site_setup.configure().start()
    plan = site_setup.plan(**SLOW)
    request, site = site_setup.request(plan), site_setup.client()
    waiting = helpers.submit(site.handle, request)
    with site_setup.call(*serde.request_parts(request)) as watching:
        assert next(step for step in steps_of(watching) if step)
        assert trainer.end(signal.SIGKILL) == -signal.SIGKILL
    assert not waiting.done()
    assert (site_setup.state / "trainer.sock").exists()  # stale now
    site_setup.start()
    assert site_setup.equal(waiting.result(120), site_setup.expected(plan, request)[0])


@pytest.mark.slow
def test_a_reply_stored_before_a_kill_is_replayed_after_it_and_noted_again(site_setup: SiteSetup) -> None:
    trainer = site_setup.configure().start()
    request = site_setup.request(site_setup.plan())
    before = site_setup.client().handle(request)
    trainer.end(signal.SIGKILL)
    site_setup.start()
    after = site_setup.client().handle(request)
    assert site_setup.equal(before, after)
    assert before.seconds == after.seconds  # stored, not trained again
    assert [line["replayed"] for line in site_setup.audit()] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_at_once_in_the_middle_of_a_round(site_setup: SiteSetup, number: int) -> None:
    trainer = site_setup.configure().start()
    request = site_setup.request(site_setup.plan(steps=100_000))
    with site_setup.call(*serde.request_parts(request)) as watching:
        assert next(step for step in steps_of(watching) if step)
        assert trainer.end(number) == 0
    assert not (site_setup.state / "trainer.sock").exists()
    assert trainer.lines[-2].endswith("stopped")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"federation": "../escape", "plan": None}, "ConfigError: name"),
        ({"federation": "elsewhere"}, "RefusedError: federation"),
        ({"plan": "no json"}, "RefusedError: plan"),
        ({"plan": "[" * 100_000}, "RefusedError: plan"),
        ({"plan": "[1, 2]"}, "RefusedError: plan"),
        ({"plan": '{"name": "town"}'}, "ConfigError: rounds"),
        ({"kind": "steal"}, "RefusedError: kind"),
        ({"round": 3, "admitted_round": 9}, "RefusedError: admitted_round"),
        ({"shared": {"head.classifier.weight": np.zeros((2, 16), np.float32)}}, "RefusedError: arrays"),
        ({"shared": {}}, "RefusedError: arrays"),
    ],
)
def test_an_order_that_may_not_be_is_refused_by_its_field(running_site: SiteSetup, change: dict, message: str) -> None:
    plan = running_site.plan("refused")
    if change.get("plan", "") is None:
        raw = to_json(plan).replace('"name": "refused"', '"name": "../escape"')
        change = {**change, "plan": raw}
    with pytest.raises(TrainerError) as caught:
        running_site.client().handle(running_site.request(plan, **change))
    assert caught.value.public() == message
    assert not (running_site.folder / "escape").exists()
    assert not list((running_site.state / "refused").glob("round-*"))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([], "RefusedError: request"),
        ([pb.TrainRequestPart()], "RefusedError: request"),
        ([pb.TrainRequestPart(chunk=pb.Chunk(name="x"))], "RefusedError: request"),
        (["head", "head"], "RefusedError: request"),
        (["head", pb.TrainRequestPart(chunk=pb.Chunk(name="core" * 500))], "RefusedError: arrays"),
        (["other protocol"], "RefusedError: protocol"),
        (["head", "empty", "half"], "RefusedError: encoder.layer.0.attention.self.query.lora_A.weight"),
        (["head", "claim"], "RefusedError: encoder.layer.0.attention.self.query.lora_A.weight"),
        (["head", "twice as much"], "RefusedError: encoder.layer.0.attention.self.query.lora_A.weight"),
        (["head", "over a chunk"], "RefusedError: encoder.layer.0.attention.self.query.lora_A.weight"),
    ],
)
def test_parts_of_no_order_are_refused(running_site: SiteSetup, sent: list, message: str) -> None:
    """TrainerClient never sends these, but code from a coordinator could."""
    request = running_site.request(running_site.plan("parts"))
    head, first, *_ = serde.request_parts(request)
    bad = dict.fromkeys(("half", "claim", "empty", "twice as much", "over a chunk"))
    for name in bad:
        bad[name] = pb.TrainRequestPart()
        bad[name].CopyFrom(first)
    bad["half"].chunk.data, bad["claim"].chunk.shape[0] = bytes(8), 1 << 50
    bad["empty"].chunk.data, bad["over a chunk"].chunk.data = b"", bytes(serde.CHUNK + 1)
    bad["twice as much"].chunk.data *= 2
    other = pb.TrainRequestPart()
    other.CopyFrom(head)
    other.head.protocol = 99
    known = {"head": head, "other protocol": other, **bad}
    with running_site.call(*(known.get(each, each) if isinstance(each, str) else each for each in sent)) as call:
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.details() == message  # type: ignore[attr-defined]


def test_a_message_beyond_the_limit_does_not_come_in(running_site: SiteSetup) -> None:
    head, *_ = serde.request_parts(running_site.request(running_site.plan("oversized")))
    big = pb.TrainRequestPart(chunk=pb.Chunk(name="x", data=bytes(2 * serde.CHUNK)))
    with running_site.call(head, big) as call, pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]


def test_what_the_site_file_does_not_allow_is_refused_before_anything_is_touched(site_setup: SiteSetup) -> None:
    site_setup.configure("[allow]", 'federations = ["town"]', "max_rank = 4").start()
    site, adapter = site_setup.client(), site_setup.plan().adapter
    larger = dataclasses.replace(adapter, rank=8, init="orthogonal")  # which cannot be smaller at one site
    for plan, message in (
        (site_setup.plan("city"), "RefusedError: federation"),
        (dataclasses.replace(site_setup.plan(), adapter=larger), "adapter.rank"),
    ):
        with pytest.raises(TrainerError) as caught:
            site.site_info(plan.name, to_json(plan))
        assert message in caught.value.public()
        with pytest.raises(TrainerError, match=message):
            site.handle(site_setup.request(plan))
    assert not (site_setup.state / "city").exists()
    assert not (site_setup.state / "town").exists()
    assert site.handle(site_setup.request(site_setup.plan())).examples == 8


@pytest.mark.slow
def test_a_site_with_a_smaller_max_rank_trains_an_adapter_of_this_rank(site_setup: SiteSetup) -> None:
    site_setup.configure("[allow]", "max_rank = 2").start()
    site, plan = site_setup.client(), site_setup.plan()
    assert site.site_info(plan.name, to_json(plan)).rank == 2 < plan.adapter.rank
    sent = site.handle(site_setup.request(plan, shared=initial_shared_state(plan))).shared  # B is zero
    a = next(key for key in sent if "lora_A" in key)
    assert np.linalg.matrix_rank(sent[a.replace("lora_A", "lora_B")] @ sent[a], tol=1e-5) == 2
    assert read_saved_model(site_setup.state / plan.name).plan.adapter.rank == 2


@pytest.mark.slow
def test_training_that_takes_longer_than_allowed_is_stopped_and_leaves_no_trace(site_setup: SiteSetup) -> None:
    trainer = site_setup.configure("[allow]", "max_seconds = 1.0").start()
    site, plan, long = site_setup.client(), site_setup.plan(), site_setup.plan("long", steps=1_000_000)
    first, second = site_setup.request(plan), site_setup.request(plan, 2)
    assert site.handle(first)
    with pytest.raises(TrainerError) as caught:
        site.handle(site_setup.request(long))
    assert caught.value.public() == "RefusedError: allow.max_seconds"
    assert "at most 1 s, found more after" in trainer.wait_for("allow.max_seconds").log
    assert not list((site_setup.state / "long").glob("round-*"))
    assert site_setup.audit("long")[-1]["text"] == "RefusedError: allow.max_seconds"
    assert site_setup.equal(site.handle(second), site_setup.expected(plan, first, second)[1])


@pytest.mark.slow
def test_the_service_returns_the_adapters_that_it_received_and_nothing_else(running_site: SiteSetup) -> None:
    """For a plan with differences: S_0, and what a stored round trained from. A reply's arrays are not among them."""
    bits = CommunicationSettings(broadcast_bits=4)
    plan = dataclasses.replace(running_site.plan("differences"), communication=bits)
    site, text, request = running_site.client(), to_json(plan), running_site.request(plan)
    reply = site.handle(request)
    assert hash_arrays(site.received(plan.name, text, 0)) == hash_arrays(initial_shared_state(plan))
    assert hash_arrays(site.received(plan.name, text, 1)) == hash_arrays(request.shared) != hash_arrays(reply.shared)
    assert site.received(plan.name, text, 2) == {}
    line = running_site.audit(plan.name)[-2]
    assert (line["kind"], line["round"], line["sha256"]) == ("received", 1, hash_arrays(request.shared))
    without = running_site.plan("plain")
    site.handle(running_site.request(without))
    for federation, asked, number in ((without.name, to_json(without), 1), (plan.name, text, -1), ("other", text, 1)):
        with pytest.raises(TrainerError) as caught:
            site.received(federation, asked, number)
        assert caught.value.public().startswith("RefusedError")


# --- output -----------------------------------------------------------------------------------------------------------


def test_the_surface_is_four_calls_and_health(running_site: SiteSetup) -> None:
    from colora.client.trainer_service.proto import trainer_pb2

    (service,) = trainer_pb2.DESCRIPTOR.services_by_name.values()
    assert [method.name for method in service.methods] == ["GetSiteInfo", "Train", "Sum", "GetReceived"]
    with grpc.insecure_channel(serde.target_of(running_site.address)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "colora.trainer.v1.Trainer"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflect = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as caught:
            list(reflect(iter([b""])))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


def test_the_audit_holds_what_was_sent_to_the_byte(running_site: SiteSetup) -> None:
    plan, site = running_site.plan("audited", final_steps=1), running_site.client()
    described = site.site_info(plan.name, to_json(plan))
    first = running_site.request(plan)
    close = running_site.request(plan, 2, kind="finalize")
    replies = [site.handle(each) for each in (first, first, close)]
    with pytest.raises(TrainerError):
        site.handle(dataclasses.replace(first, shared={}))
    lines = running_site.audit("audited")
    assert [line["kind"] for line in lines] == ["description", "reply", "reply", "reply", "error"]
    assert [line.get("replayed") for line in lines[1:4]] == [False, True, False]
    assert described.site == "ada"
    assert lines[4]["text"] == "RefusedError: arrays"
    for line, reply, request in zip(lines[1:4], replies, (first, first, close), strict=True):
        assert (line["round"], line["phase"], line["key"]) == (request.round, request.kind, request.key)
        assert line["metrics"] == sorted(reply.metrics)
        noted = {each["name"]: (each["sha256"], each["bytes"], tuple(each["shape"])) for each in line["arrays"]}
        hashes = {k: (hashlib.sha256(v.tobytes()).hexdigest(), v.nbytes, v.shape) for k, v in reply.shared.items()}
        assert noted == hashes
        norms = {each["name"]: each["norm"] for each in line["arrays"]}
        assert norms == {
            k: pytest.approx(float(np.sqrt((v.astype(float) ** 2).sum()))) for k, v in reply.shared.items()
        }


def test_without_an_audit_line_nothing_leaves(site_setup: SiteSetup) -> None:
    site_setup.configure().start()
    site, plan = site_setup.client(), site_setup.plan()
    (site_setup.state / "town" / "audit.jsonl").mkdir(parents=True)  # a folder, which not even root can append to
    for ask in (lambda: site.site_info(plan.name, to_json(plan)), lambda: site.handle(site_setup.request(plan))):
        with pytest.raises(TrainerError) as caught:
            ask()
        assert caught.value.public() == "StateError: audit.jsonl"
    (site_setup.state / "town" / "audit.jsonl").rmdir()
    assert site_setup.equal(
        site.handle(site_setup.request(plan)), site_setup.expected(plan, site_setup.request(plan))[0]
    )
    assert [line["replayed"] for line in site_setup.audit()] == [True]


def test_an_error_that_quotes_data_stays_in_the_trainers_log(site_setup: SiteSetup) -> None:
    data = 'source = "rows.csv"\ntest_source = "test.csv"\n'
    (site_setup.folder / "test.csv").write_text("text,label\nred cat moon sea hill dog,Mrs Miller has gout\n")
    trainer = site_setup.configure(data=data).start()
    for ask in (
        lambda: site_setup.client().site_info("town", to_json(site_setup.plan())),
        lambda: site_setup.client().handle(site_setup.request(site_setup.plan())),
    ):
        with pytest.raises(TrainerError) as caught:
            ask()
        assert caught.value.public() == "DataError: data.label"
        assert "Miller" not in str(caught.value)
    assert "Mrs Miller has gout" in trainer.wait_for("Miller").log
    assert {line["text"] for line in site_setup.audit()} == {"DataError: data.label"}


def test_an_unexpected_error_crosses_by_its_type_alone(site_setup: SiteSetup) -> None:
    breaking = (
        "from colora.client.training.trainer import Trainer\n"
        "def broken(*_):\n    raise KeyError('Mrs Miller has gout')\n"
        "Trainer.handle = broken"
    )
    trainer = site_setup.configure().start(breaking)
    with pytest.raises(TrainerError) as caught:
        site_setup.client().handle(site_setup.request(site_setup.plan()))
    assert caught.value.public() == "KeyError"
    assert "Miller" not in str(caught.value)
    trainer.wait_for("KeyError: 'Mrs Miller has gout'")


def test_the_log_has_a_line_a_round_and_no_row_of_the_data(running_site: SiteSetup) -> None:
    plan = running_site.plan("logged")
    running_site.client().handle(running_site.request(plan))
    log = running_site.running[0].wait_for("logged round 1")
    (line,) = [line for line in log.lines if "logged round 1" in line]
    assert "loss" in line
    assert "2 steps" in line
    assert "bytes sent" in line
    rows = (running_site.folder / "rows.csv").read_text().splitlines()[1:]
    assert not [row for row in rows if row.partition(",")[0] in log.log]


# --- start ------------------------------------------------------------------------------------------------------------


def run_service(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run("colora.client.trainer_service.server", *arguments)


@pytest.mark.parametrize(
    ("listen", "more", "message"),
    [
        ("unix:" + "x" * 120, "", "at most 100 are allowed. Choose a shorter path in trainer.listen."),
        ("127.0.0.1:0", "", "A trainer on HOST:PORT needs a trainer.link folder with ca.crt, trainer.crt, trainer.key"),
        ("nowhere", "", "trainer.listen: expected unix:PATH or HOST:PORT, found 'nowhere'"),
        ("unix:state/t.sock", "colour = 1", "colour"),
    ],
)
def test_what_cannot_begin_says_so_in_one_line_and_exits_2(
    site_setup: SiteSetup, listen: str, more: str, message: str
) -> None:
    done = run_service(site_setup.configure(more, listen=listen).file)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("colora: ")
    assert message in line


def test_a_device_that_is_not_there_is_named_at_the_start(site_setup: SiteSetup) -> None:
    site_setup.configure().file.write_text(site_setup.file.read_text().replace('device = "cpu"', 'device = "warp:9"'))
    done = run_service(site_setup.file)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert (
        "site ada: trainer.device: this machine has no device 'warp:9'. Use auto, cpu, cuda or cuda:N." in done.stderr
    )


def test_no_site_file_is_one_line_too(site_setup: SiteSetup) -> None:
    """The first by the real command, which ends before it imports anything heavy."""
    command = [sys.executable, "-m", "colora.client.trainer_service.server"]
    bare = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    for done in (bare, run_service(site_setup.folder / "missing.toml")):
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_second_trainer_for_the_same_state_is_refused_and_the_first_goes_on(site_setup: SiteSetup) -> None:
    site_setup.configure().start()
    done = run_service(site_setup.file)
    assert done.returncode == 2
    assert f"process {site_setup.running[0].process.pid}" in done.stderr
    assert site_setup.client().handle(site_setup.request(site_setup.plan())).examples == 8


def test_the_state_is_this_users_alone(running_site: SiteSetup) -> None:
    running_site.client().handle(running_site.request(running_site.plan("private")))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (running_site.state, *running_site.state.rglob("*"))}
    assert modes["state"] == 0o700
    assert modes["trainer.sock"] == 0o600
    assert modes["audit.jsonl"] == 0o600
    assert not [name for name, mode in modes.items() if mode & 0o077]


# --- full disks and memory --------------------------------------------------------------------------------------------


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
    """Fill the disk."""
    with path.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(512)):
            pass


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_the_same_order_is_answered_when_there_is_room(
    site_setup: SiteSetup, small_disk: Path
) -> None:
    site_setup.configure(trainer=f'state = "{small_disk}/state"', listen=f"unix:{site_setup.folder}/socket/t.sock")
    trainer = site_setup.start()
    site, plan = site_setup.client(), site_setup.plan()
    first, second = site_setup.request(plan), site_setup.request(plan, 2)
    site.handle(first)
    kept = {path.name: path.read_bytes() for path in (small_disk / "state" / "town").glob("round-*")}
    fill(small_disk / "filler")
    with pytest.raises(TrainerError) as caught:
        site.handle(second)
    assert caught.value.public().startswith("StateError")
    assert trainer.wait_for("No space left")
    assert {path.name: path.read_bytes() for path in (small_disk / "state" / "town").glob("*round-*")} == kept
    (small_disk / "filler").unlink()
    assert site_setup.equal(site.handle(second), site_setup.expected(plan, first, second)[1])


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
@pytest.mark.endurance
def test_fifty_rounds_take_no_more_memory_than_five(site_setup: SiteSetup, wide_bert: Path) -> None:
    """With more than 4 MiB of shared arrays in every request and reply."""
    trainer = site_setup.configure().start()
    plan, site = site_setup.plan(rounds=60, persist_optimizer_state=True), site_setup.client()
    adapter, model = dataclasses.replace(plan.adapter, target_modules=("dense",)), str(wide_bert)
    plan = dataclasses.replace(plan, adapter=adapter, model=dataclasses.replace(plan.model, source=model))
    request, sizes = site_setup.request(plan), {}
    assert sum(array.nbytes for array in request.shared.values()) > 4 << 20
    for t in range(1, 51):
        site.handle(dataclasses.replace(request, round=t, admitted_round=t - 1))
        site.site_info(plan.name, to_json(plan))  # after the trainer has released the memory of the request
        sizes[t] = resident_bytes(trainer.process.pid)
    print({t: f"{sizes[t] / 2**20:.1f} MiB" for t in (1, 5, 10, 20, 30, 40, 50)})
    assert sizes[50] <= 1.03 * sizes[5]
