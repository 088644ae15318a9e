"""A site's rows: reading files, assets and hub data sets, and refusing what cannot be trained on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..common.assets import asset_folder
from ..common.errors import AssetError, DataError, RecipeError
from ..common.rows import Row, SiteDataset
from ..common.seeds import seed_from
from ..common.settings import DataSettings
from ..common.site import SiteSettings


@dataclass
class Sources:
    """Sources as they were read, and which of their rows are taken: sites of one machine never get the same row."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    taken: dict[str, set[int]] = field(default_factory=dict)

    def free(self, source: str, site: str) -> list[tuple[int, Row]]:
        """The rows that nobody has, with their numbers in the source."""
        place = _place(source)
        if place not in self.rows:
            self.rows[place] = list(read_rows(source, site))
        used = self.taken.setdefault(place, set())
        free = [(n, row) for n, row in enumerate(self.rows[place], 1) if n not in used]
        if not free:
            wanted = "rows that are not taken yet (data.train and data.test limit how many a site takes)"
            raise DataError("data.source", wanted, f"none of {len(used)} left in {source}", site=site)
        return free

    def take(self, source: str, numbers: Iterable[int]) -> None:
        """Gives rows to a site."""
        self.taken[_place(source)].update(numbers)


def load_site_rows(site: SiteSettings, seed: int, sources: Sources | None = None) -> SiteDataset:
    """Reads, shuffles, selects and checks one site's rows. Raises DataError naming the site, field and row.

    The order hangs on seed, site and source, so a simulation and a site of its own that read the same file have the
    same rows.
    """
    data, sources = site.data, sources or Sources()

    def draw(source: str, count: int | None) -> list[Row]:
        free = sources.free(source, site.name)
        shaped = dict(select_numbered(free, data, site.name))
        order = _order(len(free), seed_from(seed, site.name, _spelling(source))) if data.shuffle else range(len(free))
        kept = [(n, shaped[n]) for n in (free[i][0] for i in order) if n in shaped]
        chosen = balanced(kept, count) if data.shuffle else kept
        sources.take(source, (n for n, _ in chosen))
        return [row for _, row in chosen]

    if data.test_source:
        train = draw(data.source, data.train)
        with as_test_source():
            test = draw(data.test_source, data.test)
    else:
        wanted = None if data.train is None or data.test is None else data.train + data.test
        train, test = hold_out(draw(data.source, wanted), data, seed_from(seed, site.name, "held out"))
    return check_rows(site.name, data, capped(train, data.train), capped(test, data.test))


