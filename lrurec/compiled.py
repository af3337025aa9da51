"""Compiled functions whose machine code is kept on disk, where there is a place for it."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from numba import config, njit
from numba.core.caching import FunctionCache


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` with `cache=True`, or without where neither the source's folder nor the user's cache can be written.

    There everything is compiled again by every process; NUMBA_CACHE_DIR names another folder.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(**options)(function)
        if getattr(config, "DISABLE_JIT", False):  # it is the function itself
            return dispatcher
        with suppress(RuntimeError):  # numba's word for no place
            dispatcher._cache = _Cache(dispatcher.py_func)  # type: ignore[no-untyped-call]
        return dispatcher

    return decorate


@cache
def _inlined() -> str:
    files = (Path(__file__).with_name(name) for name in ("bfloat16.py", "products.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class _Cache(FunctionCache):
    """Numba's cache, none of whose files is a reason to fail.

    They outlive the process that wrote them: a disk may have been full or its power lost, and an index names classes by
    where they stood in the version that wrote it.
    """

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        """Numba's, which tells versions of a function's own file apart, and of files that are compiled into others."""
        return *super()._index_key(sig, codegen), _inlined()  # type: ignore[no-untyped-call]

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What was compiled, or None, upon which it is compiled again."""
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception:  # noqa: BLE001  (pickle raises whatever it comes to)
            with suppress(OSError):
                self.flush()  # type: ignore[no-untyped-call]
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled, if the disk lets us."""
        with suppress(Exception):  # an index that can't be read, and on a full disk not be replaced either
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
