"""What a click costs by how many users there are, and the memory that the worker takes for them.

    python -m benchmarks.users                        ten thousand and a million users, 64 partitions, three rounds
    python -m benchmarks.users --users 1000 100000 --partitions 8 --rounds 1

Every user clicks once, which fills the worker's databases. Then they take turns, smallest first: a worker starts with
its databases, and clicks of users drawn evenly from all of them come as a backlog. Counted is the worker's CPU time
from a fifth of that backlog to its end, and the time that passes, which reads from the disk would add to; the memory is
the most that the worker ever had. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from benchmarks import backlog
from benchmarks.machine import cpu_seconds, machine, resident_mb
from stream_app.dev.kafka.broker import LocalBroker
from stream_app.micro_batch import KeyValue
from stream_app.publisher import Publisher, acknowledged
from stream_app.settings import Settings

ITEMS = 3_416
CHUNK = 10_000
PATIENCE_SECONDS = 600.0


class Cost(NamedTuple):
    """Of a click."""

    cpu_us: float
    us: float


class Worker(NamedTuple):
    """What works for one number of users."""

    users: int
    environment: Mapping[str, str]
    port: int
    log: Path


def main() -> None:
    """Print a line a round, a table, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.users", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--users", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--partitions", type=int, default=64)
    parser.add_argument("--clicks", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{machine('faust-streaming', 'aiokafka', 'rocksdict')}\n{vars(options)}")
    with tempfile.TemporaryDirectory() as folder:
        costs, most_mb = measure(Path(folder), options.users, options.partitions, options.clicks, options.rounds)
    for users, rounds in costs.items():
        columns = {"CPU µs": [each.cpu_us for each in rounds], "µs": [each.us for each in rounds]}
        line = "   ".join(
            f"{statistics.median(each):6.1f} {name} a click ({min(each):.1f} to {max(each):.1f})"
            for name, each in columns.items()
        )
        print(f"{users:>10,} users: {line}   most memory {most_mb[users]:,.0f} MB")
    few, many = min(costs), max(costs)
    ratios = [
        [own / base for own, base in zip(*pair, strict=True)] for pair in zip(costs[many], costs[few], strict=True)
    ]
    for name, each in zip(("CPU time", "time"), zip(*ratios, strict=True), strict=True):
        print(f"{many:,} against {few:,}, {name}: {statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})")
    print(json.dumps({"benchmark": "users", **vars(options), "costs": costs, "most_mb": most_mb}))


def measure(
    folder: Path, sizes: list[int], partitions: int, clicks: int, rounds: int
) -> tuple[dict[int, list[Cost]], dict[int, float]]:
    """The costs of every round, and the most memory, by number of users."""
    bundle = folder / "bundle"
    backlog.write_bundle(bundle, ITEMS)
    costs: dict[int, list[Cost]] = {users: [] for users in sizes}
    most_mb = dict.fromkeys(sizes, 0.0)
    with LocalBroker(folder / "kafka", port=0, heap_mb=1024) as broker:
        workers = []
        for users in sizes:
            port = backlog.free_port()
            environment = backlog.worker_environment(
                broker.bootstrap, bundle, folder / f"users-{users}", "at_least_once",
                CLICKS_TOPIC=f"clicks-{users}", PARTITIONS=str(partitions), WEB_PORT=str(port),
            )  # fmt: skip
            asyncio.run(backlog.create_topics(broker.bootstrap, {f"clicks-{users}": "delete"}, partitions))
            workers.append(Worker(users, environment, port, folder / f"users-{users}.log"))
        for worker in workers:
            asyncio.run(produce(worker, np.arange(worker.users)))
            with running(worker, most_mb):
                wait_for(worker, worker.users)
        for number in range(rounds):
            for worker in workers:
                drawn = np.random.default_rng(number).integers(0, worker.users, clicks)
                asyncio.run(produce(worker, drawn))
                with running(worker, most_mb) as process:
                    costs[worker.users].append(cost_of(worker, process, clicks))
            print(
                f"round {number + 1}: "
                + ", ".join(
                    f"{u:,} users {c[-1].cpu_us:.1f} CPU µs, {c[-1].us:.1f} µs a click" for u, c in costs.items()
                )
            )
        for worker in workers:
            backlog.prove(worker.environment)
    return costs, most_mb


async def produce(worker: Worker, users: Int64[np.ndarray, " n"]) -> None:
    """A click of each of these users, in this order, on items by chance."""
    topic = worker.environment["STREAM_APP_CLICKS_TOPIC"]
    items = np.random.default_rng(len(users)).integers(1, ITEMS + 1, len(users)).tolist()
    publisher = Publisher(Settings(broker=worker.environment["STREAM_APP_BROKER"]).kafka_client())
    await publisher.start([topic])
    try:
        for first in range(0, len(users), CHUNK):
            some = zip(users[first : first + CHUNK].tolist(), items[first : first + CHUNK], strict=True)
            batches = publisher.pack(topic, [_click(user, item) for user, item in some], time.time_ns() // 1_000_000)
            await acknowledged(await publisher.send(topic, batches), topic, 60)
    finally:
        await publisher.stop()


def _click(user: int, item: int) -> KeyValue:
    value = b'{"user_id":"user-%d","item_id":"item-%d","timestamp_ms":1700000000000}' % (user, item)
    return KeyValue(b"user-%d" % user, value)


@contextmanager
def running(worker: Worker, most_mb: dict[int, float]) -> Iterator[int]:
    """The worker's process for the length of a block, and the most memory it had."""
    with backlog.worker(worker.environment, worker.log, asked_to_end=True) as process:
        yield process.pid
        most_mb[worker.users] = max(most_mb[worker.users], resident_mb(process.pid, "VmHWM"))


def cost_of(worker: Worker, process: int, clicks: int) -> Cost:
    """From a fifth of the backlog to its end."""
    first = wait_for(worker, clicks // 5)
    cpu, began = cpu_seconds(process), time.monotonic()
    last = wait_for(worker, clicks)
    counted = last - first
    return Cost((cpu_seconds(process) - cpu) / counted * 1e6, (time.monotonic() - began) / counted * 1e6)


def wait_for(worker: Worker, clicks: int) -> int:
    """Wait until this process of the worker has applied so many clicks durably; how many it has."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (done := backlog.durable_clicks(worker.port)) < clicks:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{done:,} of {clicks:,} clicks after {PATIENCE_SECONDS:g} s")
        time.sleep(0.05)
    return done


if __name__ == "__main__":
    main()
