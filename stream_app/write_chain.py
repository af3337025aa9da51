"""Whether a RocksDB database holds all that was written to it, without a gap.

Every file of a database has checksums, but nothing tells that the list of files is whole. Where the end of its MANIFEST
is cut off, RocksDB takes that for the end: it opens the database without the files that were named there, and applies
the log that was written after them. What those files held is missing from the middle, without an error, and the newest
offset stands above it. A log that is cut off between two of its records, with another one behind it, does the same.

So writes are counted, in parts, one for each file: a part ends when its writes are flushed, or with the process. It has
a row of its own, which says how many writes there were when it began and how many with its last one; each row has to
begin where the row before it ended. What lies behind a gap are logs that were not flushed yet, which are two parts at
most: a gap always shows in the rows that are kept.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import cast

import rocksdict

from stream_app.errors import StateError

PART_BYTES = 16 << 20
"""What a part takes in memory until it is flushed, about. RocksDB's own limit has to be well above."""

PARTS_KEPT = 64

_ROW_BYTES = 100
"""What RocksDB needs beside each key and value, at most."""

# User keys are UTF-8, in which the byte 0xff does not occur.
_PREFIX = b"\xff\xffpart\xff"
_NUMBER = struct.Struct(">Q")  # in the order of the keys
_COUNTS = struct.Struct("<QQ")


class WriteChain:
    """The rows of a database that was opened, and the one to come. All but what describes it is written through here.

    Args:
        database: in raw mode.

    Raises:
        StateError: something is missing from the middle of the database.

    """

    count: int
    """Writes so far."""

    def __init__(self, database: rocksdict.Rdict) -> None:
        self._database = database
        last, self.count = _last_of(database)
        self._begin_part(last + 1)

    def _begin_part(self, number: int) -> None:
        self._number, self._start, self._bytes = number, self.count, 0

    def write(self, batch: rocksdict.WriteBatch) -> None:
        """Write a batch, which is used up. Blocks; raises what RocksDB does."""
        if self.count == self._start and self._number >= PARTS_KEPT:
            batch.delete(_key(self._number - PARTS_KEPT))
        batch.put(_key(self._number), _COUNTS.pack(self._start, self.count + 1))
        self._bytes += batch.size_in_bytes() + _ROW_BYTES * batch.len()
        self._database.write(batch)
        self.count += 1
        if self._bytes >= PART_BYTES:
            self._database.flush(wait=False)
            self._begin_part(self._number + 1)


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
