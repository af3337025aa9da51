"""How far a figure would move with other users of the same kind: percentile intervals of the bootstrap.

A resample draws as many users as there are, with replacement. The metrics see nothing of a user but the place of the
answer, one of 21, so that the histogram of places in a resample is exactly multinomial with the shares that were seen.
It is drawn as such: thousands of resamples cost nothing, whatever the number of users. For the difference of two lists
a user is a pair of places, one of 441.
"""

from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from lrurec.evaluation.metrics import GAINS, LIST_LENGTH, METRIC_NAMES, Metrics, Ranks

RESAMPLES: Final = 2_000
LEVEL: Final = 0.95
SEED: Final = 0
PLACES: Final = LIST_LENGTH + 1
"""Those of the list, and none."""


class Intervals(NamedTuple):
    """Within which a metric lies in `LEVEL` of the resamples, half of the rest below and half above."""

    low: Metrics
    high: Metrics

    def to_json(self) -> dict[str, list[float]]:
        return {name: [round(low, 6), round(high, 6)] for name, low, high in zip(METRIC_NAMES, *self, strict=True)}


def intervals(ranks: Ranks, *, resamples: int = RESAMPLES, seed: int = SEED) -> Intervals:
    """Of the four metrics of one kind of list."""
    histogram = np.bincount(_places(ranks), minlength=PLACES)
    return _percentiles(_resampled(histogram, resamples, seed) @ GAINS)


def intervals_of_difference(ranks: Ranks, other: Ranks, *, resamples: int = RESAMPLES, seed: int = SEED) -> Intervals:
    """Of the four metrics minus those of other lists for the same users, drawn together."""
    histogram = np.bincount(_places(ranks) * PLACES + _places(other), minlength=PLACES**2)
    differences = GAINS[:, None] - GAINS[None]
    return _percentiles(_resampled(histogram, resamples, seed) @ differences.reshape(PLACES**2, -1))


def _places(ranks: Ranks) -> Ranks:
    places: Ranks = np.minimum(ranks, LIST_LENGTH)
    return places


def _resampled(
    histogram: Int64[np.ndarray, " kinds"], resamples: int, seed: int
) -> Float64[np.ndarray, "resamples kinds"]:
    """The share of every kind of user in each resample."""
    users = histogram.sum()
    drawn = np.random.default_rng(seed).multinomial(users, histogram / users, size=resamples)
    shares: Float64[np.ndarray, "resamples kinds"] = drawn / users
    return shares


def _percentiles(metrics: Float64[np.ndarray, "resamples 4"]) -> Intervals:
    low, high = np.quantile(metrics, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Intervals(Metrics(*low.tolist()), Metrics(*high.tolist()))
