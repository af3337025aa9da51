"""The console script `lrurec`. Each error is one line on stderr: exit code 1, or 2 for a wrong command line.

What a command works with is imported inside it: `lrurec --help` doesn't wait for torch.
"""

import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, cast

import click

from lrurec.errors import LRURecError
from lrurec.standard_streams import guard_standard_streams
from lrurec.training.presets import PRESETS

_ERROR = 1
_INTERRUPTED = 130  # a shell's code for a command that Ctrl-C ended

_CUT_QUANTILE = 0.9


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave the process with its exit code."""
    guard_standard_streams()
    try:
        code = _commands.main(arguments, prog_name="lrurec", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(_usage(error), error.exit_code)
    except LRURecError as error:
        _fail(str(error), _ERROR)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except MemoryError:
        _fail("not enough memory; give a smaller log, or a machine with more", _ERROR)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", _ERROR)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f"; see {context.command_path} --help" if context else ""
    return error.format_message().rstrip(".") + hint


def _fail(message: str, code: int) -> NoReturn:
    click.echo("lrurec: " + " ".join(message.split()), err=True)
    sys.exit(code)


class _Command(click.Command):
    """A command whose epilog is an example, printed line by line as it was written."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_example(self, formatter)


class _Commands(click.Group):
    command_class = _Command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)  # click itself would print an empty line

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_example(self, formatter)


def _write_example(command: click.Command, formatter: click.HelpFormatter) -> None:
    with formatter.section("Example"):
        for line in (command.epilog or "").splitlines():
            formatter.write(f"  {line}\n")


class _Timestamp(click.ParamType):
    """A number in the unit of a log's timestamps. Whole ones stay whole: nanoseconds don't fit a float."""

    name = "timestamp"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        with suppress(ValueError):
            return int(value)
        time = math.nan
        with suppress(ValueError):
            time = float(value)
        if not math.isfinite(time):
            self.fail(f"{value!r} is no point in time; give a number in the unit of the log's timestamps", param, ctx)
        return time


