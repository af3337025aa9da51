"""Exponentials of item scores, compiled: a tile of scores is multiplied, exponentiated, summed and stored while hot.

Axes: r rows (labels) of a tile, d width, v rows of the item table.
"""

import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  (numba's np.dot calls it; loaded here so that its threads can be limited)
from numba import njit

#: Items of one product: so few that its scores stay in a cache until they are exponentiated.
TILE_ITEMS = 512

_int32, _float32 = np.int32, np.float32
_SIXTEEN = np.int32(16)


@njit(inline="always")
def _exp(x):
    """e^x in float32, relative error below 2e-7; x is cut to [-87, 88.7], so that it is neither 0 nor infinite.

    e^x = 2^n e^r, n = round(x / ln 2): Cephes' polynomial for e^r, |r| ≤ ln 2 / 2, and n added to the exponent's bits.
    Branch-free, so that the loop around it is vectorised. Adding and taking away 1.5·2²³ rounds to a whole number.
    """
    x = min(max(x, _float32(-87.0)), _float32(88.72283))
    shifted = x * _float32(1.4426950408889634) + _float32(12582912.0)
    n = shifted - _float32(12582912.0)
    r = (x - n * _float32(0.693359375)) - n * _float32(-2.12194440e-4)
    y = _float32(1.9875691500e-4)
    y = y * r + _float32(1.3981999507e-3)
    y = y * r + _float32(8.3334519073e-3)
    y = y * r + _float32(4.1665795894e-2)
    y = y * r + _float32(1.6666665459e-1)
    y = y * r + _float32(5.0000001201e-1)
    y = _float32(y * r * r + r + _float32(1.0))
    exponent = _int32(_float32(shifted).view(np.int32) << _int32(23))
    return _int32(y.view(np.int32) + exponent).view(np.float32)


@njit(inline="always")
def _bfloat16_bits(x):
    """The upper half of a float32's bits, rounded to the nearest, ties to even."""
    bits = _float32(x).view(np.int32)
    return np.int16(_int32(bits + _int32(0x7FFF) + _int32((bits >> _SIXTEEN) & _int32(1))) >> _SIXTEEN)


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def exponentiate(encodings, weight, bias, shift, exponentials, sums):
    """exp(E x + bias - shift), and its sum over the items.

    Args:
        encodings: (r, d) float32, contiguous.
        weight: (v, d) float32, contiguous.
        bias: (v,) float32.
        shift: (r,) float32, what is taken from a row's scores.
        exponentials: (r, v) float32, out.
        sums: (r,) float32, out.

    """
    rows, items = encodings.shape[0], weight.shape[0]
    memory = np.empty(rows * TILE_ITEMS, np.float32)
    sums[:] = _float32(0)
    for start in range(0, items, TILE_ITEMS):
        width = min(TILE_ITEMS, items - start)
        scores = memory[: rows * width].reshape(rows, width)
        np.dot(encodings, weight[start : start + width].T, scores)
        tile_bias = bias[start : start + width]
        for row in range(rows):
            # Slices that start at 0: an index that might be negative keeps a loop from being vectorised.
            out = exponentials[row, start : start + width]
            total = _float32(0)
            for j in range(width):
                value = _exp(scores[row, j] + tile_bias[j] - shift[row])
                total += value
                out[j] = value
            sums[row] += total


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def exponentiate_to_bfloat16(encodings, weight, bias, shift, exponentials, sums):
    """As `exponentiate`; exponentials are the bits of bfloat16 as int16, the sums are of the unrounded values."""
    rows, items = encodings.shape[0], weight.shape[0]
    memory = np.empty(rows * TILE_ITEMS, np.float32)
    sums[:] = _float32(0)
    for start in range(0, items, TILE_ITEMS):
        width = min(TILE_ITEMS, items - start)
        scores = memory[: rows * width].reshape(rows, width)
        np.dot(encodings, weight[start : start + width].T, scores)
        tile_bias = bias[start : start + width]
        for row in range(rows):
            # Slices that start at 0: an index that might be negative keeps a loop from being vectorised.
            out = exponentials[row, start : start + width]
            total = _float32(0)
            for j in range(width):
                value = _exp(scores[row, j] + tile_bias[j] - shift[row])
                total += value
                out[j] = _bfloat16_bits(value)
            sums[row] += total
