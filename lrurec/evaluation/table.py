"""An evaluation for people to read."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from lrurec.evaluation.bootstrap import LEVEL, RESAMPLES, Intervals
from lrurec.evaluation.metrics import METRIC_NAMES, Metrics
from lrurec.evaluation.report import MODEL, Evaluation, Group

NAME_WIDTH: Final = 14
SHOWN: Final = "ndcg@10"
"""Of the four metrics, the one that groups of users are told by; the JSON has all."""

EXPOSURE: Final = ("coverage", "gini", "popularity_lift")


def table_of(evaluation: Evaluation) -> str:
    """Lines: the metrics with their intervals, groups of users, what the lists show. No line break at the end."""
    return "\n".join(_lines(evaluation))


def _lines(evaluation: Evaluation) -> Iterator[str]:
    yield from _heading(evaluation)
    yield ""
    yield from _metrics(evaluation)
    yield from _groups(f"{SHOWN} by clicks before the answer", evaluation.by_history_length)
    yield from _groups(f"{SHOWN} by popularity of the answer", evaluation.by_popularity)
    yield from _exposure(evaluation.exposure)


def _heading(evaluation: Evaluation) -> Iterator[str]:
    unknown = f", {evaluation.unknown_answers:,} answers unknown to the bundle" if evaluation.unknown_answers else ""
    match evaluation.protocol:
        case {"protocol": name, "cut": cut, "trained_before_cut": trained_before_cut}:
            yield f"{evaluation.users:,} users, {name} at {cut}{unknown}"
            if not trained_before_cut:
                yield (
                    "the bundle does not say that it was trained on this log before the cut and may know the answers; "
                    f"train one by: lrurec train --until {cut}"
                )
        case {"protocol": name}:
            yield f"{evaluation.users:,} users, {name}{unknown}"


def _metrics(evaluation: Evaluation) -> Iterator[str]:
    yield _row(f"{LEVEL:.0%} intervals", METRIC_NAMES, 25)
    for name, metrics in evaluation.metrics.items():
        yield _row(name, _with_intervals(metrics, evaluation.intervals[name], ".4f"), 25)
    difference = evaluation.difference
    yield _row(f"- {difference.baseline}", _with_intervals(difference.metrics, difference.intervals, "+.4f"), 25)
    yield f"(percentiles of {RESAMPLES:,} bootstrap resamples of the users; last line: {MODEL} minus best baseline)"


def _with_intervals(metrics: Metrics, intervals: Intervals, form: str) -> Iterator[str]:
    for value, low, high in zip(metrics, intervals.low, intervals.high, strict=True):
        yield f"{value:{form}} {low:{form}}…{high:{form}}"


def _groups(title: str, groups: Mapping[str, Group]) -> Iterator[str]:
    names = next(iter(groups.values())).metrics
    yield ""
    yield title
    yield _row("", ["users", *names], 11)
    for name, group in groups.items():
        values = (f"{metrics.to_json()[SHOWN]:.4f}" for metrics in group.metrics.values())
        yield _row(name, [f"{group.users:,}", *values], 11)


def _exposure(exposure: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    yield ""
    yield "what the first 10 places show"
    yield _row("", EXPOSURE, 17)
    for name, values in exposure.items():
        yield _row(name, (f"{values[f'{figure}@10']:.3f}" for figure in EXPOSURE), 17)


def _row(name: str, cells: Iterable[str], width: int) -> str:
    return (name.ljust(NAME_WIDTH) + "".join(cell.rjust(width) for cell in cells)).rstrip()
