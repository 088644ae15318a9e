"""A tail of a log goes on, whatever the other process writes into the log."""

from __future__ import annotations

import re
from pathlib import Path

from colora.common.processes.log_tail import MAX_READ, FileTail, LogTail


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_a_line_longer_than_the_window_is_left_out_and_the_next_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = FileTail(path)
    append(path, b"first\n" + b"x" * 35 + b"\nsecond\nthird\n")
    found = [tail.new(10) for _ in range(8)]
    assert b"\n".join(filter(None, found)).split(b"\n") == [b"first", b"second", b"third"]


def test_a_long_line_that_is_still_written_is_left_out_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = FileTail(path)
    append(path, b"x" * 25)
    assert [tail.new(10) for _ in range(4)] == [b""] * 4
    append(path, b"ERROR\nnext\n")
    assert b"".join(tail.new(10) for _ in range(3)) == b"next"
    path.write_bytes(b"a\nb\n")  # begun anew
    append(path, b"")
    assert tail.new(10) == b"a\nb"


def test_errors_after_a_megabyte_of_text_still_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "trainer.log"
    tail = LogTail(path, re.compile("ERROR .*"))
    append(path, b"x" * (3 * MAX_READ) + b"\nERROR disk full\n")
    assert [match[0] for _ in range(6) for match in tail.new()] == ["ERROR disk full"]
