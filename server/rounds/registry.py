"""The registry of connected nodes: each node is asked which site it is, and may only be the site of its key."""

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
from ...common.errors import ColoraError, RefusedError, StateError
from ...common.processes.health import read_services
from ...common.protocol import flower_messages as messages
from ...common.protocol.types import SiteInfo
from .replies import ReplyCollector

CACHE = "roll.json"  # in the run folder
PULL_WAIT = 0.1  # seconds to wait for replies to join requests (deployed)
MAX_NODE = 1 << 64  # Flower's ids of nodes have 64 bits
REJOIN_INTERVAL = 30.0  # seconds before a node whose join requests all failed is asked again


@dataclass(frozen=True)
class ConnectedSite:
    """A site that has joined: its node, the time at which the node became active, and the site's description."""

    node: int
    since: str
    info: SiteInfo

    @property
    def site(self) -> str:
        """The site's name."""
        return self.info.site


@dataclass(frozen=True)
class JoinQuery:
    """Builds the join request for a node id; a node that answers with an error is asked ``attempts`` times."""

    message: Callable[[int], Message]
    attempts: int


@dataclass
class PendingJoin:
    """The state of a node's join request."""

    since: str
    tries: int = 0
    due: float = 0.0  # monotonic time of the next request; infinity while one is in flight and after the reply


class TakenName(RefusedError):
    """A node claims the name of another node that is connected."""


class NodeRegistry:
    """Binds nodes to sites without blocking.

    Nodes that registered with a key have the name of the key's owner and cannot join as another site. With the run
    folder of a deployed coordinator, the registry survives a restart: nodes that stayed connected are not asked again.
    ``on_join`` is called with a site's name when the site joins.
    """

    def __init__(
        self,
        grid: Grid,
        names: Collection[str],
        query: JoinQuery,
        run_folder: Path | None = None,
        on_join: Callable[[str], None] | None = None,
    ) -> None:
        self._grid, self._names, self._query, self._folder = grid, names, query, run_folder
        self._on_join = on_join or (lambda site: None)
        self._replies = ReplyCollector(grid, background=run_folder is not None)
        self._cached = _read_cache(run_folder / CACHE) if run_folder else {}
        self._gateway = _gateway_process(run_folder)
        self.connected: dict[str, ConnectedSite] = {}
        self.failures: list[tuple[str, str | None]] = []  # (node or site, reason); the caller reports and clears them
        self.refusals: list[ColoraError] = []  # likewise
        self._online: dict[int, PendingJoin] = {}
        self._key_owners: dict[int, str] = {}  # node → name of its registered key, empty without keys
        self._pending: dict[str, int] = {}  # message id → node

    @property
    def asking(self) -> int:
        """Number of online nodes that have not answered their join request."""
        return sum(node in self._online for node in self._pending.values())

    def presence(self, site: str) -> object:
        """An opaque token that changes when messages to the site may be lost; None while it is offline.

        They are when the site reconnects and when the gateway starts again, which may have died with a message.
        """
        connected = self.connected.get(site)
        online = self._online.get(connected.node) if connected else None
        return (connected.node, online.since, self._gateway) if connected and online else None

    def refresh(self) -> list[ConnectedSite]:
        """Send join requests to new and reconnected nodes, process replies, and return the sites that just joined."""
        now, gateway = time.monotonic(), _gateway_process(self._folder)
        if gateway != self._gateway:
            self._gateway = gateway
            for node in self._pending.values():
                if node in self._online:
                    self._online[node].due = now
        nodes = {int(node.node_id): node for node in self._grid.get_nodes()}
        self._online = {node: pending for node, pending in self._online.items() if node in nodes}
        for node, node_info in nodes.items():
            self._key_owners[node] = node_info.name
            pending = self._online.get(node)
            if pending is None or pending.since != node_info.last_activated_at:
                pending = self._online[node] = PendingJoin(node_info.last_activated_at)
                cached = self._cached.get(node)
                if cached and cached.since == pending.since and self._may_join(cached):
                    self.connected[cached.site], pending.due = cached, float("inf")
                    self._on_join(cached.site)
            if pending.due <= now:
                self._send(node, pending)
        return self._take_replies()

    def _send(self, node: int, pending: PendingJoin) -> None:
        pending.tries, pending.due = pending.tries + 1, float("inf")
        for message_id in self._grid.push_messages([self._query.message(node)]):
            self._pending[message_id] = node

    def _take_replies(self) -> list[ConnectedSite]:
        joined = []
        arrived = True
        while arrived and self._pending:
            arrived = False
            for message_id, message in self._replies.take(list(self._pending), PULL_WAIT):
                arrived = True
                node = self._pending.pop(message_id, None)
                pending = self._online.get(node) if node is not None else None
                if node is not None and pending and (site := self._connect(node, pending, message)):
                    joined.append(site)
        return joined

    def _connect(self, node: int, pending: PendingJoin, message: Message) -> ConnectedSite | None:
        """Process a node's reply; None when it is an error or refused."""
        name = self._key_owners.get(node) or f"node {node}"
        if message.has_error():
            if pending.tries < self._query.attempts:
                self._send(node, pending)
            else:
                pending.tries, pending.due = 0, time.monotonic() + REJOIN_INTERVAL
                self.failures.append((name, message.error.reason))
            return None
        try:
            connected = ConnectedSite(node, pending.since, messages.site_info_from(message))
            self._check_name(connected)
        except RefusedError as error:
            self.refusals.append(error if error.site else error.at_site(name))
            if isinstance(error, TakenName):  # the other node may be the same site before its restart
                pending.tries, pending.due = 0, time.monotonic() + REJOIN_INTERVAL
            return None
        self.connected[connected.site] = connected
        self._pending = {message_id: other for message_id, other in self._pending.items() if other != node}
        self._on_join(connected.site)
        self._write_cache()
        return connected

    def _write_cache(self) -> None:
        if self._folder:
            entries = [dataclasses.asdict(connected) for connected in self.connected.values()]
            write_atomically(self._folder / CACHE, json.dumps(entries).encode(), lasting=False)

    def _may_join(self, connected: ConnectedSite) -> bool:
        try:
            self._check_name(connected)
        except RefusedError:
            return False
        return True

    def _check_name(self, connected: ConnectedSite) -> None:
        """Refuse a name that is not the key owner's, one that is not in the roster, and one that a live node has.

        Where nodes have keys, a node without one has no name.
        """
        owner = self._key_owners.get(connected.node)
        if not owner and any(self._key_owners.get(node) for node in self._online):
            raise RefusedError(
                "site",
                "a node with a registered key",
                "a node without one",
                message=f"A node without a registered key tried to join as {connected.site!r}.",
            )
        if owner and connected.site != owner:
            raise RefusedError(
                "site",
                f"the name of its key, {owner}",
                connected.site,
                site=owner,
                message=f"The node with the key of {owner!r} tried to join as {connected.site!r}.",
                hint="Check name and [coordinator] key in the site file.",
            )
        holder = self.connected.get(connected.site)
        if holder and holder.node != connected.node and holder.node in self._online:
            raise TakenName(
                "site",
                "a name that no connected node has",
                connected.site,
                message=f"Another connected node has the name {connected.site!r} already.",
                hint="Stop one of the two, or give each site a name of its own.",
            )
        if connected.site not in self._names:
            raise RefusedError(
                "site",
                "a name of the roster",
                connected.site,
                message=f"{connected.site!r} is not a name of the roster.",
                hint="Check name in the site file, and the [[site]] tables of the recipe.",
            )


