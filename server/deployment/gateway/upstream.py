"""The SuperLink behind the gateway: where it is, whose certificate it shows, and the timing of requests."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from ....common.errors import StateError


@dataclass(frozen=True)
class Upstream:
    """The SuperLink behind the gateway, and the timing in seconds.

    ``registration`` lets nodes register themselves, as SuperNodes without a key do; for ``--insecure`` only.
    ``hold``: for how long requests are held while the SuperLink is down. ``linger``: for how long an empty pull is
    repeated. ``pause``: between two repetitions for one node or object. The pause grows with the number of waiting
    calls, so that all pulls together, and all objects together, cause at most ``rate`` requests per second (each takes
    12 ms of the SuperLink's CPU time). It does not grow beyond ``slowest``; SuperNode alone would pull every 3 s.
    """

    url: str  # https://127.0.0.1:PORT
    ca: Path | None = None  # PEM; needed for https
    registration: bool = False
    keys: frozenset[str] | None = None  # registered public keys as SuperNodes send them; None accepts any
    hold: float = 25.0
    linger: float = 20.0
    held_by: Path | None = None  # while this file exists, requests are held
    pause: float = 0.1
    rate: float = 12.0
    slowest: float = 2.0


def trust(upstream: Upstream) -> ssl.SSLContext | bool:
    """Return how the SuperLink's certificate is verified. Raises StateError if the CA certificate cannot be read."""
    if upstream.url.startswith("http://"):
        return False
    try:
        return ssl.create_default_context(cafile=upstream.ca)
    except (OSError, ssl.SSLError) as error:
        message = f"The CA certificate {upstream.ca} cannot be read: {error}."
        raise StateError(str(upstream.ca), "a CA certificate (PEM)", error, message=message) from None
