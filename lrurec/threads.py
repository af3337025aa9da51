"""How many threads compute."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Torch computes with `count` threads inside, as before after; None leaves torch's choice.

    The compiled loops divide their work by the same number. Each part calls BLAS, which has one thread inside: a second
    set of threads would only wait for the first.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)
