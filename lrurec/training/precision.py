"""What a training step multiplies in: float32, or bfloat16 where the CPU has instructions for it."""

from functools import cache

import torch
from llvmlite import binding

from lrurec.training.presets import Precision


def dtype_of(precision: Precision) -> torch.dtype:
    """Of the factors of products on this CPU, for a precision."""
    half = precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16())
    return torch.bfloat16 if half else torch.float32


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16; without them they are slower than float32."""
    features = binding.get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512bf16", "amx-bf16", "bf16"))
