"""Several calls side by side that do a part of their work together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class _Abandoned(BaseException):
    """Ends a call whose rendezvous was interrupted."""


class _Member(threading.Thread):
    """One call in a thread of its own, which runs only between ``resume`` and its next pause or its end."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work: Callable[[list[Any]], Sequence[Any]] | None = None  # what it waits for, with ``item``
        self.item: Any = None
        self.answer: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self._call, self._go, self._paused = call, threading.Event(), threading.Event()

    def run(self) -> None:
        self._go.wait()
        self._go.clear()
        try:
            self.result = self._call()
        except BaseException as error:  # raised again in the thread that waits for the result
            self.error = error
        finally:
            self._paused.set()

    def resume(self) -> None:
        """Run until the call pauses or ends."""
        self.work = None
        self._go.set()
        self._paused.wait()
        self._paused.clear()

    def abandon(self) -> None:
        """End a call that is still waiting."""
        if self.work is not None:
            self.answer, self.work = _Abandoned(), None
            self._go.set()

    def pause(self) -> None:
        """Called in the thread of this member: wait for the next ``resume``."""
        self._paused.set()
        self._go.wait()
        self._go.clear()


class Rendezvous:
    """Runs calls in threads of their own, but one at a time and in their order, so that they may share a model.

    A call hands over work with ``together``. When every call has done so or has ended, the work of all of them runs at
    once, in the thread of ``run``.
    """

    def __init__(self) -> None:
        self._current: _Member | None = None

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Return the results of the calls, in order. Raises the first error of a call."""
        members = [_Member(call) for call in calls]
        for member in members:
            member.start()
        try:
            self._run(members)
        finally:
            for member in members:  # where an interrupt came between
                member.abandon()
        for member in members:
            if member.error is not None:
                raise member.error
        return [member.result for member in members]

    def _run(self, members: list[_Member]) -> None:
        running = members
        while running:
            for member in running:
                self._current = member
                member.resume()
            self._current = None
            running = [member for member in running if member.work is not None]
            for work in dict.fromkeys(member.work for member in running if member.work):
                self._do(work, [member for member in running if member.work == work])

    def together(self, work: Callable[[list[Item]], Sequence[Answer]], item: Item) -> Answer:
        """Return this call's part of ``work(items)``, for the items of all calls that wait for the same work.

        An error of the work is raised in each of these calls.
        """
        member = self._current
        assert member is not None
        assert member is threading.current_thread()
        member.work, member.item = work, item
        member.pause()
        answer, member.answer = member.answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _do(self, work: Callable[[list[Any]], Sequence[Any]], members: list[_Member]) -> None:
        try:
            answers = work([member.item for member in members])
        except Exception as error:
            answers = [error] * len(members)
        for member, answer in zip(members, answers, strict=True):
            member.item, member.answer = None, answer
