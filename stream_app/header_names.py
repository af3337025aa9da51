"""Records whose header names are not UTF-8, which Kafka takes from any producer and aiokafka 0.14.0 can't read.

Its parser raises in the middle of a fetched batch, and fetches that batch again and again: one such record would stop
its partition for ever. Here the batch is parsed a second time, with U+FFFD for the bytes that are no UTF-8, as Kafka's
Java client does. A batch without such a record is parsed as ever, at aiokafka's speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, SupportsIndex

from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy
from aiokafka.structs import ConsumerRecord

_MAGIC = 16  # where a batch tells its format; headers came with format 2


def read_any_header_name() -> None:
    """From now on consumers of this process read every record. Calling it twice changes nothing."""
    fetcher.MemoryRecords = _KeptRecords
    fetcher.PartitionRecords = _PartitionRecords


class _KeptRecords:
    """aiokafka's reader of fetched batches, which keeps their bytes."""

    def __init__(self, fetched: bytes) -> None:
        records = MemoryRecords(fetched)
        self.fetched = fetched
        self.has_next = records.has_next
        self.next_batch = records.next_batch
        self.size_in_bytes = records.size_in_bytes


class _PartitionRecords(fetcher.PartitionRecords):
    """One fetch of one partition, record by record."""

    _records: Any
    _aborted_transactions: list[Any]
    _aborted_producers: set[int]

    def _unpack_records(self) -> Iterator[ConsumerRecord]:
        fetched, aborted = self._records.fetched, list(self._aborted_transactions)
        try:
            yield from super()._unpack_records()
        except UnicodeDecodeError:
            self._records = _LenientRecords(fetched)
            self._aborted_transactions, self._aborted_producers = aborted, set()
            read = self.next_fetch_offset
            yield from (record for record in super()._unpack_records() if record.offset >= read)


class _LenientRecords(_MemoryRecordsPy):
    def next_batch(self) -> Any:
        batch = self._next_slice
        if batch is None or batch[_MAGIC] < 2:
            return super().next_batch()
        self._cache_next()
        return _LenientBatch(batch)


class _LenientBatch(_DefaultRecordBatchPy):
    _buffer: bytearray

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        if not isinstance(self._buffer, _LenientBytes):
            self._buffer = _LenientBytes(self._buffer)


class _LenientBytes(bytearray):
    """Bytes of which every part can be decoded."""

    def __getitem__(self, place: SupportsIndex | slice) -> Any:
        part = super().__getitem__(place)
        return _LenientBytes(part) if isinstance(part, bytearray) else part

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return bytes(self).decode(encoding, "replace")
