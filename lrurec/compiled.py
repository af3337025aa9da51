"""Compiled functions whose machine code is kept on disk, where there is a place for it."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` with `cache=True`, or without where neither the source's folder nor the user's cache can be written.

    There everything is compiled again by every process; NUMBA_CACHE_DIR names another folder.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # numba's word for it, before anything is compiled
            return njit(**options)(function)

    return decorate
