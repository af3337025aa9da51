"""Recall and NDCG of answers whose place in the list is known."""

from typing import Final, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float64, Int64

CUTOFFS: Final = (10, 20)
"""K of Recall@K and NDCG@K, and of what is said about lists."""

LIST_LENGTH: Final = max(CUTOFFS)

Ranks: TypeAlias = Int64[np.ndarray, " users"]
"""The place of every user's answer in the list, 0 for the top; `LIST_LENGTH` or more is not in it."""


class Metrics(NamedTuple):
    """Means over users; rank 0 is the top of the list.

    Each user has one answer, so recall@K is the share of users with rank < K, and ndcg@K is the mean of
    1 / log2(rank + 2) over those, 0 over the others.
    """

    recall_at_10: float
    ndcg_at_10: float
    recall_at_20: float
    ndcg_at_20: float

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 6) for name, value in zip(METRIC_NAMES, self, strict=True)}


METRIC_NAMES: Final = tuple(name.replace("_at_", "@") for name in Metrics._fields)


def metrics_of(ranks: Ranks) -> Metrics:
    def recall(k: int) -> float:
        return float((ranks < k).mean())

    def ndcg(k: int) -> float:
        gains = 1 / np.log2(np.minimum(ranks, k) + 2)
        return float(np.where(ranks < k, gains, 0).mean())

    return Metrics(recall(10), ndcg(10), recall(20), ndcg(20))


GAINS: Final[Float64[np.ndarray, "places 4"]] = np.array(
    [metrics_of(np.array([rank], np.int64)) for rank in range(LIST_LENGTH + 1)]
)
"""What an answer at each place adds to the four metrics: places 0..19 of the list, and 20 for none of them.

The metrics of users whose ranks have the histogram c over these places are (c @ GAINS) / c.sum().
"""
