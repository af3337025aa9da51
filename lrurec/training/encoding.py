"""The encodings that training learns from, computed by threads that share out the histories of a batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from lrurec.array_types import PackedEncodings, Positions
from lrurec.dropout import drawing_from
from lrurec.model import LRURec
from lrurec.recurrence import runs_of_sequences
from lrurec.threads import in_threads
from lrurec.training.precision import dtype_of
from lrurec.training.presets import Precision
from lrurec.training.windows import Batch, padded_size

_TOKENS_PER_THREAD = 2048
"""At least: each thread calls all operators, and those of few tokens take no longer than their calls."""


def encode(model: LRURec, batch: Batch, precision: Precision) -> PackedEncodings:
    """The encodings of the tokens that have a label, float32; by products of the given precision on a CPU.

    On a CPU each thread encodes whole sequences and goes back through them: torch's own way, all threads at one
    operator after the other, has them wait for each other a hundred times a step.
    """
    embedded = model.item_embedding(batch.items)
    if embedded.device.type != "cpu":
        return model.encode_embedded(embedded, batch.position)[: len(batch.labels)]
    how = _How(model, batch.position, half=dtype_of(precision) == torch.bfloat16)
    parts = runs_of_sequences(batch.position, _TOKENS_PER_THREAD)
    encodings: Tensor
    if len(parts) == 1:
        encodings = how.encode(embedded, parts[0])
    else:
        # What belongs to an item comes in before this and after.
        parameters = [value for name, value in model.named_parameters() if not name.startswith("item_")]
        encodings = _SharedOut.apply(how, parts, embedded, *parameters)
    return encodings[: len(batch.labels)]


class _How(NamedTuple):
    model: LRURec
    position: Positions
    half: bool

    def encode(self, embedded: Tensor, part: slice) -> Tensor:
        """The sequences of a part, of which `embedded` is, in the calling thread."""
        tokens = part.stop - part.start
        zeros = padded_size(tokens) - tokens
        x, position = functional.pad(embedded, (0, 0, 0, zeros)), functional.pad(self.position[part], (0, zeros))
        # Without autocast's cache of weights, which is one for all threads.
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half, cache_enabled=False):
            return self.model.encode_embedded(x, position)[:tokens]


class _SharedOut(torch.autograd.Function):
    """Every thread keeps the graph of its own sequences from forward to backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, how: _How, parts: list[slice], embedded: Tensor, *parameters: Tensor) -> Tensor:
        generators = [torch.Generator().manual_seed(int(seed)) for seed in torch.randint(2**62, (len(parts),))]
        leaves = [embedded[part].detach().requires_grad_() for part in parts]
        results: list[Tensor] = [embedded] * len(parts)

        def encode(part: int) -> None:
            with torch.enable_grad(), drawing_from(generators[part]):
                results[part] = how.encode(leaves[part], parts[part])

        in_threads(encode, len(parts))
        ctx.graphs = parts, leaves, results, parameters  # type: ignore[attr-defined]
        return torch.cat([result.detach() for result in results])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts, leaves, results, parameters = ctx.graphs  # type: ignore[attr-defined]
        gradients: list[Sequence[Tensor]] = [()] * len(parts)

        def go_back(part: int) -> None:
            inputs = [leaves[part], *parameters]
            gradients[part] = torch.autograd.grad(results[part], inputs, grad[parts[part]])

        in_threads(go_back, len(parts))
        by_embedded, *by_parameters = zip(*gradients, strict=True)
        return None, None, torch.cat(by_embedded), *(sum(each[1:], each[0]) for each in by_parameters)
