"""How long a partition makes no progress when workers come, go, die and restart, beside a Faust program's defaults.

    python -m benchmarks.rebalance                 three rounds of each program, half an hour
    python -m benchmarks.rebalance --rounds 1

Two workers under a steady load of clicks share 8 partitions. Counted is what a consumer sees: for each partition the
longest time in which its recommendations did not grow, from the event until clicks flow again. The programs are
`stream-app worker` with its default settings, the same with STREAM_APP_INSTANCE_ID and one standby replica, and
`benchmarks.obvious_worker`: Faust with its own defaults (a session of 60 seconds, no static membership). Starting a
process counts where the event is a restart: Python, torch and the model take seconds of it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError

from benchmarks.backlog import PARTITIONS, SCRIPTS, create_topics, write_bundle
from benchmarks.machine import processor
from stream_app.dev.kafka.broker import LocalBroker

ITEMS = 3_416
USERS = 5_000
CLICKS_PER_SECOND = 100

#: Every partition has to grow for so long, without a pause of half of it, for an event to be over.
CALM_SECONDS = 4.0

#: A start may take so long beside whatever else runs on the machine.
START_SECONDS = 180.0


@dataclass(frozen=True)
class Program:
    """What is measured, and how to start one worker of it."""

    name: str
    session_seconds: float
    command: tuple[str, ...]
    variables: Callable[[str, str, Path, Path], dict[str, str]]
    """(broker, worker, bundle, folder) → its environment"""


def _ours(**more: str) -> Callable[[str, str, Path, Path], dict[str, str]]:
    def variables(broker: str, worker: str, bundle: Path, folder: Path) -> dict[str, str]:
        settings = {"BROKER": broker, "MODEL": str(bundle), "APP_ID": "measured", "WEB_PORT": "0"}
        settings |= {"RECOMMENDATIONS_TOPIC": "measured-recommendations", "STATE_DIR": str(folder / worker)}
        settings |= {name: text.format(worker=worker) for name, text in more.items()}
        return {f"STREAM_APP_{name}": text for name, text in settings.items()}

    return variables


def _obvious(broker: str, worker: str, bundle: Path, folder: Path) -> dict[str, str]:
    settings = {"NAME": "measured", "BROKER": broker, "BUNDLE": str(bundle), "PARTITIONS": str(PARTITIONS)}
    return {f"OBVIOUS_{name}": text for name, text in {**settings, "DATADIR": str(folder / worker)}.items()}


WORKER = (str(SCRIPTS / "stream-app"), "worker")
PROGRAMS = (
    Program("stream-app, defaults", 30, WORKER, _ours()),
    Program("stream-app, static, 1 standby", 30, WORKER, _ours(INSTANCE_ID="{worker}", STANDBY_REPLICAS="1")),
    Program("Faust's defaults", 60, (sys.executable, "-m", "benchmarks.obvious_worker", "worker"), _obvious),
)


def main() -> None:
    """Measure and print a table, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rebalance", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    stalls: dict[str, dict[str, list[float]]] = {program.name: {} for program in PROGRAMS}
    for number, program in itertools.product(range(rounds), PROGRAMS):
        with tempfile.TemporaryDirectory() as folder:
            for event, seconds in asyncio.run(measure(program, Path(folder))).items():
                stalls[program.name].setdefault(event, []).extend(seconds)
                middle, longest = statistics.median(seconds), max(seconds)
                print(
                    f"round {number + 1}, {program.name}, {event}: {middle:.1f} s (at most {longest:.1f})", flush=True
                )
    report(stalls)


def report(stalls: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Medians and spread over partitions and rounds."""
    print(f"\n{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("seconds without progress of a partition: median (shortest to longest)")
    for name, events in stalls.items():
        for event, seconds in events.items():
            print(
                f"{name:>30} {event:>24}: {statistics.median(seconds):5.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
            )
    print(json.dumps({"benchmark": "rebalance", "seconds": stalls}))


class Watch:
    """When each partition of the recommendations was seen to grow."""

    def __init__(self) -> None:
        self._growths: list[list[float]] = [[] for _ in range(PARTITIONS)]

    async def look(self, bootstrap: str) -> None:
        """Until cancelled."""
        partitions = [TopicPartition("measured-recommendations", partition) for partition in range(PARTITIONS)]
        consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
        await consumer.start()
        try:
            before: Mapping[TopicPartition, int] = dict.fromkeys(partitions, 0)
            while True:
                ends = await consumer.end_offsets(partitions)
                now = time.monotonic()
                for partition, growths in zip(partitions, self._growths, strict=True):
                    if ends[partition] > before[partition]:
                        growths.append(now)
                before = ends
                await asyncio.sleep(0.02)
        finally:
            await consumer.stop()

    async def calm(self, begin: float) -> None:
        """Wait until, since `begin`, every partition has grown without a pause for a while."""
        while True:
            since = max(begin, time.monotonic() - CALM_SECONDS)
            if time.monotonic() - begin > CALM_SECONDS and all(
                pause < CALM_SECONDS / 2 for pause in self.pauses(since)
            ):
                return
            await asyncio.sleep(0.1)

    def pauses(self, begin: float) -> list[float]:
        """Each partition's longest time without growth from then to now."""
        now = time.monotonic()
        times = [[begin, *(at for at in growths if at > begin), now] for growths in self._growths]
        return [max(later - at for at, later in itertools.pairwise(each)) for each in times]


async def click(bootstrap: str) -> None:
    """A steady load on every partition, until cancelled."""
    rng = np.random.default_rng(0)
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, linger_ms=5) as producer:
        began = time.monotonic()
        for number in itertools.count():
            user, item = int(rng.integers(USERS)), int(rng.integers(1, ITEMS + 1))
            event = {"user_id": f"user-{user}", "item_id": f"item-{item}", "timestamp_ms": number}
            await producer.send("clicks", key=event["user_id"].encode(), value=orjson.dumps(event))  # type: ignore[attr-defined]
            await asyncio.sleep(max(0.0, began + number / CLICKS_PER_SECOND - time.monotonic()))


