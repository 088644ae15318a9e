"""Data sets of the ``datasets`` library: on the Hugging Face hub, or in a folder of ``save_to_disk``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common.dataset import Row
from .files import READERS
from .source import DECOMPRESSORS, Source

FORMATS = f"{', '.join(READERS)}, each also with {', '.join(DECOMPRESSORS)}"


def read_hub(source: Source) -> Sequence[Row]:
    """Load ``ID`` or ``ID:SPLIT`` (default: train), in the configuration ``data.config``. Raises DataError."""
    import datasets

    name, _, split = source.name.partition(":")
    try:
        loaded = datasets.load_dataset(name, source.data.config, split=split or "train")
    except Exception as error:  # any error of the hub, the network or a dataset builder
        kind, reason = type(error).__name__, str(error).partition("\n")[0]
        if "Config name is missing" in reason or "BuilderConfig" in reason:
            hint = "Set data.config to one of the data set's configurations."
            raise source.error("a configuration", reason, message=f"{source.name!r}: {reason}", hint=hint) from None
        raise source.error(
            "a file, a folder, asset:NAME or a reachable hub data set",
            f"{source.name!r} ({kind})",
            message=f"{source.name!r} is not a local file and cannot be loaded as a hub data set ({kind}).",
            hint=f"Use a file ({FORMATS}), asset:NAME/PART, or a hub data set as ID or ID:SPLIT.",
        ) from None
    return _with_names(loaded)


def read_saved(source: Source) -> Sequence[Row]:
    """Load a folder that ``save_to_disk`` wrote; ``FOLDER:SPLIT`` names a split of several. Raises DataError."""
    import datasets

    folder, split = saved_folder(source.name) or (source.path, "")
    try:
        loaded: Any = datasets.load_from_disk(str(folder))
    except FileNotFoundError:
        raise source.error(
            "a file, or a folder of save_to_disk",
            f"another folder, {folder}",
            message=f"{folder} is a folder without a data set of save_to_disk.",
            hint=f"Name a file in it ({FORMATS}).",
        ) from None
    if not isinstance(loaded, dict):
        return _with_names(loaded)
    if (split or "train") not in loaded:
        splits = ", ".join(loaded)
        message = f"{folder} has no split {split or 'train'!r}, only {splits}."
        raise source.error(f"one of the splits {splits}", split, message=message, hint="Name one as FOLDER:SPLIT.")
    return _with_names(loaded[split or "train"])


def _with_names(dataset: Any) -> Sequence[Row]:
    """Return the rows with the names of labels that the data set stores as numbers. -1 stands for no label."""
    from datasets import ClassLabel

    features = getattr(dataset, "features", None) or {}  # some data sets know none before they are read
    inner = {column: getattr(feature, "feature", feature) for column, feature in features.items()}  # of lists
    names = {column: feature.names for column, feature in inner.items() if isinstance(feature, ClassLabel)}

    def name(column: str, number: Any) -> Any:
        if isinstance(number, list):
            return [name(column, each) for each in number]
        return names[column][number] if number is not None and number >= 0 else None

    return [{**row, **{c: name(c, row[c]) for c in names}} for row in dataset] if names else dataset


def saved_folder(name: str) -> tuple[Path, str] | None:
    """Return folder and split of a source that is an existing folder; None for another one."""
    folder, _, split = name.rpartition(":")
    candidates = [(Path(name), ""), *([(Path(folder), split)] if folder else [])]
    return next((candidate for candidate in candidates if candidate[0].is_dir()), None)
