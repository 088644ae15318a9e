"""Flower's pauses, in a process of their own: shortening them lasts."""

from __future__ import annotations

import subprocess
import sys

PULL_ONE = """
import time
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, pull_objects
from colora.common.flower_compat import shorten_pull_backoff

def pull(object_id, tries=[]):
    tries.append(object_id)
    if len(tries) < 3:
        raise ObjectUnavailableError(object_id)
    return b"here"

shorten_pull_backoff()
began = time.monotonic()
assert pull_objects(["one"], pull) == {"one": b"here"}
assert pull_objects.__kwdefaults__["max_tries_per_object"] is None, "an order may take longer than 500 s"
print(time.monotonic() - began)
"""


def test_a_part_that_is_on_its_way_is_asked_for_again_soon() -> None:
    done = subprocess.run([sys.executable, "-c", PULL_ONE], capture_output=True, text=True, check=True)
    assert 0.2 < float(done.stdout) < 1.0  # Flower by itself: 0.8 s at least for the first pause, 1.6 s for the second
