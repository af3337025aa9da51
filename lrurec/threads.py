"""How many threads compute, and compiled loops in several."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Torch computes with `count` threads inside, as before after; None leaves torch's choice.

    The compiled loops divide their work by the same number. A part that calls BLAS has one thread inside: a second set
    of threads would only wait for the first.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread() -> Iterator[int]:
    """Torch computes in the calling thread alone; yields how many threads it had.

    For work that takes turns with `in_threads`. Torch's threads spin for milliseconds after an operator, on the cores
    that the parts want, unless OpenMP was told to let them sleep; and waking them for small operators takes longer
    than the operators.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def in_threads(task: Callable[[int], None], parts: int) -> None:
    """Run the parts 0..parts-1 of a task side by side, the first in this thread; they must not hold the GIL for long.

    Torch has one thread inside each of several parts.
    """
    if parts == 1:
        task(0)
        return
    others = [_pool(parts).submit(task, part) for part in range(1, parts)]
    try:
        with one_thread():
            task(0)
    finally:
        wait(others)
    for other in others:
        other.result()


@cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, "lrurec", initializer=_have_one_thread)


def _have_one_thread() -> None:
    torch.get_num_threads()  # the first look in a thread makes it take over the number of the last that was set
    torch.set_num_threads(1)
