"""Dropout whose masks cost a byte of randomness each."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

LEVELS = 256


class ByteDropout(nn.Module):
    """x ↦ x ∘ keep / P(keep) in training, x otherwise; torch's own dropout was half of a forward pass on the CPU.

    A byte per element is drawn, so the probability of dropping is rounded to a multiple of 1/256 and the scale goes
    by the rounded value: the expectation is exact. Draws come from torch's generator of the device, as for nn.Dropout.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        # At least one level in 256 is kept: a probability below 1 must not become 1.
        self.dropped_levels = min(round(probability * LEVELS), LEVELS - 1)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        if not self.training or self.dropped_levels == 0:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
        # The full range of 64 bits: without bounds the sign bit would always be 0.
        levels = words.random_(-(2**63), None).view(torch.uint8)[: x.numel()].view(x.shape)
        # The scale is no tensor: one of bfloat16 would be rounded, and the mean be off.
        return x * (levels >= self.dropped_levels) * (LEVELS / (LEVELS - self.dropped_levels))

    def extra_repr(self) -> str:
        return f"{self.dropped_levels}/{LEVELS}"
