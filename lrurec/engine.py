"""What every engine takes and gives."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Int64

from lrurec.user_state import StateLayout, UserStates


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

        `ranked` ascends; `states` is left as it was, and what is returned is the caller's to keep. What a click gives
        depends on its user's state and earlier clicks alone, never on how clicks are cut into batches: to the bit on
        one machine, but for `TorchEngine`.
        """
        ...


def empty_ranking(rows: int, k: int) -> Ranking:
    return Ranking(np.zeros((rows, k), np.int32), np.full((rows, k), -np.inf, np.float32), np.zeros(rows, np.int64))
