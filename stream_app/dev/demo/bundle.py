"""The demo's model: trained once on the shop's training sessions, kept in the cache folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import lrurec
from stream_app.dev.cache import cache_folder, unusable_cache
from stream_app.dev.deadline import Deadline
from stream_app.dev.demo.shop import CLICKS_FILE, Shop
from stream_app.dev.guarded_process import GuardedProcess
from stream_app.errors import StreamAppError

TRAINING_SECONDS = 600.0
_ARGUMENTS = ("--preset", "eshop")
_POLL_SECONDS = 0.2
_STOP_SECONDS = 2.0


class TrainingFailed(StreamAppError):
    """The demo's model could not be trained."""


def demo_bundle(shop: Shop, report: Callable[[str], None]) -> Path:
    """The folder of a bundle trained on `shop.training` by this code, now or in an earlier demo.

    Raises:
        TrainingFailed: `lrurec train` failed or took too long.
        SettingsError: the cache folder can't be written.
    """
    folder = cache_folder() / "demo" / _fingerprint()
    bundle = folder / "bundle"
    deadline = Deadline.after(TRAINING_SECONDS)
    with _only_one_trains(folder, deadline, report):
        if not bundle.exists():
            log = _write_log(shop, folder)
            report(f"training on {len(shop.training.user_ids):,} sessions of real clicks, once")
            _train(log, bundle, deadline, report)
            log.unlink()
    return bundle


def _write_log(shop: Shop, folder: Path) -> Path:
    log = folder / "clicks.csv"
    try:
        shop.write_training_log(log)
    except OSError as error:
        raise unusable_cache(folder, error) from error
    return log


def _fingerprint() -> str:
    """16 hexadecimal digits over the clicks, the arguments and the code of lrurec: what decides what is learnt."""
    digest = hashlib.sha256(CLICKS_FILE.read_bytes())
    digest.update(" ".join(_ARGUMENTS).encode())
    for source in sorted(Path(lrurec.__path__[0]).glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _only_one_trains(folder: Path, deadline: Deadline, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's lock: of two demos started at once, the second waits for the first one's bundle."""
    with _open_lock(folder) as lock:
        told = False
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if deadline.expired:
                raise TrainingFailed(f"another demo has held {lock.name} for too long; end it and try again")
            if not told:
                report("another demo is training the model: waiting for it")
                told = True
            time.sleep(_POLL_SECONDS)
        yield


def _open_lock(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / "lock").open("w")
    except OSError as error:
        raise unusable_cache(folder, error) from error


def _train(log: Path, bundle: Path, deadline: Deadline, report: Callable[[str], None]) -> None:
    command = [sys.executable, "-c", "from lrurec.cli import main; main()", "train", *_ARGUMENTS]
    training = GuardedProcess([*command, "--interactions", log, "--out", bundle], output=subprocess.PIPE)
    try:
        last = "it said nothing"
        for last in _lines(training, deadline):
            report(last)
        code = training.wait(deadline.remaining)
    except (TimeoutError, subprocess.TimeoutExpired):
        raise TrainingFailed(f"training the demo's model took more than {TRAINING_SECONDS:g} s; last: {last}") from None
    finally:
        training.stop(Deadline.after(_STOP_SECONDS))
    if code != 0:
        raise TrainingFailed(f"lrurec train ended with exit code {code}: {last}")


def _lines(process: GuardedProcess, deadline: Deadline) -> Iterator[str]:
    """Non-empty lines of a process's output, as they come; a carriage return ends a line too.

    Raises:
        TimeoutError: the output has not ended by the deadline.
    """
    if process.stdout is None:
        return
    with process.stdout as output:
        descriptor, rest = output.fileno(), b""
        while True:
            if not select.select([descriptor], [], [], deadline.remaining)[0]:
                raise TimeoutError
            chunk = os.read(descriptor, 65_536)
            *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
            yield from (text for line in lines if (text := line.decode(errors="replace").strip()))
            if not chunk:
                return
