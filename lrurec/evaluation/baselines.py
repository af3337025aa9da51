"""What a model must be better than: three ways to recommend that take seconds to learn.

All of them learn from clicks that may be known, and where their scores are equal, at zero above all, the more popular
item stands first. They get that by working in an item table of their own, whose rows are sorted by popularity.
"""

from collections.abc import Iterator

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Int64
from torch import Tensor

from lrurec.evaluation.protocols import Examination
from lrurec.evaluation.ranking import Lists, Scorer, score_by_popularity, top_lists
from lrurec.interactions import Histories

COUNTED_CLICKS = 1_000
"""Of a user, the last: they say which items are alike."""

NEIGHBOURS = 200
"""Of an item, the most similar: at most 1.6 KB an item, 92 MB for 57,000 items."""

DAMPING = 20
"""Users that are added to every item's when similarities are scaled: two items that one user shares aren't alike yet.

Chosen with 200 neighbours and weights by 1 / age on the validation clicks of five logs, the paper's among them: without
damping the baseline has half the NDCG@10 where items have few clicks.
"""

PRODUCTS_PER_BLOCK = 1 << 23
"""Co-occurrences counted at a time: at most 64 MiB, unless one item alone has more; an item has at most N."""


def lists_of_baselines(examination: Examination, *, window: int, num_rows: int) -> dict[str, Lists]:
    """What each baseline recommends to everyone who is asked: items of the window excluded, as for a model.

    | name | score of item i after the window i_1 .. i_m, oldest first |
    |---|---|
    | popular | clicks on i |
    | last_item | how often a user's next click after i_m was i |
    | item_knn | Σ_t sim(i_t, i) / (m + 1 - t), see `similarities` |
    """
    clicks = np.bincount(examination.learnable.items, minlength=num_rows)
    rows = _rows_by_popularity(clicks)
    learnable = _renumbered(examination.learnable, rows)
    histories = _renumbered(examination.asked.histories, rows)
    scorers = {
        "popular": score_by_popularity(clicks[rows]),
        "last_item": score_by_last_item(learnable, num_rows),
        "item_knn": score_by_item_knn(learnable, num_rows),
    }
    return {
        name: rows[top_lists(score, histories, window=window, num_rows=num_rows)].astype(np.int32)
        for name, score in scorers.items()
    }


def score_by_last_item(histories: Histories, num_rows: int) -> Scorer:
    """How often each item came right after the last of the window in the histories; 0 for all after no click."""
    is_first = np.zeros(len(histories.items) + 1, np.bool_)
    is_first[histories.offsets] = True
    follows = np.flatnonzero(~is_first[1:-1]) + 1
    pairs = (histories.items[follows - 1], histories.items[follows])
    counts = scipy.sparse.csr_array((np.ones(len(follows), np.float32), pairs), shape=(num_rows, num_rows))

    def score(asked: Histories) -> Tensor:
        # The padding row follows nothing and nothing follows it.
        padded = np.concatenate([np.zeros(1, np.int32), asked.items])
        last = np.where(asked.lengths > 0, padded[asked.offsets[1:]], 0)
        return torch.from_numpy(counts[last].toarray())

    return score


def score_by_item_knn(histories: Histories, num_rows: int) -> Scorer:
    """The sum of similarities to the items of the window, each divided by its age, which is 1 for the last."""
    similar = similarities(histories, num_rows)

    def score(asked: Histories) -> Tensor:
        age = np.repeat(asked.offsets[1:], asked.lengths) - np.arange(len(asked.items))
        weights = (1 / age).astype(np.float32)
        clicked = scipy.sparse.csr_array((weights, asked.items, asked.offsets), shape=(len(asked), num_rows))
        return torch.from_numpy((clicked @ similar).toarray())

    return score


def similarities(histories: Histories, num_rows: int) -> scipy.sparse.csr_array:
    """The damped cosine of two items' sets of users, (v, v) float32; of each row the `NEIGHBOURS` greatest.

        sim(i, j) = |U_i ∩ U_j| / √((|U_i| + DAMPING) (|U_j| + DAMPING))        sim(i, i) = 0

    U_i are the users with i among their last `COUNTED_CLICKS`: time grows with Σ m² over histories of m different
    items, and one robot's would outlast all others. Counted in blocks of items, so that memory is bounded by the
    result. Among equals the lower row is kept.
    """
    histories = histories.last(COUNTED_CLICKS)
    users = np.repeat(np.arange(len(histories)), histories.lengths)
    ones = np.ones(len(users), np.float32)
    by_user = scipy.sparse.csr_array((ones, (users, histories.items)), shape=(len(histories), num_rows))
    by_user.data[:] = 1  # who clicks an item twice is one user
    by_item = by_user.T.tocsr()
    scale = 1 / np.sqrt(np.diff(by_item.indptr) + DAMPING).astype(np.float32)
    products = by_item @ np.diff(by_user.indptr)
    blocks = [
        _neighbours(by_item[items] @ by_user, items, scale) for items in _blocks_of_items(products.astype(np.int64))
    ]
    return scipy.sparse.vstack(blocks, format="csr")


def _neighbours(
    together: scipy.sparse.csr_array, items: slice, scale: "np.ndarray[tuple[int], np.dtype[np.float32]]"
) -> scipy.sparse.csr_array:
    """The rows `items` of the similarities, out of how many users have clicked both."""
    together.sort_indices()
    row = np.repeat(np.arange(items.start, items.stop), np.diff(together.indptr))
    together.data *= scale[row] * scale[together.indices]
    together.data[together.indices == row] = 0
    for start, end in zip(together.indptr[:-1], together.indptr[1:], strict=True):
        if end - start > NEIGHBOURS:
            dropped = np.argsort(-together.data[start:end], kind="stable")[NEIGHBOURS:]
            together.data[start + dropped] = 0
    together.eliminate_zeros()
    return together


def _blocks_of_items(products: Int64[np.ndarray, " v"]) -> Iterator[slice]:
    """Runs of rows, each with no more than `PRODUCTS_PER_BLOCK` co-occurrences to count, or of one row."""
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(products)])
    start = 0
    while start < len(products):
        fitting = int(np.searchsorted(before, before[start] + PRODUCTS_PER_BLOCK, side="right")) - 1
        end = max(start + 1, fitting)
        yield slice(start, end)
        start = end


def _rows_by_popularity(clicks: Int64[np.ndarray, " v"]) -> Int64[np.ndarray, " v"]:
    """Rows from the most clicked to the least, equals in row order; the padding row stays the first."""
    return np.concatenate([np.zeros(1, np.int64), np.argsort(-clicks[1:], kind="stable") + 1])


def _renumbered(histories: Histories, rows: Int64[np.ndarray, " v"]) -> Histories:
    """The same clicks in an item table whose row r is row `rows[r]` of the old one."""
    new_row = np.empty(len(rows), np.int32)
    new_row[rows] = np.arange(len(rows), dtype=np.int32)
    return Histories(new_row[histories.items], histories.offsets)
