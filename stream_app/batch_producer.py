"""Record batches → Kafka: an idempotent producer that appends many partitions' batches by one request.

aiokafka's own producer takes a batch for one partition at a time, with two futures and a place in a queue for each, and
writes and reads each field of a request by a call: a third of the time for which a worker with a hundred micro-batches
a second held the interpreter's lock. This one keeps aiokafka's connections, metadata and record batches, and has one
request and one future for all partitions that a broker leads.

Source: https://kafka.apache.org/protocol.html, Produce (key 0) in its versions 3 to 8, and KIP-98 for idempotence.
"""

from __future__ import annotations

import asyncio
import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from struct import Struct
from typing import Any, NamedTuple

import structlog
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.conn import CloseReason
from aiokafka.errors import (
    IncompatibleBrokerVersion,
    KafkaConnectionError,
    KafkaError,
    LeaderNotAvailableError,
    NodeNotReadyError,
    NoError,
    RequestTimedOutError,
    for_code,
)
from aiokafka.protocol.api import RequestStruct
from aiokafka.protocol.produce import ProduceRequest_v3, ProduceResponse_v3
from aiokafka.protocol.transaction import InitProducerIdRequest
from aiokafka.structs import TopicPartition

from stream_app.batches import Batch

log = structlog.get_logger(__name__)

#: Bytes of record batches in one request; the batch that would be beyond goes into the next. Kafka takes 100 MiB.
REQUEST_BYTES = 32 << 20

#: Before what may work then is tried again.
_BACKOFF_SECONDS = 0.1

#: Records of a partition are counted up to this, and then from 0 again.
_SEQUENCES = 1 << 31

#: Of a producer without transactions.
_TRANSACTION_MS = (1 << 31) - 1


