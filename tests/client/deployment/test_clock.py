"""A site whose clock differs too much from the coordinator's is told so, since Flower refuses its signatures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from colora.client.deployment.checks.credentials import check_coordinator
from colora.client.deployment.checks.result import CheckFailed
from colora.common.config.site_schema import CoordinatorSettings


@contextmanager
def coordinator(ahead: float) -> Iterator[CoordinatorSettings]:
    """A coordinator whose clock is so many seconds ahead of this machine's."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + ahead)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield CoordinatorSettings(f"127.0.0.1:{server.server_port}", insecure=True)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("ahead", "told"), [(-120, "is 12[01] s ahead of that of"), (400, "is (399|400) s behind that of")]
)
def test_a_clock_that_flower_refuses_is_told(ahead: float, told: str) -> None:
    with coordinator(ahead) as settings, pytest.raises(CheckFailed, match=f"this machine's clock {told}"):
        check_coordinator(settings)


@pytest.mark.parametrize("ahead", [0, 200, -3])
def test_a_clock_within_flowers_limits_is_fine(ahead: float) -> None:
    with coordinator(ahead) as settings:
        assert "answers in" in check_coordinator(settings)
