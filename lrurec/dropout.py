"""Dropout without masks in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lrurec import dropout_kernels
from lrurec.bfloat16 import memory_of
from lrurec.threads import in_threads

_ELEMENTS_PER_THREAD = 1 << 17
"""At least: waking a thread costs as much as some ten thousand."""


_generator: ContextVar[torch.Generator | None] = ContextVar("generator", default=None)


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Dropout of float32 and bfloat16 on a CPU draws from this generator, not from torch's, in the calling thread."""
    token = _generator.set(generator)
    try:
        yield
    finally:
        _generator.reset(token)


class Dropout(nn.Module):
    """x ↦ x ∘ keep / (1 - p) in training, x otherwise, as nn.Dropout.

    On a CPU which elements are kept is a hash of their index and of 64 bits drawn from torch's generator, or the one of
    `drawing_from`, computed once more in the gradient: torch's own, which draws every element, was half of a forward
    pass. The same generator state drops the same whatever the number of threads.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        if not self.training or self.probability == 0:
            return x
        if x.device.type != "cpu" or x.dtype not in _KERNELS:
            return functional.dropout(x, self.probability)
        keys = torch.randint(2**32, (2,), device="cpu", generator=_generator.get()).numpy().astype(np.uint32)
        dropped: Tensor = _Dropped.apply(x, self.probability, keys)
        return dropped

    def extra_repr(self) -> str:
        return f"p={self.probability}"


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, probability: float, keys: np.ndarray) -> Tensor:
        ctx.drops = probability, keys  # type: ignore[attr-defined]
        return _drop(x, probability, keys)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Dropped.apply(grad, *ctx.drops), None, None  # type: ignore[attr-defined]


_KERNELS = {torch.float32: dropout_kernels.drop, torch.bfloat16: dropout_kernels.drop_bfloat16}


def _drop(x: Tensor, probability: float, keys: np.ndarray) -> Tensor:
    kernel = _KERNELS[x.dtype]
    out = torch.empty(x.shape, dtype=x.dtype)
    values, results = (memory_of(tensor).reshape(-1) for tensor in (x.contiguous(), out))
    # One value of the hash at least keeps: a probability below 1 must not become 1.
    dropped = np.uint32(min(round(probability * 2**32), 2**32 - 1))
    scale = np.float32(1 / (1 - probability))
    parts = max(1, min(torch.get_num_threads(), len(values) // _ELEMENTS_PER_THREAD))
    cuts = [len(values) * part // parts for part in range(parts + 1)]

    def task(part: int) -> None:
        run = slice(cuts[part], cuts[part + 1])
        kernel(values[run], run.start, keys[0], keys[1], dropped, scale, results[run])

    in_threads(task, parts)
    return out
