"""Clicks of many users: reading them out of a log, each user's items in order, and the leave-one-out split."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import polars as pl
from jaxtyping import Float64, Int32, Int64, UInt32

from lrurec.catalogue import Catalogue
from lrurec.errors import CatalogueError, InteractionsError
from lrurec.log_files import ID_COLUMNS, ORDER_COLUMNS, TIME_COLUMNS, read_batches

CLICKS_PER_SLAB = 1 << 20
"""Users are worked on in slabs of about as many clicks: the arrays of places, 8 bytes a click, stay small."""

Times: TypeAlias = Int64[np.ndarray, " n"] | Float64[np.ndarray, " n"]
"""When every click of a log was, in the log's own unit; floats where a timestamp has a fraction."""

MIN_CLICKS_TO_EVALUATE = 3
"""Users with fewer clicks are all train: one must be left to learn from, one to validate on, one to test."""


@dataclass(frozen=True, eq=False)
class Histories:
    """Items of several users, laid end to end: user u clicked `items[offsets[u]:offsets[u + 1]]`, oldest first.

    `items` are rows of an item table: 1..N, or 0 where the catalogue doesn't hold the item.
    """

    items: Int32[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " users_and_1"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, user: int) -> Int32[np.ndarray, " n"]:
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    @property
    def lengths(self) -> Int64[np.ndarray, " users"]:
        return np.diff(self.offsets)

    def slices(self, starts: Int64[np.ndarray, " u"], lengths: Int64[np.ndarray, " u"]) -> "Histories":
        """Histories of their own out of `items[start : start + length]`, in the order given."""
        return Histories(_slices(self.items, starts, lengths), _offsets(lengths))

    def take(self, users: Int64[np.ndarray, " u"]) -> "Histories":
        """Some users' histories, in the order asked for."""
        return self.slices(self.offsets[users], self.lengths[users])

    def first(self, counts: Int64[np.ndarray, " users"]) -> "Histories":
        """Every user's oldest `counts` items."""
        return self.slices(self.offsets[:-1], np.minimum(self.lengths, counts))

    def last(self, count: int) -> "Histories":
        """Every user's newest `count` items."""
        kept = np.minimum(self.lengths, count)
        return self.slices(self.offsets[1:] - kept, kept)

    def known(self) -> "Histories":
        """Without the items that the catalogue doesn't hold: they are skipped, never encoded as row 0."""
        is_known = self.items > 0
        if is_known.all():
            return self
        offsets = np.concatenate([[0], np.cumsum(is_known)])[self.offsets]
        return Histories(self.items[is_known], offsets)


class HeldOut(NamedTuple):
    """What every evaluated user is asked: which item came after this history."""

    histories: Histories
    answers: Int32[np.ndarray, " users"]


class Split(NamedTuple):
    """Leave-one-out: the last click of a user is test, the one before it validation, the rest train."""

    train: Histories
    validation: HeldOut
    test: HeldOut


@dataclass(frozen=True, eq=False)
class Interactions:
    """A log of clicks, grouped by user. Users stand in the order of their first row in the log."""

    user_ids: tuple[str, ...]
    catalogue: Catalogue
    """Every item of the log, sorted by id; `histories` are rows of it."""

    histories: Histories

    times: Times | None = None
    """Of every click, beside `histories.items`, never falling within a user; None where the log has no such column.

    `timestamp_ms` where the log has both.
    """

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 over users, items and order: equal means equal training data."""
        digest = hashlib.sha256()
        for text in ("\n".join(self.user_ids), self.catalogue.to_text()):
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
        for array in (self.histories.items, self.histories.offsets):
            digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()[:16]

    def take(self, users: slice) -> "Interactions":
        """The same log with some users only; the catalogue stays whole, so that rows keep their meaning."""
        chosen = np.arange(len(self.user_ids), dtype=np.int64)[users]
        starts, lengths = self.histories.offsets[chosen], self.histories.lengths[chosen]
        times = None if self.times is None else _slices(self.times, starts, lengths)
        return Interactions(self.user_ids[users], self.catalogue, self.histories.take(chosen), times)

    def required_times(self) -> Times:
        """`times`. Raises `InteractionsError` where the log has none."""
        if self.times is None:
            raise InteractionsError(
                "the log orders its clicks by position and does not say when they were; a cut in time needs a column "
                f"{' or '.join(reversed(TIME_COLUMNS))}"
            )
        return self.times

    def clicks_before(self, time: int | float) -> Int64[np.ndarray, " users"]:
        """How many of every user's clicks were before a time; they are the first of the history.

        Raises `InteractionsError` where the log has no times.
        """
        earlier = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.required_times() < time)])
        return np.diff(earlier[self.histories.offsets])

    def before(self, time: int | float) -> "Interactions":
        """The log as it was at that time: no later click, and no user or item that had none yet.

        Raises `InteractionsError` where the log has no times, or none before that.
        """
        counts, times = self.clicks_before(time), self.required_times()
        if not counts.any():
            raise InteractionsError(
                f"no click of the log is before {time}; its first is at {times.min()}, "
                "give a later time in the log's own unit"
            )
        users = np.flatnonzero(counts)
        starts, lengths = self.histories.offsets[users], counts[users]
        histories = self.histories.slices(starts, lengths)
        rows = np.unique(histories.items)
        catalogue = Catalogue(self.catalogue.item_ids[row - 1] for row in rows)
        new_rows = np.zeros(len(self.catalogue) + 1, np.int32)
        new_rows[rows] = np.arange(1, len(rows) + 1)
        return Interactions(
            tuple(self.user_ids[user] for user in users),
            catalogue,
            Histories(new_rows[histories.items], histories.offsets),
            _slices(times, starts, lengths),
        )

    def histories_in(self, catalogue: Catalogue) -> Histories:
        """The histories as rows of another catalogue, 0 for items that it doesn't hold."""
        if catalogue == self.catalogue:
            return self.histories
        row_of = np.concatenate([np.zeros(1, np.int32), catalogue.rows(self.catalogue.item_ids)])
        return Histories(row_of[self.histories.items], self.histories.offsets)


