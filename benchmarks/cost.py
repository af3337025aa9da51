"""What each part of a click costs: CPU time of its parts, then of the whole worker and the broker.

    python -m benchmarks.cost

The parts are called as a micro-batch of 4,096 clicks calls them, one after the other in one thread; parts that the
micro-batch does inline are what is left of the whole. States are read from and written to one database here, warm. What
the worker takes beyond these parts is Faust, aiokafka, the event loops, and that its threads wait for one another. The
worker and the broker are processes of their own, of which the system says how much CPU time they took while a backlog
was worked off.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import rocksdict
from aiokafka import AIOKafkaConsumer, TopicPartition

from benchmarks import backlog
from benchmarks.machine import cpu_seconds, processor
from lrurec.bundle import load_bundle
from lrurec.engine import Clicks
from lrurec.serving import build_engine, state_layout
from stream_app.dev.kafka.broker import LocalBroker
from stream_app.messages import ClickLimits, decode_clicks
from stream_app.micro_batch import MicroBatcher
from stream_app.publisher import Publisher
from stream_app.recommendations import Lists, RecommendationEncoder
from stream_app.state_table import open_database, write_in_time

CLICKS, PARTITIONS, USERS, ITEMS = 4_096, 8, 50_000, 3_416
BACKLOG = 400_000
NOW_MS = 1_700_000_000_000


class Record(NamedTuple):
    """What the worker needs of a consumed record."""

    topic: str
    partition: int
    offset: int
    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...] = ()


def main() -> None:
    """Print a table, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}; CPU microseconds a click")
    with tempfile.TemporaryDirectory() as folder:
        backlog.write_bundle(Path(folder) / "bundle", ITEMS)
        costs = asyncio.run(parts(Path(folder), options.rounds))
        costs |= processes(Path(folder))
    for name, cost in costs.items():
        print(f"{name:>34}: {cost:6.2f}")
    print(json.dumps({"benchmark": "cost", **costs}))


