"""A database is all that was written to it up to some write, or is known not to be."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rocksdict

from stream_app import write_chain
from stream_app.errors import StateError
from stream_app.state_table import database_options
from stream_app.write_chain import PARTS_KEPT, WriteChain


def open_database(path: Path) -> rocksdict.Rdict:
    return rocksdict.Rdict(str(path), options=database_options(rocksdict.Cache(1 << 20)))


SMALL_PART = 2_000


class Writer:
    """Writes of one of some keys each, the number of the write under it, which are remembered."""

    def __init__(self, path: Path, keys: int, value_bytes: int, first: int = 1) -> None:
        self.path = path
        self._keys, self._value_bytes, self._number = keys, value_bytes, first - 1
        self._open()

    def _open(self) -> None:
        self.database = open_database(self.path)
        self.chain = WriteChain(self.database)

    def write(self, times: int) -> None:
        for _ in range(times):
            self._number += 1
            key, batch = self._key(self._number), rocksdict.WriteBatch(raw_mode=True)
            batch.put(key, b"%*d" % (self._value_bytes, self._number))
            self.chain.write(batch)

    def _key(self, number: int) -> bytes:
        return b"user-%d" % random.Random(number).randrange(self._keys)

    def is_closed(self) -> None:
        self.database.close()
        self._open()

    def holds_its_first(self, database: rocksdict.Rdict, count: int) -> bool:
        last = {self._key(number): number for number in range(1, count + 1)}
        return {key: int(value) for key, value in database.items() if key.startswith(b"user-")} == last


def write_and_be_killed(
    path: Path, keys: int, value_bytes: int, first: int, times: int, part_bytes: int = SMALL_PART
) -> None:
    """In a process of its own."""
    program = f"""
import os
from pathlib import Path
from stream_app import write_chain
from tests.stream_app.test_write_chain import Writer
write_chain.PART_BYTES = {part_bytes}
writer = Writer(Path({str(path)!r}), {keys}, {value_bytes}, {first})  # kept: without it the database is closed
writer.write({times})
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True, timeout=60)


@pytest.fixture
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_chain, "PART_BYTES", SMALL_PART)


def manifest_of(path: Path) -> Path:
    name = (path / "CURRENT").read_text().strip()
    return path / name


@pytest.mark.parametrize("sessions", [[5, 20], [200], [120, 1, 90, 3]])
def test_a_list_of_files_that_is_cut_off_anywhere_makes_no_gap_that_is_not_noticed(
    tmp_path: Path, sessions: list[int]
) -> None:
    written = 0
    for times in [*sessions, 3]:
        write_and_be_killed(tmp_path / "killed", 30, 1_500, written + 1, times)
        written += times
    writer, gaps, prefixes = Writer(tmp_path / "other", 30, 1_500), 0, 0
    size = manifest_of(tmp_path / "killed").stat().st_size
    for length in range(0, size + 1, max(1, size // 100)):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "killed", copy)
        with manifest_of(copy).open("r+b") as file:
            file.truncate(length)
        found = what_is_found(copy, writer)
        gaps, prefixes = gaps + (found == "gap"), prefixes + (found == "prefix")
    writer.database.close()
    assert gaps
    assert prefixes


def what_is_found(path: Path, writer: Writer) -> str:
    """Of a copy, which is removed. No gap may be taken for a prefix."""
    try:
        database = open_database(path)
    except Exception:  # noqa: BLE001  (rocksdict raises no other)
        shutil.rmtree(path)
        return "damage"
    try:
        count = WriteChain(database).count
    except StateError:
        return "gap"
    else:
        assert writer.holds_its_first(database, count)
        return "prefix"
    finally:
        database.close()
        shutil.rmtree(path)


def test_nor_does_a_log_that_is_cut_off_before_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part_bytes, value_bytes, writes = 8 << 20, 200_000, 44  # flushed once, three writes before the kill
    ends = []
    with monkeypatch.context() as patch:
        patch.setattr(write_chain, "PART_BYTES", 1 << 30)
        writer = Writer(tmp_path / "other", 30, value_bytes)
        for _ in range(writes):
            writer.write(1)
            ends.append(logs_of(writer.path)[0].stat().st_size)
    for attempt in range(20):  # the flush may have ended first
        killed = tmp_path / f"killed-{attempt}"
        write_and_be_killed(killed, 30, value_bytes, 1, writes, part_bytes)
        if len(logs_of(killed)) > 1:
            break
    else:
        pytest.fail("the flush had ended before the kill every time")
    first = logs_of(killed)[0]
    boundaries = [end for end in ends if end <= first.stat().st_size]
    seen = set()
    for end in [*boundaries[-3:], boundaries[5] - 1, boundaries[5], 0]:
        copy = tmp_path / "copy"
        shutil.copytree(killed, copy)
        with (copy / first.name).open("r+b") as file:
            file.truncate(end)
        seen.add(what_is_found(copy, writer))
    writer.database.close()
    assert "gap" in seen
    assert "prefix" in seen


def logs_of(path: Path) -> list[Path]:
    """Those that hold something, the oldest first."""
    return sorted(log for log in path.glob("*.log") if log.stat().st_size)


@pytest.mark.usefixtures("_small_parts")
def test_kills_and_closes_leave_a_chain_that_goes_on(tmp_path: Path) -> None:
    written = 0
    for times in (1, 0, 7, 300, 0, 0, 50):
        write_and_be_killed(tmp_path / "database", 10, 500, written + 1, times)
        writer = Writer(tmp_path / "database", 10, 500, written + times + 1)
        writer.write(2)
        writer.is_closed()
        written += times + 2
        assert writer.chain.count == written
        assert writer.holds_its_first(writer.database, written)
        writer.database.close()


def test_many_openings_keep_few_rows(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "database", keys=1, value_bytes=10)
    for _ in range(2 * PARTS_KEPT):
        writer.write(1)
        writer.is_closed()
    rows = [key for key in writer.database.keys() if key.startswith(b"\xff")]  # noqa: SIM118  (no mapping)
    writer.database.close()
    assert len(rows) == PARTS_KEPT


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("missing", [0, 1, 30, PARTS_KEPT - 2])
def test_a_missing_row_is_a_gap_wherever_it_is(tmp_path: Path, missing: int) -> None:
    writer = Writer(tmp_path / "database", keys=5, value_bytes=2_500)
    writer.write(PARTS_KEPT + 9)
    rows = sorted(key for key in writer.database.keys() if key.startswith(b"\xff"))  # noqa: SIM118
    del writer.database[rows[missing]]
    with pytest.raises(StateError, match=r"missing|parts there are"):
        WriteChain(writer.database)
    writer.database.close()
