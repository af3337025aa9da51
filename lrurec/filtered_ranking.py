"""Exact top-K behind a filter: a product of bytes rules out nearly every item, float32 decides about the rest.

Encodings and item rows are rounded to 8 bits, each row with a scale of its own:

    x̂ = round(x / a)     ê_v = round(E_v / b_v)     both whole numbers within ±127
    s̃_v = a b_v Σ x̂ ê_v + bias_v
    |s_v - s̃_v| ≤ |x - a x̂| |E_v| + |a x̂| |E_v - b_v ê_v|          triangle inequality, then Cauchy and Schwarz

An item whose s̃ and bound together do not reach the k-th best score found so far cannot be in the list; for the first
4,096 items a score that k of them reach is known beforehand, from their s̃ and bounds alone. For the others
s = x·E_v + bias is computed in float32, always in the same order, so a list has the same bits whatever else is ranked
beside it. The instruction that makes this pay (VPDPBUSD, "VNNI") multiplies and sums 64 pairs of bytes at once; scores
are compared while they are in a core's own cache, and never written to memory.

Axes: m rows to rank, d width, q = ⌈d / 4⌉ words of four bytes, v items in g groups of `ITEMS`.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from jaxtyping import Float32, Int32, Int64
from llvmlite import binding

from lrurec import byte_kernels
from lrurec.byte_kernels import ITEMS, LANES, SPARE, VECTORS


def is_supported() -> bool:
    """Whether this CPU has the instruction, and numba compiles for this CPU."""
    config = numba.config  # NUMBA_CPU_NAME and NUMBA_CPU_FEATURES compile for another one
    named = getattr(config, "CPU_NAME", None) or getattr(config, "CPU_FEATURES", None)
    return not named and bool(binding.get_host_cpu_features().get("avx512vnni", False))


class FilteredRanker:
    """The item table as bytes, and as what they were made of.

    Args:
        table: (v, d) float32, E.
        bias: (v,) float32.

    """

    def __init__(self, table: Float32[np.ndarray, "v d"], bias: Float32[np.ndarray, " v"]) -> None:
        self._items = _quantise(table, bias)

    def rank(
        self,
        encodings: Float32[np.ndarray, "p d"],
        wanted: Int64[np.ndarray, " m"],
        seen: Int32[np.ndarray, "n r"],
        top_items: Int32[np.ndarray, "m k"],
        top_scores: Float32[np.ndarray, "m k"],
    ) -> None:
        """As `kernels.rank`; item numbers count the table's rows from 1."""
        byte_kernels.rank(encodings, wanted, self._items, seen, top_items, top_scores)


class Items(NamedTuple):
    table: Float32[np.ndarray, "v d"]
    numbers: Int32[np.ndarray, " v"]
    """Of each row of the table: items that often score high come first, so that few are left to decide about later."""
    places: Int32[np.ndarray, " v_plus_1"]
    """The row of the table of each number; -1 for 0, which is none."""
    words: Int32[np.ndarray, "g vectors q lanes"]
    """ê, four bytes a word, the words of 16 items side by side."""
    offset: Int32[np.ndarray, "g items"]
    """128 Σ ê: bytes of x̂ are unsigned, 128 too high."""
    scale: Float32[np.ndarray, "g items"]
    bias: Float32[np.ndarray, "g items"]
    """-inf beyond the last item."""
    norm: Float32[np.ndarray, " g"]
    """The largest |E_v| of a group."""
    residual: Float32[np.ndarray, " g"]
    """The largest |E_v - b_v ê_v|."""
    rounding: Float32[np.ndarray, " g"]
    """What float32 may add to the bound for a bias, at most."""


def _quantise(table: np.ndarray, bias: np.ndarray) -> Items:
    order = np.argsort(-(bias + 2 * np.linalg.norm(table, axis=1)), kind="stable")
    table, bias = np.ascontiguousarray(table[order]), bias[order]
    items, width = table.shape
    groups, words = -(-items // ITEMS), -(-width // 4)
    padded = np.zeros((groups * ITEMS, words * 4), np.float32)
    padded[:items, :width] = table
    scale = np.maximum(np.abs(padded).max(1), np.finfo(np.float32).tiny * 128) / np.float32(127)
    rounded = np.rint(padded / scale[:, None])
    residual = np.linalg.norm(padded - rounded * scale[:, None].astype(np.float64), axis=1)
    norm = np.linalg.norm(padded.astype(np.float64), axis=1)
    biases = np.full(groups * ITEMS, -np.inf, np.float32)
    biases[:items] = bias
    magnitude = np.where(np.isfinite(biases), np.abs(biases), 0).reshape(groups, ITEMS).max(1)
    lanes = rounded.astype(np.int8).reshape(groups, VECTORS, LANES, words, 4).transpose(0, 1, 3, 2, 4)

    def upper(values: np.ndarray) -> np.ndarray:
        largest: np.ndarray = np.nextafter(values.reshape(groups, ITEMS).max(1).astype(np.float32), np.float32(np.inf))
        return largest

    return Items(
        table,
        order.astype(np.int32) + np.int32(1),
        np.concatenate([[-1], np.argsort(order)]).astype(np.int32),
        np.ascontiguousarray(lanes).view(np.int32).reshape(groups, VECTORS, words, LANES),
        (128 * rounded.sum(1)).astype(np.int32).reshape(groups, ITEMS),
        scale.reshape(groups, ITEMS),
        biases.reshape(groups, ITEMS),
        upper(norm),
        upper(residual),
        (magnitude * ((width + SPARE) * 2.0**-22)).astype(np.float32),
    )
