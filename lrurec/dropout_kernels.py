"""Dropout in one pass over memory, compiled; which elements it keeps is computed from a key, not stored."""

import numpy as np
from numba import njit

from lrurec.bfloat16 import from_bits, to_bits
from lrurec.compiled import compiled

_uint32 = np.uint32


@njit(inline="always")
def _hash(index, first_key, second_key):
    """32 bits that look independent for every index, and for every pair of keys.

    The mixing function and its constants are C. Wellons' `lowbias32`, the second key between its two products.
    """
    x = _uint32(index ^ first_key)
    x = _uint32(_uint32(x ^ (x >> _uint32(16))) * _uint32(0x7FEB352D))
    x = _uint32(x ^ second_key)
    x = _uint32(_uint32(x ^ (x >> _uint32(15))) * _uint32(0x846CA68B))
    return _uint32(x ^ (x >> _uint32(16)))


@compiled(nogil=True)
def drop(x, first, first_key, second_key, dropped, scale, out):
    """out_i = scale x_i where the hash of first + i reaches `dropped`, 0 elsewhere.

    Args:
        x: (n,) float32.
        first: the index of x_0 in the array that x is a part of; indices that are equal modulo 2^32 share their fate.
        first_key: uint32.
        second_key: uint32.
        dropped: uint32, of 2^32 values of the hash those that drop.
        scale: float32.
        out: (n,) float32; may be x.

    """
    for i in range(x.shape[0]):
        keeps = _hash(_uint32(first + i), first_key, second_key) >= dropped
        out[i] = x[i] * scale if keeps else np.float32(0)


@compiled(nogil=True)
def drop_bfloat16(x, first, first_key, second_key, dropped, scale, out):
    """As `drop`; x and out are the bits of bfloat16 as int16. The product is rounded once."""
    for i in range(x.shape[0]):
        keeps = _hash(_uint32(first + i), first_key, second_key) >= dropped
        out[i] = np.int16(np.int32(to_bits(from_bits(x[i]) * scale)) & -np.int32(keeps))  # branches are not vectorised