class BatchProducer:
    """Appends record batches, in order for each topic, each of them once, with acks=all.

    Kafka knows a producer by its id, and a batch by how many records of this producer come before it in its partition.
    One that comes again, because the answer to it was lost, is not appended again.

    Args:
        connection: what aiokafka's clients take.

    """

    def __init__(self, connection: Mapping[str, Any]) -> None:
        self._client = AIOKafkaClient(**connection)
        self._timeout_ms: int = connection["request_timeout_ms"]
        self._id = self._epoch = -1
        self._sent: defaultdict[TopicPartition, int] = defaultdict(int)  # records, modulo `_SEQUENCES`
        self._last: dict[str, asyncio.Task[list[int]]] = {}
        self._under_way: set[asyncio.Task[list[int]]] = set()

    async def start(self, topics: Iterable[str]) -> None:
        """Connect, and get an id. The caller holds the deadline.

        Raises:
            KafkaError: Kafka does not let this producer in.
        """
        await self._client.bootstrap()
        await self._client.set_topics(list(topics))
        while self._id < 0:
            try:
                node = self._client.get_random_node()
                answer = await self._client.send(node, InitProducerIdRequest(None, _TRANSACTION_MS))
                if answer.error_code:
                    raise for_code(answer.error_code)()
            except KafkaError as error:
                await self._wait_or_raise([error])
            else:
                self._id, self._epoch = answer.producer_id, answer.producer_epoch

    async def stop(self) -> None:
        """Disconnect; what is not acknowledged by then may be lost."""
        for sent in self._under_way:
            sent.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self._client.close()

    def send(self, topic: str, batches: Sequence[Batch]) -> asyncio.Future[list[int]]:
        """Append batches behind those that were handed over before; the offset of the first record of each.

        What may work later is tried again, for ever: the caller holds the deadline. Once a batch is refused, or given
        up, those that come later for its topic are refused too. The future raises KafkaError; who cancels it gives the
        batches up.
        """
        sent = asyncio.create_task(self._append(topic, batches, self._last.get(topic)))
        self._under_way.add(sent)
        sent.add_done_callback(self._under_way.discard)
        sent.add_done_callback(_look_at_error)
        self._last[topic] = sent
        return sent

    async def _append(self, topic: str, batches: Sequence[Batch], before: asyncio.Task[Any] | None) -> list[int]:
        if before is not None:
            await _appended(before)
        offsets = dict[int, int]()
        for numbers in _requests(batches):
            places = {TopicPartition(topic, batches[number].partition): number for number in numbers}
            found = await self._until_appended(
                {place: self._numbered(place, batches[n]) for place, n in places.items()}
            )
            offsets |= {number: found[place] for place, number in places.items()}
        return [offsets[number] for number in range(len(batches))]

    def _numbered(self, place: TopicPartition, batch: Batch) -> memoryview:
        """The bytes of a batch, with its number."""
        records = batch.records
        records._set_producer_state(self._id, self._epoch, self._sent[place])
        self._sent[place] = (self._sent[place] + records.record_count()) % _SEQUENCES
        return memoryview(records._build())

    async def _until_appended(self, batches: Mapping[TopicPartition, memoryview]) -> dict[TopicPartition, int]:
        offsets, told = dict[TopicPartition, int](), False
        while True:
            answers = await self._request(batches)
            offsets |= {place: offset for place, offset in answers.items() if isinstance(offset, int)}
            errors = {place: error for place, error in answers.items() if isinstance(error, KafkaError)}
            if not errors:
                return offsets
            why = list(errors.values())
            await self._wait_or_raise(why)
            if not told:
                log.warning("Kafka did not take record batches; they are sent again", error=repr(why[0]))
                told = True
            batches = {place: batches[place] for place in errors}

    async def _request(self, batches: Mapping[TopicPartition, memoryview]) -> dict[TopicPartition, int | KafkaError]:
        """Ask the leader of each partition; where it has put the batch, or why not."""
        by_node: dict[int, dict[TopicPartition, memoryview]] = {}
        answers: dict[TopicPartition, int | KafkaError] = {}
        for place, batch in batches.items():
            node = self._client.cluster.leader_for_partition(place)
            if node is None or node < 0:
                answers[place] = LeaderNotAvailableError(f"{place.topic}-{place.partition}")
            else:
                by_node.setdefault(node, {})[place] = batch
        for some in await asyncio.gather(*(self._request_of(node, each) for node, each in by_node.items())):
            answers |= some
        return answers

    async def _request_of(
        self, node: int, batches: Mapping[TopicPartition, memoryview]
    ) -> dict[TopicPartition, int | KafkaError]:
        try:
            answers = await self._ask(node, _Request(self._timeout_ms, batches))
        except KafkaError as error:
            return dict.fromkeys(batches, error)
        silence = RequestTimedOutError(f"the answer of Kafka's node {node} leaves it out")
        return {place: answers.get(place, silence) for place in batches}

    async def _ask(self, node: int, request: _Request) -> dict[TopicPartition, int | KafkaError]:
        """As `AIOKafkaClient.send` does, which would copy the parts of a request twice to put them together."""
        if not await self._client.ready(node):
            raise NodeNotReadyError(f"no connection to Kafka's node {node}")
        connection = self._client._conns[node, ConnectionGroup.DEFAULT]
        if connection._writer is None:  # closed while others waited for it too
            raise KafkaConnectionError(f"the connection to Kafka's node {node} is closed")
        number = connection._next_correlation_id()
        parts = request.parts_for(connection._versions, number, connection._client_id)
        try:
            connection._writer.writelines(parts)
        except (OSError, RuntimeError) as error:  # uvloop's word for a connection that it has closed is the second
            connection.close(reason=CloseReason.CONNECTION_BROKEN)
            raise KafkaConnectionError(f"the connection to Kafka's node {node} broke: {error}") from None
        answer: asyncio.Future[dict[TopicPartition, int | KafkaError]] = asyncio.get_running_loop().create_future()
        connection._requests.append((number, request, answer))
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                return await answer
        except TimeoutError:
            connection.close(reason=CloseReason.CONNECTION_TIMEOUT)
            raise RequestTimedOutError(f"Kafka's node {node} did not answer") from None

    async def _wait_or_raise(self, errors: Sequence[KafkaError]) -> None:
        """Before it is tried again; ask anew who leads the partitions if that may be why.

        Raises:
            KafkaError: one of these errors will be there again.
        """
        for error in errors:
            if not error.retriable:
                raise error
        await asyncio.sleep(_BACKOFF_SECONDS)
        if any(error.invalid_metadata for error in errors):
            await self._client.force_metadata_update()


def _requests(batches: Sequence[Batch]) -> Iterator[list[int]]:
    """Numbers of the batches as requests take them: one for each partition, in order, and so many bytes."""
    waiting = list(range(len(batches)))
    while waiting:
        some, blocked, room, left = list[int](), set[int](), REQUEST_BYTES, list[int]()
        for number in waiting:
            partition, size = batches[number].partition, batches[number].records.size()
            if partition in blocked or (some and size > room):
                left.append(number)
            else:
                some.append(number)
                room -= size
            blocked.add(partition)
        yield some
        waiting = left


