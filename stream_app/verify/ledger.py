"""What was read of each user, on disk, so that memory does not grow with the log.

Entries are appended to one of `BUCKETS` files, chosen by the user; one bucket at a time is then read back whole. A
bucket of ten million clicks of a million users holds 40,000 of the former and 4,000 of the latter.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BUCKETS = 256
_BUFFER_BYTES = 64 << 10
_HEAD = struct.Struct("<BIqII")  # kind, partition, offset, bytes of key, bytes of payload


class Entry(NamedTuple):
    """Something that was read: of which kind is the caller's business."""

    kind: int
    partition: int
    offset: int
    key: bytes
    payload: bytes


class Ledger:
    """Entries by user, in a folder of its own that the caller removes.

    Args:
        folder: where the buckets lie.
        sample: the share of users of whom entries are kept, above 0 and at most 1.

    """

    def __init__(self, folder: Path, sample: float = 1.0) -> None:
        self._folder = folder
        self._limit = round(sample * 2**32)
        self._buffers = [bytearray() for _ in range(BUCKETS)]

    def keeps(self, key: bytes) -> bool:
        """Whether this user is among the sample."""
        return zlib.crc32(key) < self._limit

    def add(self, entry: Entry) -> None:
        """Append an entry; of one key's entries the order is kept."""
        kind, partition, offset, key, payload = entry
        bucket = zlib.crc32(key) % BUCKETS  # the low bits; those that tell the sample are the high ones
        buffer = self._buffers[bucket]
        buffer += _HEAD.pack(kind, partition, offset, len(key), len(payload)) + key + payload
        if len(buffer) >= _BUFFER_BYTES:
            self._flush(bucket)

    def buckets(self) -> Iterator[list[Entry]]:
        """The entries of one bucket after the other."""
        for bucket in range(BUCKETS):
            self._flush(bucket)
            yield list(_entries(self._file(bucket).read_bytes()))

    def _flush(self, bucket: int) -> None:
        with self._file(bucket).open("ab") as file:
            file.write(self._buffers[bucket])
        self._buffers[bucket].clear()

    def _file(self, bucket: int) -> Path:
        return self._folder / f"{bucket:03}"


def _entries(data: bytes) -> Iterator[Entry]:
    place = 0
    while place < len(data):
        kind, partition, offset, key_bytes, payload_bytes = _HEAD.unpack_from(data, place)
        key_end = place + _HEAD.size + key_bytes
        place = key_end + payload_bytes
        yield Entry(kind, partition, offset, data[key_end - key_bytes : key_end], data[key_end:place])
