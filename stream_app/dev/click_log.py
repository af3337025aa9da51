"""A log of clicks in the order in which a shop would have seen them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from lrurec.interactions import Interactions, read_interactions
from lrurec.log_files import ORDER_COLUMNS, read_log, refuse_values

ACTIVE_USERS = 50
"""How many users click in turn when the log does not say who clicked when."""

_MS_PER = {"timestamp_ms": 1, "timestamp": 1_000}  # `timestamp` is in seconds


class LoggedClick(NamedTuple):
    user_id: str
    item_id: str
    timestamp_ms: int | None
    """None when the log has only positions."""


def read_clicks(path: Path) -> Sequence[LoggedClick]:
    """All clicks of a log in chronological order; the formats are those of `lrurec.log_files`.

    By timestamps where the log has them. Positions only order one user's clicks: then about `ACTIVE_USERS` users at a
    time take turns at random (the same turns every time), new ones coming as others finish, in the file's order.

    Raises:
        InteractionsError: the file cannot be read, lacks a column, or holds a time that no click can have.
    """
    log = read_log(path)
    column = next((name for name in _MS_PER if name in log.columns), None)
    if column is None:
        return [LoggedClick(user, item, None) for user, item in interleave(read_interactions(path))]
    times = _milliseconds(log[column], _MS_PER[column], path)
    order = [name for name in ORDER_COLUMNS if name in log.columns]
    ordered = log.with_columns(times.alias("time")).sort(order, maintain_order=True)
    columns = (ordered["user_id"].to_list(), ordered["item_id"].to_list(), ordered["time"].to_list())
    return [LoggedClick(*row) for row in zip(*columns, strict=True)]


def interleave(interactions: Interactions, active: int = ACTIVE_USERS, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(user_id, item_id) of every click: each user's in order, `active` users taking turns at random."""
    histories, ids = interactions.histories, interactions.catalogue.item_ids
    random = np.random.default_rng(seed)
    ends = histories.offsets[1:].tolist()
    next_click = histories.offsets[:-1].tolist()
    waiting = iter([user for user in range(len(ends)) if next_click[user] < ends[user]])
    present = [user for _, user in zip(range(active), waiting, strict=False)]
    while present:
        place = int(random.integers(len(present)))
        user = present[place]
        yield interactions.user_ids[user], ids[histories.items[next_click[user]] - 1]
        next_click[user] += 1
        if next_click[user] == ends[user]:
            replacement = next(waiting, None)
            if replacement is None:
                present.pop(place)
            else:
                present[place] = replacement


def _milliseconds(times: pl.Series, ms_per: int, path: Path) -> pl.Series:
    """Times as the contract has them: whole milliseconds that fit 64 bits."""
    most = (2**63 - 1) // ms_per
    if ms_per > 1:
        fits = times.is_between(-most, most)
        refuse_values(times, ~fits, path, f"it must be from {-most} to {most}: its milliseconds must fit 64 bits")
    return (times * ms_per).round().cast(pl.Int64)
