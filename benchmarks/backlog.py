"""How fast a backlog is worked off, beside the obvious program, Quix Streams, and a loop that copies.

    python -m benchmarks.backlog                     400,000 clicks of 50,000 users, 3,416 items, two rounds
    python -m benchmarks.backlog --clicks 100000 --rounds 1

All are whole processes on the same real broker and the same clicks; they take turns: the worker with each of its
guarantees, the two peers with the same model and a state (`obvious_worker`, `quix_worker`), and a loop that reads
and writes as many bytes, and computes and keeps nothing (`raw_limit`).

Counted is what a consumer could read: the growth of the recommendations topic, from its first sign of life to the end
of the backlog or of the time. The ends of transactions, which take offsets, are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import orjson
import torch
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from jaxtyping import Float64

from benchmarks.machine import processor
from lrurec.bundle import make_bundle, save_bundle
from lrurec.catalogue import Catalogue
from lrurec.config import LRURecConfig
from lrurec.model import LRURec
from stream_app.dev.kafka.broker import LocalBroker

PARTITIONS = 8
SCRIPTS = Path(sys.executable).parent

PEERS = {
    "obvious": ["benchmarks.obvious_worker", "worker"],
    "quix": ["benchmarks.quix_worker"],
    "limit": ["benchmarks.raw_limit"],
}
"""Programs that take turns with ours, by what they are called in the table."""

OWN_CHANGELOG = {"obvious": "states-changelog", "limit": "states"}
"""Which of them want it created, and how it is called."""

#: Each program may take this long for a round; the peers with a model get nowhere near the end.
ROUND_SECONDS = 40.0


def main() -> None:
    """Measure and print a table, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backlog", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clicks", type=int, default=400_000)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--items", type=int, default=3_416)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(Path(folder), options.clicks, options.users, options.items, options.rounds)
    report(rates, vars(options))


def measure(folder: Path, clicks: int, users: int, items: int, rounds: int) -> dict[str, list[float]]:
    """Clicks a second of each program, one figure a round."""
    bundle = folder / "bundle"
    write_bundle(bundle, items)
    guarantees = {"stream-app": "at_least_once", "exactly once": "exactly_once"}
    rates: dict[str, list[float]] = {name: [] for name in (*guarantees, *PEERS)}
    with LocalBroker(folder / "kafka", port=0, heap_mb=1024) as broker:
        asyncio.run(produce_backlog(broker.bootstrap, clicks, equal_shares(users), items))
        for number in range(rounds):
            for name, guarantee in guarantees.items():
                place = folder / f"{guarantee}-{number}"
                rates[name].append(run_ours(broker.bootstrap, bundle, place, clicks, guarantee))
            for name in PEERS:
                rates[name].append(run_peer(name, broker.bootstrap, bundle, folder, number, clicks))
            print(f"round {number + 1}: " + ", ".join(f"{name} {each[-1]:,.0f}/s" for name, each in rates.items()))
    return rates