def leave_one_out(histories: Histories) -> Split:
    """Split as the LRURec paper's code does: users with fewer than 3 clicks are all train.

    The input for a validation click is the train part; for a test click, train part and validation click.
    """
    lengths = histories.lengths
    evaluated = np.flatnonzero(lengths >= MIN_CLICKS_TO_EVALUATE)
    whole = histories.take(evaluated)
    return Split(
        train=histories.first(np.where(lengths >= MIN_CLICKS_TO_EVALUATE, lengths - 2, lengths)),
        validation=HeldOut(whole.first(whole.lengths - 2), whole.items[whole.offsets[1:] - 2]),
        test=HeldOut(whole.first(whole.lengths - 1), whole.items[whole.offsets[1:] - 1]),
    )


def read_interactions(path: Path | str) -> Interactions:
    """A log out of CSV, Parquet or JSON Lines, the first and the last also with .gz. Its rows may stand in any order.

    Columns: user_id and item_id (text or whole numbers), and at least one of `ORDER_COLUMNS` (numbers that fit 64
    bits). Others are ignored. Raises `InteractionsError` for anything else, with one line.

    The peak of memory is 12 + 16k bytes a click, k being the number of order columns, up to 12 more where one user has
    most of the clicks and they are in no order; some 200 bytes an id; and what reading needs whatever the size of the
    file (see `log_files`). What stays is 4 bytes a click, 8 more where the log says when it was, and the ids.
    """
    path = Path(path)
    log = _Log()
    for batch in read_batches(path):
        log.append(batch)
    try:
        return log.grouped()
    except CatalogueError as error:
        raise InteractionsError(f"{path}: {error}") from error


class _Ids:
    """A column of ids as numbers, 4 bytes a click. The text of every different id is kept once, by polars."""

    def __init__(self) -> None:
        # Polars forgets the texts when the last column of these categories goes.
        self._keeper = pl.Series([], dtype=pl.Categorical(pl.Categories.random()))
        self.batches: list[UInt32[np.ndarray, " n"]] = []
        self._count = 0

    def append(self, ids: pl.Series) -> None:
        numbers = ids.cast(self._keeper.dtype).to_physical().to_numpy()
        self.batches.append(numbers)
        self._count = max(self._count, int(numbers.max()) + 1)

    def texts(self, numbers: Int64[np.ndarray, " n"]) -> pl.Series:
        return pl.Series(numbers.astype(np.uint32)).cat.to(self._keeper.dtype).cast(pl.String)

    def by_first_click(self) -> Int64[np.ndarray, " ids"]:
        """The numbers in the order in which the log has them first.

        That is likely their own order, but polars doesn't promise it, and the fingerprint of a log depends on it.
        """
        end = sum(map(len, self.batches))
        first = np.zeros(self._count, np.int64)
        for batch in reversed(self.batches):
            # Of several values for one place numpy keeps the last: read backwards, that of the first click.
            first[batch[::-1]] = np.arange(end - 1, end - 1 - len(batch), -1)
            end -= len(batch)
        return np.argsort(first)

    def by_text(self) -> Int64[np.ndarray, " ids"]:
        """The numbers in the order of their texts, compared as UTF-8."""
        return self.texts(np.arange(self._count)).arg_sort().to_numpy().astype(np.int64)


