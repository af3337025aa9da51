"""What a schedule asks for, done to the workers, their disks, their clocks, Kafka and the network."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from tests.chaos.counts import Counts
from tests.chaos.errors import ChaosError
from tests.chaos.points import DRAINING
from tests.chaos.schedule import (
    Action,
    Cut,
    FillDisk,
    Freeze,
    JumpClock,
    Kill,
    Leave,
    RestartBroker,
    RollingRestart,
    Slow,
    Stall,
)
from tests.chaos.stage import SLOTS, Stage, terminate
from tests.chaos.workers import Worker

_KILLED_SECONDS = 30
"""For a worker to reach the point at which it is to die; then it is killed wherever it is, and the kill tried again."""
_FULL_SECONDS = 30
"""For a worker to find its disk full."""
_AWAKE_SECONDS = 8
"""For a worker that was frozen to notice what it missed."""
_ZOMBIE_REQUEST_SECONDS = 30
"""More than it is frozen for: what it had in hand would be too old to be sent, and do no harm."""
_CUT_SECONDS = 0.5
"""Between cuts."""
_HOURS_SECONDS = 0.7
"""Between jumps of a clock."""

_FULL = ("No space left", "File too large")
"""What is said of a full disk: the latter where it is a limit on files."""


class Accidents:
    """`await Accidents(stage, counts, seed).happen(slot, action)`: each slot has one at a time.

    Args:
        stage: where they happen.
        counts: what has happened.
        seed: of what is done to disks.

    """

    def __init__(self, stage: Stage, counts: Counts, seed: int) -> None:
        self._stage = stage
        self._counts = counts
        self._random = random.Random(f"{seed} disks")
        self._slots = [asyncio.Lock() for _ in range(SLOTS)]
        self._broker_at_work, self._network = asyncio.Lock(), asyncio.Lock()

    async def happen(self, slot: int, action: Action) -> None:
        """Until it is over, and no worker of the slot is left.

        Raises:
            ChaosError: something happened that may not.
        """
        if isinstance(action, RollingRestart):
            await self._restart_all()
        else:
            async with self._slots[slot]:
                await self._happen_in(slot, action)

    async def _happen_in(self, slot: int, action: Action) -> None:
        match action:
            case Kill():
                await self._kill(slot, action)
            case Leave():
                await self._leave(slot, action)
            case Freeze():
                await self._freeze(slot, action)
            case RestartBroker(away_seconds):
                await self._restart_broker(away_seconds)
            case Slow():
                await self._shake(slot, lambda: self._slow(action))
            case Stall():
                await self._shake(slot, lambda: self._stall(action))
            case Cut():
                await self._shake(slot, lambda: self._cut(action))
            case FillDisk(room):
                await self._fill_disk(slot, room)
            case JumpClock(hours):
                await self._jump_clock(slot, hours)

    async def _kill(self, slot: int, action: Kill) -> None:
        if action.disk != "kept":
            await asyncio.to_thread(self._stage.disks[slot].harm, action.disk, self._random)
            self._counts.disks[action.disk] += 1

        async def until_killed(worker: Worker) -> bool:
            if action.point in DRAINING and await worker.wait_ready():
                worker.send(signal.SIGTERM)
            code = await worker.wait(_KILLED_SECONDS)
            self._counts.kills[action.point] += code == -signal.SIGKILL
            self._counts.kills_elsewhere += code is None
            return code == -signal.SIGKILL

        await self._stage.attempts(slot, until_killed, **_armed(action, signal.SIGKILL))

    async def _leave(self, slot: int, action: Leave) -> None:
        async def until_left(worker: Worker) -> bool:
            if not await worker.wait_ready():
                return False
            await worker.wait(action.stay_seconds)
            return await terminate(worker) == 0

        await self._stage.attempts(slot, until_left)
        self._counts.leaves += 1
        await asyncio.sleep(action.away_seconds)

    async def _freeze(self, slot: int, action: Freeze) -> None:
        async def until_awake(worker: Worker) -> bool:
            if not await worker.wait_frozen():
                return False
            await asyncio.sleep(action.seconds)
            worker.send(signal.SIGCONT)
            if await worker.wait(_AWAKE_SECONDS) is not None:  # it notices, or goes on as a member that joined again
                self._stage.count_end(worker)
            return True

        armed = _armed(action, signal.SIGSTOP)
        await self._stage.attempts(slot, until_awake, request_seconds=_ZOMBIE_REQUEST_SECONDS, **armed)
        self._counts.zombies += 1

    async def _restart_broker(self, away_seconds: float) -> None:
        async with self._broker_at_work:
            self._stage.broker.kill()
            await asyncio.sleep(away_seconds)
            await self._stage.start_broker()
        self._counts.broker_restarts += 1

    async def _shake(self, slot: int, shake: Callable[[], Awaitable[None]]) -> None:
        """Do something to all connections while a worker is at work, which it need not survive."""

        async def until_shaken(worker: Worker) -> bool:
            if not await worker.wait_ready():
                return False
            async with self._network:
                await shake()
            await terminate(worker)
            self._stage.count_end(worker)
            return True

        await self._stage.attempts(slot, until_shaken)

    async def _slow(self, action: Slow) -> None:
        self._stage.proxy.delay_seconds = action.delay_seconds
        await asyncio.sleep(action.seconds)
        self._stage.proxy.delay_seconds = 0
        self._counts.slow_networks += 1

    async def _stall(self, action: Stall) -> None:
        self._stage.proxy.stall()
        await asyncio.sleep(action.seconds)
        self._stage.proxy.resume()
        self._counts.stalled_networks += 1

    async def _cut(self, action: Cut) -> None:
        for _ in range(action.times):
            self._counts.cut_connections += self._stage.proxy.cut()
            await asyncio.sleep(_CUT_SECONDS)
        self._counts.cut_networks += 1

    async def _fill_disk(self, slot: int, room: int) -> None:
        disk = self._stage.disks[slot]
        await disk.fill(room)

        async def until_full(worker: Worker) -> bool:
            if await worker.wait(_FULL_SECONDS) is None:
                raise ChaosError(f"a worker did not notice that its disk is full:\n{worker.last_words()}")
            return any(words in worker.reason() for words in _FULL)

        await self._stage.attempts(slot, until_full)
        await disk.make_room()
        self._counts.full_disks += 1

    async def _jump_clock(self, slot: int, hours: tuple[float, ...]) -> None:
        async def until_jumped(worker: Worker) -> bool:
            if not await worker.wait_ready():
                return False
            await worker.wait(len(hours) * _HOURS_SECONDS)
            return await terminate(worker) == 0

        await self._stage.attempts(slot, until_jumped, hours=hours, hours_seconds=_HOURS_SECONDS)
        self._counts.clock_jumps += 1

    async def _restart_all(self) -> None:
        """All slots have a worker that is ready; one after the other is asked to end, and followed by another."""
        async with AsyncExitStack() as stack:
            for lock in self._slots:  # always in this order, or two restarts would wait for each other
                await stack.enter_async_context(lock)
            workers = await asyncio.gather(*[self._stage.start_ready(slot) for slot in range(SLOTS)])
            for slot, worker in enumerate(workers):
                await self._stage.end(worker)
                workers[slot] = await self._stage.start_ready(slot)
            for worker in workers:
                await self._stage.end(worker)
        self._counts.rolling_restarts += 1


def _armed(action: Kill | Freeze, number: signal.Signals) -> dict[str, Any]:
    return {"point": action.point, "count": action.count, "signal": int(number)}
