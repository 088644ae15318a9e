"""How soon Flower asks again for a part of a message that is still on its way."""

from __future__ import annotations

FIRST, LONGEST = 0.1, 1.0  # seconds; Flower's own are 1 and 10, each pause twice as long as the one before
TRIES = None  # without a limit: Flower's 500 would be over after 8 minutes now, its limit of 2 hours stays


def shorten_pull_backoff() -> None:
    """Shortens the pauses in this process. Flower has no setting for them; they are defaults of one function."""
    from flwr.supercore.inflatable.inflatable_utils import pull_objects

    shorter = {"initial_backoff": FIRST, "backoff_cap": LONGEST, "max_tries_per_object": TRIES}
    pull_objects.__kwdefaults__ = {**(pull_objects.__kwdefaults__ or {}), **shorter}
