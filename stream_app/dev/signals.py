"""Signals that end a command, as exceptions or as an event: either way it ends what it started first."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a polite kill, and a closed terminal."""


@contextmanager
def keyboard_interrupt_on_signals() -> Iterator[None]:
    """Each of the signals raises KeyboardInterrupt in the main thread, wherever it is."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    with _handling(interrupt):
        yield


@contextmanager
def event_on_signals() -> Iterator[asyncio.Event]:
    """Each of the signals sets the event, for a running event loop that ends its work in its own order."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(ended.set)

    with _handling(end):
        yield ended


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    # What is ignored stays ignored: `nohup` and background jobs of a script mean it.
    numbers = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
