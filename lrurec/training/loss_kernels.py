"""Exponentials of item scores and their sums, compiled: one pass over the scores, in place.

Axes: r rows (labels) of a tile, v rows of the item table.
"""

import numpy as np
from numba import njit

from lrurec.bfloat16 import narrowed, widened
from lrurec.compiled import compiled

_int32, _float32 = np.int32, np.float32


@njit(inline="always")
def _exp(x, most):
    """e^x in float32, relative error below 3e-7 + 7e-8 |x|; x is cut to [-86.9, most]: never 0.

    e^x = 2^n 2^r, n = round(x / ln 2): a minimax polynomial for 2^r, |r| ≤ ½, and n added to the exponent's bits. What
    x / ln 2 is rounded by is no more than the rounding of x itself. Branch-free, so that the loop around it is
    vectorised. Adding and taking away 1.5·2²³ rounds to a whole number.
    """
    x = x if x < most else most  # NaN becomes the most, which is noticed
    x = x if x > _float32(-86.9) else _float32(-86.9)
    binary = x * _float32(1.4426950408889634)
    shifted = binary + _float32(12582912.0)
    r = binary - (shifted - _float32(12582912.0))
    y = _float32(1.32647e-3)
    y = y * r + _float32(9.67151e-3)
    y = y * r + _float32(5.550734e-2)
    y = y * r + _float32(2.4022242e-1)
    y = y * r + _float32(6.9314698e-1)
    y = _float32(y * r + _float32(1.0))
    exponent = _int32(_float32(shifted).view(np.int32) << _int32(23))
    return _int32(y.view(np.int32) + exponent).view(np.float32)


@compiled(nogil=True, fastmath={"reassoc", "contract"})
def exponentiate(scores, bias, shift, most, sums):
    """s_iv ← exp(s_iv + bias_v - shift_i), in place, and its sum over the items.

    Args:
        scores: (r, v) float32, or the bits of bfloat16 as int16; in and out.
        bias: (v,) float32.
        shift: (r,) float32, what is taken from a row's scores.
        most: float32, the greatest exponent, below 88; greater ones and NaN are cut to it. An argument, since LLVM
            makes four instructions of two bounds that it knows, and two of these.
        sums: (r,) float32, out: of the unrounded values.

    """
    for i in range(scores.shape[0]):
        row = scores[i]  # a slice that starts at 0: an index that might be negative keeps a loop from being vectorised
        total = _float32(0)
        for v in range(row.shape[0]):
            value = _exp(widened(row[v]) + bias[v] - shift[i], most)
            row[v] = narrowed(value, row)
            total += value
        sums[i] = total
