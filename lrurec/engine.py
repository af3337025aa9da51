"""What every engine takes and gives, and the weights that every engine steps with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64

from lrurec.model import Block, LRURec
from lrurec.user_state import StateLayout, UserStates


class Clicks(NamedTuple):
    """Columns of n clicks, in log order within each user.

    `user` indexes the rows of the states that go with them; `item` is an item row, 1..N (an unknown item is no click).
    """

    user: Int32[np.ndarray, " n"]
    item: Int32[np.ndarray, " n"]
    source_offset: Int64[np.ndarray, " n"]
    timestamp_ms: Int64[np.ndarray, " n"]


class Ranking(NamedTuple):
    """The k best items after each of m clicks: rows of the item table, best first, and their scores (logits).

    0 and -inf fill a list where the catalogue has fewer items than k that the user has not seen. `clicks` counts the
    clicks in the user's state at that point.
    """

    items: Int32[np.ndarray, "m k"]
    scores: Float32[np.ndarray, "m k"]
    clicks: Int64[np.ndarray, " m"]


@runtime_checkable
class Engine(Protocol):
    """A model on a device. Not thread-safe: one thread calls it."""

    layout: StateLayout

    def advance(
        self, states: UserStates, clicks: Clicks, ranked: Int64[np.ndarray, " m"]
    ) -> tuple[UserStates, Ranking]:
        """The states after all clicks, one step a click, and the ranking after the clicks that `ranked` names.

        `ranked` ascends; `states` is left as it was. What a click gives depends on its user's state and earlier clicks
        alone, never on how clicks are cut into batches: to the bit on one machine, but for `TorchEngine`.
        """
        ...


class Weights(NamedTuple):
    """The model folded for stepping: λ, γB, γb and the normalised embeddings computed once, in float64."""

    embedded: Float32[np.ndarray, "v d"]
    in_weight: Float32[np.ndarray, "l d w"]  # w = 4d: real parts of 2d channels, then imaginary parts
    in_bias: Float32[np.ndarray, "l w"]
    decay: Float32[np.ndarray, "l 2 h"]
    out_weight: Float32[np.ndarray, "l w d"]
    out_bias: Float32[np.ndarray, "l d"]
    norm_1: Float32[np.ndarray, "l 2 d"]
    up: Float32[np.ndarray, "l d w"]
    up_bias: Float32[np.ndarray, "l w"]
    down: Float32[np.ndarray, "l w d"]
    down_bias: Float32[np.ndarray, "l d"]
    norm_2: Float32[np.ndarray, "l 2 d"]
    epsilon: np.float32


def empty_ranking(rows: int, k: int) -> Ranking:
    return Ranking(np.zeros((rows, k), np.int32), np.full((rows, k), -np.inf, np.float32), np.zeros(rows, np.int64))


def fold(model: LRURec) -> Weights:
    def exact(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().cpu().double().numpy()

    def norm(layer: torch.nn.LayerNorm) -> np.ndarray:
        return np.stack([exact(layer.weight), exact(layer.bias)])

    table = exact(model.item_embedding.weight)
    centred = table - table.mean(1, keepdims=True)
    scale = np.sqrt(centred.var(1, keepdims=True) + model.config.layer_norm_eps)
    embedded = centred / scale * exact(model.layer_norm.weight) + exact(model.layer_norm.bias)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Weights._fields[1:-1]}
    for block in cast("Iterable[Block]", model.blocks):
        lru, feed = block.lru, block.feed_forward
        gamma = np.exp(exact(lru.gamma_log))[:, None]
        decay = np.exp(-np.exp(exact(lru.nu_log)) + 1j * np.exp(exact(lru.theta_log)))
        b, c = exact(lru.input_weight) * gamma[..., None], exact(lru.output_weight)
        folded = {
            "in_weight": np.concatenate([b[..., 0], b[..., 1]]).T,
            "in_bias": (exact(lru.input_bias) * gamma).T.ravel(),
            "decay": np.stack([decay.real, decay.imag]),
            "out_weight": np.concatenate([c[..., 0].T, -c[..., 1].T]),
            "out_bias": exact(lru.output_bias),
            "norm_1": norm(block.layer_norm),
            "up": exact(feed.inner.weight).T,
            "up_bias": exact(feed.inner.bias),
            "down": exact(feed.outer.weight).T,
            "down_bias": exact(feed.outer.bias),
            "norm_2": norm(feed.layer_norm),
        }
        for name, values in folded.items():
            columns[name].append(values)
    stacked = {name: np.ascontiguousarray(np.stack(values), np.float32) for name, values in columns.items()}
    return Weights(embedded.astype(np.float32), **stacked, epsilon=np.float32(model.config.layer_norm_eps))
