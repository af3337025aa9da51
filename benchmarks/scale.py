"""What a click costs by how many users, partitions and workers there are, and the memory that a worker takes.

    python -m benchmarks.scale                                    seven cases, three rounds
    python -m benchmarks.scale 10000x64x1 1000000x64x1 --rounds 5     users x partitions x workers

Every user clicks once, which fills the databases of a case. Then the cases take turns: workers start with their
databases, and clicks of users drawn evenly from all of them come as a backlog. Counted is the CPU time of all workers
from a fifth of that backlog on, when all of them are ready, to its end, and the time that passes, which reads from the
disk would add to; the memory is the most that one worker ever had. A ratio is of one round. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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


class Case(NamedTuple):
    users: int
    partitions: int
    workers: int

    def __str__(self) -> str:
        return f"{self.users}x{self.partitions}x{self.workers}"

    @classmethod
    def of(cls, text: str) -> Case:
        users, partitions, workers = map(int, text.split("x"))
        return cls(users, partitions, workers)


CASES = [
    Case(1_000, 8, 1), Case(50_000, 8, 1), Case(50_000, 1, 1), Case(50_000, 64, 1), Case(50_000, 8, 2),
    Case(10_000, 64, 1), Case(1_000_000, 64, 1),
]  # fmt: skip


class Cost(NamedTuple):
    """Of a click."""

    cpu_us: float
    us: float


class Worker(NamedTuple):
    """One of a case, whenever it runs."""

    environment: Mapping[str, str]
    port: int
    log: Path


def main() -> None:
    """Print a line a round, a table, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", type=Case.of, default=CASES, metavar="USERSxPARTITIONSxWORKERS")
    parser.add_argument("--clicks", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.ERROR)  # a warning for each partition of a new topic, retried
    print(f"{machine('faust-streaming', 'aiokafka', 'rocksdict')}\n{options.clicks} clicks, {options.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        costs, most_mb = measure(Path(folder), options.cases, options.clicks, options.rounds)
    base = options.cases[0]
    for case, rounds in costs.items():
        columns = {"CPU µs": [each.cpu_us for each in rounds], "µs": [each.us for each in rounds]}
        line = "   ".join(f"{_spread(each)} {name} a click" for name, each in columns.items())
        ratios = [own.cpu_us / other.cpu_us for own, other in zip(rounds, costs[base], strict=True)]
        print(
            f"{case.users:>9,} users, {case.partitions:>2} partitions, {case.workers} workers: {line}   "
            f"CPU time against {base}: {statistics.median(ratios):.2f}   most memory {most_mb[case]:,.0f} MB"
        )
    history = {str(case): {"costs": costs[case], "most_mb": most_mb[case]} for case in costs}
    print(json.dumps({"benchmark": "scale", "clicks": options.clicks, "cases": history}))


def _spread(each: Sequence[float]) -> str:
    return f"{statistics.median(each):6.1f} ({min(each):.1f} to {max(each):.1f})"


def measure(
    folder: Path, cases: Sequence[Case], clicks: int, rounds: int
) -> tuple[dict[Case, list[Cost]], dict[Case, float]]:
    """The costs of every round, and the most memory of a worker, by case."""
    bundle = folder / "bundle"
    backlog.write_bundle(bundle, ITEMS)
    costs: dict[Case, list[Cost]] = {case: [] for case in cases}
    most_mb = dict.fromkeys(cases, 0.0)
    with LocalBroker(folder / "kafka", port=0, heap_mb=1024) as broker:
        workers = {case: workers_of(case, broker.bootstrap, bundle, folder) for case in cases}
        for case in cases:
            topic = workers[case][0].environment["STREAM_APP_CLICKS_TOPIC"]
            asyncio.run(backlog.create_topics(broker.bootstrap, {topic: "delete"}, case.partitions))
            asyncio.run(produce(broker.bootstrap, topic, np.arange(case.users)))
            with running(workers[case], case, most_mb):
                wait_for(workers[case], case.users)
        for number in range(rounds):
            for case in cases:
                drawn = np.random.default_rng(number).integers(0, case.users, clicks)
                topic = workers[case][0].environment["STREAM_APP_CLICKS_TOPIC"]
                asyncio.run(produce(broker.bootstrap, topic, drawn))
                with running(workers[case], case, most_mb) as processes:
                    costs[case].append(cost_of(workers[case], processes, clicks))
            line = ", ".join(f"{case} {of_case[-1].cpu_us:.1f} CPU µs" for case, of_case in costs.items())
            print(f"round {number + 1}: {line}", flush=True)
        for case in cases:
            backlog.prove(workers[case][0].environment)
    return costs, most_mb


def workers_of(case: Case, bootstrap: str, bundle: Path, folder: Path) -> list[Worker]:
    """What its workers are started with: each has a folder of states and a port of its own."""
    found = []
    for number in range(case.workers):
        place, port = folder / f"{case}-{number}", backlog.free_port()
        environment = backlog.worker_environment(
            bootstrap, bundle, folder / str(case), "at_least_once", CLICKS_TOPIC=f"clicks-{case}",
            PARTITIONS=str(case.partitions), WEB_PORT=str(port), STATE_DIR=str(place),
        )  # fmt: skip
        found.append(Worker(environment, port, place.with_suffix(".log")))
    return found


async def produce(bootstrap: str, topic: str, users: Int64[np.ndarray, " n"]) -> None:
    """A click of each of these users, in this order, on items by chance."""
    items = np.random.default_rng(len(users)).integers(1, ITEMS + 1, len(users)).tolist()
    publisher = Publisher(Settings(broker=bootstrap).kafka_client())
    await publisher.start([topic])
    try:
        for first in range(0, len(users), CHUNK):
            some = zip(users[first : first + CHUNK].tolist(), items[first : first + CHUNK], strict=True)
            batches = publisher.pack(topic, [_click(user, item) for user, item in some], time.time_ns() // 1_000_000)
            await acknowledged([publisher.send(topic, batches)], topic, 60)
    finally:
        await publisher.stop()


def _click(user: int, item: int) -> KeyValue:
    value = b'{"user_id":"user-%d","item_id":"item-%d","timestamp_ms":1700000000000}' % (user, item)
    return (b"user-%d" % user, value)


@contextmanager
def running(workers: Sequence[Worker], case: Case, most_mb: dict[Case, float]) -> Iterator[list[int]]:
    """The workers' processes for the length of a block, and the most memory that one of them had."""
    with ExitStack() as stack:
        processes = [
            stack.enter_context(backlog.worker(each.environment, each.log, asked_to_end=True)).pid for each in workers
        ]
        yield processes
        most_mb[case] = max(most_mb[case], *(resident_mb(process, "VmHWM") for process in processes))


def cost_of(workers: Sequence[Worker], processes: Sequence[int], clicks: int) -> Cost:
    """From a fifth of the backlog, or when all workers are ready, to its end."""
    wait_until_ready(workers)
    first = wait_for(workers, clicks // 5)
    cpu, began = sum(map(cpu_seconds, processes)), time.monotonic()
    last = wait_for(workers, clicks)
    counted = last - first
    spent = sum(map(cpu_seconds, processes)) - cpu
    return Cost(spent / counted * 1e6, (time.monotonic() - began) / counted * 1e6)


def wait_until_ready(workers: Sequence[Worker]) -> None:
    """Wait until all of them have partitions and their states."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not all(is_ready(worker.port) for worker in workers):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {len(workers)} workers are ready after {PATIENCE_SECONDS:g} s")
        time.sleep(0.05)


def is_ready(port: int) -> bool:
    """What the worker's own /ready says; not before it answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_for(workers: Sequence[Worker], clicks: int) -> int:
    """Wait until these processes have applied so many clicks durably; how many they have."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (done := sum(backlog.durable_clicks(worker.port) for worker in workers)) < clicks:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{done:,} of {clicks:,} clicks after {PATIENCE_SECONDS:g} s")
        time.sleep(0.05)
    return done


if __name__ == "__main__":
    main()
