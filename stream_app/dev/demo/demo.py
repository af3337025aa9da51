"""`stream-app demo`: a real Kafka, a trained model, the real worker, real clicks, and a view of what happens."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from stream_app.dev.demo.bundle import demo_bundle
from stream_app.dev.demo.flow import DemoFlow
from stream_app.dev.demo.shop import Shop
from stream_app.dev.demo.worker import STOP_SECONDS, DemoWorker
from stream_app.dev.kafka.broker import DEFAULT_PORT, LocalBroker, PortTaken
from stream_app.dev.signals import keyboard_interrupt_on_signals
from stream_app.errors import SettingsError, StreamAppError
from stream_app.settings import Settings
from stream_app.topics import ensure_topics

WATCHABLE_RATE = 20.0
"""Clicks per second that eyes can follow."""
_SECONDS_OF_CLICKS = 30.0
"""How long the default rate takes for a given number of clicks, once that is faster than `WATCHABLE_RATE`."""


@dataclass(frozen=True)
class DemoOptions:
    clicks: int | None = None
    """End after that many clicks have their recommendations; None: go on until told to end."""
    rate: float | None = None
    """Clicks per second; None: watchable, or for a number of clicks done in about 30 seconds."""

    @property
    def clicks_per_second(self) -> float:
        return self.rate or max(WATCHABLE_RATE, (self.clicks or 0) / _SECONDS_OF_CLICKS)


def run_demo(options: DemoOptions, console: Console) -> bool:
    """Run it all; tells whether it came to its end: all clicks answered, or an endless demo ended by a signal.

    Raises:
        StreamAppError, LRURecError: a part could not be started, or died.
        KeyboardInterrupt: ended by a signal before it was under way.
    """
    with keyboard_interrupt_on_signals(), _scratch_folder() as folder:
        tell = _teller(console)
        shop = Shop.load()
        bundle = demo_bundle(shop, tell)
        with _broker(folder / "kafka", tell) as broker:
            settings = Settings(
                broker=broker.bootstrap,
                model=bundle,
                app_id="stream-app-demo",
                state_dir=folder / "state",
                web_port=0,
                shutdown_seconds=STOP_SECONDS - 1,
            )
            asyncio.run(_create_topics(settings))
            tell("starting the worker")
            with DemoWorker(settings, folder / "worker.log") as worker:
                flow = DemoFlow(shop, settings, worker, options.clicks, options.clicks_per_second)
                return asyncio.run(flow.run(console))


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A temporary folder for everything the demo writes; after a failure the logs in it stay.

    Raises:
        SettingsError: neither TMPDIR nor the system's own temporary folders can be written.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="stream-app-demo-"))
    except OSError as error:
        raise SettingsError(
            f"the demo has no temporary folder: {error.strerror}; name one that can be written by TMPDIR"
        ) from error
    try:
        yield folder
    except StreamAppError:
        _keep_only_logs(folder)
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _keep_only_logs(folder: Path) -> None:
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.name not in {"worker.log", "broker.log"}:
            path.unlink(missing_ok=True)


def _teller(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _broker(folder: Path, tell: Callable[[str], None]) -> Iterator[LocalBroker]:
    """A broker for this demo alone, on the default port if that is free; killed, since its data are thrown away."""
    broker = LocalBroker(folder, port=DEFAULT_PORT, report=tell)
    try:
        try:
            broker.start()
        except PortTaken:
            tell(f"port {DEFAULT_PORT} is taken: using a free one")
            broker = LocalBroker(folder, port=0, report=tell)
            broker.start()
        yield broker
    finally:
        broker.kill()


async def _create_topics(settings: Settings) -> None:
    await ensure_topics(settings)
