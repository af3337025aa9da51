"""What a training step multiplies in: float32, or bfloat16 where the CPU has instructions for it."""

from functools import cache
from typing import Literal, TypeAlias

import torch
from llvmlite import binding

Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]
"""Of the factors of a training step's products on a CPU: those of the blocks, the scores, and their gradients.

bfloat16 rounds factors and products to 8 significant bits and sums in float32: two to three times as fast on a CPU that
multiplies bfloat16. Weights, states, sums, the softmax and the optimizer stay float32. `auto` is bfloat16 on such a
CPU, float32 elsewhere.
"""


def dtype_of(precision: Precision) -> torch.dtype:
    """Of the factors of products on this CPU, for a precision."""
    half = precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16())
    return torch.bfloat16 if half else torch.float32


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16; without them they are slower than float32."""
    features = binding.get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512bf16", "amx-bf16", "bf16"))
