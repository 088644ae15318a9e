"""Shorter pauses between requests to Flower, tried in a separate process, since the change is global."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
assert pull_objects.__kwdefaults__["max_tries_per_object"] is None, "a request may take longer than 500 s"
print(time.monotonic() - began)
"""


@pytest.mark.slow
def test_a_missing_part_of_a_message_is_requested_again_soon() -> None:
    done = subprocess.run([sys.executable, "-c", PULL_ONE], capture_output=True, text=True, check=True)
    assert 0.2 < float(done.stdout) < 1.0  # Flower's own pauses are at least 0.8 s and 1.6 s
