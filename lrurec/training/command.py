"""`lrurec train`: from a log to a bundle in a folder, with progress on the terminal."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import click
from rich.progress import BarColumn, Progress, TextColumn

from lrurec.bundle import CONFIG_FILE, Bundle, load_bundle, require_writable_target, save_bundle
from lrurec.errors import BundleError
from lrurec.evaluation import Metrics
from lrurec.interactions import read_interactions
from lrurec.report import require_drawable, write_report
from lrurec.training.checkpoint import checkpoint_of, is_checkpoint_of
from lrurec.training.only_one import only_training_of
from lrurec.training.presets import changed, preset
from lrurec.training.train import TrainingReport, run_id
from lrurec.training.train import train as train_model

LINE_SECONDS = 2.0
"""Between two lines of progress where the output isn't a terminal."""


def train_bundle(
    interactions: Path,
    out: Path,
    *,
    preset_name: str,
    until: int | float | None = None,
    max_steps: int | None,
    seed: int,
    device: str,
    changes: Sequence[str] = (),
    report: Path | None = None,
) -> None:
    """Train, save, draw the report if one is asked for, and tell on stdout.

    A bundle that this very training has made is left as it is. With `until`, the log is what it was at that time.
    """
    require_writable_target(out)
    if report is not None:
        require_drawable(report, out)
    log = read_interactions(interactions)
    if until is not None:
        log = log.before(until)
    settings = changed(dataclasses.replace(preset(preset_name), seed=seed), changes)
    if max_steps is not None:
        settings = dataclasses.replace(settings, max_steps=max_steps)
    checkpoint, identity = checkpoint_of(out), run_id(log, settings, log.catalogue, device)
    with only_training_of(out):
        if (done := _trained_before(out, identity)) is None:
            users, clicks, items = len(log.user_ids), len(log.histories.items), len(log.catalogue)
            click.echo(f"{interactions}: {clicks:,} clicks of {users:,} users on {items:,} items")
            if is_checkpoint_of(checkpoint, identity):
                click.echo(f"going on from {checkpoint}")
            with _progress() as on_report:
                trained = train_model(log, settings, device=device, checkpoint=checkpoint, on_report=on_report)
            arguments: dict[str, str | int | float] = {
                "interactions": interactions.name,
                "preset": preset_name,
                "device": device,
            }
            if until is not None:
                arguments["until"] = until
            done = dataclasses.replace(trained, metadata={"arguments": arguments, **trained.metadata})
            save_bundle(out, done)
        if is_checkpoint_of(checkpoint, identity):  # another training's is not ours to remove
            checkpoint.unlink(missing_ok=True)
    click.echo(_summary(out, done))
    if report is not None:
        write_report(report, done, out.name)


def _trained_before(out: Path, identity: str) -> Bundle | None:
    if not (out / CONFIG_FILE).exists():
        return None
    try:
        bundle = load_bundle(out)
    except BundleError:
        return None  # it is about to be replaced
    return bundle if bundle.metadata.get("run") == identity and _metrics_of(bundle) else None


def _metrics_of(bundle: Bundle) -> str | None:
    """What its metadata say of how good it is; None where they hold no such thing, as anybody may have edited them."""
    match bundle.metadata:
        case {
            "metrics": {
                "test": {"recall@10": float(recall), "ndcg@10": float(ndcg)},
                "validation": {"recall@10": float(validation)},
            },
            "best_step": int(step),
        }:
            return (
                f"test recall@10 {recall:.4f}, ndcg@10 {ndcg:.4f}, "
                f"validation recall@10 {validation:.4f} at step {step:,}"
            )
    return None


def _summary(out: Path, bundle: Bundle) -> str:
    return f"{out}: version {bundle.version}, {_metrics_of(bundle)}"


@contextmanager
def _progress() -> Iterator[Callable[[TrainingReport], None]]:
    """A bar on a terminal under a line for every validation; elsewhere a line now and then."""
    if not sys.stdout.isatty():
        yield _Lines()
        return
    columns = (BarColumn(bar_width=None), TextColumn("{task.description}"))
    with Progress(*columns, expand=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(report: TrainingReport) -> None:
            if report.validation:
                bar.console.print(_validation_line(report, report.validation), highlight=False, soft_wrap=True)
            bar.update(task, total=report.steps, completed=report.step, description=_short_line(report))

        yield show


class _Lines:
    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, report: TrainingReport) -> None:
        if report.validation or time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_SECONDS
            click.echo(_line(report))


def _line(report: TrainingReport) -> str:
    parts = [f"step {report.step:,} of {report.steps:,}", f"loss {report.loss:.3f}"]
    if report.validation:
        parts.append(f"validation recall@10 {report.validation.recall_at_10:.4f}")
    if report.best_recall_at_10 is not None:
        parts.append(f"best {report.best_recall_at_10:.4f}")
    parts += [f"{report.examples_per_second:,.0f} examples/s", _time_left(report)]
    return ", ".join(parts)


def _short_line(report: TrainingReport) -> str:
    """What stands beside the bar: it must leave room for one in 80 columns."""
    parts = [f"{report.step:,}/{report.steps:,}", f"loss {report.loss:.3f}"]
    if report.best_recall_at_10 is not None:
        parts.append(f"best {report.best_recall_at_10:.4f}")
    parts += [f"{report.examples_per_second:,.0f} examples/s", _time_left(report)]
    return "  ".join(parts)


def _validation_line(report: TrainingReport, metrics: Metrics) -> str:
    values = f"validation recall@10 {metrics.recall_at_10:.4f}, ndcg@10 {metrics.ndcg_at_10:.4f}"
    best = ", best" if metrics.recall_at_10 == report.best_recall_at_10 else ""
    return f"step {report.step:,}: loss {report.loss:.3f}, {values}{best}"


def _time_left(report: TrainingReport) -> str:
    """Hours, minutes and seconds until the last step."""
    return f"{timedelta(seconds=round(report.seconds_left))} left"
