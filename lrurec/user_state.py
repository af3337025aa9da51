"""A user's state as bytes: one fixed-size row, little-endian, that any language can read.

    bytes                 field            type            meaning
    0                     format_version   u2              2; another layout gets another number
    2                     blocks           u1              recurrent blocks of the model
    3                     hidden_bytes     u1              bytes of a hidden number: 2 (float16) or 4 (float32)
    4                     channels         u2              complex channels of a block, 2·d
    6                     recent_capacity  u2              length R of the ring
    8                     model            8 bytes         version of the bundle that wrote it
    16                    source_log       16 bytes        identity of the log that source_offset is a place in
    32                    source_offset    i8              offset of the last applied click in its partition
    40                    clicks           i8              clicks applied so far
    48                    timestamp_ms     i8              time of the last applied click
    56                    recent_items     R x i4          ring: click number n (from 0) lies at n mod R
    56 + 4R               hidden           blocks x 2 x channels numbers: real parts, then imaginary parts

A new user's state is all zero but for the header: no clicks, h = 0, source_offset -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Shaped

from lrurec.errors import LRURecError

FORMAT_VERSION = 2
HEADER_BYTES = 32

UNKNOWN_LOG = "00" * 16
"""The `source_log` where logs have no identity: every such log is taken for the same one."""

#: Rows of a structured array, one a user; `StateLayout.dtype` is its type.
UserStates: TypeAlias = Shaped[np.ndarray, " u"]


class UserStateError(LRURecError):
    """Stored bytes are no state of this layout and model."""


@dataclass(frozen=True)
class StateLayout:
    """The row that one model, precision and ring length give.

    Args:
        model: version of the bundle, 16 hexadecimal digits.
        blocks: recurrent blocks.
        channels: complex channels a block, 2·d.
        precision: type of the stored hidden numbers.
        recent_capacity: R, how many of the latest items are remembered.
        source_log: identity of the log of clicks, 32 hexadecimal digits. A log made anew under the old name counts its
            offsets from 0 again, so an old state's offset would hide new clicks; another identity refuses that state.

    """

    model: str
    blocks: int
    channels: int
    precision: Literal["float16", "float32"] = "float16"
    recent_capacity: int = 100
    source_log: str = UNKNOWN_LOG

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The structured type of one row."""
        return np.dtype(
            [
                ("format_version", "<u2"),
                ("blocks", "u1"),
                ("hidden_bytes", "u1"),
                ("channels", "<u2"),
                ("recent_capacity", "<u2"),
                ("model", "V8"),
                ("source_log", "V16"),
                ("source_offset", "<i8"),
                ("clicks", "<i8"),
                ("timestamp_ms", "<i8"),
                ("recent_items", "<i4", (self.recent_capacity,)),
                ("hidden", "<f2" if self.precision == "float16" else "<f4", (self.blocks, 2, self.channels)),
            ]
        )

    def place_of(self, field: str) -> int:
        """The byte at which a field begins in a row: in those of numbers, and in a row's length, a multiple of four."""
        return int(self.dtype.fields[field][1]) if self.dtype.fields else 0

    @cached_property
    def hidden_numbers(self) -> int:
        """Real numbers in a hidden state."""
        return self.blocks * 2 * self.channels

    #: Bytes 0 to 32 of every row of this layout: what must be equal before a row's other bytes mean anything.
    @cached_property
    def header(self) -> bytes:
        row = np.zeros(1, self.dtype)
        row["format_version"] = FORMAT_VERSION
        row["blocks"] = self.blocks
        row["hidden_bytes"] = 2 if self.precision == "float16" else 4
        row["channels"] = self.channels
        row["recent_capacity"] = self.recent_capacity
        row["model"] = np.void(bytes.fromhex(self.model))
        row["source_log"] = np.void(bytes.fromhex(self.source_log))
        return row.tobytes()[:HEADER_BYTES]

    @cached_property
    def initial_row(self) -> bytes:
        """A user's state before the first click."""
        row = np.frombuffer(self.header.ljust(self.dtype.itemsize, b"\0"), self.dtype).copy()
        row["source_offset"] = -1
        return row.tobytes()

    def unpack(self, rows: Sequence[bytes | None]) -> UserStates:
        """States out of stored bytes, a writable copy; None is a user without history.

        Raises:
            UserStateError: a row has another length, version, architecture or model.
        """
        size, initial = self.dtype.itemsize, self.initial_row
        filled = [initial if row is None else row for row in rows]
        if set(map(len, filled)) - {size}:
            wrong = next(row for row in filled if len(row) != size)
            raise UserStateError(
                f"a stored user state has {len(wrong):,} bytes, not {size:,}: {self._difference(wrong)}"
            )
        data = bytearray().join(filled)
        states: UserStates = np.frombuffer(data, self.dtype)
        headers = np.frombuffer(data, np.uint8).reshape(len(rows), size)[:, :HEADER_BYTES]
        fits = (headers == np.frombuffer(self.header, np.uint8)).all(axis=1)
        if not fits.all():
            raise UserStateError(self._difference(headers[int(np.argmin(fits))].tobytes()))
        return states

    def _difference(self, row: bytes) -> str:
        if len(row) < HEADER_BYTES:
            return "these bytes are no user state at all"
        found = np.frombuffer(row[:HEADER_BYTES], np.dtype(self.dtype.descr[:7]))[0]
        ours = np.frombuffer(self.header, np.dtype(self.dtype.descr[:7]))[0]
        names = ("format_version", "blocks", "hidden_bytes", "channels", "recent_capacity")
        pairs = [f"{name} {found[name]} (here {ours[name]})" for name in names if found[name] != ours[name]]
        if found["model"] != ours["model"]:
            pairs.append(f"model {bytes(found['model']).hex()} (here {self.model})")
        if found["source_log"] != ours["source_log"]:
            pairs.append(f"source_log {bytes(found['source_log']).hex()} (here {self.source_log})")
        if found["format_version"] != ours["format_version"]:
            pairs = pairs[:1]  # in another format the other bytes mean something else
        return (
            f"a stored user state was written with {', '.join(pairs) or 'another layout'}; "
            "go on with the bundle and the settings that wrote it, or begin with new states"
        )
