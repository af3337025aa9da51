"""A user's state, read by nothing but `schemas/user-state.json`."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

import schemas

_KINDS = {"u1": "u1", "u2": "<u2", "i4": "<i4", "i8": "<i8", "f2": "<f2", "f4": "<f4", "b8": "V8", "b16": "V16"}
_OFFSET = struct.Struct("<q")
_DOCUMENT: dict[str, Any] = schemas.load("user-state.json")


@dataclass(frozen=True)
class StoredState:
    """The fields that can be recomputed from clicks, and those that say what they were computed by."""

    model: str
    source_log: str
    hidden_bytes: int
    source_offset: int
    clicks: int
    timestamp_ms: int
    recent_items: Int64[np.ndarray, " r"]
    """Oldest first, without the places that are not used yet."""
    hidden: Float64[np.ndarray, "l 2 h"]


def read_state(packed: bytes) -> StoredState | None:
    """The state, or None where the bytes are none of the documented format version."""
    values: dict[str, Any] = {}
    try:
        for field in _DOCUMENT["fields"]:
            values[field["name"]] = _read(field, values, packed)
    except (ValueError, KeyError):
        return None
    hidden = values["hidden"]
    end = _offset(_DOCUMENT["fields"][-1], values) + hidden.nbytes
    if end != len(packed) or int(values["format_version"]) != _version():
        return None
    return StoredState(
        values["model"].tobytes().hex(),
        values["source_log"].tobytes().hex(),
        int(values["hidden_bytes"]),
        int(values["source_offset"]),
        int(values["clicks"]),
        int(values["timestamp_ms"]),
        _in_order(values["recent_items"].astype(np.int64), int(values["clicks"])),
        hidden.astype(np.float64),
    )


def source_offset_of(packed: bytes) -> int | None:
    """Only this field of a state; None where the bytes are none of the documented format version."""
    [place] = [int(field["offset"]) for field in _DOCUMENT["fields"] if field["name"] == "source_offset"]
    if len(packed) < place + _OFFSET.size or int.from_bytes(packed[:2], "little") != _version():
        return None
    return int(_OFFSET.unpack_from(packed, place)[0])


def _read(field: dict[str, Any], values: dict[str, Any], packed: bytes) -> np.ndarray:
    kind = field["type"]
    if isinstance(kind, dict):
        [(name, kinds)] = kind.items()
        kind = kinds[str(int(values[name]))]
    shape = [size if isinstance(size, int) else int(values[size]) for size in field["shape"]]
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(packed, _KINDS[kind], count, _offset(field, values)).reshape(shape)


def _offset(field: dict[str, Any], values: dict[str, Any]) -> int:
    return int(field["offset"]) + sum(int(values[name]) * int(size) for name, size in field.get("plus", {}).items())


def _version() -> int:
    number: int = _DOCUMENT["examples"][0]["values"]["format_version"]
    return number


def _in_order(ring: np.ndarray, clicks: int) -> np.ndarray:
    """Click number n, from 0, lies at place n modulo the ring's length."""
    if clicks < len(ring):
        return ring[:clicks]
    return np.roll(ring, -(clicks % len(ring)))
