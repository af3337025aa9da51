"""One training of a bundle at a time."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except BlockingIOError as error:
        raise TrainingError(
            f"another training is writing {bundle_folder}; wait for it to end, or name another --out"
        ) from error
