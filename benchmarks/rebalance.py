"""How long partitions stand still when workers come, go, restart and die, with standbys and lasting names or without.

    python -m benchmarks.rebalance                   200,000 states, three rounds
    python -m benchmarks.rebalance --states 20000 --rounds 1

Two workers share eight partitions under a steady stream of clicks on a real broker; a third one may come. Measured is
the longest time between two recommendations of one partition, as a consumer sees them, from the event until everything
flows again: for the partition that stood still longest, and for the one that did so least.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from benchmarks.backlog import PARTITIONS, SCRIPTS, write_bundle
from benchmarks.machine import machine
from benchmarks.recovery import ITEMS, fill_changelog, json_lines
from stream_app.dev.kafka.broker import LocalBroker
from stream_app.settings import Settings

CLICKS_A_SECOND = 800
SESSION_SECONDS = 6
_QUIET_SECONDS = 1.0
"""No partition may have stood still for longer than this, for so long, before an event and after it."""
_DEADLINE_SECONDS = 120.0


class Worker:
    """`stream-app worker` with a disk of its own."""

    def __init__(self, folder: Path, name: str, environment: Mapping[str, str]) -> None:
        self._disk, self._log = folder / name, folder / f"{name}.log"
        self._environment = os.environ | environment | {"STREAM_APP_STATE_DIR": str(self._disk)}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [SCRIPTS / "stream-app", "worker"], env=self._environment, stdout=log, stderr=log
            )

    def held(self) -> list[int]:
        """The partitions that its last line since the start names; none before it is ready."""
        lines = json_lines(self._log)
        since = max(place for place, line in enumerate(lines) if line["event"] == "starting") if lines else 0
        return next((line["partitions"] for line in reversed(lines[since:]) if line["event"] == "ready"), [])

    async def end(self, number: int = signal.SIGTERM) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            await asyncio.to_thread(self._process.wait, 60)

    def lose_disk(self) -> None:
        shutil.rmtree(self._disk, ignore_errors=True)


class Flow:
    """A steady stream of clicks, and when recommendations of each partition were seen."""

    def __init__(self, bootstrap: str) -> None:
        self._bootstrap = bootstrap
        self._last = [time.monotonic()] * PARTITIONS
        self._longest = [0.0] * PARTITIONS

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._produce()), asyncio.create_task(self._consume())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def settle(self) -> None:
        """Until every partition has flowed for a while.

        Raises:
            TimeoutError: one does not.
        """
        async with asyncio.timeout(_DEADLINE_SECONDS):
            flows_since = time.monotonic()
            while time.monotonic() < flows_since + 3 * _QUIET_SECONDS:
                if time.monotonic() - min(self._last) > _QUIET_SECONDS:
                    flows_since = time.monotonic()
                await asyncio.sleep(0.01)

    async def longest_pauses(self, event: Callable[[], Awaitable[None]]) -> list[float]:
        """Seconds that each partition stood still through an event."""
        await self.settle()
        self._longest = [0.0] * PARTITIONS
        await event()
        await self.settle()
        return self._longest

    async def _produce(self) -> None:
        async with AIOKafkaProducer(bootstrap_servers=self._bootstrap) as producer:
            began = time.monotonic()
            for number in itertools.count():
                user, item = f"live-{number % 997}", f"item-{number % ITEMS + 1}"
                click = {"user_id": user, "item_id": item, "timestamp_ms": 1_700_000_000_000 + number}
                await producer.send("clicks", key=user.encode(), value=orjson.dumps(click))
                await asyncio.sleep(max(0.0, began + number / CLICKS_A_SECOND - time.monotonic()))

    async def _consume(self) -> None:
        async with AIOKafkaConsumer("recommendations", bootstrap_servers=self._bootstrap) as consumer:
            async for record in consumer:
                partition, now = orjson.loads(record.value)["source"]["partition"], time.monotonic()
                self._longest[partition] = max(self._longest[partition], now - self._last[partition])
                self._last[partition] = now


class Scenario(NamedTuple):
    """What happens to the first of two workers, and how they are set up."""

    name: str
    settings: Mapping[str, str]
    event: Callable[[list[Worker]], Awaitable[None]]


async def join(workers: list[Worker]) -> None:
    workers[2].start()
    await until(lambda: bool(workers[2].held()))


async def leave(workers: list[Worker]) -> None:
    await workers[0].end()
    await until(lambda: len(workers[1].held()) == PARTITIONS)


async def restart(workers: list[Worker]) -> None:
    held = workers[0].held()
    await workers[0].end()
    workers[0].start()
    await asyncio.sleep(0.5)  # its last line is of the time before
    await until(lambda: len(workers[0].held()) == len(held))


async def die(workers: list[Worker]) -> None:
    await workers[0].end(signal.SIGKILL)
    await until(lambda: len(workers[1].held()) == PARTITIONS)


NAMED, STANDBY = {"GROUP_INSTANCE_ID": "{}"}, {"STANDBY_REPLICAS": "1"}
SCENARIOS = [
    Scenario("a third worker joins", {}, join),
    Scenario("a worker leaves", {}, leave),
    Scenario("a worker leaves, standbys", STANDBY, leave),
    Scenario("a worker restarts", {}, restart),
    Scenario("a worker restarts, names", NAMED, restart),
    Scenario("a worker is killed", {}, die),
    Scenario("a worker is killed, standbys", STANDBY, die),
]


def main() -> None:
    """Measure and print a table, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rebalance", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--states", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pauses: dict[str, list[list[float]]] = {scenario.name: [] for scenario in SCENARIOS}
    with tempfile.TemporaryDirectory() as folder, LocalBroker(Path(folder) / "kafka", port=0, heap_mb=1024) as broker:
        environment = prepare(Path(folder), broker.bootstrap, options.states)
        for number in range(options.rounds):
            for place, scenario in enumerate(SCENARIOS):
                (Path(folder) / f"{number}-{place}").mkdir()
                found = asyncio.run(pauses_of(scenario, Path(folder) / f"{number}-{place}", environment))
                pauses[scenario.name].append(found)
                print(
                    f"round {number + 1}, {scenario.name}: {max(found):.2f} s, the least {min(found):.2f} s", flush=True
                )
    report(pauses, vars(options))


