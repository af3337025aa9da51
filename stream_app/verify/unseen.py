"""Offsets that hold no record for a consumer of committed ones, though nothing was deleted there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.consumer.fetcher import FetchResult


class Unseen:
    """Counts the ends of transactions, and the records of those that were given up, that a consumer passes over.

    It tells nobody of them, and without them a log with transactions looks like one that was compacted.

    Args:
        consumer: started, and without an assignment yet.
        ends: partition → the offset before which they are counted.

    """

    def __init__(self, consumer: AIOKafkaConsumer, ends: Mapping[TopicPartition, int]) -> None:
        self.count = 0
        self._ends = ends
        consumer._fetcher._records = _Fetched(self)

    def note(self, partition: TopicPartition, batch: Any) -> None:
        """Count what lies in a batch that was passed over."""
        self.count += max(0, min(batch.next_offset, self._ends[partition]) - batch.base_offset)


class _Fetched(dict[TopicPartition, Any]):
    """Where aiokafka keeps what it has fetched, of each partition."""

    def __init__(self, unseen: Unseen) -> None:
        super().__init__()
        self._unseen = unseen

    def __setitem__(self, partition: TopicPartition, fetched: Any) -> None:
        if isinstance(fetched, FetchResult):
            records = fetched._partition_records
            records._records = _Batches(records._records, records, partition, self._unseen)
        super().__setitem__(partition, fetched)


class _Batches:
    """The batches of one fetch. When the next one is asked for, it can be told whether the last was passed over."""

    def __init__(self, batches: Any, records: Any, partition: TopicPartition, unseen: Unseen) -> None:
        self._batches = batches
        self._records = records
        self._partition = partition
        self._unseen = unseen
        self._last: Any = None

    def has_next(self) -> bool:
        last, self._last = self._last, None
        if last is not None and (last.is_control_batch or self._was_given_up(last)):
            self._unseen.note(self._partition, last)
        return bool(self._batches.has_next())

    def _was_given_up(self, batch: Any) -> bool:
        return batch.is_transactional and batch.producer_id in self._records._aborted_producers

    def next_batch(self) -> Any:
        self._last = self._batches.next_batch()
        return self._last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)
