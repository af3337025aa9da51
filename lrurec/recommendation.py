"""What to recommend after a few clicks, asked once: exact, float32, by the parallel form.

Serving many users from stored states is `lrurec.serving`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrurec.bundle import Bundle
from lrurec.model import PADDING, LRURec


class ScoredItem(NamedTuple):
    item_id: str
    score: float
    """The logit of being the next click."""


class Recommendation(NamedTuple):
    items: list[ScoredItem]
    """Best first; equal scores stand in row order."""

    clicks: int
    """Clicks that the model knows; 0 means cold start."""

    unknown_items: list[str]
    """Items given that the catalogue doesn't hold, once each. They are skipped."""


@torch.inference_mode()
def recommend(bundle: Bundle, item_ids: Sequence[str], k: int, *, include_seen: bool = False) -> Recommendation:
    """The k best items after these clicks, oldest first, without those clicked unless `include_seen`.

    Fewer where the catalogue has fewer left. No known click at all gives the cold start.
    """
    rows = torch.from_numpy(bundle.catalogue.rows(item_ids)).long()
    unknown = [item_id for item_id, row in zip(item_ids, rows.tolist(), strict=True) if row == 0]
    known = rows[rows > 0]
    scores = bundle.model.scores(_encode(bundle.model, known)[None])[0]
    scores[PADDING] = -torch.inf
    if not include_seen:
        scores[known] = -torch.inf
    best, order = scores.sort(descending=True, stable=True)
    # -inf sorts last: what may not be recommended is cut off whatever k is.
    left = min(k, int(best.isfinite().sum()))
    ranked = zip(order[:left].tolist(), best[:left].tolist(), strict=True)
    items = [ScoredItem(bundle.catalogue.item_id(row), score) for row, score in ranked]
    return Recommendation(items, len(known), list(dict.fromkeys(unknown)))


def _encode(model: LRURec, rows: Tensor) -> Tensor:
    if not len(rows):
        return model.cold_start()
    return model.encode(rows[None], torch.tensor([len(rows)]))[0, -1]