def report(rates: Mapping[str, list[float]], options: Mapping[str, int]) -> None:
    """Medians, spread, ratio; machine and versions."""
    ratios = {
        f"{one} / {other}": [own / theirs for own, theirs in zip(rates[one], rates[other], strict=True)]
        for one, other in (
            ("stream-app", "obvious"), ("stream-app", "quix"), ("stream-app", "limit"), ("exactly once", "stream-app"),
        )
    }  # fmt: skip
    versions = {
        name: version(name) for name in ("faust-streaming", "aiokafka", "quixstreams", "rocksdict", "torch", "numba")
    }
    print(f"\n{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    print(f"{options}")
    for name, each in {**rates, **ratios}.items():
        print(f"{name:>26}: median {statistics.median(each):>10,.2f}   min {min(each):,.2f}   max {max(each):,.2f}")
    medians = {name: statistics.median(each) for name, each in ratios.items()}
    print(json.dumps({"benchmark": "backlog", **options, "clicks_per_second": rates, **medians}))


def write_bundle(folder: Path, items: int) -> None:
    """A model of the paper's size with random weights; speed does not depend on their values."""
    torch.manual_seed(0)
    config = LRURecConfig(num_items=items)
    catalogue = Catalogue([f"item-{row}" for row in range(1, items + 1)])
    save_bundle(folder, make_bundle(config, LRURec(config).state_dict(), catalogue))


async def produce_backlog(
    bootstrap: str, clicks: int, users: Float64[np.ndarray, " users"], items: int, partitions: int = PARTITIONS
) -> None:
    """Write the clicks, of users by their share and of any item, and wait until all are in the log."""
    await create_topics(bootstrap, {"clicks": "delete"}, partitions)
    rng = np.random.default_rng(0)
    rows = zip(
        rng.choice(len(users), clicks, p=users).tolist(), rng.integers(1, items + 1, clicks).tolist(), strict=True
    )
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", linger_ms=20, max_batch_size=500_000)
    await producer.start()
    try:
        for number, (user, item) in enumerate(rows):
            event = {"user_id": f"user-{user}", "item_id": f"item-{item}", "timestamp_ms": 1_700_000_000_000 + number}
            await producer.send("clicks", key=event["user_id"].encode(), value=orjson.dumps(event))  # type: ignore[attr-defined]
        await producer.flush()
    finally:
        await producer.stop()


def equal_shares(users: int) -> Float64[np.ndarray, " users"]:
    """Of every user's clicks."""
    return np.full(users, 1 / users)


async def create_topics(bootstrap: str, policies: Mapping[str, str], partitions: int = PARTITIONS) -> None:
    """Create topics with these cleanup policies."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        topics = [
            NewTopic(name, partitions, 1, topic_configs={"cleanup.policy": policy}) for name, policy in policies.items()
        ]
        await admin.create_topics(topics)
    finally:
        await admin.close()


def run_ours(bootstrap: str, bundle: Path, folder: Path, clicks: int, guarantee: str) -> float:
    """`stream-app worker` with its default settings but for the guarantee, with its states in this folder."""
    environment = worker_environment(bootstrap, bundle, folder, guarantee)
    with worker(environment, folder.with_suffix(".log")):
        rate = asyncio.run(rate_of(bootstrap, environment["STREAM_APP_RECOMMENDATIONS_TOPIC"], clicks))
    prove(environment)
    return rate


def worker_environment(bootstrap: str, bundle: Path, folder: Path, guarantee: str, **others: str) -> dict[str, str]:
    """Of a worker whose topics and states are called as the folder."""
    name = folder.name
    settings = {
        "BROKER": bootstrap,
        "MODEL": str(bundle),
        "APP_ID": name,
        "RECOMMENDATIONS_TOPIC": f"{name}-recommendations",
        "DEAD_LETTER_TOPIC": f"{name}-dead-letter",
        "STATE_DIR": str(folder),
        "GUARANTEE": guarantee,
        "WEB_PORT": "0",
        **others,
    }
    return os.environ | {f"STREAM_APP_{key}": text for key, text in settings.items()}


@contextmanager
def worker(
    environment: Mapping[str, str], log: Path, *, asked_to_end: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """`stream-app worker`, and its topics before it; at the end it is killed unless it is asked to end."""
    subprocess.run([SCRIPTS / "stream-app", "topics"], env=environment, check=True, capture_output=True, timeout=60)
    with running([str(SCRIPTS / "stream-app"), "worker"], environment, log) as process:
        yield process
        if asked_to_end:
            process.terminate()
            if process.wait(60):
                sys.exit(f"the worker did not end well; the end of its log:\n{log.read_text()[-2000:]}")


def free_port() -> int:
    """A port for the worker's /metrics."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def durable_clicks(port: int) -> int:
    """Clicks that have become durable, as the worker's own /metrics says; 0 before it answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return 0
    return next(
        int(float(line.split()[1])) for line in text.splitlines() if line.startswith("stream_app_clicks_applied_total ")
    )


def prove(environment: Mapping[str, str]) -> None:
    """End here unless `stream-app verify` finds every state and list right: a wrong result has no speed."""
    began = time.monotonic()
    done = subprocess.run(
        [SCRIPTS / "stream-app", "verify"],
        env=environment,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=600,
    )
    if done.returncode != 0:
        sys.exit(f"stream-app verify finds the result wrong:\n{done.stdout}")
    print(f"verified in {time.monotonic() - began:.0f} s: {done.stdout.splitlines()[0]}")


def run_peer(peer: str, bootstrap: str, bundle: Path, folder: Path, number: int, clicks: int) -> float:
    """One of `PEERS`."""
    name = f"{peer}-{number}"
    topics = {f"{name}-recommendations": "compact"}
    if peer in OWN_CHANGELOG:
        topics[f"{name}-{OWN_CHANGELOG[peer]}"] = "compact"
    asyncio.run(create_topics(bootstrap, topics))
    settings = {
        "NAME": name,
        "BROKER": bootstrap,
        "BUNDLE": str(bundle),
        "PARTITIONS": str(PARTITIONS),
        "DATADIR": str(folder / name),
    }
    environment = os.environ | {f"PEER_{key}": text for key, text in settings.items()}
    with running([sys.executable, "-m", *PEERS[peer]], environment, folder / f"{name}.log"):
        return asyncio.run(rate_of(bootstrap, f"{name}-recommendations", clicks))


@contextmanager
def running(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the length of a block, ended by its own id."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        yield process
    except TimeoutError:
        sys.exit(f"{command[-2:]} never wrote a recommendation; the end of its log:\n{log.read_text()[-2000:]}")
    finally:
        process.kill()
        process.wait(10)


async def rate_of(bootstrap: str, topic: str, clicks: int, partitions: int = PARTITIONS) -> float:
    """Recommendations a second, from the first sight of any to the last of them or the end of the round."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, isolation_level="read_committed")
    await consumer.start()
    log = [TopicPartition(topic, partition) for partition in range(partitions)]
    try:
        points: list[tuple[float, int]] = []
        give_up = time.monotonic() + 60
        while not points or (points[-1][1] < clicks and points[-1][0] < points[0][0] + ROUND_SECONDS):
            count = sum((await consumer.end_offsets(log)).values())
            if count and (not points or count > points[-1][1]):
                points.append((time.monotonic(), count))
            if not points and time.monotonic() > give_up:
                raise TimeoutError
            if points and time.monotonic() > points[0][0] + ROUND_SECONDS:
                break
            await asyncio.sleep(0.05)
    finally:
        await consumer.stop()
    (start, first), (stop, last) = points[0], points[-1]
    # At the end of the backlog there is one for each click: what goes beyond is ends of transactions.
    return (last - first) / (stop - start) * min(1, clicks / last)


if __name__ == "__main__":
    main()
