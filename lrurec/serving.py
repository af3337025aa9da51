"""Serving: clicks of many users at once → their new states and their recommendations.

One recurrent step per click, on states that were stored, for as many users as a micro-batch holds. Two engines, one
contract, `Engine`: compiled loops on the CPU, torch operators on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64

from lrurec import filtered_ranking, kernels
from lrurec.bundle import Bundle
from lrurec.errors import DeviceError
from lrurec.model import Block, LRURec
from lrurec.user_state import UNKNOWN_LOG, StateLayout, UserStates

#: Items in one scoring product: 32 rows of 4,096 float32 scores stay in a core's second-level cache.
CHUNK_ITEMS = 4_096


class Clicks(NamedTuple):
    """Columns of n clicks, in log order within each user.

    `user` indexes the rows of the states that go with them; `item` is an item row, 1..N (an unknown item is no click).
    """

    user: Int32[np.ndarray, " n"]
    item: Int32[np.ndarray, " n"]
    source_offset: Int64[np.ndarray, " n"]
    timestamp_ms: Int64[np.ndarray, " n"]


class Ranking(NamedTuple):
    """The k best items after each of m clicks: rows of the item table, best first, and their scores (logits).

    0 and -inf fill a list where the catalogue has fewer items than k that the user has not seen. `clicks` counts the
    clicks in the user's state at that point.
    """

    items: Int32[np.ndarray, "m k"]
    scores: Float32[np.ndarray, "m k"]
    clicks: Int64[np.ndarray, " m"]


@runtime_checkable
class Engine(Protocol):
    """A model on a device. Not thread-safe: one thread calls it."""

    layout: StateLayout

    def advance(
        self, states: UserStates, clicks: Clicks, ranked: Int64[np.ndarray, " m"]
    ) -> tuple[UserStates, Ranking]:
        """The states after all clicks, one step a click, and the ranking after the clicks that `ranked` names.

        `ranked` ascends; `states` is left as it was. What a click gives depends on its user's state and earlier clicks
        alone, never on how clicks are cut into batches: to the bit on one machine, but for `TorchEngine`.
        """
        ...


class _Weights(NamedTuple):
    """The model folded for stepping: λ, γB, γb and the normalised embeddings computed once, in float64."""

    embedded: Float32[np.ndarray, "v d"]
    in_weight: Float32[np.ndarray, "l d w"]  # w = 4d: real parts of 2d channels, then imaginary parts
    in_bias: Float32[np.ndarray, "l w"]
    decay: Float32[np.ndarray, "l 2 h"]
    out_weight: Float32[np.ndarray, "l w d"]
    out_bias: Float32[np.ndarray, "l d"]
    norm_1: Float32[np.ndarray, "l 2 d"]
    up: Float32[np.ndarray, "l d w"]
    up_bias: Float32[np.ndarray, "l w"]
    down: Float32[np.ndarray, "l w d"]
    down_bias: Float32[np.ndarray, "l d"]
    norm_2: Float32[np.ndarray, "l 2 d"]
    epsilon: np.float32


def state_layout(
    bundle: Bundle,
    precision: Literal["float16", "float32"] = "float16",
    recent_capacity: int = 100,
    source_log: str = UNKNOWN_LOG,
) -> StateLayout:
    """The layout of user states under this bundle and on this log of clicks."""
    config = bundle.config
    return StateLayout(bundle.version, config.num_blocks, config.state_channels, precision, recent_capacity, source_log)


def build_engine(
    bundle: Bundle,
    layout: StateLayout,
    *,
    top_k: int = 10,
    exclude_seen: bool = True,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    max_batch: int = 2_048,
) -> Engine:
    """The engine for a device; `auto` takes a GPU where torch finds one.

    Raises:
        DeviceError: cuda was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise DeviceError("device cuda was asked for, but torch finds no CUDA device here; choose auto or cpu")
    if available and device != "cpu":
        return TorchEngine(bundle, layout, top_k=top_k, exclude_seen=exclude_seen, device=torch.device("cuda"))
    return CompiledEngine(bundle, layout, top_k=top_k, exclude_seen=exclude_seen, max_batch=max_batch)


