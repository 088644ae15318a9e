"""``allow.max_seconds``: a limit on everything that a request makes the models do."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook

from ...common.errors import RefusedError


class TimeLimit:
    """A context in which every forward pass of every model raises RefusedError once ``seconds`` have passed.

    Training, evaluation, generation and transfers all run models, so none of them outlasts the limit by more than one
    forward pass. Without a limit nothing is hooked.
    """

    def __init__(self, seconds: float | None, site: str) -> None:
        self.seconds, self.site = seconds, site
        self.done = self.total = 0  # optimizer steps
        self._deadline, self._hook = float("inf"), None

    def check(self, *_: Any) -> None:
        """Raise RefusedError if the time is over."""
        if time.monotonic() > self._deadline:
            found = f"more after {self.done} of {self.total} steps"
            raise RefusedError("allow.max_seconds", f"at most {self.seconds:g} s", found, site=self.site)

    def on_step(self, done: int, total: int) -> None:
        """Record a step for the error message, and check the time."""
        self.done, self.total = done, total
        self.check()

    def __enter__(self) -> TimeLimit:
        if self.seconds is not None:
            self._deadline = time.monotonic() + self.seconds
            self._hook = register_module_forward_pre_hook(self.check)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hook is not None:
            self._hook.remove()
