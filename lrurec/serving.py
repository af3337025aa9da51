"""Serving: clicks of many users at once → their new states and their recommendations.

One recurrent step per click, on states that were stored, for as many users as a micro-batch holds. Two engines, one
contract, `Engine`: compiled loops on the CPU, `lrurec.device` on a GPU.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Int64

from lrurec import filtered_ranking, kernels
from lrurec.bundle import Bundle
from lrurec.engine import Clicks, Engine, Ranking, empty_ranking
from lrurec.errors import DeviceError
from lrurec.products import COLUMNS, pack
from lrurec.user_state import UNKNOWN_LOG, StateLayout, UserStates
from lrurec.weights import FoldedWeights, fold


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
    max_batch: int = 4_096,
) -> Engine:
    """The engine for a device; `auto` takes a GPU where torch finds one.

    Raises:
        DeviceError: cuda was asked for and there is none.
    """
    if device == "cpu" or (device == "auto" and not _has_driver()):
        return CompiledEngine(bundle, layout, top_k=top_k, exclude_seen=exclude_seen, max_batch=max_batch)
    import torch

    if torch.cuda.is_available():
        from lrurec.device.engine import TorchEngine

        cuda = torch.device("cuda")
        return TorchEngine(bundle, layout, top_k=top_k, exclude_seen=exclude_seen, device=cuda, max_batch=max_batch)
    if device == "cuda":
        raise DeviceError("device cuda was asked for, but torch finds no CUDA device here; choose auto or cpu")
    return CompiledEngine(bundle, layout, top_k=top_k, exclude_seen=exclude_seen, max_batch=max_batch)


def _has_driver() -> bool:
    """Whether there is a CUDA driver; without one torch finds no device."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


class CompiledEngine:
    """The CPU engine: one call without the GIL for all steps, one for the ranking; see `kernels`."""

    def __init__(
        self, bundle: Bundle, layout: StateLayout, *, top_k: int, exclude_seen: bool, max_batch: int = 4_096
    ) -> None:
        self.layout = layout
        self._weights = packed(fold(bundle.config, bundle.weights))
        self._ranker = ranker_of(bundle.weights["item_embedding.weight"], bundle.weights["item_bias"])
        self._half = layout.precision == "float16"
        self._top_k = top_k
        self._exclude_seen = exclude_seen
        self._rows = max_batch
        width = bundle.config.hidden_units
        self._encodings = np.zeros((self._rows, width), np.float32)
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
        hidden, counts_by_user = self._widened(states), states["clicks"].copy()
        ranking = empty_ranking(len(ranked), self._top_k)
        for start in range(0, len(clicks.user), self._rows):
            part = slice(start, start + self._rows)
            first, last = np.searchsorted(ranked, (start, start + self._rows))
            counts = self._step(clicks.user[part], clicks.item[part], states, hidden, counts_by_user)
            wanted = ranked[first:last] - start
            self._rank(wanted, ranking.items[first:last], ranking.scores[first:last])
            ranking.clicks[first:last] = counts[wanted]
        self._store(hidden, states)
        states["clicks"] = counts_by_user
        # Assignment in order: a user's last click wins.
        states["source_offset"][clicks.user] = clicks.source_offset
        states["timestamp_ms"][clicks.user] = clicks.timestamp_ms
        return states, ranking

    def _widened(self, states: UserStates) -> Float32[np.ndarray, "u n"]:
        if not self._half:
            return np.array(states["hidden"]).reshape(len(states), -1)
        hidden = np.empty((len(states), self.layout.hidden_numbers), np.float32)
        kernels.widen(_columns_of(states, np.int16), self.layout.place_of("hidden") // 2, hidden)
        return hidden

    def _store(self, hidden: Float32[np.ndarray, "u n"], states: UserStates) -> None:
        if self._half:
            kernels.narrow(hidden, self.layout.place_of("hidden") // 2, _columns_of(states, np.int16))
        else:
            states["hidden"] = hidden.reshape(states["hidden"].shape)

    def _step(
        self,
        user: np.ndarray,
        item: np.ndarray,
        states: UserStates,
        hidden: Float32[np.ndarray, "u n"],
        counts_by_user: np.ndarray,
    ) -> np.ndarray:
        counts = np.empty(len(user), np.int64)
        kernels.advance(
            user, item, self._weights, hidden.reshape(states["hidden"].shape), self._half,
            _columns_of(states, np.int32), self.layout.place_of("recent_items") // 4, counts_by_user,
            self._encodings, self._seen, counts,
        )  # fmt: skip
        return counts

    def _rank(self, wanted: np.ndarray, top_items: np.ndarray, top_scores: np.ndarray) -> None:
        seen = self._seen if self._exclude_seen else self._seen[:, :0]
        self._ranker.rank(self._encodings, wanted, np.ascontiguousarray(seen), top_items, top_scores)


def _columns_of(states: UserStates, number: type[np.integer[Any]]) -> np.ndarray:
    """Whole rows as numbers of one type: fields of that type lie side by side in it."""
    return states.view(number).reshape(len(states), -1)


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


class FullRanker:
    """Scores every item in float32: for any CPU."""

    def __init__(self, table: Float32[np.ndarray, "v d"], bias: Float32[np.ndarray, " v"]) -> None:
        self._table, self._bias = packed_items(table, bias)

    def rank(
        self,
        encodings: Float32[np.ndarray, "p d"],
        wanted: Int64[np.ndarray, " m"],
        seen: Int32[np.ndarray, "n r"],
        top_items: Int32[np.ndarray, "m k"],
        top_scores: Float32[np.ndarray, "m k"],
    ) -> None:
        """See `kernels.rank`."""
        kernels.rank(encodings, wanted, self._table, self._bias, seen, top_items, top_scores)


def ranker_of(table: Float32[np.ndarray, "v d"], bias: Float32[np.ndarray, " v"]) -> Ranker:
    """The fastest that this CPU has the instructions for; row 0 is the padding item's, and never ranked."""
    products = filtered_ranking.supported()
    if not products or table.shape[1] > filtered_ranking.WIDEST:
        return FullRanker(table, bias)
    return filtered_ranking.FilteredRanker(table[1:], bias[1:], products[0])


def packed_items(
    table: Float32[np.ndarray, "v d"], bias: Float32[np.ndarray, " v"]
) -> tuple[Float32[np.ndarray, "g passes d at_once"], Float32[np.ndarray, "g columns"]]:
    """Table and bias as `kernels.rank` takes them: of items 1..N; places beyond N score -inf."""
    words = pack(table[1:], np.dtype(np.float32))
    biases = np.full((len(words), COLUMNS), -np.inf, np.float32)
    biases.reshape(-1)[: len(bias) - 1] = bias[1:]
    return words, biases


def packed(weights: FoldedWeights) -> FoldedWeights:
    """Matrices as `products.multiply` takes them, (l, g, passes, q, at_once), and their biases as (l, g, columns)."""

    def words(matrices: np.ndarray) -> np.ndarray:
        return np.stack([pack(matrix.T, matrix.dtype) for matrix in matrices])

    def groups(biases: np.ndarray) -> np.ndarray:
        return np.pad(biases, ((0, 0), (0, -biases.shape[1] % COLUMNS))).reshape(len(biases), -1, COLUMNS)

    matrices = {name: words(getattr(weights, name)) for name in ("in_weight", "out_weight", "up", "down")}
    biases = {name: groups(getattr(weights, name)) for name in ("in_bias", "out_bias", "up_bias", "down_bias")}
    return FoldedWeights(**(weights._asdict() | matrices | biases))
