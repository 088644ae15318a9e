"""A secret in a file: 64 hexadecimal digits from the operating system's entropy, readable by its owner only."""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path

from .atomic_io import CHECKSUM, write_atomically
from .errors import StateError

# The secret in a line, and its checksum in the next. A file of one line was written by
# hand (the guide shows how): it is read without a check.
_FORM = re.compile(rf"(?P<secret>[0-9a-f]{{64}})(\n{CHECKSUM}(?P<checksum>[0-9a-f]{{64}}))?")


def read_secret(path: Path, of: str, hint: str) -> str | None:
    """Return the secret in a file; None if there is no file.

    ``of`` says whose secret it is, and ``hint`` what to do about a damaged one. Raises StateError for a file that
    cannot be read or understood: a secret is never replaced silently.
    """
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror or str(error)
        raise StateError(str(path), "a readable file", reason, message=f"Cannot read {path}: {reason}.") from None
    found = _FORM.fullmatch(text)
    if found is None or found["checksum"] not in (None, _checksum(found["secret"])):
        raise StateError(
            str(path),
            "64 hexadecimal digits and their checksum",
            "something else",
            message=f"{path} does not hold the secret of {of}.",
            hint=hint,
        )
    return found["secret"]


def new_secret(path: Path) -> str:
    """Make a secret and write it with mode 0600. Raises StateError if writing fails."""
    secret = secrets.token_hex(32)
    write_atomically(path, f"{secret}\n{CHECKSUM}{_checksum(secret)}\n".encode())
    return secret


def _checksum(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
