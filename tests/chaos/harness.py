"""Clicks, workers and a schedule of accidents on a real Kafka; at the end `stream-app verify` says what is left."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.chaos.accidents import Accidents
from tests.chaos.click_stream import ClickStream
from tests.chaos.counts import Counts
from tests.chaos.errors import ChaosError
from tests.chaos.schedule import Action
from tests.chaos.stage import SLOTS, Stage
from tests.stream_app.live import SCRIPTS

_WORK_OFF_SECONDS = 300
_WORK_OFF_RATE = 1_000
"""Clicks a second, at least, when nothing goes wrong any more."""
_LOOK_SECONDS = 0.5
_VERIFY_SECONDS = 900
_TELL_SECONDS = 10


class Harness:
    """One run: `await Harness(folder, seed=1).run(actions, clicks=100_000)`.

    Args:
        folder: for Kafka, the bundle and the logs; kept.
        seed: of the clicks and of what is done to disks.
        rate: clicks a second, at most.
        mutation: one of `mutations.MUTATIONS`, for workers that are wrong on purpose.
        settings: of the workers, by their names without STREAM_APP_.
        report: is given a line now and then.

    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        rate: float,
        mutation: str = "",
        settings: Mapping[str, str] = MappingProxyType({}),
        report: Callable[[str], None] = print,
    ) -> None:
        self.counts = Counts()
        self._report = report
        self._stage = Stage(folder, self.counts, mutation, settings)
        self._accidents = Accidents(self._stage, self.counts, seed)
        self._stream = ClickStream(self._stage.settings, self.counts, random.Random(f"{seed} clicks"), rate)
        self._actions: list[Action] = []
        self._planned = 0
        self._accidents_are_over = False

    async def run(self, actions: Sequence[Action], clicks: int, seconds: float = math.inf) -> dict[str, Any]:
        """All actions, and at least so many clicks, which are then worked off. What `stream-app verify` says of it.

        Args:
            actions: in their order; `counts` tell what took place.
            clicks: at least.
            seconds: in which an action may begin; what there was no time for is left out.

        Raises:
            ChaosError: something happened that may not.
        """
        self._actions = list(reversed(actions))
        self._planned = len(actions)
        async with self._stage:
            telling = asyncio.create_task(self._tell())
            try:
                until = time.monotonic() + seconds
                await _together(self._stream.run(clicks, self._share), self._live(clicks, until))
                return await self._verify()
            finally:
                await _cancelled(telling)

    def _share(self) -> float:
        """How much of the schedule is over."""
        return 1.0 if self._accidents_are_over else min(0.99, 1 - len(self._actions) / max(1, self._planned))

    async def _live(self, clicks: int, until: float) -> None:
        await self._stream.has_begun.wait()
        await _together(*[self._work(slot, until) for slot in range(SLOTS)])
        self._accidents_are_over = True
        await self._work_off(clicks)

    async def _work(self, slot: int, until: float) -> None:
        while self._actions and time.monotonic() < until:
            await self._accidents.happen(slot, self._actions.pop())

    async def _work_off(self, clicks: int) -> None:
        """Workers without accidents, until every click is committed."""
        seconds = _WORK_OFF_SECONDS + max(0, clicks - self.counts.clicks) / _WORK_OFF_RATE
        deadline = time.monotonic() + seconds
        workers = [await self._stage.start(slot) for slot in range(SLOTS)]
        while not self._stream.is_over or await self._stream.lag() > 0:
            for slot, worker in enumerate(workers):
                if worker.exit_code is not None:
                    self._stage.count_end(worker)
                    workers[slot] = await self._stage.start(slot)
            if time.monotonic() > deadline:
                raise ChaosError(f"not all clicks were worked off in {seconds:.0f} s:\n{workers[0].last_words()}")
            await asyncio.sleep(_LOOK_SECONDS)
        await asyncio.gather(*[self._stage.end(worker) for worker in workers])
        for worker in workers:
            if worker.exit_code != 0:
                raise ChaosError(f"a worker that was asked to end: {worker.reason()}")

    async def _verify(self) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            SCRIPTS / "stream-app", "verify", "--json",
            env=self._stage.site.environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(_VERIFY_SECONDS):
            out, err = await process.communicate()
        if not out:
            raise ChaosError(f"stream-app verify said nothing: {err.decode()[-3000:]}")
        found: dict[str, Any] = json.loads(out)
        return found

    async def _tell(self) -> None:
        while True:
            self._report(f"{len(self._actions):4} accidents to come; {self._stream.behind:,} behind; {self.counts}")
            await asyncio.sleep(_TELL_SECONDS)


async def _together(*coroutines: Coroutine[Any, Any, None]) -> None:
    """All of them, or none after the first error."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            await _cancelled(task)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def is_once(found: dict[str, Any]) -> bool:
    """Whether no click was answered twice, by what `stream-app verify` says, and no other record either."""
    return bool(not found["repeated_recommendations"] and found["dead_letters"] == found["poison"])
