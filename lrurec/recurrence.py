"""The linear recurrent unit: a whole sequence at once for training, one step on a carried state for serving."""

import math
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Complex, Complex64, Float, Float32, Int64
from torch import Tensor, nn

from lrurec import scan_kernels
from lrurec.bfloat16 import memory_of
from lrurec.threads import in_threads

RING = (0.8, 0.99)
"""|λ| at initialisation: between forgetting within a few clicks and remembering about a hundred."""

_TOKENS_PER_THREAD = 512
"""At least: waking a thread costs as much as some hundred tokens."""


class LRU(nn.Module):
    """A diagonal complex linear recurrence, as LRURec's published code computes it.

        λ   = exp(-exp(nu_log) + i exp(theta_log))                 |λ| < 1 by construction
        h_t = λ ∘ h_{t-1} + exp(gamma_log) ∘ (B x_t + b)           h_0 = 0
        y_t = Re(C h_t + c)

    `gamma_log` is free: initialised so that γ = √(1 - |λ|²), it is trained on its own, and it scales b too. The paper's
    D x_t is the residual connection around this module. B, b and C are complex and stored as real pairs (..., 2), so
    that safetensors and AdamW need to know nothing of complex numbers. The imaginary part of c never shows and isn't
    stored.

    Sources: arXiv 2310.02367, its published code, and arXiv 2303.06349 (the LRU).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = 2 * width
        self.nu_log = nn.Parameter(torch.empty(channels))
        self.theta_log = nn.Parameter(torch.empty(channels))
        self.gamma_log = nn.Parameter(torch.empty(channels))
        self.input_weight = nn.Parameter(torch.empty(channels, width, 2))
        self.input_bias = nn.Parameter(torch.empty(channels, 2))
        self.output_weight = nn.Parameter(torch.empty(width, channels, 2))
        self.output_bias = nn.Parameter(torch.empty(width))
        if not self.nu_log.is_meta:  # weights that will be read from a bundle need no values
            self.reset_eigenvalues()

    @torch.no_grad()
    def reset_eigenvalues(self) -> None:
        """λ uniform by area on the ring 0.8 ≤ |λ| ≤ 0.99, any angle; γ = √(1 - |λ|²)."""
        low, high = RING
        squared_radius = low**2 + (high**2 - low**2) * torch.rand_like(self.nu_log)
        self.nu_log.copy_((-0.5 * squared_radius.log()).log())
        # 1 - rand lies in (0, 1]: the logarithm of an angle of 0 does not exist.
        self.theta_log.copy_((2 * math.pi * (1 - torch.rand_like(self.theta_log))).log())
        self.gamma_log.copy_(0.5 * (1 - squared_radius).log())

    def eigenvalues(self) -> Complex64[Tensor, " h"]:
        """λ, computed in float64: what its rounding costs grows with the length of a history where |λ| is near 1."""
        exponent = torch.complex(-self.nu_log.double().exp(), self.theta_log.double().exp())
        return torch.exp(exponent).to(torch.complex64)

    def drive(self, x: Float32[Tensor, "n d"]) -> Float[Tensor, "n 2 h"]:
        """γ ∘ (B x + b): what one click adds to the state, in planes; bfloat16 where torch.autocast says so."""
        gamma = self.gamma_log.exp()[:, None]
        weight = (self.input_weight * gamma[..., None]).movedim(2, 0).flatten(0, 1)  # (2h, d)
        bias = (self.input_bias * gamma).T.flatten()
        driven: Tensor = nn.functional.linear(x, weight, bias).unflatten(1, (2, -1))
        return driven

    def read(self, h: Float[Tensor, "n 2 h"]) -> Float[Tensor, "n d"]:
        """Re(C h + c) of a state in planes; bfloat16 where torch.autocast says so, as in training, else float32."""
        re, im = self.output_weight.unbind(2)
        weight = torch.cat([re, -im], 1)  # Re(C h) = Re C · Re h - Im C · Im h
        return nn.functional.linear(h.flatten(1), weight, self.output_bias)

    def forward(
        self,
        x: Float32[Tensor, "n d"],
        position: Int64[Tensor, " n"],
        state: Complex64[Tensor, "s h"] | None = None,
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n 2 h"]]:
        """All steps of several sequences laid end to end: (y, h after every step, in planes).

        `position` is 0 where a sequence starts. `state` is what each of the s sequences starts from; None is zeros.
        """
        eigenvalues = self.eigenvalues()
        driven = self.drive(x)
        if state is not None:
            carried = planes(eigenvalues * state).to(driven.dtype)
            driven = driven.index_add(0, torch.nonzero(position == 0)[:, 0], carried)
        h = linear_scan(driven, eigenvalues, position)
        return self.read(h), h

    def step(
        self, x: Float32[Tensor, "b d"], state: Complex64[Tensor, "b h"]
    ) -> tuple[Float[Tensor, "b d"], Complex64[Tensor, "b h"]]:
        """One step of b users: (y, the state after it). `state` is left as it was."""
        h = self.eigenvalues() * state + from_planes(self.drive(x).float())
        return self.read(planes(h)), h


def planes(values: Complex[Tensor, "*n h"]) -> Float[Tensor, "*n 2 h"]:
    """Real parts beside imaginary parts, each of them dense: what compiled loops and products go through fastest."""
    return torch.stack([values.real, values.imag], -2)


def from_planes(values: Float[Tensor, "*n 2 h"]) -> Complex[Tensor, "*n h"]:
    """The complex numbers of `planes`."""
    return torch.complex(*values.unbind(-2))


def linear_scan(
    driven: Float[Tensor, "n 2 h"], eigenvalues: Complex[Tensor, " h"], position: Int64[Tensor, " n"]
) -> Float[Tensor, "n 2 h"]:
    """h_t = λ h_{t-1} + u_t within each packed sequence; h starts at 0 where `position` is 0. u and h in planes.

    One token after the other on a CPU (`scan_kernels`), by doubling elsewhere (`scan_by_doubling`). bfloat16 is rounded
    to once a token, not from token to token: h is carried on as precisely as λ is given. It needs a CPU.
    """
    result: Tensor = _LinearScan.apply(driven, eigenvalues, position)
    return result


class _LinearScan(torch.autograd.Function):
    """Hand-written backward: the gradient of a linear recurrence is the same recurrence, run from the end.

        g_t = ∂L/∂h_t + conj(λ) g_{t+1},    ∂L/∂u_t = g_t,    ∂L/∂λ = Σ_t g_t conj(h_{t-1})

    Autograd through either form would keep every pass, or every step, in memory.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, driven: Tensor, eigenvalues: Tensor, position: Tensor
    ) -> Tensor:
        if driven.device.type == "cpu":
            h = torch.empty(driven.shape, dtype=driven.dtype)
            tokens = memory_of(driven.contiguous()), position.numpy(), memory_of(h)
            channels, parts = memory_of(planes(eigenvalues)), runs_of_sequences(position, _TOKENS_PER_THREAD)

            def scan(part: int) -> None:
                u, places, out = (values[parts[part]] for values in tokens)
                scan_kernels.scan(u, channels, places, out)

            in_threads(scan, len(parts))
        else:
            h = scan_by_doubling(driven, eigenvalues, position)
        ctx.save_for_backward(h, eigenvalues, position)
        return h

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        h, eigenvalues, position = ctx.saved_tensors  # type: ignore[attr-defined]
        if grad.device.type == "cpu":
            g = torch.empty(h.shape, dtype=h.dtype)
            tokens = memory_of(grad.contiguous()), memory_of(h), position.numpy(), memory_of(g)
            channels, parts = memory_of(planes(eigenvalues)), runs_of_sequences(position, _TOKENS_PER_THREAD)
            summed = torch.empty(len(parts), *channels.shape, dtype=torch.float64)

            def scan_gradient(part: int) -> None:
                upstream, states, places, out = (values[parts[part]] for values in tokens)
                scan_kernels.scan_gradient(upstream, states, channels, places, out, summed[part].numpy())

            in_threads(scan_gradient, len(parts))
            return g, from_planes(summed.sum(0)).to(eigenvalues.dtype), None
        return (*gradient_by_doubling(grad, h, eigenvalues, position), None)


