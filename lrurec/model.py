"""LRURec: item embedding → blocks of LRU and feed-forward → a score for every item."""

from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np
import torch
from jaxtyping import Complex64, Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional

from lrurec.array_types import (
    Encodings,
    EncodingSequences,
    Items,
    ItemScores,
    ItemSequences,
    Lengths,
    PackedEncodings,
    PackedItems,
    Positions,
    UserStates,
)
from lrurec.config import LRURecConfig
from lrurec.dropout import Dropout
from lrurec.recurrence import LRU, from_planes

PADDING = 0
"""Row of the item that is none: the input of the cold start, and never a recommendation."""

INIT_STD = 0.02


class FeedForward(nn.Module):
    """x ↦ LN(dropout(W2 dropout(GELU(W1 x))) + x), width 4d inside, GELU by erf."""

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        width = config.hidden_units
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)
        self.dropout = Dropout(config.dropout)
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Float32[Tensor, "n d"]) -> Float32[Tensor, "n d"]:
        inner = self.dropout(functional.gelu(self.inner(x)))
        normed: Tensor = self.layer_norm(self.dropout(self.outer(inner)) + x)
        return normed


class Block(nn.Module):
    """x ↦ FF(LN(dropout(LRU(x)) + x)). The state is that of the LRU."""

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        self.lru = LRU(config.hidden_units)
        self.dropout = Dropout(config.dropout)
        self.layer_norm = nn.LayerNorm(config.hidden_units, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Float32[Tensor, "n d"],
        position: Int64[Tensor, " n"],
        state: Complex64[Tensor, "s h"] | None = None,
    ) -> tuple[Float32[Tensor, "n d"], Float[Tensor, "n 2 h"]]:
        """All steps of packed sequences: (output, state after every step, in planes); see `LRU.forward`."""
        y, h = self.lru(x, position, state)
        return self._join(y, x), h

    def step(
        self, x: Float32[Tensor, "b d"], state: Complex64[Tensor, "b h"]
    ) -> tuple[Float32[Tensor, "b d"], Complex64[Tensor, "b h"]]:
        y, h = self.lru.step(x, state)
        return self._join(y, x), h

    def _join(self, y: Tensor, x: Tensor) -> Tensor:
        joined: Tensor = self.feed_forward(self.layer_norm(self.dropout(y) + x))
        return joined


