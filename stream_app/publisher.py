"""Records → Kafka, by the batch: the producer that writes recommendations, dead letters and the changelog."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import InvalidTimestampError, KafkaError, MessageSizeTooLargeError
from aiokafka.producer.message_accumulator import BatchBuilder

from stream_app.batch_producer import BatchProducer
from stream_app.batches import BATCH_BYTES, Batch, Packer
from stream_app.errors import BrokerUnavailable, WorkerError, foreign_record
from stream_app.messages import REASON_HEADERS, DeadLetter, Header
from stream_app.micro_batch import KeyValue
from stream_app.partitioner import partitions_of

#: Ends the name of a header that says what of a dead letter was too large for its topic; its value is the size.
LEFT_OUT = "-left-out"


def by_partition(letters: Sequence[DeadLetter], partitions: int) -> dict[int, list[DeadLetter]]:
    """Letters by their keys' partitions in a topic of so many, in order; those without a key as with an empty one."""
    found: dict[int, list[DeadLetter]] = {}
    if not letters:  # nearly always
        return found
    keys = [letter.key or b"" for letter in letters]
    for partition, letter in zip(partitions_of(keys, partitions).tolist(), letters, strict=True):
        found.setdefault(partition, []).append(letter)
    return found


def fill(new_batch: Callable[[], BatchBuilder], letters: Iterable[DeadLetter], timestamp_ms: int) -> list[BatchBuilder]:
    """As many batches as it takes for these letters."""
    batches = [new_batch()]
    for key, value, headers in letters:
        # A full batch takes no more, and says so only by what it returns; an empty one takes a record of any size.
        if batches[-1].append(timestamp=timestamp_ms, key=key, value=value, headers=headers) is None:
            batches.append(new_batch())
            batches[-1].append(timestamp=timestamp_ms, key=key, value=value, headers=headers)
    return batches


