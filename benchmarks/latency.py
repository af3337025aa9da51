"""How long after a click its recommendation can be read, at four loads.

    python -m benchmarks.latency                                  8 and 64 partitions, 30 seconds a load
    python -m benchmarks.latency --partitions 8 --seconds 120

What the worker can do is measured first, on a backlog. Then clicks come at 10, 30, 50 and 80% of it, each at a time
that was fixed beforehand, evenly apart: one that waits, for the worker or for its producer, waits from its own time on
(no coordinated omission). A latency ends where a consumer has the recommendation; every fifth click is looked at, after
the first ten seconds of a load: a broker that was just started compiles itself meanwhile.

Broker, worker, producer and consumer share the machine's cores. The consumer is librdkafka, which leaves most of them
to what is measured; the producer sends what is due every five milliseconds, all partitions in one request, as Kafka's
own does. librdkafka would send one for each partition, which keeps the broker as busy as the worker.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import platform
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import orjson
import uvloop
from confluent_kafka import Consumer, Message, TopicPartition

from benchmarks import backlog
from benchmarks.machine import processor
from stream_app.dev.kafka.broker import LocalBroker
from stream_app.micro_batch import KeyValue
from stream_app.publisher import Publisher, acknowledged

LOADS = (0.1, 0.3, 0.5, 0.8)
USERS, ITEMS = 50_000, 3_416
BACKLOG = 300_000

#: Of the clicks, the first of so many carries an event_id by which its recommendation is known again.
_LOOKED_AT = 5

#: Between two looks at which clicks are due: linger.ms of Kafka's own producer, by default since 4.0.
_TICK_SECONDS = 0.005

_LEAD_SECONDS, _SETTLING_SECONDS, _PATIENCE_SECONDS = 0.5, 10.0, 60.0


def main() -> None:
    """Print a table, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--partitions", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    results = {}
    for partitions in options.partitions:
        with tempfile.TemporaryDirectory() as folder:
            results[partitions] = measure(Path(folder), partitions, options.seconds)
    print(json.dumps({"benchmark": "latency", "seconds": options.seconds, "milliseconds": results}))


def measure(folder: Path, partitions: int, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds by load and percentile."""
    bundle, users, results = folder / "bundle", backlog.equal_shares(USERS), {}
    backlog.write_bundle(bundle, ITEMS)
    with LocalBroker(folder / "kafka", port=0, heap_mb=1024) as broker:
        asyncio.run(backlog.produce_backlog(broker.bootstrap, BACKLOG, users, ITEMS, partitions))
        environment = backlog.worker_environment(
            broker.bootstrap, bundle, folder / "latency", "at_least_once", PARTITIONS=str(partitions)
        )
        with backlog.worker(environment, folder / "worker.log"):
            topic = environment["STREAM_APP_RECOMMENDATIONS_TOPIC"]
            saturation = asyncio.run(backlog.rate_of(broker.bootstrap, topic, BACKLOG, partitions))
            print(f"{partitions} partitions: {saturation:,.0f} clicks/s on a backlog")
            for load in LOADS:
                rate = load * saturation
                waits = latencies(broker.bootstrap, topic, partitions, rate, seconds)
                found = dict(zip(("p50", "p99", "p99.9"), np.percentile(waits, [50, 99, 99.9]), strict=True))
                results[f"{load:.0%}"] = {name: round(1000 * float(value), 2) for name, value in found.items()}
                line = "   ".join(f"{name} {value:8,.1f} ms" for name, value in results[f"{load:.0%}"].items())
                print(f"{partitions:>4} partitions, {load:4.0%}, {rate:8,.0f} clicks/s:   {line}", flush=True)
        backlog.prove(environment)
    return results


def latencies(bootstrap: str, topic: str, partitions: int, rate: float, seconds: float) -> list[float]:
    """Seconds from when a click was due to when its recommendation was here, of the clicks that are looked at."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "latency", "enable.auto.commit": False})
    try:
        log = [TopicPartition(topic, partition) for partition in range(partitions)]
        ends = [consumer.get_watermark_offsets(each, _PATIENCE_SECONDS)[1] for each in log]
        consumer.assign([TopicPartition(topic, each.partition, end) for each, end in zip(log, ends, strict=True)])
        count, waits = int(rate * (_SETTLING_SECONDS + seconds)), dict[int, float]()
        with load_generator(bootstrap, rate, count) as start:
            due = start + np.arange(count) / rate
            while len(waits) < -(-count // _LOOKED_AT):
                if time.time() > due[-1] + _PATIENCE_SECONDS:
                    raise TimeoutError(f"{count} clicks, and after {_PATIENCE_SECONDS:g} s {len(waits)} answers")
                # It waits until it has so many: one at least, then those that are here too.
                found = consumer.consume(1, 1.0) + consumer.consume(1_000, 0)
                now = time.time()
                for number in map(_number_of, found):
                    if number is not None:
                        waits.setdefault(number, now - due[number])
    finally:
        consumer.close()
    return [wait for number, wait in waits.items() if number >= rate * _SETTLING_SECONDS]


def _number_of(recommendation: Message) -> int | None:
    """Of the click that it answers, which is looked at; None for other clicks."""
    if recommendation.error() is not None:
        raise RuntimeError(f"recommendations can't be read: {recommendation.error()}")
    value = recommendation.value() or b""
    place = value.find(b'"event_id":"')
    return None if place < 0 else int(value[place + 12 : value.index(b'"', place + 12)])


@contextmanager
def load_generator(bootstrap: str, rate: float, count: int) -> Iterator[float]:
    """A process that sends the clicks when they are due; yields when the first one is, once it is ready to send."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_generate, args=(theirs, bootstrap, rate, count))
    process.start()
    try:
        if not ours.poll(_PATIENCE_SECONDS):
            raise TimeoutError("the process that sends the clicks did not start")
        yield ours.recv()
    finally:
        process.join(_PATIENCE_SECONDS)
        process.kill()
        process.join()


def _generate(ready: Connection, bootstrap: str, rate: float, count: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # a click that it held up would look late
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_send_when_due(ready, bootstrap, rate, count))


async def _send_when_due(ready: Connection, bootstrap: str, rate: float, count: int) -> None:
    rng = np.random.default_rng(int(rate))
    users, items = rng.integers(0, USERS, count).tolist(), rng.integers(1, ITEMS + 1, count).tolist()
    clicks = list(map(_click, range(count), users, items))
    publisher = Publisher({"bootstrap_servers": [bootstrap], "request_timeout_ms": 30_000})
    await publisher.start(["clicks"])
    start = time.time() + _LEAD_SECONDS
    ready.send(start)
    sent, in_flight = 0, set[asyncio.Future[object]]()
    try:
        while sent < count:
            wanted = min(count, int((time.time() - start) * rate) + 1)
            if wanted > sent:
                batches = publisher.pack("clicks", clicks[sent:wanted], int(time.time() * 1000))
                future = publisher.send("clicks", batches)
                in_flight.add(future)
                future.add_done_callback(in_flight.discard)
                sent = wanted
            await asyncio.sleep(_TICK_SECONDS)
        await acknowledged(list(in_flight), "clicks", 30.0)
    finally:
        await publisher.stop()


def _click(number: int, user: int, item: int) -> KeyValue:
    event: dict[str, object] = {"user_id": f"user-{user}", "item_id": f"item-{item}", "timestamp_ms": 1_700_000_000_000}
    if number % _LOOKED_AT == 0:
        event["event_id"] = str(number)
    return (f"user-{user}".encode(), orjson.dumps(event))


if __name__ == "__main__":
    main()