class CompiledEngine:
    """The CPU engine: one call without the GIL for all steps, one for the ranking; see `kernels`."""

    def __init__(
        self, bundle: Bundle, layout: StateLayout, *, top_k: int, exclude_seen: bool, max_batch: int = 2_048
    ) -> None:
        self.layout = layout
        self._weights = _fold(bundle.model)
        self._ranker = ranker_of(bundle.model)
        self._top_k = top_k
        self._exclude_seen = exclude_seen
        self._rows = -(-max_batch // kernels.TILE) * kernels.TILE
        width = bundle.config.hidden_units
        self._encodings = np.zeros((self._rows, width), np.float32)
        self._wide = np.zeros((self._rows, 4 * width), np.float32)
        self._seen = np.zeros((self._rows, layout.recent_capacity), np.int32)
        self._compile()

    def _compile(self) -> None:
        """Compile, or load what was compiled before, now rather than at the first click."""
        one = np.zeros(1, np.int64)
        click = Clicks(one.astype(np.int32), one.astype(np.int32) + 1, one, one)
        self.advance(self.layout.unpack([None]), click, one)

    def advance(
        self, states: UserStates, clicks: Clicks, ranked: Int64[np.ndarray, " m"]
    ) -> tuple[UserStates, Ranking]:
        """See `Engine.advance`. Larger batches than `max_batch` are cut."""
        states = states.copy()
        hidden = self._widened(states["hidden"])
        recent, counts_by_user = states["recent_items"].copy(), states["clicks"].copy()
        ranking = _empty_ranking(len(ranked), self._top_k)
        for start in range(0, len(clicks.user), self._rows):
            part = slice(start, start + self._rows)
            first, last = np.searchsorted(ranked, (start, start + self._rows))
            counts = self._step(clicks.user[part], clicks.item[part], hidden, recent, counts_by_user)
            wanted = ranked[first:last] - start
            self._rank(wanted, ranking.items[first:last], ranking.scores[first:last])
            ranking.clicks[first:last] = counts[wanted]
        states["hidden"] = self._as_stored(hidden)
        states["recent_items"], states["clicks"] = recent, counts_by_user
        # Assignment in order: a user's last click wins.
        states["source_offset"][clicks.user] = clicks.source_offset
        states["timestamp_ms"][clicks.user] = clicks.timestamp_ms
        return states, ranking

    def _widened(self, stored: np.ndarray) -> np.ndarray:
        if stored.dtype != np.float16:
            return stored.copy()
        hidden = np.empty(stored.shape, np.float32)
        kernels.widen(np.ascontiguousarray(stored).view(np.int16).reshape(-1), hidden.reshape(-1))
        return hidden

    def _as_stored(self, hidden: np.ndarray) -> np.ndarray:
        if self.layout.precision != "float16":
            return hidden
        half = np.empty(hidden.shape, np.int16)
        kernels.narrow(hidden.reshape(-1), half.reshape(-1))
        return half.view(np.float16)

    def _step(
        self, user: np.ndarray, item: np.ndarray, hidden: np.ndarray, recent: np.ndarray, clicks: np.ndarray
    ) -> np.ndarray:
        rows = -(-len(user) // kernels.TILE) * kernels.TILE
        counts = np.empty(len(user), np.int64)
        half = self.layout.precision == "float16"
        kernels.advance(
            user, item, self._weights, hidden, half, recent, clicks,
            self._encodings[:rows], self._wide[:rows], self._seen, counts,
        )  # fmt: skip
        return counts

    def _rank(self, wanted: np.ndarray, top_items: np.ndarray, top_scores: np.ndarray) -> None:
        seen = self._seen if self._exclude_seen else self._seen[:, :0]
        self._ranker.rank(self._encodings, wanted, np.ascontiguousarray(seen), top_items, top_scores)


@runtime_checkable
class Ranker(Protocol):
    """Finds the k best items of encodings, exactly."""

    def rank(
        self,
        encodings: Float32[np.ndarray, "p d"],
        wanted: Int64[np.ndarray, " m"],
        seen: Int32[np.ndarray, "n r"],
        top_items: Int32[np.ndarray, "m k"],
        top_scores: Float32[np.ndarray, "m k"],
    ) -> None:
        """See `kernels.rank`."""
        ...


class ChunkedRanker:
    """Scores every item in float32, a run of items at a time: for any CPU."""

    def __init__(self, model: LRURec) -> None:
        self._item_chunks = chunks_of_items(model)

    def rank(
        self,
        encodings: Float32[np.ndarray, "p d"],
        wanted: Int64[np.ndarray, " m"],
        seen: Int32[np.ndarray, "n r"],
        top_items: Int32[np.ndarray, "m k"],
        top_scores: Float32[np.ndarray, "m k"],
    ) -> None:
        """See `kernels.rank`."""
        kernels.rank(encodings, wanted, self._item_chunks, seen, top_items, top_scores)


def ranker_of(model: LRURec) -> Ranker:
    """The fastest that this CPU has the instructions for."""
    if not filtered_ranking.is_supported():
        return ChunkedRanker(model)
    parameters = (model.item_embedding.weight, model.item_bias)
    table, bias = (parameter.detach().cpu().numpy()[1:] for parameter in parameters)
    return filtered_ranking.FilteredRanker(table, bias)


class TorchEngine:
    """The same on a torch device, as whole-batch operators: step number s advances every user's click number s.

    Float32 throughout; the state is rounded as it is stored after every click. Torch's products may differ in the last
    bits between batches of different sizes, so here a click's result is the same in every batch to rounding only. Never
    run on a GPU yet: its equality with `CompiledEngine` is tested on the CPU device.
    """

    def __init__(
        self, bundle: Bundle, layout: StateLayout, *, top_k: int, exclude_seen: bool, device: torch.device
    ) -> None:
        self.layout = layout
        self._model = copy.deepcopy(bundle.model).to(
            device
        )  # `to` moves a model in place, and the bundle is others' too
        self._top_k = top_k
        self._exclude_seen = exclude_seen
        self._device = device
        self._precision = torch.float16 if layout.precision == "float16" else torch.float32

    @torch.inference_mode()
    def advance(
        self, states: UserStates, clicks: Clicks, ranked: Int64[np.ndarray, " m"]
    ) -> tuple[UserStates, Ranking]:
        """See `Engine.advance`."""
        states = states.copy()
        pairs = torch.from_numpy(states["hidden"].astype(np.float32)).to(self._device)
        hidden = torch.complex(pairs[:, :, 0], pairs[:, :, 1])
        encodings = torch.empty(len(clicks.user), self._model.config.hidden_units, device=self._device)
        seen = np.zeros((len(clicks.user), self.layout.recent_capacity), np.int32)
        counts = np.zeros(len(clicks.user), np.int64)
        for wave in _waves(clicks.user):
            users = torch.from_numpy(clicks.user[wave].astype(np.int64)).to(self._device)
            items = torch.from_numpy(clicks.item[wave].astype(np.int64)).to(self._device)
            encoded, after = self._model.step(items, hidden[users])
            hidden[users] = self._as_stored(after)
            encodings[torch.from_numpy(wave).to(self._device)] = encoded
            _remember(states, clicks, wave)
            seen[wave], counts[wave] = states["recent_items"][clicks.user[wave]], states["clicks"][clicks.user[wave]]
        states["hidden"] = torch.stack([hidden.real, hidden.imag], 2).cpu().numpy()
        states["source_offset"][clicks.user] = clicks.source_offset
        states["timestamp_ms"][clicks.user] = clicks.timestamp_ms
        ranking = _empty_ranking(len(ranked), self._top_k)
        ranking.clicks[:] = counts[ranked]
        self._rank(encodings[torch.from_numpy(ranked).to(self._device)], seen[ranked], ranking)
        return states, ranking

    def _as_stored(self, hidden: torch.Tensor) -> torch.Tensor:
        limit = torch.finfo(self._precision).max
        parts = torch.view_as_real(hidden).clamp(-limit, limit).to(self._precision).float()
        return torch.view_as_complex(parts)

    def _rank(self, encodings: torch.Tensor, seen: np.ndarray, ranking: Ranking) -> None:
        for start in range(0, len(encodings), 256):  # 256 rows: the scores of a million items are 1 GB
            scores = self._model.scores(encodings[start : start + 256])
            if self._exclude_seen:
                scores.scatter_(
                    1, torch.from_numpy(seen[start : start + 256].astype(np.int64)).to(self._device), -np.inf
                )
            scores[:, 0] = -np.inf
            # A stable sort puts the lower item row first among equals, as the CPU engine does; topk promises no order.
            best, rows = scores.sort(dim=1, descending=True, stable=True)
            width = min(self._top_k, scores.shape[1])
            ranking.scores[start : start + 256, :width] = best[:, :width].cpu().numpy()
            ranking.items[start : start + 256, :width] = rows[:, :width].cpu().numpy()
        ranking.items[np.isneginf(ranking.scores)] = 0


def _waves(user: np.ndarray) -> list[np.ndarray]:
    """Click indices by how many clicks of the same user came before: within one wave every user is there once."""
    order = np.argsort(user, kind="stable")
    starts = np.flatnonzero(np.diff(user[order], prepend=-1))
    rank = np.arange(len(user)) - np.repeat(starts, np.diff(np.append(starts, len(user))))
    return [order[rank == number] for number in range(int(rank.max(initial=-1)) + 1)]


def _remember(states: UserStates, clicks: Clicks, wave: np.ndarray) -> None:
    user = clicks.user[wave]
    place = states["clicks"][user] % states["recent_items"].shape[1]
    states["recent_items"][user, place] = clicks.item[wave]
    states["clicks"][user] += 1


def _empty_ranking(rows: int, k: int) -> Ranking:
    return Ranking(np.zeros((rows, k), np.int32), np.full((rows, k), -np.inf, np.float32), np.zeros(rows, np.int64))


def _fold(model: LRURec) -> _Weights:
    def exact(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().cpu().double().numpy()

    def norm(layer: torch.nn.LayerNorm) -> np.ndarray:
        return np.stack([exact(layer.weight), exact(layer.bias)])

    table = exact(model.item_embedding.weight)
    centred = table - table.mean(1, keepdims=True)
    scale = np.sqrt(centred.var(1, keepdims=True) + model.config.layer_norm_eps)
    embedded = centred / scale * exact(model.layer_norm.weight) + exact(model.layer_norm.bias)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in _Weights._fields[1:-1]}
    for block in cast("Iterable[Block]", model.blocks):
        lru, feed = block.lru, block.feed_forward
        gamma = np.exp(exact(lru.gamma_log))[:, None]
        decay = np.exp(-np.exp(exact(lru.nu_log)) + 1j * np.exp(exact(lru.theta_log)))
        b, c = exact(lru.input_weight) * gamma[..., None], exact(lru.output_weight)
        folded = {
            "in_weight": np.concatenate([b[..., 0], b[..., 1]]).T,
            "in_bias": (exact(lru.input_bias) * gamma).T.ravel(),
            "decay": np.stack([decay.real, decay.imag]),
            "out_weight": np.concatenate([c[..., 0].T, -c[..., 1].T]),
            "out_bias": exact(lru.output_bias),
            "norm_1": norm(block.layer_norm),
            "up": exact(feed.inner.weight).T,
            "up_bias": exact(feed.inner.bias),
            "down": exact(feed.outer.weight).T,
            "down_bias": exact(feed.outer.bias),
            "norm_2": norm(feed.layer_norm),
        }
        for name, values in folded.items():
            columns[name].append(values)
    stacked = {name: np.ascontiguousarray(np.stack(values), np.float32) for name, values in columns.items()}
    return _Weights(embedded.astype(np.float32), **stacked, epsilon=np.float32(model.config.layer_norm_eps))


def chunks_of_items(model: LRURec) -> Float32[np.ndarray, "chunks d_plus_1 width"]:
    """Eᵀ with the bias as a last row, as `kernels.rank` takes it: items 1..N in runs; places beyond N score -inf."""
    table = np.concatenate([model.item_embedding.weight.detach().cpu(), model.item_bias.detach().cpu()[:, None]], 1)[1:]
    items, rows = table.shape
    width = min(CHUNK_ITEMS, items)
    chunks = -(-items // width)
    padded = np.zeros((chunks * width, rows), np.float32)
    padded[:, -1] = -np.inf
    padded[:items] = table
    return np.ascontiguousarray(padded.reshape(chunks, width, rows).transpose(0, 2, 1))
