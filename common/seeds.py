"""Seeds derive from (federation seed, site, round, purpose), never from order or time."""

from __future__ import annotations

import hashlib


def seed_from(*parts: object) -> int:
    """Return a 63-bit seed from the parts. Equal parts give equal seeds on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
