"""A short hash of a text. Plans, layouts and requests are compared by it."""

from __future__ import annotations

import hashlib


def digest(text: str) -> str:
    """Return the first 32 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