class _Log:
    """The clicks of a log in the file's order, as `read_batches` gives them: 8 + 8k bytes a click."""

    def __init__(self) -> None:
        self._users, self._items = _Ids(), _Ids()
        self._order: dict[str, list[np.ndarray]] = {}

    def append(self, batch: pl.DataFrame) -> None:
        for ids, name in zip((self._users, self._items), ID_COLUMNS, strict=True):
            ids.append(batch[name])
        for name in ORDER_COLUMNS:
            if name in batch.columns:
                self._order.setdefault(name, []).append(batch[name].to_numpy())

    def grouped(self) -> Interactions:
        """The clicks user by user, each user's sorted by the order columns; this log is empty afterwards.

        Raises `CatalogueError` for item ids that no catalogue can hold.
        """
        users, items = self._users.by_first_click(), self._items.by_text()
        catalogue = Catalogue(self._items.texts(items))
        user_ids = tuple(self._users.texts(users))
        offsets, clicked, order = self._by_user(_places_in(users))
        _sort_each_user(clicked, order, offsets)
        rows = (_places_in(items) + 1).astype(np.int32)
        times = next((column for name, column in zip(self._order, order, strict=True) if name in TIME_COLUMNS), None)
        return Interactions(user_ids, catalogue, Histories(rows[clicked], offsets), times)

    def _by_user(
        self, user_of: Int64[np.ndarray, " users"]
    ) -> tuple[Int64[np.ndarray, " users_and_1"], UInt32[np.ndarray, " n"], list[np.ndarray]]:
        """Where each user's clicks begin; the items' numbers and the order columns, user by user.

        `user_of` maps users' numbers to users. Within a user the file's order stays.
        """
        counts = np.zeros(len(user_of), np.int64)
        for numbers in self._users.batches:
            np.add.at(counts, user_of[numbers], 1)
        offsets = _offsets(counts)
        columns = [self._items.batches, *self._order.values()]
        # Whole numbers in one batch and fractions in another make a column of fractions.
        grouped = [np.empty(offsets[-1], np.result_type(*{part.dtype for part in column})) for column in columns]
        free = offsets[:-1].copy()
        for numbers, *parts in zip(self._users.batches, *columns, strict=True):
            places = _take_places(user_of[numbers], free)
            for column, part in zip(grouped, parts, strict=True):
                column[places] = part
        for batches in (self._users.batches, *columns):
            batches.clear()
        return offsets, grouped[0], grouped[1:]


def _places_in(order: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """The inverse permutation: where in `order` each of 0..n-1 stands."""
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    return places


def _take_places(users: Int64[np.ndarray, " n"], free: Int64[np.ndarray, " users"]) -> Int64[np.ndarray, " n"]:
    """A place for each click of a batch: its user's next free one. `free` moves on in place."""
    by_user = np.argsort(users, kind="stable")
    ordered = users[by_user]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    counts = np.diff(starts, append=len(ordered))
    places = np.empty(len(users), np.int64)
    places[by_user] = free[ordered] + np.arange(len(ordered)) - np.repeat(starts, counts)
    free[ordered[starts]] += counts
    return places


def _sort_each_user(
    clicked: UInt32[np.ndarray, " n"], order: Sequence[np.ndarray], offsets: Int64[np.ndarray, " users_and_1"]
) -> None:
    """Sort every user's clicks in place by the order columns, the first of them first; equal ones stay as they are."""
    for users, clicks in _slabs(offsets):
        owner = np.repeat(np.arange(users.start, users.stop), np.diff(offsets[users.start : users.stop + 1]))
        keys = [owner, *(column[clicks] for column in order)]
        if not _are_sorted(keys):
            places = np.lexsort(keys[::-1])
            for column in (clicked, *order):
                column[clicks] = column[clicks][places]


def _are_sorted(keys: Sequence[np.ndarray]) -> bool:
    """Whether rows stand in order by the first key, where it is equal by the next, and so on."""
    in_order: Any = True
    for key in reversed(keys):
        in_order = (key[1:] > key[:-1]) | ((key[1:] == key[:-1]) & in_order)
    return bool(np.all(in_order))


def _slices(values: np.ndarray, starts: Int64[np.ndarray, " u"], lengths: Int64[np.ndarray, " u"]) -> np.ndarray:
    """`values[start : start + length]` of each, laid end to end."""
    offsets = _offsets(lengths)
    chosen = np.empty(offsets[-1], values.dtype)
    for users, clicks in _slabs(offsets):
        shift = np.repeat(starts[users] - offsets[users], lengths[users])
        chosen[clicks] = values[np.arange(clicks.start, clicks.stop) + shift]
    return chosen


def _slabs(offsets: Int64[np.ndarray, " users_and_1"]) -> Iterator[tuple[slice, slice]]:
    """All users in order, and the places of their clicks, cut to `CLICKS_PER_SLAB` clicks or else one user."""
    start, users = 0, len(offsets) - 1
    while start < users:
        last = int(np.searchsorted(offsets, offsets[start] + CLICKS_PER_SLAB, side="right")) - 1
        end = min(max(last, start + 1), users)
        yield slice(start, end), slice(int(offsets[start]), int(offsets[end]))
        start = end


def _offsets(lengths: Int64[np.ndarray, " users"]) -> Int64[np.ndarray, " users_and_1"]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
