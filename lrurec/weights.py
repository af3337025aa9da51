"""A model's weights as arrays, by the names of its `state_dict`: which they are, and what steps are computed with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from lrurec.config import LRURecConfig

_ROWS_AT_ONCE = 8_192
"""Of the item table in float64: a table may be most of the memory there is."""

_WEIGHTS_PER_BLOCK = 15


class FoldedWeights(NamedTuple):
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


def shapes_of(config: LRURecConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, each of them float32."""
    rows, d, h = config.num_items + 1, config.hidden_units, config.state_channels
    norm = {"layer_norm.weight": (d,), "layer_norm.bias": (d,)}
    block = {
        "lru.nu_log": (h,),
        "lru.theta_log": (h,),
        "lru.gamma_log": (h,),
        "lru.input_weight": (h, d, 2),
        "lru.input_bias": (h, 2),
        "lru.output_weight": (d, h, 2),
        "lru.output_bias": (d,),
        **norm,
        "feed_forward.inner.weight": (4 * d, d),
        "feed_forward.inner.bias": (4 * d,),
        "feed_forward.outer.weight": (d, 4 * d),
        "feed_forward.outer.bias": (d,),
        **{f"feed_forward.{name}": shape for name, shape in norm.items()},
    }
    blocks = {f"blocks.{b}.{name}": shape for b in range(config.num_blocks) for name, shape in block.items()}
    return {"item_bias": (rows,), "item_embedding.weight": (rows, d), **norm, **blocks}


def first_fault(config: LRURecConfig, weights: Mapping[str, Any]) -> str | None:
    """What keeps these tensors or arrays from being the weights of such a model, in one line; None if nothing does."""
    # First of all what a config claims: one that was tampered with must not cost more memory than the weights do.
    if fault := _size_fault(config, weights):
        return fault
    shapes = shapes_of(config)
    if missing := sorted(shapes.keys() - weights.keys()):
        return f"weights lack {missing[0]!r} ({len(missing)} missing); is it a bundle of another architecture?"
    if unknown := sorted(weights.keys() - shapes.keys()):
        return f"weights hold {unknown[0]!r}, which no LRURec has; is it a bundle of another architecture?"
    for name, shape in shapes.items():
        given, needed = _describe(weights[name].dtype, weights[name].shape), _describe("float32", shape)
        if given != needed:
            return f"{name!r} is {given}, the architecture needs {needed}"
    return None


def first_not_finite(config: LRURecConfig, weights: Mapping[str, np.ndarray]) -> str | None:
    """Where numbers end: in one of the weights, or in the scores that come of them; None if nowhere."""
    for name in shapes_of(config):
        if not np.isfinite(weights[name]).all():
            return f"{name!r} holds NaN or infinite numbers; train or convert the model again"
    # Finite weights may still overflow: in an exponential of the eigenvalues, in a norm, in a product.
    with np.errstate(all="ignore"):
        folded = fold(config, weights)
        # In float32, as the model has them; folding goes by float64, which reaches further.
        logs = [f"blocks.{block}.lru.{name}_log" for block in range(config.num_blocks) for name in ("theta", "gamma")]
        exponentials = [np.exp(weights[name]) for name in logs]
        found = [*folded, *exponentials, _cold_start_scores(folded, weights)]
    if folded.epsilon > 0 and all(np.isfinite(each).all() for each in found):
        return None
    return "weights give scores that are no numbers; train or convert the model again"


def fold(config: LRURecConfig, weights: Mapping[str, np.ndarray]) -> FoldedWeights:
    """The same model in fewer operations a step."""

    def exact(name: str) -> np.ndarray:
        return weights[name].astype(np.float64)

    def norm(name: str) -> np.ndarray:
        return np.stack([exact(f"{name}.weight"), exact(f"{name}.bias")])

    table, outer_norm = weights["item_embedding.weight"], norm("layer_norm")
    embedded = np.empty(table.shape, np.float32)
    for first in range(0, len(table), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        part = table[rows].astype(np.float64)
        centred = part - part.mean(1, keepdims=True)
        scale = np.sqrt(centred.var(1, keepdims=True) + config.layer_norm_eps)
        embedded[rows] = centred / scale * outer_norm[0] + outer_norm[1]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in FoldedWeights._fields[1:-1]}
    for number in range(config.num_blocks):
        lru, feed = f"blocks.{number}.lru", f"blocks.{number}.feed_forward"
        gamma = np.exp(exact(f"{lru}.gamma_log"))[:, None]
        decay = np.exp(-np.exp(exact(f"{lru}.nu_log")) + 1j * np.exp(exact(f"{lru}.theta_log")))
        b, c = exact(f"{lru}.input_weight") * gamma[..., None], exact(f"{lru}.output_weight")
        folded = {
            "in_weight": np.concatenate([b[..., 0], b[..., 1]]).T,
            "in_bias": (exact(f"{lru}.input_bias") * gamma).T.ravel(),
            "decay": np.stack([decay.real, decay.imag]),
            "out_weight": np.concatenate([c[..., 0].T, -c[..., 1].T]),
            "out_bias": exact(f"{lru}.output_bias"),
            "norm_1": norm(f"blocks.{number}.layer_norm"),
            "up": exact(f"{feed}.inner.weight").T,
            "up_bias": exact(f"{feed}.inner.bias"),
            "down": exact(f"{feed}.outer.weight").T,
            "down_bias": exact(f"{feed}.outer.bias"),
            "norm_2": norm(f"{feed}.layer_norm"),
        }
        for name, values in folded.items():
            columns[name].append(values)
    stacked = {name: np.ascontiguousarray(np.stack(values), np.float32) for name, values in columns.items()}
    return FoldedWeights(embedded, **stacked, epsilon=np.float32(config.layer_norm_eps))


def _cold_start_scores(folded: FoldedWeights, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of the first step on the padding item, the state being zero; see `LRURec.cold_start`."""

    def normed(x: np.ndarray, norm: np.ndarray) -> np.ndarray:
        centred = x - x.mean()
        scaled: np.ndarray = centred / np.sqrt((centred * centred).mean() + folded.epsilon) * norm[0] + norm[1]
        return scaled

    x = folded.embedded[0]
    for block in range(len(folded.decay)):
        state = x @ folded.in_weight[block] + folded.in_bias[block]
        x = normed(state @ folded.out_weight[block] + folded.out_bias[block] + x, folded.norm_1[block])
        inner = x @ folded.up[block] + folded.up_bias[block]
        inner = inner * [np.float32(0.5 + 0.5 * math.erf(each * math.sqrt(0.5))) for each in inner.tolist()]
        x = normed(inner @ folded.down[block] + folded.down_bias[block] + x, folded.norm_2[block])
    scores: np.ndarray = weights["item_embedding.weight"] @ x + weights["item_bias"]
    return scores


def _size_fault(config: LRURecConfig, weights: Mapping[str, Any]) -> str | None:
    table = weights.get("item_embedding.weight")
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    shape = None if table is None else list(table.shape)
    # A block in name only is none: what is listed of an architecture takes memory too.
    enough = 2 * len(weights) > _WEIGHTS_PER_BLOCK * config.num_blocks
    if shape == [config.num_items + 1, config.hidden_units] and len(blocks) == config.num_blocks and enough:
        return None
    return (
        f"{len(weights)} weights have an item table {shape} and {len(blocks)} blocks, the architecture says "
        f"{[config.num_items + 1, config.hidden_units]} and {config.num_blocks}; are the files of one bundle?"
    )


def _describe(dtype: object, shape: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
