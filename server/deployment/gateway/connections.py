"""Which connections the gateway keeps: those of known sites first, and of strangers only a bounded number.

A connection is *known* once a request on it carried a valid signature of a site's key; until then it is a stranger's.
Where there is no room for another stranger, the stranger who has waited longest is disconnected. A new connection is
therefore never refused, and a site needs only the time of a handshake and a header to become known.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

SPARE_FILES = 64  # open files that are kept for everything but connections
MAX_CONNECTIONS = 2048
MAX_STRANGERS = 512  # the rest of the connections is kept for known sites
MAX_PER_KEY = 32  # known connections of one key; a SuperNode has about five
MAX_UPSTREAM = 256  # connections to the SuperLink
SITE_ROOM = 8  # strangers of an address with a known connection that do not count against the address


@dataclass(frozen=True)
class Limits:
    """Maximum numbers of connections, and of seconds that a connection may take for each step.

    Sites behind one NAT share an address, so ``per_address`` counts strangers only.
    """

    connections: int = MAX_CONNECTIONS
    strangers: int = MAX_STRANGERS
    per_address: int = MAX_STRANGERS // 2  # strangers of one IPv4 address or one IPv6 /64 network
    per_key: int = MAX_PER_KEY
    upstream: int = MAX_UPSTREAM
    handshake: float = 10.0  # seconds for the TLS handshake
    header: float = 10.0  # seconds for the first request's header
    idle: float = 30.0  # seconds to the end of the next header; SuperNode keeps an idle connection for 5

    @classmethod
    def for_files(cls, files: int) -> Limits:
        """Return limits that fit into a number of open files: a quarter of them is for the SuperLink."""
        free = max(files - SPARE_FILES, 16)
        upstream = min(MAX_UPSTREAM, free // 4)
        connections = min(MAX_CONNECTIONS, free - upstream)
        strangers = min(MAX_STRANGERS, connections // 2)
        return cls(connections, strangers, max(strangers // 2, 1), upstream=upstream)


@dataclass(eq=False)
class Connection:
    """An accepted connection. ``disconnect`` ends it from any state; ``key`` is set while it is known."""

    host: str
    disconnect: Callable[[], None]
    known: bool = False
    key: str | None = None
    address: str = field(init=False)

    def __post_init__(self) -> None:
        self.address = address_of(self.host)


class ConnectionTable:
    """The open connections, within limits."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._strangers: dict[str, dict[Connection, None]] = {}  # by address, oldest first
        self._known: set[Connection] = set()
        self._by_key: Counter[str | None] = Counter()
        self._known_at: Counter[str] = Counter()  # known connections by address

    @property
    def strangers(self) -> int:
        """Number of connections that are not known."""
        return sum(map(len, self._strangers.values()))

    @property
    def known(self) -> int:
        """Number of known connections."""
        return len(self._known)

    def admit(self, connection: Connection) -> None:
        """Add a new connection as a stranger; disconnect the one stranger for whom there is no more room."""
        if len(self._strangers.get(connection.address, ())) >= self.limits.per_address:
            self._drop_oldest(connection.address)
        elif self.strangers >= self.limits.strangers:
            self._drop_oldest(max(self._strangers, key=self._weight))
        self._strangers.setdefault(connection.address, {})[connection] = None

    def accept_key(self, connection: Connection, key: str | None) -> None:
        """Make a connection known whose caller has proved to hold ``key``; None where there are no keys.

        Connections beyond what is kept for known ones, or beyond a key's share, stay strangers.
        """
        room = self.limits.connections - self.limits.strangers
        if connection.known or connection not in self._strangers.get(connection.address, ()) or self.known >= room:
            return
        if key is not None and self._by_key[key] >= self.limits.per_key:
            return
        self._forget(connection)
        connection.known, connection.key = True, key
        self._known.add(connection)
        self._by_key[key] += 1
        self._known_at[connection.address] += 1

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        if connection not in self._known:
            self._forget(connection)
            return
        self._known.remove(connection)
        self._by_key -= Counter([connection.key])  # leaves no zeros behind
        self._known_at -= Counter([connection.address])

    def _weight(self, address: str) -> int:
        return len(self._strangers[address]) - (SITE_ROOM if address in self._known_at else 0)

    def _drop_oldest(self, address: str) -> None:
        oldest = next(iter(self._strangers[address]))
        self._forget(oldest)
        oldest.disconnect()

    def _forget(self, connection: Connection) -> None:
        there = self._strangers.get(connection.address, {})
        there.pop(connection, None)
        if not there:
            self._strangers.pop(connection.address, None)


CALLER = "caller"  # the key of the Caller in the state of a request


@dataclass(frozen=True)
class Caller:
    """The connection of a request, as the app sees it."""

    table: ConnectionTable
    connection: Connection

    def accept_key(self, key: str | None) -> None:
        """See ``ConnectionTable.accept_key``."""
        self.table.accept_key(self.connection, key)


def address_of(host: str) -> str:
    """Return what counts as one address: an IPv4 address, or the /64 network of an IPv6 address."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
