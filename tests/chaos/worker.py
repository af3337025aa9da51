"""Workers that kill or freeze themselves at a named point, live with a clock that jumps, or are wrong on purpose.

Each is `stream-app worker`, forked from this one process that has imported all they need: on two cores most of a run
would go into imports. What is asked comes as JSON, one line a worker, and so do the answers:

    → {"id": 7, "log": "worker.log", "environment": {…}, "chaos": {"point": "changelog sent", "count": 3, "signal": 9}}
    ← {"id": 7, "pid": 4711}
    ← {"id": 7, "exit_code": -9}

Ends when its input does, and its workers with it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import functools
import json
import os
import resource
import select
import signal
import sys
from typing import Any, NoReturn

import stream_app.worker  # noqa: F401  (what a worker would import)
from stream_app import state_table
from stream_app.cli import main
from stream_app.state_table import UserStateStore
from tests.chaos.clock import let_jump
from tests.chaos.mutations import MUTATIONS
from tests.chaos.points import signal_at

_WRITE_BUFFER_BYTES = 256 << 10
"""Kills shall come before, in and after flushes, and a full disk be met soon."""


def fork_workers() -> None:
    """Until the end of the input."""
    ids: dict[int, int] = {}
    """Process id → id."""
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        _serve(ids, awake)
    finally:
        for pid in ids:
            os.kill(pid, signal.SIGKILL)


def _serve(ids: dict[int, int], awake: int) -> None:
    orders = b""
    while True:
        ready, _, _ = select.select([0, awake], [], [])
        if awake in ready:
            os.read(awake, 4096)
            _bury(ids)
        if 0 in ready:
            if not (received := os.read(0, 1 << 16)):
                return
            *lines, orders = (orders + received).split(b"\n")
            for order in map(json.loads, lines):
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # it may come before the worker listens
                pid = os.fork()
                if not pid:
                    ids.clear()  # they are its siblings
                    _be_a_worker(order)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
                ids[pid] = order["id"]
                _answer(id=order["id"], pid=pid)


def _bury(ids: dict[int, int]) -> None:
    while ids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        _answer(id=ids.pop(pid), exit_code=os.waitstatus_to_exitcode(status))


def _answer(**answer: int) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def _be_a_worker(order: dict[str, Any]) -> NoReturn:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # as the command does first of all
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for descriptor, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(file, descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    _become_chaotic(**order["chaos"])
    sys.exit(main(["worker"]))


def _become_chaotic(
    *,
    mutation: str = "",
    point: str = "",
    count: int = 0,
    signal: int = 0,
    hours: list[float] | None = None,
    hours_seconds: float = 1,
    largest_file: int | None = None,
) -> None:
    state_table.WRITE_BUFFER_BYTES = _WRITE_BUFFER_BYTES
    _tell_rebalances()
    _tell_tasks_when_asked()
    if mutation:
        MUTATIONS[mutation]()
    if point:
        exactly_once = os.environ.get("STREAM_APP_GUARANTEE") == "exactly_once"
        signal_at(point, count, signal, exactly_once=exactly_once)
    if hours:
        let_jump(hours, hours_seconds)
    if largest_file is not None:  # Python ignores the signal that comes with it
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))


def _tell_rebalances() -> None:
    """A line in the log for each, with the number that Kafka gave it: they are counted by it."""
    on_rebalance = UserStateStore.on_rebalance

    @functools.wraps(on_rebalance)
    async def and_tell(self: Any, assigned: Any, revoked: Any, newly_assigned: Any, generation_id: int = 0) -> None:
        sys.stderr.write(f'{{"event": "rebalance", "generation": {generation_id}}}\n')
        await on_rebalance(self, assigned, revoked, newly_assigned, generation_id)

    UserStateStore.on_rebalance = and_tell  # type: ignore[method-assign]


def _tell_tasks_when_asked() -> None:
    """On SIGUSR1: where every task of every loop stands, in the log."""

    def tell(*_: Any) -> None:
        # `all_tasks` knows one loop's. The name is of Python 3.11, then of 3.12.
        every = getattr(asyncio.tasks, "_all_tasks", None) or getattr(asyncio.tasks, "_scheduled_tasks", ())
        for task in list(every):
            if not task.done():
                task.print_stack(file=sys.stderr)
        faulthandler.dump_traceback()

    signal.signal(signal.SIGUSR1, tell)


if __name__ == "__main__":
    fork_workers()
