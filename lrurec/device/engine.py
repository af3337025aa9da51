"""`TorchEngine`: a micro-batch on a torch device.

Dense layers run over all clicks of a micro-batch at once, whoever's they are; only h ← λh + γ(Bx + b) goes click by
click, in waves. What is uploaded, what is computed and what is downloaded has static places in a `Bucket`, one for
every power of two of clicks: on a GPU a CUDA graph then replays the whole step as one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor
from torch.nn import functional

from lrurec.bundle import Bundle
from lrurec.device.operators import Operators, operators_on
from lrurec.device.staging import Staging, Waves, waves_of
from lrurec.engine import Clicks, Ranking, empty_ranking
from lrurec.user_state import StateLayout, UserStates
from lrurec.weights import FoldedWeights, fold

SMALLEST_BUCKET = 16


class TorchEngine:
    """`Engine` on a torch device.

    Float32 factors and sums throughout, never TF32; the state is rounded as it is stored after every click. Libraries
    choose a product's order of summation by its size, so here a click's result is the same in every batch to rounding
    only. What has met a GPU and what hasn't: docs/gpu.md.

    Args:
        bundle: the model.
        layout: of the states.
        top_k: length of a list.
        exclude_seen: leave out of a click's list what the ring of recent items holds after it.
        device: where.
        max_batch: a GPU's kernels and graphs are made at once for micro-batches of up to so many clicks. Larger ones
            are taken too; theirs are made when the first of them comes.
        operators: None for the fastest on the device.

    """

    def __init__(
        self,
        bundle: Bundle,
        layout: StateLayout,
        *,
        top_k: int,
        exclude_seen: bool,
        device: torch.device,
        max_batch: int = 4_096,
        operators: Operators | None = None,
    ) -> None:
        self.layout = layout
        self._top_k = top_k
        self._exclude_seen = exclude_seen
        self._device = device
        self._operators = operators or operators_on(device)
        self._weights = weights_on(device, fold(bundle.config, bundle.weights))
        self._table = torch.from_numpy(bundle.weights["item_embedding.weight"]).to(device)
        self._bias = torch.from_numpy(bundle.weights["item_bias"]).to(device, copy=True)
        self._bias[0] = -torch.inf  # the padding item is never recommended
        self._buckets: dict[int, Bucket] = {}
        if device.type == "cuda":
            self._warm_up(max_batch)

    def _warm_up(self, max_batch: int) -> None:
        """Compile and capture now rather than at a click."""
        for clicks in sorted({min(1 << power, max_batch) for power in range(max_batch.bit_length() + 1)}):
            each = np.arange(clicks)
            column = Clicks(each.astype(np.int32), np.ones(clicks, np.int32), each, each)
            self.advance(self.layout.unpack([None] * clicks), column, each)

    @torch.inference_mode()
    def advance(
        self, states: UserStates, clicks: Clicks, ranked: Int64[np.ndarray, " m"]
    ) -> tuple[UserStates, Ranking]:
        """See `Engine.advance`."""
        states, ranking = states.copy(), empty_ranking(len(ranked), self._top_k)
        if not len(clicks.user):
            return states, ranking
        waves = waves_of(clicks.user)
        ranking.clicks[:] = states["clicks"][clicks.user[ranked]] + waves.number[ranked] + 1
        with float32_products():
            bucket = self._bucket_for(len(clicks.user))
            bucket.fill(states, clicks.item, waves, ranked)
            bucket.inputs.upload()
            bucket.step(np.diff(waves.starts).tolist())
            self._rank(bucket, len(ranked))
            bucket.outputs.download()
        ranking.items[:] = bucket.outputs.host["items"][: len(ranked)]
        ranking.scores[:] = bucket.outputs.host["scores"][: len(ranked)]
        states["hidden"][waves.users] = bucket.outputs.host["hidden"][: len(waves.users)]
        _remember(states, clicks, waves)
        return states, ranking

    def _bucket_for(self, clicks: int) -> Bucket:
        size = max(SMALLEST_BUCKET, 1 << (clicks - 1).bit_length())
        if size not in self._buckets:
            self._buckets[size] = Bucket(size, self._weights, self.layout, self._top_k, self._device, self._operators)
        return self._buckets[size]

    def _rank(self, bucket: Bucket, rows: int) -> None:
        if not rows:
            return
        encodings = bucket.encodings[bucket.inputs.device["ranked"][:rows]]
        seen = bucket.seen(rows) if self._exclude_seen else bucket.seen(rows)[:, :0]
        scores, items = self._operators.rank(encodings, self._table, self._bias, seen, self._top_k)
        bucket.outputs.device["scores"][:rows] = scores
        bucket.outputs.device["items"][:rows] = items


@contextmanager
def float32_products() -> Iterator[None]:
    """Torch multiplies float32 as float32 inside, whatever the process allows outside: no TF32, no bfloat16."""
    # By backend: a look at the setting for all of them is an error where they differ.
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


# -- the step


class BlockWeights(NamedTuple):
    """Of one block."""

    in_weight: Float32[Tensor, "d w"]
    in_bias: Float32[Tensor, " w"]
    decay: Float32[Tensor, "2 h"]
    out_weight: Float32[Tensor, "w d"]
    out_bias: Float32[Tensor, " d"]
    norm_1: Float32[Tensor, "2 d"]
    up: Float32[Tensor, "d w"]
    up_bias: Float32[Tensor, " w"]
    down: Float32[Tensor, "w d"]
    down_bias: Float32[Tensor, " d"]
    norm_2: Float32[Tensor, "2 d"]


class DeviceWeights(NamedTuple):
    """`FoldedWeights`, on the device."""

    embedded: Float32[Tensor, "v d"]
    blocks: list[BlockWeights]
    epsilon: float


def weights_on(device: torch.device, weights: FoldedWeights) -> DeviceWeights:
    columns = {name: torch.from_numpy(getattr(weights, name)).to(device) for name in BlockWeights._fields}
    blocks = [
        BlockWeights(**{name: column[index] for name, column in columns.items()}) for index in range(len(weights.decay))
    ]
    return DeviceWeights(torch.from_numpy(weights.embedded).to(device), blocks, float(weights.epsilon))


class Bucket:
    """Room for a micro-batch of up to `size` clicks, and the step on what lies there.

    Rows beyond a micro-batch's own hold zeros or what an earlier one left: item rows that exist and users without a
    click. They are computed like others, and nobody reads what they give.
    """

    def __init__(
        self, size: int, weights: DeviceWeights, layout: StateLayout, k: int, device: torch.device, operators: Operators
    ) -> None:
        self._weights, self._operators = weights, operators
        half = torch.float16 if layout.precision == "float16" else torch.float32
        hidden = half, (size, layout.blocks, 2, layout.channels)
        index = torch.int32, (size,)
        self.inputs = Staging(
            {
                "hidden": hidden,
                "recent_items": (torch.int32, (size, layout.recent_capacity)),
                "clicks": (torch.int64, (size,)),
                "counts": index,
                "starts": (torch.int32, (size + 1,)),
                "item": index,
                "ranked": index,
                "ranked_owner": index,
                "ranked_number": index,
            },
            device,
        )
        self.outputs = Staging(
            {"hidden": hidden, "items": (torch.int32, (size, k)), "scores": (torch.float32, (size, k))}, device
        )
        self.encodings = torch.zeros((size, weights.embedded.shape[1]), device=device)
        self._replay = _captured(self._step) if operators.captured and device.type == "cuda" else None

    def fill(self, states: UserStates, item: np.ndarray, waves: Waves, ranked: np.ndarray) -> None:
        """The host's arrays."""
        put, place = self.inputs.put, waves.place
        for column in ("hidden", "recent_items", "clicks"):
            put(column, states[column][waves.users])
        self.inputs.host["counts"][:] = 0
        put("counts", waves.counts)
        put("starts", waves.starts)
        self.inputs.host["item"][place] = item
        put("ranked", place[ranked])
        put("ranked_owner", waves.owner[ranked])
        put("ranked_number", waves.number[ranked])

    def step(self, wave_sizes: Sequence[int]) -> None:
        """Encodings and states after every click of the inputs; see `Operators.recur` for `wave_sizes`."""
        if self._replay is None:
            self._step(wave_sizes)
        else:
            self._replay()

    def _step(self, wave_sizes: Sequence[int] = ()) -> None:
        embedded, blocks, epsilon = self._weights
        inputs, after = self.inputs.device, self.outputs.device["hidden"]
        x = functional.embedding(inputs["item"], embedded)
        for index, block in enumerate(blocks):
            wide = torch.addmm(block.in_bias, x, block.in_weight)
            self._operators.recur(
                wide,
                inputs["hidden"][:, index],
                after[:, index],
                block.decay,
                inputs["counts"],
                inputs["starts"],
                wave_sizes,
            )
            y = _normed(torch.addmm(block.out_bias, wide, block.out_weight) + x, block.norm_1, epsilon)
            inner = functional.gelu(torch.addmm(block.up_bias, y, block.up))
            x = _normed(torch.addmm(block.down_bias, inner, block.down) + y, block.norm_2, epsilon)
        self.encodings.copy_(x)

    def seen(self, rows: int) -> Int32[Tensor, "m r"]:
        """The ring of recent items after each ranked click, as `user_state` describes it.

        Place s of it holds the latest click whose number, counted from the user's first ever, is s modulo r: one of
        this micro-batch, or what lay there before, 0 if nothing did.
        """
        inputs = self.inputs.device
        owner, number = (inputs[name][:rows, None].long() for name in ("ranked_owner", "ranked_number"))
        ring, earlier = inputs["recent_items"], inputs["clicks"][owner]
        capacity = ring.shape[1]
        last = earlier + number
        latest = last - (last - torch.arange(capacity, device=ring.device)) % capacity
        wave = latest - earlier
        ours = inputs["item"][inputs["starts"][wave.clamp(min=0)].long() + owner]
        return torch.where(wave >= 0, ours, ring[owner[:, 0]])


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """The same step as a CUDA graph: all its launches as one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled or allocated once must not be captured
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


def _normed(x: Tensor, norm: Tensor, epsilon: float) -> Tensor:
    return functional.layer_norm(x, x.shape[1:], norm[0], norm[1], epsilon)


def _remember(states: UserStates, clicks: Clicks, waves: Waves) -> None:
    """The rest of the state: the ring, the count, and the last click's place and time."""
    user, capacity = clicks.user, states["recent_items"].shape[1]
    # Assignment in order: a user's last click wins, and the latest in each place of the ring.
    states["recent_items"][user, (states["clicks"][user] + waves.number) % capacity] = clicks.item
    states["clicks"][waves.users] += waves.counts
    states["source_offset"][user] = clicks.source_offset
    states["timestamp_ms"][user] = clicks.timestamp_ms
