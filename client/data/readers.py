"""Read rows from files, folders, assets and hub data sets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...common.config.diagnostics import did_you_mean
from ...common.config.schema import DataSettings
from ...common.dataset import Row
from ...common.errors import ConfigError, DataError
from .datasets_library import FORMATS, read_hub, read_saved, saved_folder
from .files import READERS
from .packaged import read_asset
from .source import Source

HUB_ID = re.compile(r"(?![./~])[\w.-]+(/[\w.-]+)?(:[^/\\]+)?")  # ID or OWNER/ID, and perhaps :SPLIT


def read_rows(
    source: str, site: str | None = None, data: DataSettings | None = None, notes: list[str] | None = None
) -> Sequence[Row]:
    """Read the rows of a file, of a folder, of ``asset:NAME/PART`` or of a hub data set (``ID`` or ``ID:SPLIT``).

    The suffix of a file selects the reader. ``data`` gives delimiter, encoding and configuration. ``notes`` receives
    what a reader decided by itself. Raises DataError, or ConfigError for an unknown asset.
    """
    if source.startswith("asset:"):
        return read_asset(source.removeprefix("asset:"), site)
    opened = Source(source, data or DataSettings(), site, [] if notes is None else notes)
    if saved_folder(source):
        rows = read_saved(opened)
    elif opened.path.exists():
        rows = _read_file(opened)
    elif is_hub_id(source):
        rows = read_hub(opened)
    else:
        hint = did_you_mean(opened.path.name, _files_beside(opened.path))
        raise opened.error("an existing file", source, message=f"the file {source} does not exist.", hint=hint)
    if not rows:
        message = f"{source} contains no rows."
        raise opened.error("rows", f"an empty file, {source}", message=message)
    return rows


def is_hub_id(source: str) -> bool:
    """Whether a source that does not exist here looks like a hub id.

    It does not if a data file here has this name with a suffix.
    """
    if not HUB_ID.fullmatch(source) or Source(source, DataSettings()).suffix in READERS:
        return False
    path = Path(source)
    return not any(name.startswith(f"{path.name}.") for name in _files_beside(path))


def _files_beside(path: Path) -> list[str]:
    """Return the names of the data files in the folder of a path that does not exist."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    except OSError:
        return []
    return [name for name in names if Source(name, DataSettings()).suffix in READERS]


def _read_file(source: Source) -> list[Row]:
    reader, suffix = READERS.get(source.suffix), source.suffix or "no suffix"
    if reader is None:
        raise source.error(
            f"a file ending in {FORMATS}",
            f"{source.name}, which ends in {suffix}",
            message=f"{source.name} ends in {suffix}, which selects no reader.",
            hint=f"Use a file in one of these formats: {FORMATS}.",
        )
    try:
        return list(reader(source))
    except DataError:
        raise
    except Exception as error:  # any error of a parser that gets damaged bytes
        raise source.error(
            f"a readable {suffix} file",
            f"{source.name} ({error})",
            message=f"cannot read {source.name} as a {suffix} file ({error}).",
        ) from None


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
