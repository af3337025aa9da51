"""How often, and how high, the next click stands in the list: leave-one-out over all items."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from lrurec.array_types import ItemScores
from lrurec.bundle import Bundle
from lrurec.errors import InteractionsError
from lrurec.interactions import MIN_CLICKS_TO_EVALUATE, HeldOut, Histories, Interactions, leave_one_out
from lrurec.model import PADDING, LRURec

TOKENS_PER_BATCH = 16_384
SCORES_PER_BATCH = 1 << 24
"""At most 64 MiB of float32 scores at a time."""

Scorer: TypeAlias = Callable[[Histories], ItemScores]
"""A score per row of the item table for each of b histories, any of which may be empty."""

MISSED = np.iinfo(np.int64).max
"""The rank of an answer that cannot be recommended: unknown, or among the items already seen."""


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
        return {name.replace("_at_", "@"): round(value, 6) for name, value in self._asdict().items()}


class Evaluation(NamedTuple):
    users: int
    model: Metrics
    popular: Metrics
    """Of recommending to everyone the items with the most clicks in the same histories."""

    def to_json(self) -> dict[str, Any]:
        return {"users": self.users, **self.model.to_json(), "baselines": {"popular": self.popular.to_json()}}


def evaluate(bundle: Bundle, interactions: Interactions) -> Evaluation:
    """Leave-one-out on every user's last click, ranked among all items but those of the input window.

    The window is the last `config.max_len` clicks, as in training and in the paper. Items that the bundle doesn't know
    are skipped in a history; as an answer they count as missed.

    Raises `InteractionsError` if nobody has 3 clicks, or the log has no item of the bundle.
    """
    histories = interactions.histories_in(bundle.catalogue)
    if not histories.items.any():
        raise InteractionsError("no item of the log is in the bundle's catalogue; give a log of the same shop")
    test = leave_one_out(histories).test
    if not len(test.answers):
        raise InteractionsError(f"no user has {MIN_CLICKS_TO_EVALUATE} clicks; there is nobody to evaluate")
    test = HeldOut(test.histories.known(), test.answers)
    num_rows = bundle.config.num_items + 1
    # The clicks that are asked for are nobody's knowledge.
    popularity = np.bincount(histories.items, minlength=num_rows) - np.bincount(test.answers, minlength=num_rows)

    def measure(score: Scorer) -> Metrics:
        return metrics_of(rank_answers(score, test, window=bundle.config.max_len, num_rows=num_rows))

    return Evaluation(
        len(test.answers), measure(score_by_model(bundle.model)), measure(score_by_popularity(popularity))
    )


def metrics_of(ranks: Int64[np.ndarray, " users"]) -> Metrics:
    def recall(k: int) -> float:
        return float((ranks < k).mean())

    def ndcg(k: int) -> float:
        gains = 1 / np.log2(np.minimum(ranks, k) + 2)
        return float(np.where(ranks < k, gains, 0).mean())

    return Metrics(recall(10), ndcg(10), recall(20), ndcg(20))


def rank_answers(score: Scorer, held_out: HeldOut, *, window: int, num_rows: int) -> Int64[np.ndarray, " users"]:
    """The rank of every user's answer after the last `window` items of the history; `MISSED` where there is none.

    Scores are `num_rows` = N + 1 a user. The padding row and items of the window are not ranked. Equal scores stand in
    row order.
    """
    histories = held_out.histories.last(window)
    ranks = np.full(len(histories), MISSED)
    for users in _batches(histories.lengths, num_rows):
        part = histories.take(users)
        scores = score(part)
        answers = torch.from_numpy(held_out.answers[users].astype(np.int64)).to(scores.device)
        ranks[users] = _ranks(scores, part, answers).cpu().numpy()
    return ranks


def score_by_model(model: LRURec) -> Scorer:
    """Scores of the model in evaluation mode, on the device where it is; it is left in evaluation mode."""
    model.eval()
    device = model.item_bias.device

    @torch.no_grad()
    def score(histories: Histories) -> Tensor:
        # Who has no clicks is asked by the padding item: the cold start.
        lengths = np.maximum(histories.lengths, 1)
        ends = np.cumsum(lengths)
        items = np.full(ends[-1], PADDING, np.int64)
        position = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        items[np.repeat(histories.lengths > 0, lengths)] = histories.items
        encodings = model.encode_packed(torch.from_numpy(items).to(device), torch.from_numpy(position).to(device))
        return model.scores(encodings[torch.from_numpy(ends - 1).to(device)])

    return score


def score_by_popularity(clicks: Int64[np.ndarray, " v"]) -> Scorer:
    """The same scores for everyone: the number of clicks on each item."""
    scores = torch.from_numpy(clicks.astype(np.float32))
    return lambda histories: scores.repeat(len(histories), 1)


def _ranks(scores: Tensor, histories: Histories, answers: Tensor) -> Tensor:
    users = torch.from_numpy(np.repeat(np.arange(len(histories)), histories.lengths)).to(scores.device)
    seen = torch.from_numpy(histories.items.astype(np.int64)).to(scores.device)
    scores[users, seen] = -torch.inf
    scores[:, PADDING] = -torch.inf
    own = scores.gather(1, answers[:, None])
    rows = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > own) | ((scores == own) & (rows < answers[:, None]))
    return torch.where(own[:, 0].isfinite(), ahead.sum(1), MISSED)


def _batches(lengths: Int64[np.ndarray, " users"], num_rows: int) -> Iterator[Int64[np.ndarray, " u"]]:
    """Users in order, cut so that neither tokens nor scores of a batch outgrow their budget."""
    users_by_scores = max(1, SCORES_PER_BATCH // num_rows)
    tokens_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.maximum(lengths, 1))])
    start = 0
    while start < len(lengths):
        by_tokens = int(np.searchsorted(tokens_before, tokens_before[start] + TOKENS_PER_BATCH, side="right")) - 1
        end = max(start + 1, min(start + users_by_scores, by_tokens))
        yield np.arange(start, end)
        start = end
