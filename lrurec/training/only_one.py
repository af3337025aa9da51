"""One training of a bundle at a time."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lrurec.errors import TrainingError

if sys.platform != "win32":
    import fcntl


@contextmanager
def only_training_of(bundle_folder: Path) -> Iterator[None]:
    """Hold the lock file beside a bundle's folder; the system lets go of it when the process ends, however it ends.

    Raises `TrainingError` if another process holds it: two trainings would replace each other's checkpoint and bundle.
    Windows has no such lock, and gets none.
    """
    path = bundle_folder.with_name(bundle_folder.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a") as file:
            _lock(file, bundle_folder)
            # The one that held it may have removed the file between our opening and our locking it.
            if not _is_at(file, path):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _lock(file: IO[str], bundle_folder: Path) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TrainingError(
            f"another training is writing {bundle_folder}; wait for it to end, or name another --out"
        ) from error


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
