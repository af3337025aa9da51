"""The peer of `benchmarks.training`: LRURec trained as it is usually written.

Padded windows, autograd through complex arithmetic, a scan by recursive doubling, float32 scores of all items at every
position, torch's own cross entropy and dropout. It computes with the parameters of an `LRURec`, so that its loss and
gradients can be held against ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrurec.model import PADDING, Block, LRURec
from lrurec.recurrence import LRU


def loss(model: LRURec, items: Tensor, labels: Tensor, dropout: float, smoothing: float) -> Tensor:
    """Mean cross entropy of the labels that are not padding.

    Both arguments are (b, t), padded on the left; t is a power of two. An item's own place holds its label: the item
    that came next.
    """
    x = model.layer_norm(functional.dropout(model.item_embedding(items), dropout))
    real = items != PADDING
    for block in model.blocks:
        assert isinstance(block, Block)
        x = block_output(block, x, real, dropout)
    scores = functional.linear(x, model.item_embedding.weight, model.item_bias)
    return functional.cross_entropy(
        scores.flatten(0, 1), labels.flatten(), ignore_index=PADDING, label_smoothing=smoothing
    )


def block_output(block: Block, x: Tensor, real: Tensor, dropout: float) -> Tensor:
    """FF(LN(dropout(LRU(x)) + x)) of (b, t, d)."""
    y = block.layer_norm(functional.dropout(recurrence(block.lru, x, real), dropout) + x)
    feed_forward = block.feed_forward
    inner = functional.dropout(functional.gelu(feed_forward.inner(y)), dropout)
    result: Tensor = feed_forward.layer_norm(functional.dropout(feed_forward.outer(inner), dropout) + y)
    return result


def recurrence(lru: LRU, x: Tensor, real: Tensor) -> Tensor:
    """Re(C h + c), h_t = λ h_{t-1} + γ (B x_t + b); what padding leaves behind is forgotten."""
    eigenvalues = lru.eigenvalues()
    drive = x.to(torch.complex64) @ torch.view_as_complex(lru.input_weight).T + torch.view_as_complex(lru.input_bias)
    h = drive * lru.gamma_log.exp()
    length, powers = 1, eigenvalues[None]
    batch, tokens, channels = h.shape
    while length < tokens:
        # The second half of every run of 2·length tokens takes up the end of the first.
        halves = h.view(batch, tokens // (2 * length), 2, length, channels)
        masked = real.view(batch, tokens // (2 * length), 2, length)[:, :, 0, -1:, None]
        second = halves[:, :, 1] + powers * halves[:, :, 0, -1:] * masked
        h = torch.stack([halves[:, :, 0], second], 2).view(batch, tokens, channels)
        powers = torch.cat([powers, powers * powers[-1]])
        length *= 2
    return (h @ torch.view_as_complex(lru.output_weight).T).real + lru.output_bias


def optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW as published, in torch's default form."""
    plain = [p for name, p in model.named_parameters() if "bias" in name or "layer_norm" in name]
    decayed = [p for name, p in model.named_parameters() if "bias" not in name and "layer_norm" not in name]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], eps=1e-9
    )
