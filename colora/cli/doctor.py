"""``colora doctor``: which files of a run, a site or a state folder are whole."""

# pyright: reportMissingImports=false
# (in a checkout the other packages lie beside this one, where a type checker does not look)

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from .exit_codes import UNHEALTHY

SKIPPED = {"flower", "logs"}  # folders of other programs' files


def doctor(directory: Annotated[Path, typer.Argument(show_default=False, metavar="DIR")]) -> None:
    """List the files of a run folder, a site's folder or a state folder, and whether each is whole.

    States, checkpoints, the ledger of the privacy budget and the secret are compared with their SHA-256. The exit code
    is 1 when a file is damaged.
    """
    from colora.common.errors import StateError
    from colora.common.foreign_text import clean, printable

    if not directory.is_dir():
        message = f"{directory} is not a folder."
        raise StateError("DIR", "a folder", "none", message=message, hint="Name a run folder or a site's folder.")
    files, damaged = list(_files(directory)), []
    if not files:
        message = f"{directory} contains no files of colora."
        raise StateError("DIR", "a run folder or a site's folder", "neither", message=message)
    for path in files:
        name = printable(str(path.relative_to(directory)))
        try:
            typer.echo(f"ok       {name}  {CHECKS[path.suffix](path)}")
        except Exception as error:  # a damaged file can make its reader raise anything
            damaged.append(path)
            typer.echo(f"DAMAGED  {name}  {clean(error)}")
    for hint in dict.fromkeys(HINTS[path.suffix] for path in damaged):
        typer.echo(hint)
    typer.echo(
        f"{len(damaged)} of {len(files)} files are damaged." if damaged else f"All {len(files)} files are whole."
    )
    if damaged:
        raise typer.Exit(UNHEALTHY)


def _files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.suffix in CHECKS and path.is_file() and not hidden and not SKIPPED.intersection(relative.parts[:-1]):
            yield path


def _arrays(path: Path) -> str:
    from colora.common.atomic_io import has_checksum, load_arrays

    arrays, meta = load_arrays(path)
    card = meta.get("card", {})
    number = f"round {card['round']}, " if "round" in card else ""
    checked = "SHA-256 checked" if has_checksum(path) else "no checksum, so damage cannot be detected"
    return f"{number}{len(arrays)} arrays, {checked}"


def _lines(path: Path) -> str:
    lines = path.read_bytes().split(b"\n")
    cut = lines.pop()
    if path.name == "events.jsonl":
        from colora.server.reporting.event_fields import parse_event

        bad = [number for number, line in enumerate(lines, 1) if line.strip() and parse_event(line) is None]
    else:
        bad = [number for number, line in enumerate(lines, 1) if line.strip() and not _is_json(line)]
    if bad:
        raise ValueError(f"line {bad[0]} cannot be read ({len(bad)} such lines)")
    return f"{len(lines)} lines" + (", and a last line that was cut off, which is ignored" if cut.strip() else "")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json(path: Path) -> str:
    if path.name == "roster.json":
        from colora.server.reporting.run_folder import RunFolder

        return f"{len(RunFolder(path.parent).read_roster())} sites"
    if path.name == "privacy.json":
        from colora.client.training.privacy_budget import PrivacyLedger

        return f"{len(PrivacyLedger(path).spendings())} spendings of the privacy budget"
    json.loads(path.read_bytes())
    return "valid JSON"


def _secret(path: Path) -> str:
    if path.name == "noise.secret":
        from colora.server.rounds.site_privacy import coordinator_secret

        coordinator_secret(path.parent)
        return "the secret of the coordinator"
    from colora.client.trainer_service.site_secret import site_secret

    site_secret(path.parent)
    return "the secret of the site"


def _toml(path: Path) -> str:
    tomllib.loads(path.read_text(encoding="utf-8"))
    return "valid TOML"


CHECKS: dict[str, Callable[[Path], str]] = {
    ".safetensors": _arrays,
    ".jsonl": _lines,
    ".json": _json,
    ".toml": _toml,
    ".secret": _secret,
}
HINTS = {  # what to do about a damaged file
    ".safetensors": "colora skips damaged states and checkpoints and continues from the newest whole one.",
    ".jsonl": "colora skips lines of events.jsonl that cannot be read. Restore other files, or delete such lines.",
    ".json": "Restore the file. colora writes services.json, roll.json and node.json again: delete those.",
    ".toml": "Restore the file, or write it again with the same values.",
    ".secret": "Restore the secret from a backup.",
}
