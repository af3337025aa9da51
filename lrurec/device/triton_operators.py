"""`Operators` as Triton kernels: `triton_kernels`, and how they are launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from lrurec.device import triton_kernels
from lrurec.device.operators import TorchOperators, best_keys, keys_of, listed

LONGEST_LIST = 128
"""Up to here a list stays in registers; longer ones are `TorchOperators`'."""

TILE = {"tile_rows": 64, "tile_items": 128, "tile_width": 32}
"""Of one product. Compiled for an H100, 8 warps keep its 8,192 sums in registers, 32 a thread, with hardly a spill."""

PROGRAMS = 1_024
"""Where there are items enough: some for each of the 132 multiprocessors of an H100."""

_CHANNELS = 128

#: Sums of products round once. Stated, because Triton 3.10 will have another default.
_FUSED = {"enable_fp_fusion": True}


class TritonOperators:
    """One kernel for the recurrence of all clicks of a block, one for the candidates of all lists.

    Args:
        programs: of the ranking, about; the more, the shorter the runs of items that each of them ranks.

    """

    captured = True

    def __init__(self, programs: int = PROGRAMS) -> None:
        self._programs = programs

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
        """See `Operators.recur`. Each program carries 128 channels of one user in registers through all its clicks."""
        users, _, channels = before.shape
        triton_kernels.recur[users, triton.cdiv(channels, _CHANNELS)](
            driven, before, after, decay, counts, starts, channels,
            before.stride(0), after.stride(0), torch.finfo(after.dtype).max, block=_CHANNELS, **_FUSED,
        )  # fmt: skip

    def rank(
        self,
        encodings: Float32[Tensor, "m d"],
        table: Float32[Tensor, "v d"],
        bias: Float32[Tensor, " v"],
        seen: Int32[Tensor, "m r"],
        k: int,
    ) -> tuple[Float32[Tensor, "m k"], Int32[Tensor, "m k"]]:
        """See `Operators.rank`. What reaches memory are k candidates of each row and run of items."""
        if k > LONGEST_LIST:
            return TorchOperators().rank(encodings, table, bias, seen, k)
        (rows, width), items = encodings.shape, len(bias)
        row_blocks = triton.cdiv(rows, TILE["tile_rows"])
        tiles = triton.cdiv(items, TILE["tile_items"])
        run = triton.cdiv(tiles, triton.cdiv(self._programs, row_blocks)) * TILE["tile_items"]
        runs = triton.cdiv(items, run)
        # Seen items in order, and the place of each run's first: a tile then looks at its own few alone.
        seen = seen.sort(dim=1).values
        firsts = torch.arange(0, items, run, dtype=torch.int32, device=seen.device)
        seen_from = torch.searchsorted(seen, firsts.expand(rows, -1).contiguous(), out_int32=True)
        scores = torch.empty((rows, runs, k), device=encodings.device)
        found = torch.empty((rows, runs, k), dtype=torch.int32, device=encodings.device)
        triton_kernels.best_of_run[row_blocks, runs](
            encodings, table, bias, seen, seen_from, scores, found, rows, items, width, seen.shape[1], run, runs, k,
            places=triton.next_power_of_2(k), num_warps=8, **TILE, **_FUSED,
        )  # fmt: skip
        return listed(best_keys(keys_of(scores.flatten(1), found.flatten(1)), k), k)
