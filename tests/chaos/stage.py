"""A real Kafka behind a proxy, disks, and workers on them: what accidents happen to."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from lrurec.bundle import save_bundle
from lrurec.convert import convert
from stream_app.dev.kafka.broker import LocalBroker
from stream_app.settings import Settings
from tests.chaos.counts import Counts
from tests.chaos.disks import Disk
from tests.chaos.errors import ChaosError
from tests.chaos.proxy import Proxy
from tests.chaos.workers import Worker, Workers
from tests.stream_app.live import Site, free_port

SLOTS = 2
"""Workers at a time, each with a disk of its own."""

SESSION_SECONDS = 2
REQUEST_SECONDS = 5
"""That a worker's request to Kafka may take."""

_GOLDEN = Path(__file__).parents[1] / "lrurec" / "golden" / "public_large_d64_b2.npz"
_LISTENER = "PROXIED"
_SLOT = "{slot}"

_BROKER_SECONDS = 180
_END_SECONDS = 25
_BACK_OFF_SECONDS = 0.5
_ATTEMPTS = 12
"""Starts for one action, where a worker ends by itself because Kafka is away or somebody wrote in between."""


class Stage:
    """`async with Stage(folder, counts) as stage: worker = await stage.start(slot)`.

    Args:
        folder: for Kafka, the bundle, the states and the logs; kept.
        counts: where is counted how workers end.
        mutation: one of `mutations.MUTATIONS`, for workers that are wrong on purpose.
        settings: of the workers, by their names without STREAM_APP_; `{slot}` in a value is the worker's slot.

    """

    def __init__(self, folder: Path, counts: Counts, mutation: str, settings: Mapping[str, str]) -> None:
        self._folder = folder.absolute()
        self._counts = counts
        self._mutation = mutation
        self._starts = itertools.count()
        self._workers = Workers()
        self.disks: list[Disk] = []
        """One a slot."""
        self.proxy = Proxy(free_port(), lambda: self.broker.port_of(_LISTENER))
        """What workers take for Kafka."""
        port = free_port()  # the same after each restart
        self.broker = LocalBroker(
            folder / "kafka",
            port=port,
            listeners={_LISTENER: "PLAINTEXT"},
            properties={"advertised.listeners": f"PLAINTEXT://127.0.0.1:{port},{_LISTENER}://{self.proxy.address}"},
        )
        extra = {"MAX_BATCH": "512", "STATE_DTYPE": "float16", "SESSION_TIMEOUT_SECONDS": str(SESSION_SECONDS)}
        self._each_its_own = {name: value for name, value in settings.items() if _SLOT in value}
        extra |= {name: value for name, value in settings.items() if _SLOT not in value}
        self.site = Site(f"127.0.0.1:{port}", "chaos", folder / "bundle", folder, partitions=8, extra=extra)
        """Kafka itself, for whoever has no accidents."""
        self.settings = Settings.from_environment(self.site.environment())

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            save_bundle(self.site.bundle, convert(_GOLDEN))
            stack.callback(self.broker.kill)
            await self.start_broker()
            await stack.enter_async_context(self.proxy)
            await asyncio.to_thread(self.site.create_topics)
            await self._keep_every_recommendation()
            for slot in range(SLOTS):
                mount = self._folder / f"disk-{slot}"
                mount.mkdir()
                disk = await Disk.make(mount)
                stack.push_async_callback(disk.close)
                self.disks.append(disk)
            await stack.enter_async_context(self._workers)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.__aexit__(*error)

    async def _keep_every_recommendation(self) -> None:
        """Compaction would take most of them before they are looked at; of states it may."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.site.bootstrap)
        await admin.start()
        try:
            kept = {
                "cleanup.policy": "compact",
                "min.compaction.lag.ms": str(2**62),
                "message.timestamp.type": "LogAppendTime",  # those that are not named get their defaults
            }
            topic = ConfigResource(ConfigResourceType.TOPIC, self.site.recommendations, configs=kept)
            await admin.alter_configs([topic])
        finally:
            await admin.close()

    async def start_broker(self) -> None:
        await asyncio.to_thread(self.broker.start, _BROKER_SECONDS)

    async def start(self, slot: int, request_seconds: float = REQUEST_SECONDS, **chaos: Any) -> Worker:
        disk = self.disks[slot]
        environment = self.site.environment(
            BROKER=self.proxy.address,
            BROKER_TIMEOUT_SECONDS=str(request_seconds),
            STATE_DIR=str(disk.folder / "state"),
            WEB_PORT="0",
            **{name: value.replace(_SLOT, str(slot)) for name, value in self._each_its_own.items()},
        )
        log = self._folder / f"worker-{slot}-{next(self._starts):04}.log"
        fixed = {"mutation": self._mutation, "largest_file": disk.largest_file}
        return await self._workers.start(log, environment, **fixed, **chaos)

    async def attempts(self, slot: int, attempt: Callable[[Worker], Awaitable[bool]], **chaos: Any) -> None:
        """Start workers until one goes through with the action; a worker may end by itself, with a reason."""
        for _ in range(_ATTEMPTS):
            worker = await self.start(slot, **chaos)
            done = await attempt(worker)
            if worker.exit_code is None:
                await worker.kill()
            self._counts.rebalances = max(self._counts.rebalances, worker.generation())
            if done:
                return
            self.count_end(worker)
            await asyncio.sleep(_BACK_OFF_SECONDS)
        raise ChaosError(f"no worker came through in {_ATTEMPTS} starts:\n{worker.last_words()}")

    def count_end(self, worker: Worker) -> None:
        """Of a worker that may have ended by itself."""
        if worker.exit_code not in {0, -signal.SIGKILL}:
            words = worker.reason().split()
            same = [word for word in words if not any(letter.isdigit() or letter == "/" for letter in word)]
            self._counts.ended_by_themselves[" ".join(same)[:160]] += 1

    async def start_ready(self, slot: int) -> Worker:
        for _ in range(_ATTEMPTS):
            worker = await self.start(slot)
            if await worker.wait_ready():
                return worker
            self.count_end(worker)
            await asyncio.sleep(_BACK_OFF_SECONDS)
        raise ChaosError(f"no worker was ready in {_ATTEMPTS} starts:\n{worker.last_words()}")

    async def end(self, worker: Worker) -> None:
        await terminate(worker)
        self._counts.rebalances = max(self._counts.rebalances, worker.generation())
        self.count_end(worker)


async def terminate(worker: Worker) -> int:
    """Ask it to end; its exit code."""
    worker.send(signal.SIGTERM)
    code = await worker.wait(_END_SECONDS)
    if code is None:
        raise ChaosError(f"a worker did not end within {_END_SECONDS} s of SIGTERM:\n{worker.last_words()}")
    return code
