"""Logs of clicks: reading them, each user's items in order, and the leave-one-out split."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Int32, Int64

from lrurec.catalogue import Catalogue
from lrurec.errors import CatalogueError, InteractionsError

ID_COLUMNS = ("user_id", "item_id")

ORDER_COLUMNS = ("timestamp_ms", "timestamp", "position")
"""At least one is needed. With several, the first decides and the next break its ties; then the order in the file."""

_BEYOND_64_BITS = 2.0**63
"""The least number that a signed 64-bit integer does not hold."""

_SHOWN_CHARACTERS = 60
"""Of a value that is refused."""

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
        offsets = _offsets(lengths)
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Histories(self.items[places], offsets)

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

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 over users, items and order: equal means equal training data."""
        digest = hashlib.sha256()
        for text in ("\n".join(self.user_ids), self.catalogue.to_text()):
            digest.update(text.encode())
        for array in (self.histories.items, self.histories.offsets):
            digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()[:16]

    def take(self, users: slice) -> "Interactions":
        """The same log with some users only; the catalogue stays whole, so that rows keep their meaning."""
        chosen = np.arange(len(self.user_ids), dtype=np.int64)[users]
        return Interactions(self.user_ids[users], self.catalogue, self.histories.take(chosen))

    def histories_in(self, catalogue: Catalogue) -> Histories:
        """The histories as rows of another catalogue, 0 for items that it doesn't hold."""
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
    """A log out of CSV, Parquet or JSON Lines, the first and the last also with .gz.

    Columns: user_id and item_id (text or whole numbers), and at least one of `ORDER_COLUMNS` (numbers that fit 64
    bits). Others are ignored. Raises `InteractionsError` for anything else, with one line.
    """
    path = Path(path)
    return _group(read_log(path), path)


def read_log(path: Path) -> pl.DataFrame:
    """The rows of a log in the file's order, checked: ids as text, and those of `ORDER_COLUMNS` that it has.

    The latter are int64, or float64 where a number has a fraction. Raises `InteractionsError` as `read_interactions`.
    """
    table = _read_table(path)
    order = _require_columns(table, path)
    columns = [_ids(table, name, path) for name in ID_COLUMNS] + [_numbers(table, name, path) for name in order]
    return pl.DataFrame(columns)


def _read_table(path: Path) -> pl.DataFrame:
    name = path.name.lower()
    reader = next((read for ending, read in READERS.items() if name.removesuffix(".gz").endswith(ending)), None)
    if reader is None or (name.endswith(".gz") and reader is pl.read_parquet):
        raise InteractionsError(f"{path}: unknown kind of file; allowed are .csv, .csv.gz, .jsonl, .jsonl.gz, .parquet")
    try:
        content = path.read_bytes()
        return reader(io.BytesIO(gzip.decompress(content) if name.endswith(".gz") else content))
    except pl.exceptions.NoDataError as error:
        raise InteractionsError(f"{path} is empty; it must hold a log of clicks") from error
    except OSError as error:
        raise InteractionsError(f"{path} cannot be read: {error.strerror or error}") from error
    except (pl.exceptions.PolarsError, zlib.error, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise InteractionsError(f"{path} cannot be read as its name says ({reason}); is the file whole?") from error


def _read_csv(file: io.BytesIO) -> pl.DataFrame:
    # Everything as text: an id such as 007 must not become the number 7.
    return pl.read_csv(file, infer_schema=False)


def _read_json_lines(file: io.BytesIO) -> pl.DataFrame:
    return pl.read_ndjson(file, infer_schema_length=None)


READERS: dict[str, Callable[[io.BytesIO], pl.DataFrame]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": pl.read_parquet,
}


def _require_columns(table: pl.DataFrame, path: Path) -> list[str]:
    """The order columns that are there. Raises if any column that is needed is not, or there are no rows."""
    order = [name for name in ORDER_COLUMNS if name in table.columns]
    missing = [name for name in ID_COLUMNS if name not in table.columns]
    if missing or not order:
        needed = f"user_id, item_id and one of {', '.join(ORDER_COLUMNS)}"
        raise InteractionsError(f"{path} has columns {', '.join(table.columns)}; it needs {needed}")
    if table.is_empty():
        raise InteractionsError(f"{path} has no rows; it must hold a log of clicks")
    return order


def _ids(table: pl.DataFrame, name: str, path: Path) -> pl.Series:
    column = table[name]
    if column.dtype not in (pl.String, pl.Categorical, pl.Enum) and not column.dtype.is_integer():
        raise InteractionsError(f"{path}: column {name} is {column.dtype}; ids must be text or whole numbers")
    ids = column.cast(pl.String)
    _refuse_rows(ids.is_null() | (ids == ""), path, f"{name} is empty; every click needs one")
    _refuse_rows(ids.str.contains(r"[\r\n]"), path, f"{name} holds a line break; an id must be one line")
    return ids


def _numbers(table: pl.DataFrame, name: str, path: Path) -> pl.Series:
    column = table[name]
    if not column.dtype.is_numeric() and column.dtype != pl.String:
        raise InteractionsError(f"{path}: column {name} is {column.dtype}; it must be numbers")
    # Whole numbers stay whole: nanoseconds don't fit a float.
    whole = column.cast(pl.Int64, strict=False)
    if column.dtype.is_integer() or (column.dtype == pl.String and whole.null_count() == 0):
        numbers, good = whole, whole.is_not_null()
    else:
        numbers = column.cast(pl.Float64, strict=False)
        good = (numbers.abs() < _BEYOND_64_BITS).fill_null(value=False)  # polars holds NaN for the greatest number
    refuse_values(column, ~good, path, "it must be a number that fits 64 bits: it orders the clicks of a user")
    return numbers


def refuse_values(column: pl.Series, bad: pl.Series, path: Path, allowed: str) -> None:
    """Raise `InteractionsError` for the first value of a column of a log that is bad; `allowed` says what would do."""
    if (rows := bad.arg_true()).len():
        value = column[rows[0]]
        given = repr(value) if isinstance(value, str) else "empty" if value is None else str(value)
        _refuse_rows(bad, path, f"{column.name} is {given[:_SHOWN_CHARACTERS]}; {allowed}")


def _refuse_rows(bad: pl.Series, path: Path, fault: str) -> None:
    if (row := bad.arg_true()).len():
        raise InteractionsError(f"{path}: in data row {row[0] + 1} {fault}")


def _group(table: pl.DataFrame, path: Path) -> Interactions:
    user_ids = table["user_id"].unique(maintain_order=True)
    item_ids = table["item_id"].unique().sort()
    order = [name for name in table.columns if name in ORDER_COLUMNS]
    users = table["user_id"].cast(pl.Enum(user_ids)).to_physical().alias("user")
    items = table["item_id"].cast(pl.Enum(item_ids)).to_physical().alias("item")
    ordered = table.with_columns(users, items).sort("user", *order, maintain_order=True)
    counts = np.bincount(ordered["user"].to_numpy(), minlength=len(user_ids))
    try:
        catalogue = Catalogue(item_ids)
    except CatalogueError as error:
        raise InteractionsError(f"{path}: {error}") from error
    rows = ordered["item"].to_numpy().astype(np.int32) + np.int32(1)
    return Interactions(tuple(user_ids), catalogue, Histories(rows, _offsets(counts)))


def _offsets(lengths: Int64[np.ndarray, " users"]) -> Int64[np.ndarray, " users_and_1"]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
