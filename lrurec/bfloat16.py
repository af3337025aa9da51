"""bfloat16 in compiled loops, which numba does not know: its bits as int16, the upper half of a float32's."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from numba import njit, types
from numba.extending import overload
from torch import Tensor

_int32, _float32 = np.int32, np.float32
_SIXTEEN = np.int32(16)


def memory_of(values: Shaped[Tensor, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """What the loops take: bfloat16 as its bits, other types as they are. The same memory."""
    values = values.detach()
    memory: Shaped[np.ndarray, "*shape"] = values.view(
        torch.int16 if values.dtype == torch.bfloat16 else values.dtype
    ).numpy()
    return memory


@njit(inline="always")
def to_bits(x):
    """The bits of a float32, rounded to the nearest bfloat16, ties to even."""
    bits = _float32(x).view(np.int32)
    return np.int16(_int32(bits + _int32(0x7FFF) + _int32((bits >> _SIXTEEN) & _int32(1))) >> _SIXTEEN)


@njit(inline="always")
def from_bits(value):
    """The float32 of the same value."""
    return _int32(_int32(value) << _SIXTEEN).view(np.float32)


def widened(value: Any) -> Any:
    """In compiled loops: what an element of `memory_of` stands for, float32 for bfloat16's bits."""
    raise NotImplementedError


@overload(widened, inline="always")
def _widened(value):
    return from_bits.py_func if value == types.int16 else lambda value: value


def narrowed(value: Any, like: Any) -> Any:
    """In compiled loops: a value as an array of `memory_of` holds it."""
    raise NotImplementedError


@overload(narrowed, inline="always")
def _narrowed(value, like):
    return (lambda value, like: to_bits(value)) if like.dtype == types.int16 else (lambda value, like: value)
