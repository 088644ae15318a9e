"""Private parts of Flower that the coordinator and the sites share.

Only ``common/flower_compat.py``, ``server/flower_compat.py`` and ``client/flower_compat.py`` import private names of
``flwr``. Public are ``flwr.app``, ``flwr.serverapp``, ``flwr.clientapp`` and ``flwr.simulation``.
Imports are local where the module behind them is heavy: a ClientApp process loads this file for every message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

# Environment variable of flower-superexec: seconds between two looks for a task. Read in 1.40, 1.41 and 1.42
# (flwr/supercore/superexec/run_superexec.py); Flower has no command-line option for it.
TASK_POLL_INTERVAL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"

# Seconds by which the time in a SuperNode's signature may be in the past and in the future. Read in 1.40, 1.41 and 1.42
# (TIMESTAMP_TOLERANCE and SYSTEM_TIME_TOLERANCE in flwr/common/constant.py).
SIGNATURE_MAX_AGE, SIGNATURE_MAX_AHEAD = 305.0, 5.0

# Pauses between two requests in seconds, doubled from FIRST up to LONGEST. Flower's defaults are 1 and 10.
FIRST, LONGEST = 0.1, 1.0
# No limit on tries: with these pauses, Flower's 500 would be used up after 8 minutes. Its limit of 2 hours remains.
TRIES = None


def shorten_pull_backoff() -> None:
    """Shorten the pauses between two requests for a part of a message that is still being uploaded, in this process.

    Flower has no setting for them: they are keyword defaults of one function.
    Read in 1.40, 1.41 and 1.42 (the file is the same since 1.36).
    """
    from flwr.supercore.inflatable.inflatable_utils import pull_objects

    shorter = {"initial_backoff": FIRST, "backoff_cap": LONGEST, "max_tries_per_object": TRIES}
    pull_objects.__kwdefaults__ = {**(pull_objects.__kwdefaults__ or {}), **shorter}


def version_interceptor(component: str) -> RuntimeVersionHttpInterceptor:
    """Return the interceptor that adds Flower's version headers, without which Flower's HTTP APIs refuse a request.

    Read in 1.40, 1.41 and 1.42 (the file is the same in all three).
    """
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    return RuntimeVersionHttpInterceptor(component_name=component)
