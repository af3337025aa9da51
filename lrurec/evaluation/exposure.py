"""What lists show of the catalogue, whether or not they are right."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from lrurec.evaluation.metrics import CUTOFFS
from lrurec.evaluation.ranking import Lists


class Exposure(NamedTuple):
    """Of the first K places of everybody's list, over a catalogue of N items.

    With x_i the number of lists that item i is in, and c_i its clicks in what may be known:

        coverage         |{i : x_i > 0}| / N                                    1: every item is shown to somebody
        gini             Σ_i (2i - N - 1) x_(i) / (N Σ_i x_i), x ascending      0: all equally often, 1: one item alone
        popularity_lift  exp(mean log(1 + c) over all places - mean log(1 + c) over the answers)
                                                                                2: twice as popular as what is clicked
    """

    coverage: float
    gini: float
    popularity_lift: float


def exposure_of(
    lists: Lists, answers: Int32[np.ndarray, " users"], clicks: Int64[np.ndarray, " v"], k: int
) -> Exposure:
    """An answer in row 0, which is none of the catalogue's, counts as one without clicks. Empty places don't count."""
    shown = lists[:, :k][lists[:, :k] > 0]
    times = np.bincount(shown, minlength=len(clicks))[1:]
    log_clicks = np.log1p(clicks)
    lift = float(np.exp(log_clicks[shown].mean() - log_clicks[answers].mean())) if len(shown) else 0.0
    return Exposure(float((times > 0).mean()), _gini(times), lift)


def exposure_to_json(
    lists: Lists, answers: Int32[np.ndarray, " users"], clicks: Int64[np.ndarray, " v"]
) -> dict[str, Any]:
    """Every figure at every K, as `coverage@10`."""
    at = {k: exposure_of(lists, answers, clicks, k) for k in CUTOFFS}
    return {f"{name}@{k}": round(value, 6) for k in CUTOFFS for name, value in at[k]._asdict().items()}


def _gini(times: Int64[np.ndarray, " items"]) -> float:
    place = np.arange(1, len(times) + 1)
    total = int(times.sum())
    return float(((2 * place - len(times) - 1) * np.sort(times)).sum() / (len(times) * total)) if total else 0.0