async def parts(folder: Path, rounds: int) -> dict[str, float]:
    """Of one thread each."""
    bundle = load_bundle(folder / "bundle")
    layout = state_layout(bundle)
    engine = build_engine(bundle, layout, device="cpu")
    ids = ["", *bundle.catalogue.item_ids]
    rows = {item_id: row for row, item_id in enumerate(ids) if row}
    encoder, limits = RecommendationEncoder(ids, bundle.version, "clicks"), ClickLimits(1 << 20, 1 << 20)
    batches = micro_batch()
    columns = [decode_clicks(records, rows, limits) for records in batches]
    users: dict[bytes, int] = {}
    user = [users.setdefault(key, len(users)) for part in columns for key in part.user]
    numbers = np.arange(CLICKS)
    clicks = Clicks(
        np.array(user, np.int32), np.array([item for part in columns for item in part.item], np.int32), numbers, numbers
    )
    stored = engine.advance(layout.unpack([None] * len(users)), clicks, numbers)[0].tobytes()
    packed = [stored[start : start + layout.dtype.itemsize] for start in range(0, len(stored), layout.dtype.itemsize)]
    states = layout.unpack(packed)
    ranking = engine.advance(states, clicks, numbers)[1]
    partition = np.repeat(np.arange(PARTITIONS), CLICKS // PARTITIONS)
    keys = [key for part in columns for key in part.user]
    lists = Lists(keys, *ranking, partition, numbers, numbers, [None] * CLICKS)
    values = encoder.encode(lists, NOW_MS)
    publisher = Publisher({"bootstrap_servers": ["localhost:9092"], "request_timeout_ms": 1_000})
    records = list(zip(keys, values, strict=True))
    changelog = list(zip(users, packed, strict=True))
    batcher = MicroBatcher(engine, rows, encoder, limits)
    by_user = dict(zip(users, packed, strict=True))

    def cost(task: Callable[[], object]) -> float:
        task()
        took = []
        for _ in range(rounds):
            began = time.thread_time()
            task()
            took.append(time.thread_time() - began)
        return round(statistics.median(took) / CLICKS * 1e6, 2)

    none = np.empty(0, np.int64)
    step = cost(lambda: engine.advance(states, clicks, none))
    found = {
        "decode": cost(lambda: [decode_clicks(records, rows, limits) for records in batches]),
        "unpack states": cost(lambda: layout.unpack(packed)),
        "step": step,
        "rank": round(cost(lambda: engine.advance(states, clicks, numbers)) - step, 2),
        "encode": cost(lambda: encoder.encode(lists, NOW_MS)),
    }
    whole = cost(lambda: micro_batch_of(batcher, batches, by_user))
    found["the rest of a micro-batch"] = round(whole - sum(found.values()), 2)
    found["record batches"] = cost(lambda: [publisher.pack_for(0, each, NOW_MS) for each in (records, changelog)])
    await publisher.stop()
    database = open_database(folder / "states", rocksdict.Cache(256 << 20))
    found["write states"] = cost(lambda: write(database, changelog))
    found["load states"] = cost(lambda: database[list(users)])
    database.close()
    return found


def write(database: rocksdict.Rdict, rows: list[tuple[bytes, bytes]]) -> None:
    """As the table does."""

    def batch() -> rocksdict.WriteBatch:
        made = rocksdict.WriteBatch(raw_mode=True)
        for key, state in rows:
            made.put(key, state)
        return made

    write_in_time(database, batch)


def micro_batch_of(batcher: MicroBatcher, batches: list[list[Record]], states: Mapping[bytes, bytes]) -> None:
    """All of one, but for what is read and written."""
    arrived = batcher.decode(batches)
    rows = [states[key] for _, keys in arrived.users for key in keys]
    _, answers = batcher.advance(arrived, batcher.unpack(rows))
    if answers is not None:
        batcher.write(answers, NOW_MS)


def micro_batch() -> list[list[Record]]:
    """One batch of records a partition."""
    rng = np.random.default_rng(0)
    batches = []
    for partition in range(PARTITIONS):
        records = []
        for offset in range(CLICKS // PARTITIONS):
            user = f"user-{rng.integers(USERS // PARTITIONS) * PARTITIONS + partition}"
            event = {"user_id": user, "item_id": f"item-{rng.integers(1, ITEMS + 1)}", "timestamp_ms": NOW_MS + offset}
            # The states know offsets below 4,096: only a click behind them is applied.
            records.append(Record("clicks", partition, CLICKS + offset, user.encode(), orjson.dumps(event)))
        batches.append(records)
    return batches


def processes(folder: Path) -> dict[str, float]:
    """Of the worker and the broker while a backlog is worked off, from its second quarter on."""
    with LocalBroker(folder / "kafka", port=0, heap_mb=1024) as broker:
        asyncio.run(backlog.produce_backlog(broker.bootstrap, BACKLOG, backlog.equal_shares(USERS), ITEMS))
        environment = backlog.worker_environment(broker.bootstrap, folder / "bundle", folder / "cost", "at_least_once")
        with backlog.worker(environment, folder / "worker.log") as process:
            pids = [process.pid, broker.process.pid if broker.process else 0]
            asyncio.run(until(broker.bootstrap, environment["STREAM_APP_RECOMMENDATIONS_TOPIC"], BACKLOG // 4))
            before = [cpu_seconds(pid) for pid in pids]
            first = asyncio.run(until(broker.bootstrap, environment["STREAM_APP_RECOMMENDATIONS_TOPIC"], 1))
            last = asyncio.run(until(broker.bootstrap, environment["STREAM_APP_RECOMMENDATIONS_TOPIC"], BACKLOG))
            after = [cpu_seconds(pid) for pid in pids]
        backlog.prove(environment)
    names = ("the whole worker, on a backlog", "the broker beside it")
    return {
        name: round((stop - start) / (last - first) * 1e6, 2)
        for name, start, stop in zip(names, before, after, strict=True)
    }


async def until(bootstrap: str, topic: str, count: int) -> int:
    """Wait for so many recommendations; how many there are then."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
    await consumer.start()
    try:
        async with asyncio.timeout(120):
            while True:
                log = [TopicPartition(topic, partition) for partition in range(PARTITIONS)]
                found = sum((await consumer.end_offsets(log)).values())
                if found >= count:
                    return int(found)
                await asyncio.sleep(0.05)
    finally:
        await consumer.stop()


if __name__ == "__main__":
    main()
