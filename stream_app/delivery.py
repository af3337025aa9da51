"""How what a micro-batch leads to becomes durable on Kafka, between its computation and the local disk.

One contract and a sibling for each guarantee: `AtLeastOnce` here, `ExactlyOnce` in `transactions.py`.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Generic, TypeVar

from stream_app.batches import Batch
from stream_app.micro_batch import Outbox
from stream_app.publisher import Publisher, acknowledged, offsets_of

Parcel = TypeVar("Parcel")


@dataclass(frozen=True)
class Topics:
    """Where a worker writes."""

    recommendations: str
    dead_letters: str
    changelog: str


class Delivery(ABC, Generic[Parcel]):
    """What becomes of an outbox: `pack`, `send_outputs`, `send_states` and `appended`, each once and in this order.

    A step gets the parcels of micro-batches in their order, and the next one only after it has returned for the one
    before; different steps work on different parcels at a time. After `appended` all that is in the parcel is durable.
    """

    end_markers: ClassVar[int]
    """Offsets that Kafka takes for itself behind what `append`, or one parcel, appends to a partition's changelog."""

    @abstractmethod
    async def start(self) -> None:
        """Connect; called once, before anything else.

        Raises:
            BrokerUnavailable: Kafka did not answer in time.
        """

    @abstractmethod
    async def take_over(self, partitions: Collection[int]) -> None:
        """Make sure that nobody else writes for these source partitions by this guarantee any more.

        Called at each rebalance with all that this worker has from now on, before their states are restored.

        Raises:
            BrokerUnavailable: Kafka did not answer in time.
        """

    @abstractmethod
    def pack(self, outbox: Outbox, ends: Mapping[int, int], now_ms: int) -> Parcel:
        """What there is to write, as record batches. Called from another thread.

        Args:
            outbox: of one micro-batch.
            ends: source partition → the offset behind the micro-batch's last record, for each that is in it.
            now_ms: the records' time stamp.

        """

    @abstractmethod
    async def send_outputs(self, parcel: Parcel) -> None:
        """Hand over what others read."""

    @abstractmethod
    async def send_states(self, parcel: Parcel) -> None:
        """Hand over the states, as soon as what others read is durable."""

    @abstractmethod
    async def appended(self, parcel: Parcel) -> dict[int, range]:
        """Wait until the states are durable; partition of the changelog → the offsets that hold its records.

        Raises:
            WorkerError: Kafka refused something, or did not answer in time.
            StateError: somebody else has written to the changelog in between.
        """

    @abstractmethod
    async def append(self, partition: int, rows: Sequence[tuple[bytes, bytes]]) -> range:
        """Append states to the changelog alone, and wait for it; the offsets that hold them. Raises as `appended`."""

    @abstractmethod
    async def stop(self) -> None:
        """Disconnect."""


@dataclass(slots=True)
class Sent:
    """A parcel, and Kafka's answers to come."""

    outbox: Outbox
    recommendations: list[Batch]
    states: dict[int, list[Batch]]
    outputs_in_flight: list[asyncio.Future[Any]] = field(default_factory=list)
    states_in_flight: list[asyncio.Future[list[int]]] = field(default_factory=list)
    """One at most."""


class AtLeastOnce(Delivery[Sent]):
    """Recommendations and dead letters first, states when those are acknowledged; offsets are committed by Faust.

    Args:
        publisher: not yet connected.
        topics: where to write.
        timeout_seconds: deadline for Kafka's acknowledgements.

    """

    end_markers = 0

    def __init__(self, publisher: Publisher, topics: Topics, timeout_seconds: float) -> None:
        self._publisher = publisher
        self._topics = topics
        self._timeout_seconds = timeout_seconds

    async def start(self) -> None:
        await self._publisher.start([self._topics.recommendations, self._topics.dead_letters, self._topics.changelog])

    async def take_over(self, partitions: Collection[int]) -> None:
        """Nothing: a worker that wakes up too late is found out by what it writes (see `state_table`)."""

    def pack(self, outbox: Outbox, ends: Mapping[int, int], now_ms: int) -> Sent:
        recommendations = _flat(outbox.recommendations.values())
        return Sent(
            outbox,
            self._publisher.pack(self._topics.recommendations, recommendations, now_ms),
            self._publisher.pack_each(outbox.states, now_ms),
        )

    async def send_outputs(self, parcel: Sent) -> None:
        letters = _flat(parcel.outbox.dead_letters.values())
        if parcel.recommendations:
            parcel.outputs_in_flight.append(self._publisher.send(self._topics.recommendations, parcel.recommendations))
        parcel.outputs_in_flight += await self._publisher.send_dead_letters(self._topics.dead_letters, letters)

    async def send_states(self, parcel: Sent) -> None:
        await acknowledged(parcel.outputs_in_flight, "recommendations or dead letters", self._timeout_seconds)
        if parcel.states:
            states = _flat(parcel.states.values())
            parcel.states_in_flight.append(self._publisher.send(self._topics.changelog, states))

    async def appended(self, parcel: Sent) -> dict[int, range]:
        answers = await acknowledged(parcel.states_in_flight, "the changelog of user states", self._timeout_seconds)
        offsets = iter(_flat(answers))
        return {
            partition: offsets_of(batches, list(islice(offsets, len(batches))))
            for partition, batches in parcel.states.items()
        }

    async def append(self, partition: int, rows: Sequence[tuple[bytes, bytes]]) -> range:
        return await self._publisher.append(self._topics.changelog, partition, rows)

    async def stop(self) -> None:
        await self._publisher.stop()


_T = TypeVar("_T")


def _flat(lists: Iterable[list[_T]]) -> list[_T]:
    return [each for some in lists for each in some]
