"""What Kafka and its client allow: the clicks are read and as many recommendations written, by nobody's computation.

No model, no state, no changelog, no commit: each record of a fetch becomes one with the same key and the bytes of a
recommendation that was made once. aiokafka's own consumer and record batches, in as few calls as it has; what is
written waits for its acknowledgement while the next fetch is under way.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from stream_app.messages import RecommendationEncoder, Source

_FETCHED = 4_096
_FETCHES_IN_FLIGHT = 4


async def run(name: str, broker: str) -> None:
    """Copy until cancelled."""
    encoder = RecommendationEncoder(["", *(f"item-{row}" for row in range(1, 11))], "9aad0b43e639d264")
    scores = [4.20311 - 0.1 * place for place in range(10)]
    source = Source("clicks", 3, 123_456, 1_700_000_000_000, None)
    value = encoder.encode("user-12345", list(range(1, 11)), scores, 12, source, 1_700_000_000_000)
    consumer = AIOKafkaConsumer("clicks", bootstrap_servers=broker, group_id=name, auto_offset_reset="earliest")
    producer = AIOKafkaProducer(bootstrap_servers=broker, acks="all", enable_idempotence=True, max_batch_size=1_000_000)
    await consumer.start()
    await producer.start()
    in_flight: deque[list[asyncio.Future[object]]] = deque()
    try:
        while True:
            sent = []
            for partition, records in (await consumer.getmany(timeout_ms=1_000, max_records=_FETCHED)).items():
                batch = producer.create_batch()
                for record in records:
                    if batch.append(key=record.key, value=value, timestamp=None) is None:
                        sent.append(await _send(producer, batch, name, partition.partition))
                        batch = producer.create_batch()
                        batch.append(key=record.key, value=value, timestamp=None)
                sent.append(await _send(producer, batch, name, partition.partition))
            in_flight.append(sent)
            if len(in_flight) > _FETCHES_IN_FLIGHT:
                await asyncio.gather(*in_flight.popleft())
    finally:
        await consumer.stop()
        await producer.stop()


async def _send(producer: AIOKafkaProducer, batch: object, name: str, partition: int) -> asyncio.Future[object]:
    sent: asyncio.Future[object] = await producer.send_batch(batch, f"{name}-recommendations", partition=partition)
    return sent


if __name__ == "__main__":
    asyncio.run(run(os.environ["PEER_NAME"], os.environ["PEER_BROKER"]))
