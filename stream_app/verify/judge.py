"""What is a click, by the contract in `schemas/click.schema.json` and Python's own JSON."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple, NoReturn


class Click(NamedTuple):
    user: bytes
    item_id: str
    timestamp_ms: int
    event_id: str | None


def judge(key: bytes | None, value: bytes | None, max_bytes: int) -> Click | None:
    """The click of a record; None for poison."""
    if key is None or value is None or len(value) > max_bytes:
        return None
    try:
        document = json.loads(value.decode(), parse_constant=_refuse, parse_float=_double, parse_int=_integer)
        json.dumps(document, ensure_ascii=False).encode()  # refuses halves of surrogate pairs
    except (ValueError, RecursionError):
        return None
    return _click(key, document)


def _click(key: bytes, document: Any) -> Click | None:
    if type(document) is not dict:
        return None
    user_id, item_id, timestamp_ms = document.get("user_id"), document.get("item_id"), document.get("timestamp_ms")
    event_id = document.get("event_id")
    if type(user_id) is not str or not user_id or user_id.encode() != key or type(item_id) is not str:
        return None
    if type(timestamp_ms) is not int or not -(2**63) <= timestamp_ms < 2**63:
        return None
    if "event_id" in document and type(event_id) is not str:
        return None
    return Click(key, item_id, timestamp_ms, event_id)


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


def _double(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(text)
    return number


def _integer(text: str) -> int:
    _double(text)  # refuses what no double holds, and with it digits without end
    return int(text)
