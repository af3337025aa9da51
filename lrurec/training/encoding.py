"""The encodings that training learns from, computed by threads that share out the histories of a batch."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float32
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
from lrurec.training.windows import padded_size

_TOKENS_PER_THREAD = 2048
"""About, for the threads to share them out: each calls all operators, and those of few tokens last as long as calls."""


def encode(
    model: LRURec, embedded: Float32[Tensor, "n d"], position: Positions, precision: Precision
) -> PackedEncodings:
    """As `LRURec.encode_embedded`, float32; by products of the given precision on a CPU.

    On a CPU each thread encodes whole sequences and goes back through them, if there are tokens enough: torch's own
    way, all threads at one operator after the other, has them wait for each other a hundred times a step. The graph
    can be gone back through once then, and a hook of a parameter sees the gradients of every thread.
    """
    device, threads = embedded.device.type, torch.get_num_threads()
    half = device == "cpu" and dtype_of(precision) == torch.bfloat16

    def encode_embedded(embedded: Tensor, position: Positions) -> Tensor:
        # Without autocast's cache of weights, which is one for all threads.
        with torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=False):
            return model.encode_embedded(embedded, position)

    if device != "cpu" or threads == 1 or len(embedded) < threads * _TOKENS_PER_THREAD:
        return encode_embedded(embedded, position)
    # What belongs to an item comes in before this and after.
    others = [value for name, value in model.named_parameters() if not name.startswith("item_")]
    learned = [value for value in others if value.requires_grad]
    encodings: Tensor = _SharedOut.apply(encode_embedded, position, embedded, *learned)
    return encodings


class _SharedOut(torch.autograd.Function):
    """Every thread keeps the graph of its own sequences from forward to backward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        encode_embedded: Callable[[Tensor, Positions], Tensor],
        position: Positions,
        embedded: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        parts = runs_of_sequences(position, _TOKENS_PER_THREAD)
        generators = [torch.Generator().manual_seed(int(seed)) for seed in torch.randint(2**32, (len(parts),))]
        leaves = [embedded[part].detach().requires_grad_() for part in parts]
        results: list[Tensor] = [embedded] * len(parts)

        def go_ahead(part: int) -> None:
            tokens = len(leaves[part])
            zeros = padded_size(tokens) - tokens  # for oneDNN: see `Batch`
            places = functional.pad(position[parts[part]], (0, zeros))
            with torch.enable_grad(), drawing_from(generators[part]):
                results[part] = encode_embedded(functional.pad(leaves[part], (0, 0, 0, zeros)), places)[:tokens]

        in_threads(go_ahead, len(parts))
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
