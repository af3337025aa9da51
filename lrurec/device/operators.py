"""The two operators that torch lacks, the recurrence by waves and the exact top-K: a contract, and plain torch for it.

`triton_operators` has the same for NVIDIA GPUs, each as one kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from subprocess import CalledProcessError
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

logger = logging.getLogger(__name__)

SCORES_AT_ONCE = 1 << 22
"""Scores in memory at a time: 16 MB, and while keys are made of them, eight times that."""

_NO_ITEM = 2**31 - 1


@runtime_checkable
class Operators(Protocol):
    """Float32 throughout: float32 factors, float32 sums."""

    captured: bool
    """Whether `recur` does the same launches whatever the clicks, so that a CUDA graph can hold it."""

    def recur(
        self,
        driven: Float32[Tensor, "n two_h"],
        before: Float[Tensor, "a 2 h"],
        after: Float[Tensor, "a 2 h"],
        decay: Float32[Tensor, "2 h"],
        counts: Int32[Tensor, " a"],
        starts: Int32[Tensor, " waves_plus_1"],
        wave_sizes: Sequence[int],
    ) -> None:
        """h ← λh + u, click after click of each user, in the layout of `staging.Waves`; real parts, then imaginary.

        After every click h is rounded to the type of `after`, and stays within its largest numbers: what a click gives
        does not depend on which clicks shared its micro-batch.

        Args:
            driven: γ(Bx + b) of each click going in, h after it coming out.
            before: each user's state, left as it is.
            after: out, the state after the last click.
            decay: λ.
            counts: clicks of each user; 0 for rows that are no user.
            starts: the first click of each wave.
            wave_sizes: users in each wave, known to the host; not used where `captured`.

        """
        ...

    def rank(
        self,
        encodings: Float32[Tensor, "m d"],
        table: Float32[Tensor, "v d"],
        bias: Float32[Tensor, " v"],
        seen: Int32[Tensor, "m r"],
        k: int,
    ) -> tuple[Float32[Tensor, "m k"], Int32[Tensor, "m k"]]:
        """The k best of x·E_v + bias_v over the rows v of the table that a row has not seen: scores and v, best first.

        Equal scores stand in row order. -inf and 0 where there are fewer than k; a score of -inf or NaN is never
        listed. Exact: of the scores as they were computed, this is the head of their full stable sort.
        """
        ...


def operators_on(device: torch.device) -> Operators:
    """The fastest for a device: Triton's kernels on a GPU, if Triton is there and a C compiler for its launcher."""
    if device.type == "cuda" and find_spec("triton"):
        from triton.runtime import driver  # noqa: PLC0415  nobody else waits for Triton

        try:
            _ = driver.active.utils  # compiled now, if not before
        except (RuntimeError, OSError, CalledProcessError) as error:
            logger.warning("torch's operators compute, which are slower: Triton's kernels can't be launched: %s", error)
            return TorchOperators()
        from lrurec.device.triton_operators import TritonOperators  # noqa: PLC0415

        return TritonOperators()
    return TorchOperators()


class TorchOperators:
    """Any device: a few elementwise operators a wave, and products of all rows with a run of items."""

    captured = False

    def __init__(self, scores_at_once: int = SCORES_AT_ONCE) -> None:
        self._scores_at_once = scores_at_once

    def recur(
        self,
        driven: Float32[Tensor, "n two_h"],
        before: Float[Tensor, "a 2 h"],
        after: Float[Tensor, "a 2 h"],
        decay: Float32[Tensor, "2 h"],
        counts: Int32[Tensor, " a"],
        starts: Int32[Tensor, " waves_plus_1"],
        wave_sizes: Sequence[int],
    ) -> None:
        """See `Operators.recur`."""
        limit = torch.finfo(after.dtype).max
        crossed = torch.stack([-decay[1], decay[1]])  # (λh)_re = λ_re h_re - λ_im h_im, (λh)_im = λ_re h_im + λ_im h_re
        state = before.to(torch.float32, copy=True)
        start = 0
        for users in wave_sizes:
            h, u = state[:users], driven[start : start + users].view(users, 2, -1)
            u.addcmul_(h, decay[0]).addcmul_(h.flip(1), crossed)
            u.copy_(u.clamp_(-limit, limit).to(after.dtype))
            h.copy_(u)
            start += users
        after.copy_(state)

    def rank(
        self,
        encodings: Float32[Tensor, "m d"],
        table: Float32[Tensor, "v d"],
        bias: Float32[Tensor, " v"],
        seen: Int32[Tensor, "m r"],
        k: int,
    ) -> tuple[Float32[Tensor, "m k"], Int32[Tensor, "m k"]]:
        """See `Operators.rank`. Memory: `scores_at_once` scores and keys, or one item's."""
        rows = len(encodings)
        at_once = max(1, self._scores_at_once // max(1, rows))
        best = torch.empty((rows, 0), dtype=torch.int64, device=encodings.device)
        for first in range(0, len(bias), at_once):
            part = slice(first, first + at_once)
            scores = torch.addmm(bias[part], encodings, table[part].T)
            place = seen.long() - first
            inside = (place >= 0) & (place < scores.shape[1])
            never = torch.where(inside, -torch.inf, torch.inf)
            scores.scatter_reduce_(1, torch.where(inside, place, 0), never, "amin")
            items = torch.arange(first, first + scores.shape[1], dtype=torch.int32, device=scores.device)
            best = best_keys(torch.cat([best, best_keys(keys_of(scores, items), k)], 1), k)
        return listed(best, k)


# -- a score and its item as one number


def keys_of(scores: Float32[Tensor, "m c"], items: Int32[Tensor, "*m c"]) -> Int64[Tensor, "m c"]:
    """Integers in the order of lists: the higher score has the larger key, and so has the lower item among equals.

    `topk` promises no order among equal scores; no two keys are equal. Upper 32 bits: a float32's bits, of which those
    behind the sign turned around where it is negative, compare as the numbers do. Lower: 2^31 - 1 - item. NaN has the
    key of -inf, and -0 that of 0.
    """
    scores = torch.where(scores > -torch.inf, scores, -torch.inf) + 0.0
    return _turned(scores.view(torch.int32)).long() << 32 | _NO_ITEM - items.long()


def best_keys(keys: Int64[Tensor, "m c"], k: int) -> Int64[Tensor, "m c_or_k"]:
    """The k largest, or all where there are fewer, in descending order."""
    return keys.topk(min(k, keys.shape[1]), dim=1).values


def listed(keys: Int64[Tensor, "m c"], k: int) -> tuple[Float32[Tensor, "m k"], Int32[Tensor, "m k"]]:
    """Scores and items of at most k keys, filled up with -inf and 0."""
    scores = torch.full((len(keys), k), -torch.inf, device=keys.device)
    items = torch.zeros((len(keys), k), dtype=torch.int32, device=keys.device)
    width = keys.shape[1]
    scores[:, :width] = _turned((keys >> 32).int()).view(torch.float32)
    items[:, :width] = (_NO_ITEM - (keys & 0xFFFFFFFF)).int()
    return scores, items.masked_fill_(scores == -torch.inf, 0)


def _turned(bits: Tensor) -> Tensor:
    """Its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
