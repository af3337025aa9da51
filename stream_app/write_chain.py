"""Whether a RocksDB database holds all that was written to it, without a gap.

Every file of a database has checksums, but nothing tells that the list of files is whole. Where the end of its MANIFEST
is cut off, RocksDB takes that for the end: it opens the database without the files that were named there, and applies
the log that was written after them. What those files held is missing from the middle, without an error, and the newest
offset stands above it.

So writes are counted, in parts. A part has a row of its own, which says how many writes there were when it began and
how many with its last one; each row has to begin where the row before it ended. What is missing from the middle was in
files, and the log that was written after them is shorter than what is kept of the chain: a gap always shows in it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import cast

import rocksdict

from stream_app.errors import StateError

PART_BYTES = 1 << 20
"""Of keys and values, after which another part begins. One begins whenever a database is opened, too."""

PARTS_KEPT = 64
"""More than go into the log behind the newest file, which are two write buffers."""

# User keys are UTF-8, in which the byte 0xff does not occur.
_PREFIX = b"\xff\xffpart\xff"
_NUMBER = struct.Struct(">Q")  # in the order of the keys
_COUNTS = struct.Struct("<QQ")


class WriteChain:
    """The rows of a database that was opened, and the one to come.

    Args:
        database: in raw mode; read from alone.

    Raises:
        StateError: something is missing from the middle of the database.

    """

    count: int
    """Writes so far."""

    def __init__(self, database: rocksdict.Rdict) -> None:
        last, count = _last_of(database)
        self._number = last + 1
        self._start = self.count = count
        self._bytes = 0

    def extend(self, batch: rocksdict.WriteBatch, size: int) -> None:
        """Count a batch of so many bytes of keys and values; its row goes into the batch."""
        if self._bytes >= PART_BYTES:
            self._number, self._start, self._bytes = self._number + 1, self.count, 0
        if not self._bytes and self._number >= PARTS_KEPT:
            batch.delete(_key(self._number - PARTS_KEPT))
        self.count += 1
        self._bytes += max(size, 1)
        batch.put(_key(self._number), _COUNTS.pack(self._start, self.count))


def _key(number: int) -> bytes:
    return _PREFIX + _NUMBER.pack(number)


def _last_of(database: rocksdict.Rdict) -> tuple[int, int]:
    """The last part's number, -1 if there is none, and the writes up to it."""
    last, count, parts = -1, 0, 0
    for key, counts in cast("Iterable[tuple[bytes, bytes]]", database.items(from_key=_PREFIX)):
        if not key.startswith(_PREFIX):
            break
        (number,), (start, end) = _NUMBER.unpack(key.removeprefix(_PREFIX)), _COUNTS.unpack(counts)
        if parts and (number, start) != (last + 1, count):
            raise StateError(f"between its writes {count:,} and {start:,} some are missing")
        last, count, parts = number, end, parts + 1
    if parts < min(last + 1, PARTS_KEPT):
        raise StateError(f"of its last {PARTS_KEPT} parts there are {parts}")
    return last, count
