"""Records → record batches, by compiled code: Python only joins all their bytes.

aiokafka's batches take a record by a call, and a byte of their checksum in ten times the time that a CPU's own
instruction for it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from struct import Struct
from typing import NamedTuple

import google_crc32c
import numpy as np
from jaxtyping import Int32, Int64, UInt8

from stream_app import batch_kernels
from stream_app.micro_batch import KeyValue
from stream_app.partitioner import partitions_of

#: Bytes of one record batch, at most; a topic may take less.
BATCH_BYTES = 1_000_000

_TRANSACTIONAL = 0x10  # of a batch's attributes
_PRODUCER, _PRODUCER_AT = Struct(">qhi"), 43  # id, epoch, and the number of the batch's first record
_CHECKSUM, _CHECKSUM_AT, _CHECKED_FROM = Struct(">I"), 17, 21


class Batch(NamedTuple):
    """Records on their way to one partition."""

    partition: int
    records: RecordBatch


class RecordBatch:
    """A record batch in Kafka's format, which aiokafka's producer takes in place of its own `BatchBuilder`.

    Args:
        data: the batch, still without the producer's number and the checksum.
        count: its records.

    """

    def __init__(self, data: UInt8[np.ndarray, " bytes"], count: int) -> None:
        self._data = data.data
        self._checked = data[_CHECKED_FROM:]
        self._count = count

    def record_count(self) -> int:
        """How many records it holds."""
        return self._count

    def size(self) -> int:
        """Bytes."""
        return len(self._data)

    def close(self) -> None:
        """Nothing: it takes no more records."""

    def closed(self) -> bool:
        """Yes."""
        return True

    def _set_producer_state(self, producer_id: int, producer_epoch: int, base_sequence: int) -> None:
        _PRODUCER.pack_into(self._data, _PRODUCER_AT, producer_id, producer_epoch, base_sequence)

    def _build(self) -> memoryview:
        _CHECKSUM.pack_into(self._data, _CHECKSUM_AT, google_crc32c.value(self._checked))
        return self._data


class Packer:
    """Packs records into batches of a size.

    Args:
        most_bytes: of a batch with more than one record.
        transactional: whether they go with a transaction.

    """

    def __init__(self, most_bytes: int, *, transactional: bool = False) -> None:
        self._most_bytes = min(most_bytes, BATCH_BYTES)
        self._attributes = _TRANSACTIONAL if transactional else 0
        self.pack_for(0, [(b"", b"")], 0)  # compiles, or loads what was compiled before, now and not at the first click

    def pack(self, records: Sequence[KeyValue], partitions: int, timestamp_ms: int) -> list[Batch]:
        """Records with their keys' partitions of so many, batch by batch in order."""
        if not records:
            return []
        keys, values = zip(*records, strict=True)
        return self._pack(keys, values, partitions_of(keys, partitions), timestamp_ms)

    def pack_for(self, partition: int, records: Sequence[KeyValue], timestamp_ms: int) -> list[Batch]:
        """Records for one given partition, in order."""
        return self.pack_each({partition: records}, timestamp_ms).get(partition, [])

    def pack_each(self, records: Mapping[int, Sequence[KeyValue]], timestamp_ms: int) -> dict[int, list[Batch]]:
        """Records for given partitions, in order for each; by partition, without those that get none."""
        destinations = np.repeat(np.fromiter(records, np.int32), [len(rows) for rows in records.values()])
        if not len(destinations):
            return {}
        keys, values = zip(*(record for rows in records.values() for record in rows), strict=True)
        found: dict[int, list[Batch]] = {}
        for batch in self._pack(keys, values, destinations, timestamp_ms):
            found.setdefault(batch.partition, []).append(batch)
        return found

    def _pack(
        self, keys: Sequence[bytes], values: Sequence[bytes], destinations: Int32[np.ndarray, " n"], timestamp_ms: int
    ) -> list[Batch]:
        data, batches = batch_kernels.write_batches(
            *_joined(keys), *_joined(values), destinations, int(destinations.max()) + 1, self._most_bytes,
            timestamp_ms, self._attributes,
        )  # fmt: skip
        starts = [0, *batches[:, 1].tolist()]
        return [
            Batch(partition, RecordBatch(data[start:end], count))
            for start, (partition, end, count) in zip(starts, batches.tolist(), strict=False)
        ]


def _joined(texts: Iterable[bytes]) -> tuple[UInt8[np.ndarray, " bytes"], Int64[np.ndarray, " n"]]:
    """Texts end to end, and where each ends."""
    texts = list(texts)
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    return np.frombuffer(b"".join(texts), np.uint8), ends
