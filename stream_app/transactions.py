"""Exactly once: what the clicks of a partition lead to, and their offset, in one Kafka transaction.

Each source partition has a producer of its own, whose transactional id names the application and the partition. Whoever
starts a producer with that id ends the transaction that an earlier one left open, and from then on Kafka takes nothing
more from the earlier one. A worker does so when it gets a partition, before it restores the partition's states: what it
then reads of the changelog is final, and a worker that was frozen past its session can add nothing to it.

A consumer that reads committed records sees all of a transaction or nothing of it. Clicks whose transaction was not
committed are in no state and are done again; those whose was are in the changelog, meet the offset fence and leave
nothing behind.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from aiokafka import AIOKafkaProducer
from aiokafka.errors import InvalidTransactionTimeout, KafkaError, ProducerFenced
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from stream_app.batches import BATCH_BYTES, Batch, Packer, RecordBatch
from stream_app.delivery import Delivery, Topics
from stream_app.errors import BrokerUnavailable, WorkerError
from stream_app.messages import DeadLetter
from stream_app.micro_batch import Outbox
from stream_app.publisher import (
    by_partition,
    fill,
    forms_of,
    no_room_for_a_reason,
    offsets_of,
)

#: Seconds that Kafka waits longer for the end of a transaction than the worker does.
_SLACK_SECONDS = 5.0


class Addressed(NamedTuple):
    """A record batch on its way to a partition of a topic."""

    topic: str
    partition: int
    records: RecordBatch | BatchBuilder


@dataclass(slots=True)
class Transaction:
    """What one source partition's clicks of a micro-batch lead to."""

    outputs: list[Addressed]
    states: list[Batch]
    end: int | None
    """The offset to commit, if any."""


@dataclass(slots=True)
class Transactions:
    """A parcel: one transaction a source partition; and where Kafka has put the states."""

    by_partition: dict[int, Transaction]
    offsets: dict[int, range]


@dataclass(frozen=True)
class Group:
    """Whose offsets are committed with the transactions.

    Args:
        app_id: the consumer group, and the first part of transactional ids.
        clicks_topic: what the offsets are places in.
        note: what each committed offset carries.

    """

    app_id: str
    clicks_topic: str
    note: str


@dataclass(frozen=True)
class Limits:
    """Of the topics: how many partitions they have, and the largest record batch that they take, in bytes."""

    recommendation_partitions: int
    dead_letter_partitions: int
    batch: int
    dead_letter: int