class Publisher:
    """What is acknowledged is on every in-sync replica, once, in order.

    Dead letters have a producer of their own, which is not idempotent: one that is takes no more records after Kafka
    has refused a batch, and a dead letter may be refused for its size.

    Args:
        connection: `Settings.kafka_client()`.
        largest_batch: bytes of the largest record batch that every topic takes, its header included.

    """

    def __init__(self, connection: Mapping[str, Any], largest_batch: int = BATCH_BYTES) -> None:
        size = min(largest_batch, BATCH_BYTES)
        self._packer = Packer(size)
        self._producer = BatchProducer(connection)
        self._dead_letter_producer = AIOKafkaProducer(
            **connection, acks="all", max_batch_size=size, max_request_size=64 * BATCH_BYTES
        )
        self._partitions: dict[str, int] = {}
        self._kafka = f"Kafka at {','.join(connection['bootstrap_servers'])}"
        self._timeout_seconds = connection["request_timeout_ms"] / 1000

    async def start(self, topics: Iterable[str]) -> None:
        """Connect, and learn how many partitions the topics have.

        All topics are named at once: a producer that knew a topic from bootstrap alone would forget it later, and fail.

        Raises:
            BrokerUnavailable: Kafka did not answer in time.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                topics = list(topics)
                await self._producer.start(topics)
                await self._dead_letter_producer.start()
                await self._dead_letter_producer.client.set_topics(topics)
                for topic in topics:
                    self._partitions[topic] = len(await self._dead_letter_producer.partitions_for(topic))
        except TimeoutError:
            raise BrokerUnavailable(
                f"{self._kafka} did not answer within {self._timeout_seconds:g} s; is it up?"
            ) from None
        except KafkaError as error:
            raise BrokerUnavailable(
                f"{self._kafka} did not let the producer in: {error!r}; is it up, and may it write?"
            ) from None

    async def stop(self) -> None:
        """Disconnect; what is not acknowledged by then may be lost."""
        await self._producer.stop()
        await self._dead_letter_producer.stop()

    def pack(self, topic: str, records: Sequence[KeyValue], timestamp_ms: int) -> list[Batch]:
        """Records with their keys' partitions, batch by batch in order; can be called from another thread."""
        return self._packer.pack(records, self._partitions[topic], timestamp_ms)

    def pack_for(self, partition: int, records: Sequence[KeyValue], timestamp_ms: int) -> list[Batch]:
        """The same for one given partition."""
        return self._packer.pack_for(partition, records, timestamp_ms)

    def pack_each(self, records: Mapping[int, Sequence[KeyValue]], timestamp_ms: int) -> dict[int, list[Batch]]:
        """The same for given partitions; by partition, without those that get none."""
        return self._packer.pack_each(records, timestamp_ms)

    def send(self, topic: str, batches: Sequence[Batch]) -> asyncio.Future[list[int]]:
        """Hand batches over, in order; the future has the offset of each one's first record, once all are acknowledged.

        It raises KafkaError; see `acknowledged`.
        """
        return self._producer.send(topic, batches)

    async def append(self, topic: str, partition: int, records: Sequence[KeyValue]) -> range:
        """Write records to one partition and wait until Kafka has acknowledged them; the offsets that hold them.

        Raises:
            WorkerError: they were refused, or not acknowledged in time.
            StateError: somebody else wrote in between.
        """
        batches = self.pack_for(partition, records, time.time_ns() // 1_000_000)
        sent = self.send(topic, batches)
        [offsets] = await acknowledged([sent], f"records for {topic}", self._timeout_seconds)
        return offsets_of(batches, offsets)

    async def send_dead_letters(self, topic: str, letters: Sequence[DeadLetter]) -> list[asyncio.Future[Any]]:
        """Hand dead letters over in batches, in order for each partition; those without a key go to one partition.

        The futures resolve when Kafka has acknowledged them.

        Raises:
            WorkerError: the batch before one of these did not get out in time.
        """
        try:
            return [
                asyncio.ensure_future(
                    self._see_through(topic, partition, part, await self._hand_over(topic, partition, batch))
                )
                for partition, rows in by_partition(letters, self._partitions[topic]).items()
                for batch, part in self._pack_dead_letters(rows)
            ]
        except KafkaError as error:
            raise WorkerError(f"Kafka takes no more records for {topic}: {error!r}") from None

    def _pack_dead_letters(self, letters: Sequence[DeadLetter]) -> Iterator[tuple[BatchBuilder, list[DeadLetter]]]:
        """Record batches, each with the letters that it holds."""
        batch, inside = self._dead_letter_producer.create_batch(), list[DeadLetter]()
        for letter in letters:
            if not _add(letter, batch):
                yield batch, inside
                batch, inside = self._dead_letter_producer.create_batch(), []
                _add(letter, batch)
            inside.append(letter)
        yield batch, inside

    async def _hand_over(self, topic: str, partition: int, batch: BatchBuilder) -> asyncio.Future[Any]:
        sent: asyncio.Future[Any] = await self._dead_letter_producer.send_batch(batch, topic, partition=partition)
        return sent

    async def _see_through(
        self, topic: str, partition: int, letters: Sequence[DeadLetter], sent: asyncio.Future[Any]
    ) -> None:
        """Wait until these letters are acknowledged; where they are too large together, send each half by itself."""
        try:
            await sent
        except MessageSizeTooLargeError:
            if len(letters) == 1:
                await self._send_cut_down(topic, partition, letters[0])
                return
            half = len(letters) // 2
            for part in (letters[:half], letters[half:]):
                await self._send_together(topic, partition, part)

    async def _send_together(self, topic: str, partition: int, letters: Sequence[DeadLetter]) -> None:
        for batch, part in self._pack_dead_letters(letters):
            await self._see_through(topic, partition, part, await self._hand_over(topic, partition, batch))

    async def _send_cut_down(self, topic: str, partition: int, letter: DeadLetter) -> None:
        # It fitted its own topic, compressed or with a larger limit, but not this one. The stream goes on all the same.
        for smaller in itertools.islice(forms_of(letter), 1, None):
            batch = self._dead_letter_producer.create_batch()
            _add(smaller, batch)
            try:
                await (await self._hand_over(topic, partition, batch))
            except MessageSizeTooLargeError:
                continue
            return
        raise no_room_for_a_reason(topic)


def no_room_for_a_reason(topic: str) -> WorkerError:
    """Kafka refuses what is left of a dead letter."""
    return WorkerError(f"not even the reason of a dead letter fits topic {topic}: raise its max.message.bytes")


def _add(letter: DeadLetter, batch: BatchBuilder) -> bool:
    """Whether the batch had room for it; an empty one has for a letter of any size."""
    return batch.append(key=letter.key, value=letter.value, timestamp=None, headers=letter.headers) is not None


def forms_of(letter: DeadLetter) -> Iterator[DeadLetter]:
    """A dead letter, and then what is left of it where it is too large."""
    yield letter
    yield _without_value(letter)
    yield _without_content(letter)


def _without_value(letter: DeadLetter) -> DeadLetter:
    return letter._replace(value=None, headers=[*letter.headers, _left_out("value", letter.value)])


def _without_content(letter: DeadLetter) -> DeadLetter:
    """The reason alone: where the record lies, in which topic, and what was wrong with it."""
    own = letter.headers[:-REASON_HEADERS]
    parts = {"key": letter.key, "value": letter.value, "headers": b"".join(n.encode() + (v or b"") for n, v in own)}
    headers = [*letter.headers[-REASON_HEADERS:], *(_left_out(name, part) for name, part in parts.items())]
    return DeadLetter(None, None, headers)


def _left_out(name: str, part: bytes | None) -> Header:
    return f"__streams.errors.{name}{LEFT_OUT}", str(len(part or b"")).encode()


def offsets_of(batches: Sequence[Batch], offsets: Sequence[int]) -> range:
    """The offsets that hold the records of batches for one partition of the changelog, by those of their first ones.

    Raises:
        StateError: they don't follow each other: somebody else wrote in between.
    """
    first = following = offsets[0]
    for batch, offset in zip(batches, offsets, strict=True):
        if offset != following:
            raise foreign_record(batch.partition, following)
        following = offset + batch.records.record_count()
    return range(first, following)


async def acknowledged(futures: Sequence[asyncio.Future[Any]], what: str, timeout_seconds: float) -> list[Any]:
    """The broker's answers.

    Raises:
        WorkerError: one was refused, or none came in time; what was sent may or may not be in the log.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            return list(await asyncio.gather(*futures))
    except TimeoutError:
        raise WorkerError(f"Kafka did not acknowledge {what} within {timeout_seconds:g} seconds") from None
    except InvalidTimestampError:
        raise WorkerError(
            f"Kafka refused {what}, whose time lies too far from its own: set this machine's clock, or give the topic "
            "message.timestamp.type=LogAppendTime, as `stream-app topics` does where it creates one"
        ) from None
    except KafkaError as error:
        raise WorkerError(f"Kafka refused {what}: {error!r}") from None