def _gateway_process(run_folder: Path | None) -> int | None:
    """The pid of the gateway, which ``colora server`` writes at each start; None if it is unknown."""
    try:
        services = read_services(run_folder) if run_folder else None
    except StateError:
        return None
    return services.pids.get("gateway") if services else None


def _read_cache(path: Path) -> dict[int, ConnectedSite]:
    """Sites by node, as an earlier process wrote them; empty if the file is missing or damaged.

    Entries are checked as join replies are. A wrong one is left out, and its node is asked again.
    """
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    sites = [_connected_from(entry) for entry in entries] if isinstance(entries, list) else []
    return {connected.node: connected for connected in sites if connected}


def _connected_from(entry: object) -> ConnectedSite | None:
    """The site in one entry of the cache; None if a field is missing, unknown, of another type or out of range."""
    if not isinstance(entry, dict) or entry.keys() != {"node", "since", "info"}:
        return None
    node, since = entry["node"], entry["since"]
    if type(node) is not int or not 0 <= node < MAX_NODE or not isinstance(since, str):
        return None
    try:
        return ConnectedSite(node, since, messages.site_info_of(entry["info"]))
    except RefusedError:
        return None


def wait_for_nodes(grid: Grid, count: int, timeout: float = 60.0, pause: float = 0.5) -> None:
    """Block until ``count`` nodes are online, or some are and no more appeared within ``pause`` seconds.

    Flower's simulation runtime starts the ServerApp before it registers its nodes. ``timeout`` is in seconds.
    """
    deadline, before = time.monotonic() + timeout, -1
    while (online := len(list(grid.get_node_ids()))) < count and time.monotonic() < deadline:
        if online and online == before:
            return
        before = online
        time.sleep(pause)