async def _appended(before: asyncio.Task[Any]) -> None:
    """Wait for it.

    Raises:
        KafkaError: it was refused or given up.
    """
    await asyncio.wait([before])
    if before.cancelled():
        raise KafkaError("what was to be appended before was given up")
    if error := before.exception():
        raise copy.copy(error)


def _look_at_error(sent: asyncio.Task[Any]) -> None:
    """So that asyncio doesn't complain of one that nobody waits for: the error of the first is what counts."""
    if not sent.cancelled():
        sent.exception()


_PRODUCE, _OLDEST, _NEWEST = 0, 3, 8  # the key of the request, and the versions of it that are written here
_ALL_REPLICAS = -1

_SHORT, _INT, _HEAD, _BATCH = Struct(">h"), Struct(">i"), Struct(">hhii"), Struct(">ii")
_ANSWER, _ANSWER_WITH_START = Struct(">ihqq"), Struct(">ihqqq")


class _Request(RequestStruct):
    """A produce request, with what a connection of aiokafka's asks of one to read its answer."""

    API_KEY = _PRODUCE
    API_VERSION = _OLDEST
    SCHEMA = ProduceRequest_v3.SCHEMA
    RESPONSE_TYPE = ProduceResponse_v3

    def __init__(self, timeout_ms: int, batches: Mapping[TopicPartition, memoryview]) -> None:
        self._timeout_ms = timeout_ms
        self._batches = batches

    def parts_for(
        self, versions: Mapping[int, tuple[int, int]], number: int, client_id: str
    ) -> list[bytes | memoryview]:
        """What to write to a connection, in the newest version that the broker and this module know."""
        oldest, newest = versions[_PRODUCE]
        self.API_VERSION = min(newest, _NEWEST)
        if max(oldest, _OLDEST) > self.API_VERSION:
            raise IncompatibleBrokerVersion(
                f"the broker takes produce requests of versions {oldest} to {newest}, this producer sends "
                f"{_OLDEST} to {_NEWEST}"
            )
        self.RESPONSE_TYPE = _AnswerType(self.API_VERSION)
        topic = next(iter(self._batches)).topic.encode()
        head = b"".join((
            self.build_request_header(number, client_id).encode(),
            _HEAD.pack(-1, _ALL_REPLICAS, self._timeout_ms, 1),  # -1: no transaction; 1: topics
            _SHORT.pack(len(topic)),
            topic,
            _INT.pack(len(self._batches)),
        ))  # fmt: skip
        size = len(head) + sum(_BATCH.size + len(records) for records in self._batches.values())
        parts: list[bytes | memoryview] = [_INT.pack(size) + head]
        for place, records in self._batches.items():
            parts += _BATCH.pack(place.partition, len(records)), records
        return parts

    def __repr__(self) -> str:
        return f"produce to {[*self._batches]}"


class _AnswerType(NamedTuple):
    """Reads the answers to requests of a version."""

    version: int

    def decode(self, data: BytesIO) -> dict[TopicPartition, int | KafkaError]:
        """The offset of the first record of each batch, or why it was not appended."""
        answers: dict[TopicPartition, int | KafkaError] = {}
        layout = _ANSWER if self.version < 5 else _ANSWER_WITH_START
        for _ in range(_read(_INT, data)):
            topic = data.read(_read(_SHORT, data)).decode()
            for _ in range(_read(_INT, data)):
                partition, code, offset, *_ = layout.unpack(data.read(layout.size))
                reason = _reason(data) if self.version >= 8 else None
                error = for_code(code)
                answers[TopicPartition(topic, partition)] = (
                    offset if error is NoError else error(*filter(None, [reason]))
                )
        return answers


def _reason(data: BytesIO) -> str | None:
    """What the broker says of the batch; of its records it says nothing that isn't said there."""
    for _ in range(_read(_INT, data)):
        data.read(_INT.size)
        _text(data)
    return _text(data)


def _text(data: BytesIO) -> str | None:
    size = _read(_SHORT, data)
    return None if size < 0 else data.read(size).decode()


def _read(number: Struct, data: BytesIO) -> int:
    return int(number.unpack(data.read(number.size))[0])