def _order(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(count).tolist()


def _place(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).is_file() else source


def _spelling(source: str) -> str:
    """What a source is called wherever it lies: a file by its name."""
    return Path(source).name if Path(source).is_file() else source


def capped(rows: Sequence[Row], count: int | None) -> list[Row]:
    """The first ``count`` rows, taken in turn from every label where rows have labels, so that no class is lost."""
    if count is None or len(rows) <= count:
        return list(rows)
    return [row for _, row in balanced(list(enumerate(rows)), count)]


def balanced(rows: Sequence[tuple[int, Row]], count: int | None) -> list[tuple[int, Row]]:
    """The same for rows with their numbers."""
    if count is None:
        return list(rows)
    by_label: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        by_label.setdefault(row[1].get("label", ""), []).append(row)
    turns = zip_longest(*(by_label[label] for label in sorted(by_label)))
    return [row for turn in turns for row in turn if row is not None][:count]


def hold_out(rows: Sequence[Row], data: DataSettings, seed: int) -> tuple[list[Row], list[Row]]:
    """A seeded split into training and test rows, ``train`` : ``test`` where both are set, else by ``test_fraction``.

    A label that only the test rows would have gives its first row to training: chance refuses no site.
    """
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    share = data.test / (data.train + data.test) if data.train and data.test else data.test_fraction
    cut = len(rows) - round(len(rows) * share)
    seen, given = {rows[i].get("label") for i in order[:cut]}, []
    for i in order[cut:]:
        if rows[i].get("label") not in seen:
            seen.add(rows[i].get("label"))
            given.append(i)
    return [rows[i] for i in given + order[:cut]], [rows[i] for i in order[cut:] if i not in given]


def select_numbered(rows: Iterable[tuple[int, Row]], data: DataSettings, site: str) -> list[tuple[int, Row]]:
    """Rows in the form of their task, filtered by ``where`` and ``labels``, with their numbers in the source."""
    wanted = dict(data.where or {})
    kept = [(n, row) for n, row in rows if all(str(row.get(k)) == v for k, v in wanted.items())]
    shaped = [(n, _SHAPES[data.task](row, n, data, site)) for n, row in kept]
    if data.labels is not None and data.task == "classification":
        shaped = [(n, row) for n, row in shaped if row["label"] in data.labels]
    return shaped


def check_rows(site: str, data: DataSettings, train: Sequence[Row], test: Sequence[Row]) -> SiteDataset:
    """Rules that need all rows: some on both sides, at least two classes, no test label that training lacks."""
    if not train:
        raise DataError("data.source", "rows to train on", f"none in {data.source}", site=site)
    if not test:
        key, place = ("test_source", data.test_source) if data.test_source else ("test_fraction", data.source)
        raise DataError(f"data.{key}", "rows to test on", f"none in {place} beside {len(train)} to train on", site=site)
    for key in ("x", "y") if data.task == "regression" else ():
        shapes = sorted({np.shape(row[key]) for row in (*train, *test)})
        if len(shapes) > 1:
            raise DataError(f"data.{key}", f"one shape in every row, {shapes[0]}", shapes[1], site=site)
    if data.task != "classification":
        return SiteDataset(site, data.task, train, test)
    seen = {row["label"] for row in train}
    unseen = sorted({row["label"] for row in test} - seen)
    if unseen:
        raise DataError("data.label", f"a label seen in training ({_few(seen)})", repr(unseen[0]), site=site)
    labels = data.labels or tuple(sorted(seen))
    if len(seen) < 2:
        raise DataError("data.label", "at least two classes", f"only {_few(seen)}", site=site)
    return SiteDataset(site, data.task, train, test, labels)


def read_rows(source: str, site: str | None = None) -> Iterable[Row]:
    """Rows of a file (by its ending), of ``asset:NAME/SPLIT`` or of a hub data set (``id`` or ``id:split``)."""
    if source.startswith("asset:"):
        return _read_asset(source.removeprefix("asset:"), site)
    path = Path(source)
    reader = _READERS.get(path.suffix)
    if reader is None:
        return _read_hub(source, site)
    if not path.is_file():
        raise DataError("data.source", "a file that is there", source, site=site)
    try:
        rows = list(reader(path, site))
    except DataError:
        raise
    except (ValueError, OSError, EOFError, csv.Error, BadZipFile) as error:
        raise DataError("data.source", f"a readable {path.suffix} file", f"{source} ({error})", site=site) from None
    if not rows:
        raise DataError("data.source", "rows", f"an empty file, {source}", site=site)
    return rows


@contextmanager
def as_test_source() -> Iterator[None]:
    """Errors about ``data.source`` are about ``data.test_source`` where that is what is read."""
    try:
        yield
    except (DataError, RecipeError) as error:
        error.field = "data.test_source" if error.field == "data.source" else error.field
        raise


def _read_jsonl(path: Path, site: str | None) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path.name} line {number}", "one JSON object", error.msg, site=site) from None
            if not isinstance(row, dict):
                raise DataError(f"{path.name} line {number}", "one JSON object", type(row).__name__, site=site)
            yield row


def _read_table(delimiter: str) -> Callable[[Path, str | None], Iterator[Row]]:
    def read(path: Path, site: str | None) -> Iterator[Row]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter=delimiter)

    return read


def _read_parquet(path: Path, site: str | None) -> Iterator[Row]:
    import pyarrow.parquet

    yield from pyarrow.parquet.read_table(path).to_pylist()


def _read_npz(path: Path, site: str | None) -> Iterator[Row]:
    with np.load(path, allow_pickle=False) as file:
        if set(file.files) != {"x", "y"}:
            raise DataError("data.source", "arrays x and y", ", ".join(file.files), site=site)
        yield from ({"x": x, "y": y} for x, y in zip(file["x"], file["y"], strict=True))


