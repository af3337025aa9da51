"""Exact top-K behind a filter: a product of bytes rules out nearly every item, float32 decides about the rest.

Encodings and item rows are rounded to bytes, with a scale for each encoding and for each group of items:

    x̂ = round(x / a)     ê_v = round(E_v / b)
    s̃_v = a b Σ x̂ ê_v + bias_v
    |s_v - s̃_v| ≤ |x - a x̂| |E_v| + |a x̂| |E_v - b ê_v|          triangle inequality, then Cauchy and Schwarz

An item whose s̃ and bound together do not reach the k-th best score found so far cannot be in the list; for the first
4,096 items a score that k of them reach is known beforehand, from their s̃ and bounds alone. For the others
s = x·E_v + bias is computed in float32, always in the same order, so a list has the same bits whatever else is ranked
beside it. Scores are compared while they are in a core's own cache, and never written to memory.

Two instructions make this pay. Both multiply unsigned bytes, for which x̂ is raised by its greatest value and one, by
signed ones, ê; what that adds is taken away beforehand:

    VPDPBUSD (AVX-512 "VNNI")   64 products, four each to a sum of 32 bits; x̂ and ê within ±127
    VPMADDUBSW (AVX2)           32 products, two each to 16 bits, which would be cut off beyond ±2¹⁵: x̂ within ±63, so
                                that 2 · 127 · 127 fits. Sums are taken modulo 2¹⁶, which is right for those within
                                ±2¹⁵ whatever came between, and |Σ x̂ ê| ≤ |x̂| |ê|: a and b are such that |x̂| and |ê|
                                are at most 181 each.

Axes: m rows to rank, d width, q words of four bytes or two, v items in g groups of `ITEMS`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int16, Int32, Int64

from lrurec import byte_kernels
from lrurec.byte_kernels import SPARE
from lrurec.products import COLUMNS as ITEMS
from lrurec.products import cpu_features, pack

#: Items that score high about as often; among them, those of about the same bias make a group.
_RUN = 4_096


#: The greatest width: 255 · 127 times as much is what 32 bits hold.
WIDEST = 1 << 16


class Product(NamedTuple):
    """What an instruction takes."""

    word: type[np.signedinteger[Any]]
    """As wide as its sums, and as the bytes that it takes to one of them."""
    levels: int
    """|x̂_i| at most."""
    longest: float
    """|x̂| and |ê| at most. Rounding makes a row longer by √d / 2 at most, for which there has to be room."""


VNNI = Product(np.int32, 127, np.inf)
AVX2 = Product(np.int16, 63, 181.0)


def supported() -> list[Product]:
    """The instructions that this CPU has, fastest first."""
    features = cpu_features()
    return [each for each, name in ((VNNI, "avx512vnni"), (AVX2, "avx2")) if name in features]


class FilteredRanker:
    """The item table as bytes, and as what they were made of. Products |x| |E_v| have to be finite in float32.

    Args:
        table: (v, d) float32, E.
        bias: (v,) float32.
        product: one of `supported()`.

    """

    def __init__(self, table: Float32[np.ndarray, "v d"], bias: Float32[np.ndarray, " v"], product: Product) -> None:
        self._items = _quantise(table, bias, product)

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
    words: Int32[np.ndarray, "g passes q at_once"] | Int16[np.ndarray, "g passes q at_once"]
    """ê, four or two bytes a word, the words of all items of a pass side by side."""
    start: Int32[np.ndarray, "g items"] | Int16[np.ndarray, "g items"]
    """-(levels + 1) Σ ê: bytes of x̂ are unsigned, so much too high. Modulo 2¹⁶ where sums are."""
    scale: Float32[np.ndarray, " g"]
    """b."""
    bias: Float32[np.ndarray, "g items"]
    """-inf beyond the last item."""
    highest_bias: Float32[np.ndarray, " g"]
    norm: Float32[np.ndarray, " g"]
    """The largest |E_v| of a group."""
    residual: Float32[np.ndarray, " g"]
    """The largest |E_v - b ê_v|."""
    rounding: Float32[np.ndarray, " g"]
    """What float32 may add to the bound for a bias, at most."""
    levels: int
    """|x̂_i| at most."""
    longest: float
    """|x| / a at most."""


def _quantise(table: np.ndarray, bias: np.ndarray, product: Product) -> Items:
    run = np.empty(len(bias), np.int64)
    run[np.argsort(-(bias + 2 * np.linalg.norm(table, axis=1)), kind="stable")] = np.arange(len(bias)) // _RUN
    order = np.lexsort((-bias, run))
    table, bias = np.ascontiguousarray(table[order]), bias[order]
    items, width = table.shape
    groups = -(-items // ITEMS)
    padded = np.zeros((groups * ITEMS, width), np.float32)
    padded[:items] = table
    norm = np.linalg.norm(padded.astype(np.float64), axis=1)
    longest = product.longest - np.sqrt(width) / 2 - 1
    largest = np.maximum(np.abs(padded).max(1), np.finfo(np.float32).tiny * 128)
    scale = np.maximum(largest / np.float32(127), (norm / longest).astype(np.float32)).reshape(groups, ITEMS).max(1)
    scales = np.repeat(scale, ITEMS)[:, None]
    rounded = np.rint(padded / scales)
    residual = np.linalg.norm(padded - rounded * scales.astype(np.float64), axis=1)
    biases = np.full(groups * ITEMS, -np.inf, np.float32)
    biases[:items] = bias
    magnitude = np.where(np.isfinite(biases), np.abs(biases), 0).reshape(groups, ITEMS).max(1)

    def upper(values: np.ndarray) -> np.ndarray:
        largest: np.ndarray = np.nextafter(values.reshape(groups, ITEMS).max(1).astype(np.float32), np.float32(np.inf))
        return largest

    return Items(
        table,
        order.astype(np.int32) + np.int32(1),
        np.concatenate([[-1], np.argsort(order)]).astype(np.int32),
        pack(rounded.astype(np.int8), np.dtype(product.word)),
        (-(product.levels + 1) * rounded.sum(1)).astype(np.int32).astype(product.word).reshape(groups, ITEMS),
        scale,
        biases.reshape(groups, ITEMS),
        biases.reshape(groups, ITEMS).max(1),
        upper(norm),
        upper(residual),
        (magnitude * ((width + SPARE) * 2.0**-22)).astype(np.float32),
        product.levels,
        float(longest),
    )
