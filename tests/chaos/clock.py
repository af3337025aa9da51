"""A wall clock that jumps by hours, for a worker; its monotonic clock goes on as ever."""

from __future__ import annotations

import time
from collections.abc import Sequence


def let_jump(hours: Sequence[float], seconds: float) -> None:
    """Make this process's wall clock jump every so many seconds, to the next of these hours from the true time.

    Seen by whoever asks `time.time` or `time.time_ns`; after the last of the hours comes the first again.
    """
    true_ns, began = time.time_ns, time.monotonic()

    def time_ns() -> int:
        passed = int((time.monotonic() - began) / seconds)
        return true_ns() + int(hours[passed % len(hours)] * 3600e9)

    time.time_ns = time_ns
    time.time = lambda: time_ns() / 1e9
