"""Which connections are kept: the policy alone, without sockets."""

from __future__ import annotations

import pytest

from colora.server.deployment.gateway.connections import Connection, ConnectionTable, Limits, address_of

SMALL = Limits(connections=10, strangers=6, per_address=3, per_key=2)


class Door:
    """A table whose connections are named, and the names of those that were disconnected."""

    def __init__(self, limits: Limits = SMALL) -> None:
        self.table, self.gone = ConnectionTable(limits), list[str]()

    def admit(self, name: str, host: str) -> Connection:
        connection = Connection(host, lambda: self.gone.append(name))
        self.table.admit(connection)
        return connection


def test_the_oldest_stranger_of_an_address_makes_room_for_its_next() -> None:
    door = Door()
    for n in range(5):
        door.admit(f"a{n}", "192.0.2.1")
    door.admit("b0", "192.0.2.2")
    assert door.gone == ["a0", "a1"]
    assert door.table.strangers == SMALL.per_address + 1


def test_when_strangers_fill_their_room_the_largest_holder_gives_way() -> None:
    door = Door()
    for n in range(3):
        door.admit(f"a{n}", "192.0.2.1")
    for n, host in enumerate(("192.0.2.2", "192.0.2.3", "192.0.2.4")):
        door.admit(f"b{n}", host)
    door.admit("new", "192.0.2.5")
    assert door.gone == ["a0"]


def test_strangers_beside_a_known_site_are_spared_up_to_a_number() -> None:
    door = Door(Limits(connections=100, strangers=40, per_address=30))
    door.table.accept_key(door.admit("site", "192.0.2.1"), "key")
    for n in range(18):
        door.admit(f"a{n}", "192.0.2.1")
    for n in range(22):
        door.admit(f"b{n}", "192.0.2.2")
    for n in range(12):
        door.admit(f"c{n}", f"198.51.100.{n}")
    assert door.gone == [f"b{n}" for n in range(12)]  # from 22 down to 10 = 18 less the 8 that do not count


def test_a_known_connection_is_never_disconnected_for_a_stranger() -> None:
    door = Door()
    for n in range(2):
        door.table.accept_key(door.admit(f"site{n}", "192.0.2.1"), "key")
    for n in range(50):
        door.admit(f"a{n}", "192.0.2.1")
        door.admit(f"b{n}", f"198.51.100.{n}")
    assert not [name for name in door.gone if name.startswith("site")]
    assert (door.table.known, door.table.strangers) == (2, SMALL.strangers)


def test_a_key_takes_no_more_than_its_share_and_gets_it_back() -> None:
    door = Door()
    first, second, third = (door.admit(f"a{n}", "192.0.2.1") for n in range(3))
    for connection in (first, second, third):
        door.table.accept_key(connection, "key")
    assert [connection.known for connection in (first, second, third)] == [True, True, False]
    door.table.remove(first)
    door.table.remove(first)  # an end that is told twice
    door.table.accept_key(third, "key")
    assert third.known


def test_known_connections_leave_the_room_of_strangers_alone() -> None:
    door = Door()
    for n in range(10):
        connection = door.admit(f"site{n}", f"192.0.2.{n}")
        door.table.accept_key(connection, f"key{n}")
    assert (door.table.known, door.table.strangers) == (4, 6)  # 10 connections, 6 of them strangers'


def test_a_disconnected_stranger_cannot_become_known() -> None:
    door = Door()
    first = door.admit("a0", "192.0.2.1")
    for n in range(3):
        door.admit(f"a{n + 1}", "192.0.2.1")
    door.table.accept_key(first, "key")
    assert (door.gone, first.known) == (["a0"], False)


@pytest.mark.parametrize("files", [128, 400, 1024, 20_000, 1 << 30])
def test_limits_fit_into_the_open_files(files: int) -> None:
    limits = Limits.for_files(files)
    assert limits.connections + limits.upstream + 64 <= files
    assert 0 < limits.per_address < limits.strangers < limits.connections
    assert limits.connections - limits.strangers >= limits.strangers


def test_an_ipv6_network_is_one_address() -> None:
    assert address_of("2001:db8::1") == address_of("2001:db8::ffff:2%eth0") != address_of("2001:db8:0:1::1")
    assert address_of("::ffff:192.0.2.1") == address_of("192.0.2.1") == "192.0.2.1"