class ExactlyOnce(Delivery[Transactions]):
    """One transaction a source partition and micro-batch; those of different partitions run side by side.

    Args:
        connection: `Settings.kafka_client()`.
        topics: where to write.
        group: whose offsets are committed.
        limits: of the topics.
        timeout_seconds: deadline for a transaction.

    """

    end_markers = 1  # the end of a transaction has an offset too

    def __init__(
        self, connection: Mapping[str, Any], topics: Topics, group: Group, limits: Limits, timeout_seconds: float
    ) -> None:
        self._connection = connection
        self._topics = topics
        self._group = group
        self._limits = limits
        self._timeout_seconds = timeout_seconds
        self._packer = Packer(limits.batch, transactional=True)
        self._producers: dict[int, PartitionProducer] = {}

    async def start(self) -> None:
        """Nothing: producers are started for partitions."""

    async def take_over(self, partitions: Collection[int]) -> None:
        """Start a producer for each partition, also where this worker had one: another may have had it meanwhile."""
        await self.stop()
        self._producers = {partition: self._producer(partition) for partition in partitions}
        try:
            async with asyncio.timeout(self._connection["request_timeout_ms"] / 1000):
                await asyncio.gather(*(producer.start() for producer in self._producers.values()))
        except InvalidTransactionTimeout:
            raise WorkerError(
                f"Kafka allows no transaction of {self._timeout_seconds + _SLACK_SECONDS:g} seconds, which is ten more "
                "than STREAM_APP_BROKER_TIMEOUT_SECONDS: lower that, or raise the brokers' transaction.max.timeout.ms"
            ) from None
        except (TimeoutError, KafkaError) as error:
            servers = ",".join(self._connection["bootstrap_servers"])
            raise BrokerUnavailable(
                f"Kafka at {servers} did not let transactions of {self._group.app_id} begin: {error!r}; is it up, and "
                f"may this user write with transactional ids {self._group.app_id}-*?"
            ) from None

    def _producer(self, partition: int) -> PartitionProducer:
        return PartitionProducer(self._connection, self._topics, self._group, partition, self._timeout_seconds)

    def pack(self, outbox: Outbox, ends: Mapping[int, int], now_ms: int) -> Transactions:
        return Transactions({part: self._transaction(outbox, part, end, now_ms) for part, end in ends.items()}, {})

    def _transaction(self, outbox: Outbox, partition: int, end: int, now_ms: int) -> Transaction:
        lists = outbox.recommendations.get(partition, ())
        outputs = [
            Addressed(self._topics.recommendations, *batch)
            for batch in self._packer.pack(lists, self._limits.recommendation_partitions, now_ms)
        ]
        outputs += self._pack_dead_letters(outbox.dead_letters.get(partition, ()), now_ms)
        return Transaction(outputs, self._packer.pack_for(partition, outbox.states.get(partition, ()), now_ms), end)

    def _pack_dead_letters(self, letters: Sequence[DeadLetter], now_ms: int) -> list[Addressed]:
        """One that is refused would end its transaction, again and again: so what is too large is told beforehand."""
        new_batch = partial(BatchBuilder, min(self._limits.dead_letter, BATCH_BYTES), 0, is_transactional=1)
        return [
            Addressed(self._topics.dead_letters, destination, batch)
            for destination, some in by_partition(letters, self._limits.dead_letter_partitions).items()
            for batch in fill(new_batch, map(self._fitting, some), now_ms)
        ]

    def _fitting(self, letter: DeadLetter) -> DeadLetter:
        for form in forms_of(letter):
            [alone] = fill(partial(BatchBuilder, BATCH_BYTES, 0, is_transactional=1), [form], 0)
            if alone.size() <= self._limits.dead_letter:
                return form
        raise no_room_for_a_reason(self._topics.dead_letters)

    async def send_outputs(self, parcel: Transactions) -> None:
        """Run the transactions: outputs and states leave together, and the two steps that follow find all done."""
        producers = [self._producer_of(partition) for partition in parcel.by_partition]
        done = await asyncio.gather(*map(PartitionProducer.transact, producers, parcel.by_partition.values()))
        appended = dict(zip(parcel.by_partition, done, strict=True))
        parcel.offsets = {partition: offsets for partition, offsets in appended.items() if offsets is not None}

    async def send_states(self, parcel: Transactions) -> None:
        """Nothing: they went with the outputs."""

    async def appended(self, parcel: Transactions) -> dict[int, range]:
        return parcel.offsets

    async def append(self, partition: int, rows: Sequence[tuple[bytes, bytes]]) -> range:
        states = self._packer.pack_for(partition, rows, time.time_ns() // 1_000_000)
        offsets = await self._producer_of(partition).transact(Transaction([], states, None))
        return offsets if offsets is not None else range(0)

    def _producer_of(self, partition: int) -> PartitionProducer:
        try:
            return self._producers[partition]
        except KeyError:
            raise WorkerError(f"clicks of partition {partition} are to be written, which this worker has not") from None

    async def stop(self) -> None:
        producers, self._producers = self._producers, {}
        await asyncio.gather(*(producer.stop() for producer in producers.values()))


class PartitionProducer:
    """The transactions of one source partition, one after the other.

    Args:
        connection: `Settings.kafka_client()`.
        topics: where to write.
        group: whose offsets are committed.
        partition: the source partition.
        timeout_seconds: deadline for a transaction.

    """

    def __init__(
        self, connection: Mapping[str, Any], topics: Topics, group: Group, partition: int, timeout_seconds: float
    ) -> None:
        self._topics = topics
        self._group = group
        self._partition = partition
        self._timeout_seconds = timeout_seconds
        self._producer = AIOKafkaProducer(
            **connection,
            acks="all",
            transactional_id=f"{group.app_id}-{partition}",
            transaction_timeout_ms=int((timeout_seconds + _SLACK_SECONDS) * 1000),
        )

    async def start(self) -> None:
        """Connect, and end what an earlier producer of this partition left open. The caller holds the deadline."""
        await self._producer.start()
        # All at once: a producer that learned of topics one by one would forget them later, and fail.
        await self._producer.client.set_topics(
            [self._topics.recommendations, self._topics.dead_letters, self._topics.changelog]
        )

    async def stop(self) -> None:
        """Disconnect. An open transaction stays open, until another producer takes over or Kafka gives it up."""
        await self._producer.stop()

    async def transact(self, transaction: Transaction) -> range | None:
        """Write it and commit; the offsets of its states in the changelog, None if there are none.

        Raises:
            WorkerError: another worker has taken over, or Kafka refused something or did not answer in time. The
                transaction was not committed, or nobody knows; whoever takes the partition over finds out.
            StateError: somebody else has written to the changelog in between.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                answers = await self._run(transaction)
        except TimeoutError:
            raise WorkerError(
                f"Kafka did not end a transaction of partition {self._partition} within {self._timeout_seconds:g} s"
            ) from None
        except (KafkaError, AssertionError) as error:  # aiokafka asserts that a producer that has failed isn't used
            raise self._explained(error) from None
        if not transaction.states:
            return None
        return offsets_of(transaction.states, [answer.offset for answer in answers[-len(transaction.states) :]])

    async def _run(self, transaction: Transaction) -> list[Any]:
        await self._producer.begin_transaction()
        answers = await self._send(transaction.outputs)
        answers += await self._send([Addressed(self._topics.changelog, *batch) for batch in transaction.states])
        # Before the commit: aiokafka would commit what is left when a batch was refused.
        acknowledged = await _all(*answers, self._send_offset(transaction.end))
        await self._commit()
        return acknowledged[: len(answers)]

    async def _commit(self) -> None:
        await self._producer.commit_transaction()

    async def _send(self, addressed: Iterable[Addressed]) -> list[asyncio.Future[Any]]:
        return [
            await self._producer.send_batch(records, topic, partition=partition)
            for topic, partition, records in addressed
        ]

    async def _send_offset(self, end: int | None) -> None:
        if end is not None:
            place = TopicPartition(self._group.clicks_topic, self._partition)
            offsets = {place: OffsetAndMetadata(end, self._group.note)}
            await self._producer.send_offsets_to_transaction(offsets, self._group.app_id)

    def _explained(self, error: Exception) -> WorkerError:
        # Once Kafka has refused the producer, aiokafka says of whatever is asked next that it can't be.
        reason = error
        with suppress(asyncio.InvalidStateError, asyncio.CancelledError):
            reason = self._producer._sender.sender_task.exception() or error
        if isinstance(reason, ProducerFenced):
            return WorkerError(
                f"partition {self._partition} was taken over by another worker, or its transaction was given up by "
                f"Kafka after {self._timeout_seconds + _SLACK_SECONDS:g} s: this worker was frozen or cut off; nothing "
                "of that transaction is seen by consumers that read committed records; start it again"
            )
        return WorkerError(f"Kafka refused a transaction of partition {self._partition}: {reason!r}")


async def _all(*awaited: Any) -> list[Any]:
    """Every result; the first error only when all have ended, or the others' would be lost with a warning."""
    results = await asyncio.gather(*awaited, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return list(results)