_READERS: dict[str, Callable[[Path, str | None], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_table(","),
    ".tsv": _read_table("\t"),
    ".parquet": _read_parquet,
    ".npz": _read_npz,
}


def _read_hub(source: str, site: str | None) -> Iterable[Row]:
    import datasets

    name, _, split = source.partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")  # type: ignore[return-value]
    except Exception as error:  # whatever the hub, the network or a builder raises
        endings = ", ".join(_READERS)
        wanted = f"a file ({endings}), asset:NAME or a hub data set that can be reached"
        raise DataError("data.source", wanted, f"{source!r} ({type(error).__name__})", site=site) from None


def _read_asset(name: str, site: str | None) -> Iterable[Row]:
    asset, _, part = name.partition("/")
    reader = _ASSET_READERS.get(asset)
    if reader is None:
        raise RecipeError("data.source", f"asset:NAME with NAME of {', '.join(_ASSET_READERS)}", repr(name), site=site)
    try:
        rows = list(reader(asset_folder(asset), part))
    except AssetError as error:
        raise error.at_site(site or "") from None
    except FileNotFoundError:
        rows = []
    if not rows:
        raise DataError("data.source", f"asset:{asset}/PART with a part that is there", repr(name), site=site)
    return rows


def _read_newsgroups(folder: Path, part: str) -> Iterator[Row]:
    with (folder / f"20newsgroups-{part or 'train'}.tab").open(encoding="utf-8") as file:
        for line in list(file)[3:]:  # three header lines
            label, _, text = line.rstrip("\n").partition("\t")
            yield {"label": label, "family": label.split(".")[0], "text": text}


def _read_orange(folder: Path, part: str) -> Iterator[Row]:
    """Any of the package's tables, by its file's name: below the columns' names stand their types and their roles."""
    with (folder / f"{part}.tab").open(encoding="utf-8", newline="") as file:
        yield from islice(csv.DictReader(file, delimiter="\t"), 2, None)


def _read_chatterbot(folder: Path, part: str) -> Iterator[Row]:
    """The first two turns of every conversation; the corpus repeats itself, so each pair comes once."""
    import yaml

    seen: set[tuple[str, str]] = set()
    for file in sorted(folder.glob(f"{part or '*'}.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            pair = tuple(str(turn) for turn in turns[:2])
            if len(pair) == 2 and pair not in seen:
                seen.add(pair)
                yield {"topic": file.stem, "prompt": pair[0], "completion": pair[1]}


_ASSET_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    "20newsgroups": _read_newsgroups,
    "orange-texts": _read_orange,
    "chatterbot": _read_chatterbot,
}


def _classification(row: Row, number: int, data: DataSettings, site: str) -> Row:
    text, label = (
        _column(row, data.text, "data.text", number, site),
        _column(row, data.label, "data.label", number, site),
    )
    if isinstance(label, float) or label is None:
        raise DataError("data.label", "a text or whole number", f"{label!r} in row {number}", site=site)
    return {"text": _text(text, "data.text", number, site), "label": str(label)}


def _generation(row: Row, number: int, data: DataSettings, site: str) -> Row:
    if data.messages:
        messages = _column(row, data.messages, "data.messages", number, site)
        if not isinstance(messages, list) or not all(_is_turn(turn) for turn in messages):
            wanted = "a list of {role, content}"
            raise DataError("data.messages", wanted, f"{type(messages).__name__} in row {number}", site=site)
        return {"messages": messages}
    prompt, completion = (
        _text(_column(row, getattr(data, key), f"data.{key}", number, site), f"data.{key}", number, site)
        for key in ("prompt", "completion")
    )
    if data.chat:
        turns = (("user", prompt), ("assistant", completion))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}
    return {"prompt": prompt, "completion": completion}


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def _regression(row: Row, number: int, data: DataSettings, site: str) -> Row:
    return {key: _array(_column(row, key, f"data.{key}", number, site), f"data.{key}", number, site) for key in "xy"}


_SHAPES: dict[str, Callable[[Row, int, DataSettings, str], Row]] = {
    "classification": _classification,
    "generation": _generation,
    "regression": _regression,
}


def _column(row: Row, name: str, field: str, number: int, site: str) -> Any:
    if name not in row:
        raise DataError(field, f"a column {name!r}", f"only {', '.join(map(str, row))} in row {number}", site=site)
    return row[name]


def _array(value: Any, field: str, number: int, site: str) -> np.ndarray:
    try:
        return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise DataError(field, "numbers", f"{type(value).__name__} in row {number}", site=site) from None


def _text(value: Any, field: str, number: int, site: str) -> str:
    if not isinstance(value, str):
        found = "nothing" if value is None else type(value).__name__
        raise DataError(field, "text", f"{found} in row {number}", site=site)
    return value


def _few(labels: Iterable[str]) -> str:
    names = sorted(labels)
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
