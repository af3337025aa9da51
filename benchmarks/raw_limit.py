"""What a plain copying loop does: it reads and writes as many bytes as the worker, and computes and keeps nothing.

Each click of a fetch becomes a recommendation with the same key, and each user in it a record of a changelog, both with
bytes of the worker's sizes that were made once. No model, no state, no order between the two topics, no commit of
offsets. Records are read and written by the batch, as the worker does it, with the client's own calls; several fetches
may wait for their acknowledgements. All of it is one thread, where the worker packs its batches in another.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Iterable

import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from lrurec.user_state import StateLayout
from stream_app.recommendations import Lists, RecommendationEncoder

_FETCHED = 4_096
_FETCHES_IN_FLIGHT = 4

#: Of the paper's architecture, which `backlog` gives to all programs.
_STATE = StateLayout("9aad0b43e639d264", 2, 128)


async def run(name: str, broker: str) -> None:
    """Copy until cancelled."""
    encoder = RecommendationEncoder(["", *(f"item-{row}" for row in range(1_001, 1_011))], "9aad0b43e639d264", "clicks")
    items, scores = np.arange(1, 11, dtype=np.int32), np.linspace(4.20311, 3.30307, 10, dtype=np.float32)
    numbers = (np.array([number]) for number in (12, 3, 123_456, 1_700_000_000_000))
    lists = Lists([b"user-12345"], items[None], scores[None], *numbers, [None])
    [ranking] = encoder.encode(lists, 1_700_000_000_000)
    state = bytes(_STATE.dtype.itemsize)
    consumer = AIOKafkaConsumer("clicks", bootstrap_servers=broker, auto_offset_reset="earliest")
    producer = AIOKafkaProducer(bootstrap_servers=broker, acks="all", enable_idempotence=True, max_batch_size=1_000_000)
    await consumer.start()
    await producer.start()
    in_flight: deque[list[asyncio.Future[object]]] = deque()
    try:
        while True:
            sent: list[asyncio.Future[object]] = []
            for partition, records in (await consumer.getmany(timeout_ms=1_000, max_records=_FETCHED)).items():
                keys = [record.key for record in records]
                for topic, of_topic, value in (
                    ("recommendations", keys, ranking),
                    ("states", dict.fromkeys(keys), state),
                ):
                    sent += await _send(producer, f"{name}-{topic}", partition.partition, of_topic, value)
            in_flight.append(sent)
            if len(in_flight) > _FETCHES_IN_FLIGHT:
                await asyncio.gather(*in_flight.popleft())
    finally:
        await consumer.stop()
        await producer.stop()


async def _send(
    producer: AIOKafkaProducer, topic: str, partition: int, keys: Iterable[bytes], value: bytes
) -> list[asyncio.Future[object]]:
    """A record for every key, in as few batches as hold them."""
    batches = [producer.create_batch()]
    for key in keys:
        if batches[-1].append(key=key, value=value, timestamp=None) is None:
            batches.append(producer.create_batch())
            batches[-1].append(key=key, value=value, timestamp=None)
    return [await producer.send_batch(batch, topic, partition=partition) for batch in batches]


if __name__ == "__main__":
    asyncio.run(run(os.environ["PEER_NAME"], os.environ["PEER_BROKER"]))