class _Quantile(click.FloatRange):
    """Between 0 and 1, neither of them; click's own range lets NaN through."""

    def __init__(self) -> None:
        super().__init__(0, 1, min_open=True, max_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is no number between 0 and 1", param, ctx)
        return number


class _Path(click.Path):
    """A path that can be written down: the libraries that read and write files take no other."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = cast("Path", super().convert(value, param, ctx))
        try:
            str(path).encode()
        except UnicodeEncodeError:
            self.fail(f"{os.fsencode(path)!r} is not UTF-8; give the file another name", param, ctx)
        return path


_BUNDLE = click.argument("bundle", type=_Path())
_INTERACTIONS = click.option(
    "--interactions",
    type=_Path(),
    required=True,
    metavar="FILE",
    help="A log: .csv, .csv.gz, .jsonl, .jsonl.gz or .parquet with the columns user_id, item_id, and timestamp, "
    "timestamp_ms or position.",
)
_OUT = click.option("--out", type=_Path(), required=True, metavar="BUNDLE", help="The folder to write.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="lrurec train --interactions clicks.csv.gz --out shop.bundle\n"
    "lrurec evaluate shop.bundle --interactions clicks.csv.gz\n"
    "lrurec recommend shop.bundle --items A13,B4",
)
@click.version_option(package_name="stream-app")
def _commands() -> None:
    """LRURec: what a user clicks next, by linear recurrent units."""


@_commands.command(epilog="lrurec train --interactions clicks.csv.gz --out shop.bundle --preset eshop")
@_INTERACTIONS
@_OUT
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(list(PRESETS)),
    default="default",
    show_default=True,
    help="Sizes and recipe: `default` for a log of your own, `published` as the paper's code trains.",
)
@click.option(
    "--until",
    type=_Timestamp(),
    metavar="TIMESTAMP",
    help="Learn from the clicks before this time alone, in the unit of the log's timestamps: what is to be evaluated "
    "by `--protocol time-split --cut TIMESTAMP` must not know what came after.",
)
@click.option(
    "--max-steps", type=click.IntRange(1), metavar="N", help="End after N steps at most.  [default: the preset's]"
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=42, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="NAME=VALUE",
    help="Another setting than the preset's, such as threads=1 or precision=float32; again for each.",
)
@click.option(
    "--report",
    type=_Path(),
    metavar="FILE",
    help="Draw what `lrurec report` draws, once trained: .html, .png or .svg.",
)
def train(
    interactions: Path,
    out: Path,
    preset_name: str,
    until: int | float | None,
    max_steps: int | None,
    seed: int,
    device: str,
    changes: tuple[str, ...],
    report: Path | None,
) -> None:
    """Train a model on a log of clicks and write a bundle.

    The same command goes on after a kill, from the checkpoint beside the bundle, to the same weights as if it had
    never been killed; run once more after its end, it finds the bundle and does nothing.
    """
    from lrurec.training.command import train_bundle

    train_bundle(
        interactions,
        out,
        preset_name=preset_name,
        until=until,
        max_steps=max_steps,
        seed=seed,
        device=device,
        changes=changes,
        report=report,
    )


@_commands.command(epilog="lrurec report shop.bundle --out shop.html")
@_BUNDLE
@click.option("--out", type=_Path(), required=True, metavar="FILE", help="The .html, .png or .svg to write.")
def report(bundle: Path, out: Path) -> None:
    """Draw how a bundle's training went and what its model remembers.

    Loss and validation by step, the best step, and |λ| and phase of the channels of every block. An .html is one file
    that needs no network. Needs matplotlib: pip install 'stream-app[report]'.
    """
    from lrurec.bundle import load_bundle
    from lrurec.report import require_drawable, write_report

    require_drawable(out, bundle)
    write_report(out, load_bundle(bundle), bundle.name)
    click.echo(f"{out}: the report on {bundle}")


@_commands.command(
    epilog="lrurec evaluate shop.bundle --interactions clicks.csv.gz --json\n"
    "lrurec train --interactions clicks.csv.gz --until 1369000000 --out may.bundle\n"
    "lrurec evaluate may.bundle --interactions clicks.csv.gz --protocol time-split --cut 1369000000"
)
@_BUNDLE
@_INTERACTIONS
@click.option(
    "--protocol",
    type=click.Choice(["leave-one-out", "time-split"]),
    default="leave-one-out",
    show_default=True,
    help="Ask every user for the last click, as the paper does; or for the first one since a point in time, from "
    "what was clicked before it.",
)
@click.option(
    "--cut-quantile",
    type=_Quantile(),
    metavar="Q",
    help="time-split: cut where this share of the log's clicks is over.  [default: 0.9]",
)
@click.option(
    "--cut", type=_Timestamp(), metavar="TIMESTAMP", help="time-split: cut there, in the log's unit, instead."
)
@_JSON
def evaluate(
    bundle: Path,
    interactions: Path,
    protocol: str,
    cut_quantile: float | None,
    cut: int | float | None,
    as_json: bool,
) -> None:
    """How often, and how high, a user's next click stands among the first 10 and 20 of all items.

    The list leaves out the items of the input window, the user's last clicks before. Beside it the lists that plain
    counting gives: the most popular items, those that followed the last item, those that are clicked by the same
    users (item-kNN). With 95% intervals, by length of the history, by popularity of the answer, and what the lists
    show of the catalogue.

    A time split tells about the future only where the bundle was trained before the cut: see `lrurec train --until`.
    """
    from lrurec.bundle import load_bundle
    from lrurec.evaluation import LeaveOneOut, TimeSplit, time_at_quantile
    from lrurec.evaluation import evaluate as evaluate_bundle
    from lrurec.evaluation.table import table_of
    from lrurec.interactions import read_interactions

    if cut is not None and cut_quantile is not None:
        raise click.UsageError("--cut and --cut-quantile say the same thing twice; give one of them")
    if protocol == "leave-one-out" and (cut is not None or cut_quantile is not None):
        raise click.UsageError("--cut and --cut-quantile are for --protocol time-split; leave-one-out cuts nothing")
    loaded, log = load_bundle(bundle), read_interactions(interactions)
    chosen: LeaveOneOut | TimeSplit = LeaveOneOut()
    if protocol == "time-split":
        chosen = TimeSplit(time_at_quantile(log, cut_quantile or _CUT_QUANTILE) if cut is None else cut)
    result = evaluate_bundle(loaded, log, chosen)
    click.echo(json.dumps(result.to_json()) if as_json else table_of(result))


@_commands.command(epilog="lrurec recommend shop.bundle --items A13,B4,B17 -k 5")
@_BUNDLE
@click.option("--items", default="", metavar="A,B,C", help="Clicks, oldest first.  [default: none, a cold start]")
@click.option("-k", type=click.IntRange(1), default=10, show_default=True, help="Length of the list.")
@click.option("--include-seen", is_flag=True, help="Recommend clicked items too.")
@_JSON
def recommend(bundle: Path, items: str, k: int, include_seen: bool, as_json: bool) -> None:
    """The items most likely to be clicked next, best first."""
    from lrurec.bundle import load_bundle
    from lrurec.recommendation import recommend as recommend_items

    loaded = load_bundle(bundle)
    clicked = [item_id.strip() for item_id in items.split(",") if item_id.strip()]
    result = recommend_items(loaded, clicked, k, include_seen=include_seen)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "items": [item._asdict() for item in result.items],
                    "model_version": loaded.version,
                    "clicks": result.clicks,
                    "unknown_items": result.unknown_items,
                },
                ensure_ascii=False,
            )
        )
        return
    for item in result.items:
        click.echo(f"{item.score:9.4f}  {item.item_id}")
    if result.unknown_items:
        click.echo(f"skipped, not in the catalogue: {', '.join(result.unknown_items)}", err=True)


@_commands.command(epilog="lrurec convert best_acc_model.pth --items items.txt --out shop.bundle")
@click.argument("checkpoint", type=_Path())
@_OUT
@click.option(
    "--items",
    type=_Path(),
    metavar="FILE",
    help="One item id a line, for rows 1..N.  [default: the ids 1 to N]",
)
def convert(checkpoint: Path, out: Path, items: Path | None) -> None:
    """Make a bundle out of the published implementation's weights.

    CHECKPOINT is a .pth with its state_dict, or a .npz whose keys are the parameter names, with or without the prefix
    param/. No code in it is run.
    """
    from lrurec.bundle import require_writable_target, save_bundle
    from lrurec.convert import convert as convert_checkpoint

    require_writable_target(out)
    bundle = convert_checkpoint(checkpoint, items)
    save_bundle(out, bundle)
    config = bundle.config
    sizes = f"{config.num_items:,} items, d = {config.hidden_units}, {config.num_blocks} blocks"
    click.echo(f"{out}: {sizes}, version {bundle.version}")