def prepare(folder: Path, bootstrap: str, states: int) -> dict[str, str]:
    """A model, topics, and a changelog with states of users who click no more; the workers' environment."""
    write_bundle(folder / "bundle", ITEMS)
    environment = {
        "STREAM_APP_BROKER": bootstrap,
        "STREAM_APP_MODEL": str(folder / "bundle"),
        "STREAM_APP_WEB_PORT": "0",
        "STREAM_APP_SESSION_TIMEOUT_SECONDS": str(SESSION_SECONDS),
    }
    topics = [SCRIPTS / "stream-app", "topics"]
    subprocess.run(topics, env=os.environ | environment, check=True, capture_output=True, timeout=60)
    asyncio.run(fill_changelog(Settings.from_environment(environment), states))
    return environment


async def pauses_of(scenario: Scenario, folder: Path, environment: Mapping[str, str]) -> list[float]:
    """Seconds that each partition stood still; the workers begin with empty disks and end in order."""
    workers = []
    for name in ("first", "second", "third"):
        settings = {f"STREAM_APP_{key}": value.format(name) for key, value in scenario.settings.items()}
        workers.append(Worker(folder, name, {**environment, **settings}))
    flow = Flow(environment["STREAM_APP_BROKER"])
    try:
        async with flow.running():
            for worker in workers[:2]:
                worker.start()
            await until(lambda: sorted(workers[0].held() + workers[1].held()) == list(range(PARTITIONS)))
            await flow.settle()
            await asyncio.sleep(5)  # for standbys to catch up
            return await flow.longest_pauses(lambda: scenario.event(workers))
    except TimeoutError:
        sys.exit(f"{scenario.name}: the clicks did not flow; see the logs in {folder}")
    finally:
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await worker.end(signal.SIGKILL)
        await asyncio.sleep(SESSION_SECONDS + 1)  # the next workers shall not wait for these
        for worker in workers:
            worker.lose_disk()


async def until(condition: Callable[[], bool]) -> None:
    """Wait.

    Raises:
        TimeoutError: it did not come true.
    """
    async with asyncio.timeout(_DEADLINE_SECONDS):
        while True:
            if condition():
                return
            await asyncio.sleep(0.1)


def report(pauses: Mapping[str, list[list[float]]], options: Mapping[str, Any]) -> None:
    """Medians and spread of the longest and the least pause; machine and versions."""
    print(f"\n{machine('faust-streaming', 'aiokafka', 'rocksdict')}\n{options}, session timeout {SESSION_SECONDS} s")
    for name, rounds in pauses.items():
        most, least = ([pick(each) for each in rounds] for pick in (max, min))
        print(
            f"{name:>30}: {statistics.median(most):6.2f} s ({min(most):.2f} to {max(most):.2f}) where it was longest, "
            f"{statistics.median(least):.2f} s where it was least"
        )
    print(json.dumps({"benchmark": "rebalance", **options, "pauses": pauses}))


if __name__ == "__main__":
    main()
