"""Exponentials of item scores and their sums, compiled: one pass over the scores, in place.

Axes: r rows (labels) of a tile, v rows of the item table.
"""

import numpy as np
from numba import njit

from lrurec.bfloat16 import narrowed, widened

_int32, _float32 = np.int32, np.float32


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


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def exponentiate(scores, bias, shift, sums):
    """s_iv ← exp(s_iv + bias_v - shift_i), in place, and its sum over the items.

    Args:
        scores: (r, v) float32, or the bits of bfloat16 as int16; in and out.
        bias: (v,) float32.
        shift: (r,) float32, what is taken from a row's scores.
        sums: (r,) float32, out: of the unrounded values.

    """
    for i in range(scores.shape[0]):
        row = scores[i]  # a slice that starts at 0: an index that might be negative keeps a loop from being vectorised
        total = _float32(0)
        for v in range(row.shape[0]):
            value = _exp(widened(row[v]) + bias[v] - shift[i])
            row[v] = narrowed(value, row)
            total += value
        sums[i] = total