@asynccontextmanager
async def going_on(*coroutines: asyncio.Future[None]) -> AsyncIterator[None]:
    """These run for the length of the block; their failure is not hidden."""
    try:
        yield
    finally:
        for task in coroutines:
            task.cancel()
        for task in coroutines:
            with suppress(asyncio.CancelledError):
                await task


class Group:
    """The consumer group, as Kafka sees it."""

    def __init__(self, admin: AIOKafkaAdminClient) -> None:
        self._admin = admin

    async def has(self, members: int) -> None:
        """Wait until it is stable with so many members."""
        while True:
            with suppress(GroupCoordinatorNotAvailableError):  # Kafka makes its topic of groups when first asked
                [answer] = await self._admin.describe_consumer_groups(["measured"])
                _, _, state, _, _, found, *_ = answer.groups[0]
                if state == "Stable" and len(found) == members:
                    return
            await asyncio.sleep(0.2)


class Workers:
    """Processes of one program, by name, ended by their own ids."""

    def __init__(self, program: Program, broker: str, bundle: Path, folder: Path) -> None:
        self._program = program
        self._places = broker, bundle, folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    async def start(self, name: str) -> None:
        """Start one."""
        self._start(name)

    def _start(self, name: str) -> None:
        broker, bundle, folder = self._places
        environment = os.environ | self._program.variables(broker, name, bundle, folder)
        with (folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(self._program.command, env=environment, stdout=log, stderr=log)

    async def terminate(self, name: str) -> None:
        """SIGTERM, and wait for its end."""
        self._running[name].terminate()
        await asyncio.to_thread(self._running.pop(name).wait, 60)

    async def kill(self, name: str) -> None:
        """SIGKILL."""
        self._kill(name)

    def _kill(self, name: str) -> None:
        self._running[name].kill()
        self._running.pop(name).wait(10)

    def end(self) -> None:
        """Kill what runs."""
        for name in list(self._running):
            self._kill(name)


async def measure(program: Program, folder: Path) -> dict[str, list[float]]:
    """Event → the stall of each partition."""
    bundle = folder / "bundle"
    write_bundle(bundle, ITEMS)
    with LocalBroker(folder / "kafka", port=0) as broker:
        policies = {"measured-recommendations": "compact", "measured-states-changelog": "compact"}
        await create_topics(broker.bootstrap, {"clicks": "delete", **policies})
        if program.command == WORKER:
            environment = os.environ | program.variables(broker.bootstrap, "a", bundle, folder)
            done = await asyncio.create_subprocess_exec(WORKER[0], "topics", env=environment)
            if await done.wait():
                sys.exit("stream-app topics failed")
        workers, watch = Workers(program, broker.bootstrap, bundle, folder), Watch()
        admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
        tasks = [asyncio.ensure_future(watch.look(broker.bootstrap)), asyncio.ensure_future(click(broker.bootstrap))]
        try:
            await admin.start()
            async with going_on(*tasks):
                return await events(workers, watch, Group(admin), program)
        finally:
            workers.end()
            await admin.close()


async def events(workers: Workers, watch: Watch, group: Group, program: Program) -> dict[str, list[float]]:
    """Everything that happens in a round, one after the other."""
    stalls: dict[str, list[float]] = {}

    async def stall(event: str, members: int, *acts: Awaitable[None]) -> None:
        begin = time.monotonic()
        for act in acts:
            await act
        async with asyncio.timeout(program.session_seconds + START_SECONDS):
            await group.has(members)
            await watch.calm(time.monotonic())
        stalls[event] = watch.pauses(begin)

    await stall("start", 2, workers.start("a"), workers.start("b"))
    await stall("nothing happens", 2, asyncio.sleep(5))
    await stall("a third joins", 3, workers.start("c"))
    await stall("it leaves (SIGTERM)", 2, workers.terminate("c"))
    await stall("one is killed (SIGKILL)", 1, workers.kill("b"))
    await stall("it comes back", 2, workers.start("b"))
    await stall("one restarts (SIGTERM)", 2, workers.terminate("b"), workers.start("b"))
    return stalls


if __name__ == "__main__":
    main()
