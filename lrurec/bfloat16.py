"""bfloat16 in compiled loops, which numba does not know: its bits as int16, the upper half of a float32's.

Numba's cache does not see that a loop which takes these in has to be compiled again when they change: remove the
`__pycache__` beside it then.
"""

import numpy as np
from numba import njit

_int32, _float32 = np.int32, np.float32
_SIXTEEN = np.int32(16)


@njit(inline="always")
def to_bits(x):
    """The bits of a float32, rounded to the nearest bfloat16, ties to even."""
    bits = _float32(x).view(np.int32)
    return np.int16(_int32(bits + _int32(0x7FFF) + _int32((bits >> _SIXTEEN) & _int32(1))) >> _SIXTEEN)


@njit(inline="always")
def from_bits(bits):
    """The float32 of the same value."""
    return _int32(_int32(bits) << _SIXTEEN).view(np.float32)
