"""Clicks, workers and a schedule of accidents on a real Kafka; at the end `stream-app verify` says what is left."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer

from lrurec.bundle import save_bundle
from lrurec.convert import convert
from stream_app.committed import committed_offsets
from stream_app.dev.kafka.broker import LocalBroker
from stream_app.errors import StreamAppError
from stream_app.settings import Settings
from tests.chaos.schedule import Action, Disk, Freeze, Kill, Leave, RestartBroker
from tests.stream_app.live import SCRIPTS, Site, click, free_port

GOLDEN = Path(__file__).parents[1] / "lrurec" / "golden" / "public_large_d64_b2.npz"

SESSION_SECONDS = 3

_ITEMS = 200
_BURST = 200
_MOST_BEHIND = 30_000
"""Clicks that no commit has passed, at which the producer waits: all of them must be worked off at the end."""

_POISON = (b"\xff\xfe", b"{", b'{"user_id": 1}', b"[" * 500, b"null", b'{"user_id":"\\ud800"}', b"")

_READY_SECONDS = 60
_KILLED_SECONDS = 30
"""For a worker to reach the point at which it is to die; then it is killed wherever it is."""
_END_SECONDS = 25
_BACK_OFF_SECONDS = 1
_ATTEMPTS = 12
"""Starts for one action, where a worker ends by itself because Kafka is away or somebody wrote in between."""


class ChaosError(Exception):
    """Something happened that may not: a worker that doesn't come up, or one that doesn't end."""


@dataclass
class Counts:
    """What has happened."""

    clicks: int = 0
    poison: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    """By point."""
    kills_elsewhere: int = 0
    """At a worker that did not pass its point in time."""
    disks: Counter[str] = field(default_factory=Counter)
    leaves: int = 0
    zombies: int = 0
    broker_restarts: int = 0
    ended_by_themselves: Counter[str] = field(default_factory=Counter)
    """By the reason they gave."""

    @property
    def all_kills(self) -> int:
        return self.kills.total() + self.kills_elsewhere


class Worker:
    """A worker process under the harness's control, ended by its own id."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self._begin = log.stat().st_size

    @classmethod
    async def start(cls, site: Site, slot: int, **chaos: str) -> Worker:
        log = site.folder / f"worker-{slot}.log"
        log.touch()
        own = {"STATE_DIR": str(site.folder / f"state-{slot}"), "WEB_PORT": "0"}
        environment = site.environment(**own) | {f"CHAOS_{name}": value for name, value in chaos.items()}
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.chaos.worker", env=environment, stdout=file, stderr=file
            )
        return cls(process, log)

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def wait(self, seconds: float) -> int | None:
        """The exit code, None while it runs."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self._process.wait()
        return None

    async def kill(self) -> None:
        self.send(signal.SIGKILL)
        await self._process.wait()

    async def wait_ready(self) -> bool:
        """Whether it says that it is, before it ends."""
        deadline = time.monotonic() + _READY_SECONDS
        while self.exit_code is None:
            if '"event": "ready"' in self.said():
                return True
            if time.monotonic() > deadline:
                raise ChaosError(f"a worker was not ready within {_READY_SECONDS} s:\n{self.said()[-3000:]}")
            await asyncio.sleep(0.1)
        return False

    async def wait_frozen(self) -> bool:
        """Whether it stops, by a signal, before it ends."""
        deadline = time.monotonic() + _READY_SECONDS
        while self.exit_code is None:
            ps = await asyncio.create_subprocess_exec(
                "ps", "-o", "stat=", "-p", str(self._process.pid), stdout=asyncio.subprocess.PIPE
            )
            if (await ps.communicate())[0].startswith(b"T"):
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.1)
        return False

    def said(self) -> str:
        with self._log.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode(errors="replace")

    def reason(self) -> str:
        """Its last line, without what differs from time to time."""
        lines = [line for line in self.said().splitlines() if line.startswith("Error: ")]
        words = (lines or [f"exit code {self.exit_code} without a line"])[-1].split()
        return " ".join(word for word in words if not any(letter.isdigit() or letter == "/" for letter in word))[:160]


class Harness:
    """One run: `await Harness(folder, seed=1).run(actions, clicks=100_000)`.

    Args:
        folder: for Kafka, the bundle, the states and the logs; kept.
        seed: of the clicks and of what is done to disks.
        rate: clicks a second.
        mutation: one of `mutations.MUTATIONS`, for workers that are wrong on purpose.
        guarantee: the workers' setting.
        report: is given a line now and then.

    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        rate: float,
        mutation: str = "",
        guarantee: str = "at_least_once",
        report: Callable[[str], None] = print,
    ) -> None:
        self.counts = Counts()
        self._random = random.Random(seed)
        self._rate = rate
        self._chaos = {"MUTATION": mutation} if mutation else {}
        self._guarantee = guarantee
        self._report = report
        self._folder = folder
        self._broker = LocalBroker(folder / "kafka", port=free_port())  # the same after each restart
        self._broker_at_work = asyncio.Lock()
        self._workers: set[Worker] = set()
        self._actions: list[Action] = []
        self._behind = 0
        self._enough = asyncio.Event()

    async def run(self, actions: Sequence[Action], clicks: int, slots: int = 2) -> dict[str, Any]:
        """All actions, and at least so many clicks, which are then worked off. What `stream-app verify` says of it.

        Raises:
            ChaosError: something happened that may not.
        """
        bundle = self._folder / "bundle"
        save_bundle(bundle, convert(GOLDEN))
        await asyncio.to_thread(self._broker.start)
        try:
            extra = {"MAX_BATCH": "256", "STATE_DTYPE": "float16", "SESSION_TIMEOUT_SECONDS": str(SESSION_SECONDS)}
            extra["GUARANTEE"] = self._guarantee
            self._site = Site(self._broker.bootstrap, "chaos", bundle, self._folder, partitions=8, extra=extra)
            self._settings = Settings.from_environment(self._site.environment())
            await asyncio.to_thread(self._site.create_topics)
            self._actions = list(reversed(actions))
            producing = asyncio.create_task(self._produce(clicks))
            try:
                await self._until_first_error([self._work(slot) for slot in range(slots)], producing)
            finally:
                await _cancelled(producing)
            await self._work_off(slots)
            return await self._verify()
        finally:
            for worker in list(self._workers):
                await worker.kill()
            self._broker.kill()

    async def _until_first_error(self, slots: list[Any], producing: asyncio.Task[None]) -> None:
        tasks = {asyncio.create_task(slot) for slot in slots}
        try:
            while not producing.done() or not all(task.done() for task in tasks):
                running = {task for task in (producing, *tasks) if not task.done()}
                done, _ = await asyncio.wait(running, timeout=10, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                self._report(self._progress())
                if all(task.done() for task in tasks):
                    self._enough.set()
        finally:
            for task in tasks:
                await _cancelled(task)

    # -- clicks

    async def _produce(self, at_least: int) -> None:
        """Clicks until the schedule is through and there are enough; also poison and unknown items."""
        client = AIOKafkaProducer(
            bootstrap_servers=self._site.bootstrap, acks="all", enable_idempotence=True, request_timeout_ms=60_000
        )
        await client.start()
        measuring = asyncio.create_task(self._measure())
        try:
            sent: list[Any] = []
            due = time.monotonic()
            while not (self._enough.is_set() and self.counts.clicks >= at_least):
                if self._behind > _MOST_BEHIND:
                    await asyncio.sleep(0.2)
                    due = time.monotonic()
                    continue
                for _ in range(_BURST):
                    key, value = self._click()
                    sent.append(await client.send(self._site.clicks, key=key, value=value))
                if len(sent) >= 50 * _BURST:
                    await asyncio.gather(*sent)
                    sent = []
                due += _BURST / self._rate
                await asyncio.sleep(max(0, due - time.monotonic()))
            await asyncio.gather(*sent)
        finally:
            await _cancelled(measuring)
            with suppress(TimeoutError):
                async with asyncio.timeout(_END_SECONDS):
                    await client.stop()

    def _click(self) -> tuple[bytes, bytes]:
        draw = self._random.random()
        user, item = f"user-{int(5_000 * self._random.random() ** 3)}", str(self._random.randint(1, _ITEMS))
        if draw < 0.01:
            self.counts.poison += 1
            return user.encode(), self._random.choice(_POISON)
        self.counts.clicks += 1
        return click(user, item if draw < 0.99 else "unheard-of")

    async def _measure(self) -> None:
        while True:
            with suppress(StreamAppError):
                self._behind = await self._lag()
            await asyncio.sleep(1)

    async def _lag(self) -> int:
        passed = sum(found.offset for found in (await committed_offsets(self._settings)).values())
        return self.counts.clicks + self.counts.poison - passed

    # -- workers

    async def _work(self, slot: int) -> None:
        """One accident after the other, each at a worker of this slot."""
        while self._actions:
            action = self._actions.pop()
            match action:
                case Kill():
                    await self._kill(slot, action)
                case Leave(away_seconds):
                    await self._leave(slot, away_seconds)
                case Freeze():
                    await self._freeze(slot, action)
                case RestartBroker():
                    await self._restart_broker()

    async def _start(self, slot: int, **chaos: str) -> Worker:
        worker = await Worker.start(self._site, slot, **self._chaos, **chaos)
        self._workers = {each for each in self._workers if each.exit_code is None} | {worker}
        return worker

    async def _attempts(self, slot: int, attempt: Callable[[Worker], Any], **chaos: str) -> None:
        """Start workers until one goes through with the action; a worker may end by itself, with a reason."""
        for _ in range(_ATTEMPTS):
            worker = await self._start(slot, **chaos)
            if await attempt(worker):
                return
            if worker.exit_code is None:
                await worker.kill()
            else:
                self.counts.ended_by_themselves[worker.reason()] += 1
                await asyncio.sleep(_BACK_OFF_SECONDS)
        raise ChaosError(f"no worker came through in {_ATTEMPTS} starts:\n{worker.said()[-3000:]}")

    async def _kill(self, slot: int, action: Kill) -> None:
        if action.disk != "kept":
            await asyncio.to_thread(self._spoil, slot, action.disk)
            self.counts.disks[action.disk] += 1

        async def until_killed(worker: Worker) -> bool:
            if action.point.startswith("drain") and await worker.wait_ready():
                worker.send(signal.SIGTERM)
            code = await worker.wait(_KILLED_SECONDS)
            if code == -signal.SIGKILL:
                self.counts.kills[action.point] += 1
            elif code is None:
                await worker.kill()
                self.counts.kills_elsewhere += 1
            return code in {None, -signal.SIGKILL}

        await self._attempts(slot, until_killed, **_armed(action, signal.SIGKILL))

    def _spoil(self, slot: int, disk: Disk) -> None:
        """Lose the folder of states, cut the end off one of its files, or change bytes in one."""
        folder = self._folder / f"state-{slot}"
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
        if disk == "lost" or not files:
            shutil.rmtree(folder, ignore_errors=True)
            return
        path = self._random.choice(files)
        content = bytearray(path.read_bytes())
        if disk == "cut":
            del content[self._random.randrange(len(content)) :]
        else:
            for _ in range(8):
                content[self._random.randrange(len(content))] ^= 1 << self._random.randrange(8)
        path.write_bytes(content)

    async def _leave(self, slot: int, away_seconds: float) -> None:
        async def until_left(worker: Worker) -> bool:
            if not await worker.wait_ready():
                return False
            await asyncio.sleep(self._random.uniform(0, 2))
            worker.send(signal.SIGTERM)
            code = await worker.wait(_END_SECONDS)
            if code is None:
                raise ChaosError(f"a worker did not end within {_END_SECONDS} s:\n{worker.said()[-3000:]}")
            return code == 0

        await self._attempts(slot, until_left)
        self.counts.leaves += 1
        await asyncio.sleep(away_seconds)

    async def _freeze(self, slot: int, action: Freeze) -> None:
        async def until_awake(worker: Worker) -> bool:
            if not await worker.wait_frozen():
                return False
            await asyncio.sleep(action.seconds)
            worker.send(signal.SIGCONT)
            if await worker.wait(_END_SECONDS / 3) is None:  # it notices, or goes on as a member that joined again
                await worker.kill()
            return True

        await self._attempts(slot, until_awake, **_armed(action, signal.SIGSTOP))
        self.counts.zombies += 1

    async def _restart_broker(self) -> None:
        async with self._broker_at_work:
            self._broker.kill()
            await asyncio.sleep(self._random.uniform(0, 2))
            await asyncio.to_thread(self._broker.start)
        self.counts.broker_restarts += 1

    # -- the end

    async def _work_off(self, slots: int) -> None:
        """Workers without accidents, until every click is committed."""
        deadline = time.monotonic() + 300
        workers = [await self._start(slot) for slot in range(slots)]
        while (left := await self._lag()) > 0:
            for slot, worker in enumerate(workers):
                if worker.exit_code is not None:
                    self.counts.ended_by_themselves[worker.reason()] += 1
                    workers[slot] = await self._start(slot)
            if time.monotonic() > deadline:
                raise ChaosError(f"{left:,} records were not worked off:\n{workers[0].said()[-3000:]}")
            await asyncio.sleep(0.5)
        for worker in workers:
            worker.send(signal.SIGTERM)
        for worker in workers:
            if (code := await worker.wait(_END_SECONDS)) != 0:
                raise ChaosError(f"a worker ended with {code} though it was only asked to:\n{worker.said()[-3000:]}")

    async def _verify(self) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            SCRIPTS / "stream-app", "verify", "--json",
            env=self._site.environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(900):
            out, err = await process.communicate()
        if not out:
            raise ChaosError(f"stream-app verify said nothing: {err.decode()[-3000:]}")
        found: dict[str, Any] = json.loads(out)
        return found

    def _progress(self) -> str:
        counts = self.counts
        return (
            f"{len(self._actions):4} accidents to come; {counts.clicks:,} clicks, {self._behind:,} behind;"
            f" {counts.all_kills} kills, {counts.disks.total()} disks, {counts.leaves} left and joined again,"
            f" {counts.zombies} zombies, {counts.broker_restarts} broker restarts"
        )


def is_once(found: dict[str, Any]) -> bool:
    """Whether no click was found answered twice, by what `stream-app verify` says, and no other record either."""
    return bool(found["every_click"] and not found["repeated_recommendations"]) and (
        found["dead_letters"] == found["poison"]
    )


def _armed(action: Kill | Freeze, number: signal.Signals) -> dict[str, str]:
    return {"POINT": action.point, "COUNT": str(action.count), "SIGNAL": str(int(number))}


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
