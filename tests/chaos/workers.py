"""Worker processes under the harness's control."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tests.chaos.errors import ChaosError

_READY_SECONDS = 120
"""Longer than a worker itself puts up with being neither ready nor restoring, before it ends with a line."""

_START_SECONDS = 120
_KILLED_SECONDS = 10
_LOOK_SECONDS = 0.05
_DUMP_SECONDS = 3

_GENERATION = re.compile(r'"event": "rebalance", "generation": (\d+)')


class Worker:
    """A worker process, ended by its own id."""

    def __init__(self, log: Path) -> None:
        self.pid: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """Its exit code."""
        self._log = log

    @property
    def exit_code(self) -> int | None:
        return self.ended.result() if self.ended.done() else None

    def send(self, number: signal.Signals) -> None:
        if self.exit_code is None and self.pid.done():
            with suppress(ProcessLookupError):
                os.kill(self.pid.result(), number)

    async def wait(self, seconds: float) -> int | None:
        """The exit code, None while it runs."""
        await asyncio.wait({self.ended}, timeout=seconds)
        return self.exit_code

    async def kill(self) -> None:
        self.send(signal.SIGKILL)
        if await self.wait(_KILLED_SECONDS) is None:
            raise ChaosError(f"a worker did not end within {_KILLED_SECONDS} s of SIGKILL")

    async def wait_ready(self) -> bool:
        """Whether it says that it is, before it ends."""
        deadline = time.monotonic() + _READY_SECONDS
        while self.exit_code is None:
            if '"event": "ready"' in self.said():
                return True
            if time.monotonic() > deadline:
                self.send(signal.SIGUSR1)
                await self.wait(_DUMP_SECONDS)
                raise ChaosError(f"a worker was not ready within {_READY_SECONDS} s:\n{self.said()[-30_000:]}")
            await self.wait(_LOOK_SECONDS)
        return False

    async def wait_frozen(self) -> bool:
        """Whether it stops, by a signal, before it ends."""
        deadline = time.monotonic() + _READY_SECONDS
        while self.exit_code is None and time.monotonic() < deadline:
            if self._is_frozen():
                return True
            await self.wait(_LOOK_SECONDS)
        return False

    def _is_frozen(self) -> bool:
        with suppress(FileNotFoundError):
            status = Path(f"/proc/{self.pid.result()}/stat").read_text()
            return status.rpartition(")")[2].split()[0] == "T"
        return False

    def said(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def last_words(self) -> str:
        return self.said()[-3000:]

    def generation(self) -> int:
        """How many times the group had been rebalanced, the last time that it heard of it."""
        return max(map(int, _GENERATION.findall(self.said())), default=0)

    def reason(self) -> str:
        """The one line for an operator that a worker ends with.

        Raises:
            ChaosError: it said none, or more than one.
        """
        lines = [line for line in self.said().splitlines() if not line.startswith("{")]
        if len(lines) != 1 or not lines[0].startswith("Error: "):
            said = "\n".join(lines) or self.last_words()
            raise ChaosError(f"a worker ended with {self.exit_code} and not with one clear line:\n{said}")
        return lines[0]


class Workers:
    """Starts workers: `async with Workers() as workers: await workers.start(log, environment)`."""

    def __init__(self) -> None:
        self._ids = itertools.count()
        self._workers: dict[int, Worker] = {}
        """Those that run."""

    async def __aenter__(self) -> Self:
        self._nursery = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.chaos.worker", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        self._listening = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._nursery.wait()
        finally:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)

    async def start(self, log: Path, environment: Mapping[str, str], **chaos: Any) -> Worker:
        assert self._nursery.stdin is not None
        number, worker = next(self._ids), Worker(log)
        self._workers[number] = worker
        order = {"id": number, "log": str(log), "environment": dict(environment), "chaos": chaos}
        self._nursery.stdin.write(json.dumps(order).encode() + b"\n")
        await asyncio.wait({worker.pid}, timeout=_START_SECONDS)
        if not worker.pid.done():
            raise ChaosError(f"no worker was forked within {_START_SECONDS} s")
        return worker

    async def _listen(self) -> None:
        assert self._nursery.stdout is not None
        async for line in self._nursery.stdout:
            answer = json.loads(line)
            if "pid" in answer:
                self._workers[answer["id"]].pid.set_result(answer["pid"])
            else:
                self._workers.pop(answer["id"]).ended.set_result(answer["exit_code"])
