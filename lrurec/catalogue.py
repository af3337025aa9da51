"""Which item stands in which row of the model's item table."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from lrurec.errors import CatalogueError

UNKNOWN = 0
"""The row of an item that the catalogue does not hold. Row 0 of the item table is the padding item."""


class Catalogue:
    """Item ids of rows 1..N, in row order. Never changes.

    Raises `CatalogueError` for an empty catalogue, an id twice, an empty id, or one that would break a file of one id
    a line.
    """

    __slots__ = ("_item_ids", "_rows")

    def __init__(self, item_ids: Iterable[str]) -> None:
        self._item_ids = tuple(item_ids)
        for row, item_id in enumerate(self._item_ids, start=1):
            _check_item_id(row, item_id)
        self._rows = {item_id: row for row, item_id in enumerate(self._item_ids, start=1)}
        if not self._item_ids:
            raise CatalogueError("the catalogue is empty; it needs at least one item id")
        if len(self._rows) < len(self._item_ids):
            raise CatalogueError(_name_duplicate(self._item_ids))

    @classmethod
    def from_text(cls, text: str) -> "Catalogue":
        """A catalogue out of one item id a line, for rows 1..N in order."""
        lines = text.replace("\r\n", "\n").split("\n")
        return cls(lines[:-1] if lines[-1] == "" else lines)

    def to_text(self) -> str:
        return "".join(f"{item_id}\n" for item_id in self._item_ids)

    @property
    def item_ids(self) -> tuple[str, ...]:
        """The ids of rows 1..N; row r is `item_ids[r - 1]`."""
        return self._item_ids

    def __len__(self) -> int:
        """N, without the padding row."""
        return len(self._item_ids)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._rows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Catalogue) and self._item_ids == other._item_ids

    def __hash__(self) -> int:
        return hash(self._item_ids)

    def __repr__(self) -> str:
        return f"Catalogue({len(self)} items)"

    def rows(self, item_ids: Sequence[str]) -> Int32[np.ndarray, " n"]:
        """The row of each id, `UNKNOWN` (0) for those that the catalogue does not hold."""
        row_of = self._rows.get
        return np.fromiter((row_of(item_id, UNKNOWN) for item_id in item_ids), np.int32, len(item_ids))

    def item_id(self, row: int) -> str:
        """The id in a row 1..N. Raises IndexError for any other row, 0 included."""
        if not 1 <= row <= len(self._item_ids):
            raise IndexError(f"row {row} is none of 1..{len(self._item_ids)}")
        return self._item_ids[row - 1]


def _check_item_id(row: int, item_id: object) -> None:
    if not isinstance(item_id, str) or not item_id:
        raise CatalogueError(f"row {row} has item id {item_id!r}; it must be a text that is not empty")
    if "\n" in item_id or "\r" in item_id:
        raise CatalogueError(f"row {row} has item id {item_id!r}; line breaks are not allowed in an id")


def _name_duplicate(item_ids: Sequence[str]) -> str:
    first: dict[str, int] = {}
    for row, item_id in enumerate(item_ids, start=1):
        if item_id in first:
            return f"item id {item_id!r} stands in rows {first[item_id]} and {row}; every id may stand once"
        first[item_id] = row
    raise AssertionError("no duplicate")
