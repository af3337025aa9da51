"""Full softmax cross entropy that never holds more than a tile of scores."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

SCORES_PER_TILE = 1 << 22
"""16 MiB of float32 scores at a time; for a video batch of 1,200 labels and 24K items all of them would be 110 MiB."""


def softmax_cross_entropy(
    encodings: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"],
    labels: Int64[Tensor, " n"],
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean over n of the cross entropy, in nats, of softmax(E x + bias) and the label.

        loss_i = log Σ_v exp s_iv - (1 - ε) s_i,label - ε mean_v s_iv        ε = smoothing

    The gradient, softmax minus the smoothed label, is computed tile by tile beside the loss: scores aren't kept.
    """
    result: Tensor = _SoftmaxCrossEntropy.apply(encodings, weight, bias, labels, smoothing)
    return result


class _SoftmaxCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        encodings: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        smoothing: float,
    ) -> Tensor:
        grad_encodings = torch.empty_like(encodings)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        total = encodings.new_zeros(())
        rows_per_tile = max(1, SCORES_PER_TILE // len(weight))
        for start in range(0, len(encodings), rows_per_tile):
            rows = slice(start, start + rows_per_tile)
            loss, grad_scores = _tile(torch.addmm(bias, encodings[rows], weight.T), labels[rows], smoothing)
            total += loss
            grad_scores /= len(encodings)
            torch.mm(grad_scores, weight, out=grad_encodings[rows])
            grad_weight.addmm_(grad_scores.T, encodings[rows])
            grad_bias += grad_scores.sum(0)
        ctx.save_for_backward(grad_encodings, grad_weight, grad_bias)
        return total / len(encodings)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        grad_encodings, grad_weight, grad_bias = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * grad_encodings, grad * grad_weight, grad * grad_bias, None, None


def _tile(scores: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The summed loss of a tile, and its gradient by the scores, which are overwritten by it."""
    total = scores.logsumexp(1, keepdim=True)
    own = scores.gather(1, labels[:, None])
    loss = (total - (1 - smoothing) * own).sum()
    if smoothing:
        loss = loss - smoothing * scores.mean(1).sum()
    grad = scores.sub_(total).exp_()
    if smoothing:
        grad -= smoothing / scores.shape[1]
    grad.scatter_add_(1, labels[:, None], torch.full_like(own, smoothing - 1))
    return loss, grad