class LRURec(nn.Module):
    """The next item of a sequence of clicks (arXiv 2310.02367, as its published code computes it).

        x_t = LN(dropout(E[item_t]))           no positions
        x_t = block_l(x_t)                     l = 1 .. num_blocks
        scores_t = E x_t + bias                one per row of the item table E, N + 1 of them

    Item rows are 1..N. Row 0 is the padding item: alone, from an empty state, it stands for "no clicks yet", and its
    encoding is learned. It is never an item of a sequence: an unknown item is to be skipped, not encoded as 0.

    The same numbers come out of `encode` (a whole sequence) and of `step` (one click on a carried state), to within
    3e-5 in the scores, in float32 and complex64.
    """

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        self.config = config
        rows, width = config.num_items + 1, config.hidden_units
        self.item_embedding = nn.Embedding(rows, width, _weight=torch.empty(rows, width))  # `reset_parameters` fills it
        self.dropout = Dropout(config.dropout)
        self.layer_norm = nn.LayerNorm(config.hidden_units, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_blocks)])
        self.item_bias = nn.Parameter(torch.empty(config.num_items + 1))
        if not self.item_bias.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Truncated normal, std .02 within ±.04, for all but LayerNorm and the eigenvalues."""
        for name, parameter in self.named_parameters():
            if "layer_norm" not in name and not name.endswith("_log"):
                nn.init.trunc_normal_(parameter, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)

    def initial_state(self, batch: int) -> UserStates:
        """The state of users without a click: zeros."""
        config = self.config
        shape = (batch, config.num_blocks, config.state_channels)
        return torch.zeros(shape, dtype=torch.complex64, device=self.item_bias.device)

    def encode(self, items: ItemSequences, lengths: Lengths) -> EncodingSequences:
        """The encoding after every click: `[i, t]` knows the items 0..t of sequence i, oldest first.

        Sequence i is `items[i, :lengths[i]]`, each 1..N; the rest of the row is padding, ignored, and encoded as zeros.
        Raises ValueError for an item row or a length out of range.
        """
        return self.encode_from(self.initial_state(len(items)), items, lengths)[0]

    def encode_from(
        self, state: UserStates, items: ItemSequences, lengths: Lengths
    ) -> tuple[EncodingSequences, UserStates]:
        """As `encode`, going on from a state: (encodings, the state after each sequence).

        `state` is left as it was. A sequence of length 0 keeps its state.
        """
        batch, tokens = items.shape
        if batch and (lengths.min() < 0 or lengths.max() > tokens):
            raise ValueError(f"lengths must be within 0..{tokens}, the width of items")
        place = torch.arange(tokens, device=items.device).expand(batch, tokens)
        real = place < lengths[:, None]
        packed = items[real]
        if len(packed) and (packed.min() < 1 or packed.max() > self.config.num_items):
            raise ValueError(f"items must be within 1..{self.config.num_items}; unknown items are to be skipped")
        started = lengths > 0
        x, states = self._run(self.item_embedding(packed), place[real], state[started])
        last = lengths[started].cumsum(0) - 1
        encodings = x.new_zeros(batch, tokens, self.config.hidden_units)
        encodings[real] = x
        after = state.clone()
        after[started] = torch.stack([from_planes(h[last]) for h in states], 1)
        return encodings, after

    def encode_packed(self, items: PackedItems, position: Positions) -> PackedEncodings:
        """The encoding after every token of sequences laid end to end.

        `position` counts within each sequence; 0 starts anew from an empty state, whatever came before. The padding
        item may stand here as a sequence of its own: the cold start.
        """
        return self.encode_embedded(self.item_embedding(items), position)

    def encode_embedded(self, embedded: Float32[Tensor, "n d"], position: Positions) -> PackedEncodings:
        """As `encode_packed`, of the items' rows of the table; what training runs."""
        return self._run(embedded, position, None)[0]

    def step(self, items: Items, state: UserStates) -> tuple[Encodings, UserStates]:
        """One click of b users, items 1..N: (encodings, states after it). `state` is left as it was."""
        x = self._normed(self.item_embedding(items))
        after = []
        for index, block in enumerate(self._blocks()):
            x, h = block.step(x, state[:, index])
            after.append(h)
        return x, torch.stack(after, 1)

    def cold_start(self) -> Float32[Tensor, " d"]:
        """The encoding of an empty history: one step on the padding item from an empty state.

        The state after that step is nobody's: a first click starts from `initial_state`.
        """
        padding = torch.full((1,), PADDING, device=self.item_bias.device)
        return self.step(padding, self.initial_state(1))[0][0]

    def scores(self, encodings: Encodings) -> ItemScores:
        """E x + bias, the logits of the next item. Column 0 is the padding item's."""
        return functional.linear(encodings, self.item_embedding.weight, self.item_bias)

    def _blocks(self) -> Iterator[Block]:
        return cast("Iterator[Block]", iter(self.blocks))

    def _normed(self, embedded: Tensor) -> Tensor:
        normed: Tensor = self.layer_norm(self.dropout(embedded))
        return normed

    def _run(self, embedded: Tensor, position: Tensor, state: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Packed encodings (n, d), and each block's states after every token (n, 2, h)."""
        x = self._normed(embedded)
        states = []
        for index, block in enumerate(self._blocks()):
            x, h = block(x, position, None if state is None else state[:, index])
            states.append(h)
        return x, states


def with_weights(config: LRURecConfig, weights: Mapping[str, np.ndarray]) -> LRURec:
    """The model with these weights, not a copy of them: in evaluation mode, on the CPU, nothing to be trained."""
    with torch.device("meta"):
        model = LRURec(config)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, assign=True)
    return model.eval().requires_grad_(requires_grad=False)
