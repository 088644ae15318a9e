"""Who is here: every node of the grid is asked who it is, and bound to the site that it may speak for."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import Grid

from ...common.atomic_io import write_atomically
from ...common.errors import ColoraError, RefusedError
from ...common.protocol import flower_messages as messages
from ...common.protocol.types import SiteInfo

AGAIN = 30.0  # seconds after which a site that failed to introduce itself is asked once more


@dataclass(frozen=True)
class ConnectedSite:
    """A site as it introduced itself, on the node it did so from, which came at ``since``."""

    node: int
    since: str
    info: SiteInfo

    @property
    def site(self) -> str:
        """The site's name."""
        return self.info.site


@dataclass(frozen=True)
class JoinQuery:
    """How a node is asked who it is, and how often when its answer is an error."""

    message: Callable[[int], Message]
    attempts: int


@dataclass
class PendingJoin:
    """A question to a node that is here: who are you?"""

    since: str
    tries: int = 0
    due: float = 0.0  # when to ask (again); infinity: under way, or answered


class NodeRegistry:
    """Meets nodes without ever waiting for one. ``welcome`` judges who came, and raises RefusedError.

    Nodes that registered by a key carry the name that the key belongs to, and can speak for no other site. With a
    ``memory`` (a file) a coordinator that starts again need not ask those that stayed. ``heard`` is told
    each site's name when it is met.
    """

    def __init__(
        self,
        grid: Grid,
        names: Collection[str],
        inquiry: JoinQuery,
        memory: Path | None = None,
        heard: Callable[[str], None] | None = None,
    ) -> None:
        self._grid, self._names, self._inquiry, self._memory = grid, names, inquiry, memory
        self._heard = heard or (lambda site: None)
        self._known = _recall(memory) if memory else {}
        self.connected: dict[str, ConnectedSite] = {}
        self.failures: list[tuple[str, str | None]] = []  # (node or site, reason), for the caller to tell and clear
        self.refusals: list[ColoraError] = []
        self._here: dict[int, PendingJoin] = {}
        self._registered: dict[int, str] = {}
        self._pending: dict[str, int] = {}  # message id → node

    @property
    def asking(self) -> int:
        """How many nodes have yet to answer who they are."""
        return sum(node in self._here for node in self._pending.values())

    def presence(self, site: str) -> object:
        """Something true that is another thing after the site has gone and come back; None while it is away."""
        present = self.connected.get(site)
        there = self._here.get(present.node) if present else None
        return (present.node, there.since) if present and there else None

    def refresh(self) -> list[ConnectedSite]:
        """Asks who is new or came back, takes in what was answered, and returns the sites that were met just now."""
        now = time.monotonic()
        nodes = {int(node.node_id): node for node in self._grid.get_nodes()}
        self._here = {node: intro for node, intro in self._here.items() if node in nodes}
        for node, info in nodes.items():
            self._registered[node] = info.name
            there = self._here.get(node)
            if there is None or there.since != info.last_activated_at:
                there = self._here[node] = PendingJoin(info.last_activated_at)
                known = self._known.get(node)
                if known and known.since == there.since and known.site in self._names:
                    self.connected[known.site], there.due = known, float("inf")
                    self._heard(known.site)
            if there.due <= now:
                self._ask(node, there)
        return self._take_answers()

    def _ask(self, node: int, there: PendingJoin) -> None:
        there.tries, there.due = there.tries + 1, float("inf")
        for message_id in self._grid.push_messages([self._inquiry.message(node)]):
            self._pending[message_id] = node

    def _take_answers(self) -> list[ConnectedSite]:
        found = []
        while answers := list(self._grid.pull_messages(list(self._pending))) if self._pending else []:
            for message in answers:
                node = self._pending.pop(message.metadata.reply_to_message_id)
                there = self._here.get(node)
                if there and (present := self._present(node, there, message)):
                    found.append(present)
        return found

    def _present(self, node: int, there: PendingJoin, message: Message) -> ConnectedSite | None:
        name = self._registered.get(node) or f"node {node}"
        if message.has_error():
            if there.tries < self._inquiry.attempts:
                self._ask(node, there)
            else:
                there.tries, there.due = 0, time.monotonic() + AGAIN
                self.failures.append((name, message.error.reason))
            return None
        try:
            present = ConnectedSite(node, there.since, messages.site_info_from(message))
            self._check_name(present)
        except RefusedError as error:
            self.refusals.append(error if error.site else error.at_site(name))
            return None
        self.connected[present.site] = present
        self._heard(present.site)
        self._remember()
        return present

    def _remember(self) -> None:
        if self._memory:
            told = [dataclasses.asdict(present) for present in self.connected.values()]
            write_atomically(self._memory, json.dumps(told).encode(), lasting=False)

    def _check_name(self, present: ConnectedSite) -> None:
        registered = self._registered.get(present.node)
        if registered in self._names and present.site != registered:
            raise RefusedError("site", f"the name of its key, {registered}", present.site, site=registered)
        if present.site not in self._names:
            raise RefusedError("site", "a name of the roster", present.site)


def _recall(memory: Path) -> dict[int, ConnectedSite]:
    """Who was met before, by node; nobody where the file is missing or from another version."""
    try:
        told = json.loads(memory.read_text())
        found = [ConnectedSite(each["node"], each["since"], SiteInfo(**each["info"])) for each in told]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return {present.node: present for present in found}


def wait_for_nodes(grid: Grid, wanted: int, patience: float = 60.0, pause: float = 0.5) -> None:
    """Returns once ``wanted`` nodes are there, or once some are there and no more came within a ``pause`` (seconds).

    Flower's simulation runtime starts the ServerApp before it has registered its nodes.
    """
    ends, before = time.monotonic() + patience, -1
    while (count := len(list(grid.get_node_ids()))) < wanted and time.monotonic() < ends:
        if count and count == before:
            return
        before = count
        time.sleep(pause)
