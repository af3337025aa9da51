"""The list for every user, and the answer's place in it: a batch of users at a time, never users × items at once."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from lrurec import kernels
from lrurec.array_types import ItemScores
from lrurec.evaluation.metrics import LIST_LENGTH, Ranks
from lrurec.interactions import Histories
from lrurec.model import PADDING, LRURec
from lrurec.serving import packed_items
from lrurec.threads import in_threads, limited_threads

TOKENS_PER_BATCH = 16_384
SCORES_PER_BATCH = 1 << 24
"""At most 64 MiB of float32 scores at a time."""

Scorer: TypeAlias = Callable[[Histories], ItemScores]
"""A score per row of the item table for each of b histories, any of which may be empty."""

Lists: TypeAlias = Int32[np.ndarray, "users k"]
"""What each user is recommended: item rows, best first; 0 where fewer than k items are left."""

MISSED = np.iinfo(np.int64).max
"""The rank of an answer that cannot be recommended: unknown, or among the items already seen."""


def lists_by_model(model: LRURec, histories: Histories, *, window: int) -> Lists:
    """The `LIST_LENGTH` best items for every user after the last `window` items of the history, none of them again.

    Exact, in float32, equal scores in row order, by `kernels.rank`, shared out over torch's
    threads: scores are never written down. A history without items is the cold start. The model may be on any device,
    and is left in evaluation mode.
    """
    recent = histories.last(window)
    lists = np.zeros((len(recent), LIST_LENGTH), np.int32)
    table, bias = (each.detach().cpu().numpy() for each in (model.item_embedding.weight, model.item_bias))
    items = packed_items(table, bias)
    with limited_threads(None):
        for users in _batches(recent.lengths, num_rows=1):
            part = recent.take(users)
            _fill_lists(_last_encodings(model, part), items, _padded(part), lists[users[0] : users[-1] + 1])
    return lists


def _fill_lists(
    encodings: Float32[np.ndarray, "u d"],
    items: tuple[Float32[np.ndarray, "g passes d at_once"], Float32[np.ndarray, "g columns"]],
    seen: Int32[np.ndarray, "u window"],
    lists: Lists,
) -> None:
    scores = np.empty(lists.shape, np.float32)
    parts = np.array_split(np.arange(len(lists)), torch.get_num_threads())

    def fill(index: int) -> None:
        if len(users := parts[index]):
            own = slice(users[0], users[-1] + 1)
            kernels.rank(encodings, users, *items, seen, lists[own], scores[own])

    in_threads(fill, len(parts))


@torch.no_grad()
def _last_encodings(model: LRURec, histories: Histories) -> Float32[np.ndarray, "u d"]:
    model.eval()
    device = model.item_bias.device
    # Who has no clicks is asked by the padding item: the cold start.
    lengths = np.maximum(histories.lengths, 1)
    ends = np.cumsum(lengths)
    items = np.full(ends[-1], PADDING, np.int64)
    position = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    items[np.repeat(histories.lengths > 0, lengths)] = histories.items
    encodings = model.encode_packed(torch.from_numpy(items).to(device), torch.from_numpy(position).to(device))
    last: Float32[np.ndarray, "u d"] = encodings[torch.from_numpy(ends - 1).to(device)].cpu().numpy()
    return last


def _padded(histories: Histories) -> Int32[np.ndarray, "u window"]:
    """A row of items a user, filled up with 0."""
    lengths = histories.lengths
    items = np.zeros((len(histories), lengths.max(initial=0)), np.int32)
    items[np.arange(items.shape[1]) < lengths[:, None]] = histories.items
    return items


def top_lists(score: Scorer, histories: Histories, *, window: int, num_rows: int) -> Lists:
    """The same lists out of any scores, `num_rows` = N + 1 a user, on the CPU."""
    recent = histories.last(window)
    lists = np.zeros((len(recent), LIST_LENGTH), np.int32)
    for users in _batches(recent.lengths, num_rows):
        part = recent.take(users)
        scores = _without_seen(score(part), part)
        kernels.best_of(scores.numpy(), lists[users[0] : users[-1] + 1])
    return lists


def ranks_in(lists: Lists, answers: Int32[np.ndarray, " users"]) -> Ranks:
    """The place of each answer in its user's list; `MISSED` where it isn't there, and for an unknown answer, row 0."""
    hits = (lists == answers[:, None]) & (lists > 0)
    return np.where(hits.any(1), hits.argmax(1), MISSED)


def score_by_popularity(clicks: Int64[np.ndarray, " v"]) -> Scorer:
    """The same scores for everyone: the number of clicks on each item."""
    scores = torch.from_numpy(clicks.astype(np.float32))
    return lambda histories: scores.repeat(len(histories), 1)


def _without_seen(scores: Tensor, histories: Histories) -> Tensor:
    """The scores themselves, with -inf for the padding row and every item of the history."""
    users = torch.from_numpy(np.repeat(np.arange(len(histories)), histories.lengths)).to(scores.device)
    seen = torch.from_numpy(histories.items.astype(np.int64)).to(scores.device)
    scores[users, seen] = -torch.inf
    scores[:, PADDING] = -torch.inf
    return scores


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