def runs_of_sequences(position: Int64[Tensor, " n"], tokens_per_run: int) -> list[slice]:
    """Runs of whole sequences, at most one for a thread, of about as many tokens each; fewer where there are few."""
    tokens = len(position)
    count = max(1, min(torch.get_num_threads(), tokens // tokens_per_run))
    starts = np.flatnonzero(position.numpy() == 0) if count > 1 else np.empty(0, np.int64)
    wanted = np.searchsorted(starts, [tokens * part // count for part in range(1, count)])
    cuts = sorted({0, tokens, *starts[wanted[wanted < len(starts)]].tolist()})
    return [slice(first, last) for first, last in pairwise(cuts)] or [slice(0, 0)]


def scan_by_doubling(
    driven: Float[Tensor, "n 2 h"], eigenvalues: Complex[Tensor, " h"], position: Int64[Tensor, " n"]
) -> Float[Tensor, "n 2 h"]:
    """`linear_scan` in ⌈log2(longest sequence)⌉ passes over the array, each of which a GPU does in parallel."""
    return planes(_doubled(from_planes(driven), eigenvalues, position))


def gradient_by_doubling(
    grad: Float[Tensor, "n 2 h"],
    h: Float[Tensor, "n 2 h"],
    eigenvalues: Complex[Tensor, " h"],
    position: Int64[Tensor, " n"],
) -> tuple[Float[Tensor, "n 2 h"], Complex[Tensor, " h"]]:
    """∂L/∂u and ∂L/∂λ of a scan by doubling, of ∂L/∂h."""
    # Read backwards, each sequence's last token comes first: its distance to the end is the new position.
    g = _doubled(from_planes(grad).flip(0), eigenvalues.conj(), _distance_to_end(position).flip(0)).flip(0)
    continues = (position[1:] > 0)[:, None]
    return planes(g), (g[1:] * from_planes(h)[:-1].conj() * continues).sum(0)


def _doubled(driven: Tensor, eigenvalues: Tensor, position: Tensor) -> Tensor:
    """The scan of complex numbers; after the pass of stride s, h_t holds the last 2s terms of its sum."""
    longest = int(position.max()) + 1 if len(position) else 0
    h, power, stride = driven.clone(), eigenvalues, 1
    while stride < longest:
        # Few tokens stand far enough from their start for the later passes: only those rows are touched.
        rows = torch.nonzero(position >= stride)[:, 0]
        h[rows] = torch.addcmul(h[rows], h[rows - stride], power)
        power, stride = power * power, 2 * stride
    return h


def _distance_to_end(position: Tensor) -> Tensor:
    """Steps left until the last token of each token's own sequence."""
    starts = torch.nonzero(position == 0)[:, 0]
    ends = torch.cat([starts[1:], starts.new_tensor([len(position)])])
    length = (ends - starts).repeat_interleave(ends - starts)
    return length - 1 - position
