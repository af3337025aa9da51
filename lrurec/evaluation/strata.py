"""Users in groups: by how much is known of them, and by how popular the answer is."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

LENGTHS: Final = (1, 5, 10, 20, 50)
"""The fewest clicks before the answer in each group."""

POPULARITY: Final = ("head", "middle", "tail", "unseen")


class Stratum(NamedTuple):
    name: str
    users: Bool[np.ndarray, " users"]


def by_history_length(clicks_before: Int64[np.ndarray, " users"]) -> list[Stratum]:
    """1-4, 5-9, 10-19, 20-49 and 50+ clicks before the answer, without the groups that nobody is in."""
    group = np.searchsorted(LENGTHS, clicks_before, side="right") - 1
    names = [f"{low}-{next_low - 1}" for low, next_low in pairwise(LENGTHS)]
    return _strata([*names, f"{LENGTHS[-1]}+"], group)


def by_popularity(answers: Int32[np.ndarray, " users"], clicks: Int64[np.ndarray, " v"]) -> list[Stratum]:
    """Head, middle, tail and unseen answers, without the groups that nobody is in; see `popularity_groups`.

    An answer in row 0, which is none of the catalogue's, is unseen.
    """
    return _strata(POPULARITY, popularity_groups(clicks)[answers])


def popularity_groups(clicks: Int64[np.ndarray, " v"]) -> Int64[np.ndarray, " v"]:
    """The place in `POPULARITY` of every item, by its clicks in what may be known.

    From the most clicked item down: those that begin within the first third of all clicks are the head, within the
    second the middle, the others with a click the tail, and those without one unseen.
    """
    order = np.argsort(-clicks, kind="stable")
    ahead = np.empty_like(clicks)
    ahead[order] = np.cumsum(clicks[order]) - clicks[order]
    return np.where(clicks > 0, 3 * ahead // max(1, int(clicks.sum())), len(POPULARITY) - 1)


def _strata(names: Sequence[str], group: Int64[np.ndarray, " users"]) -> list[Stratum]:
    return [Stratum(name, group == index) for index, name in enumerate(names) if (group == index).any()]
