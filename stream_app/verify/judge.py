"""What is a click, by the contract in `schemas/click.schema.json` and Python's own JSON."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

_MOST_LEVELS = 1024

_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)")
"""In valid JSON a backslash stands in strings alone."""

_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


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
        document = _parse(value.decode())
    except ValueError:
        return None
    return _click(key, document)


def _parse(text: str) -> Any:
    """What `json` makes of it, which keeps of a name that stands twice the last value alone, but refuses any value."""
    levels = _levels(text)
    if levels > _MOST_LEVELS:
        raise ValueError(levels)
    with _recursion(levels):
        document = json.loads(text, parse_constant=_refuse, parse_float=_double, parse_int=_integer)
    if _has_half_a_pair(text):
        raise ValueError(text)
    return document


def _levels(text: str) -> int:
    """How deep arrays and objects lie in each other; more than that of text that is no JSON doesn't matter."""
    if text.count("[") + text.count("{") <= _MOST_LEVELS // 2:
        return 0
    depth = deepest = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        deepest = max(deepest, depth)
    return deepest


@contextmanager
def _recursion(levels: int) -> Iterator[None]:
    """Room for `json`, which calls itself for every level."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + levels)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _has_half_a_pair(text: str) -> bool:
    """Whether some string has half of a surrogate pair; UTF-8 has none, so it is an escape."""
    open_until = -1  # where the other half of a pair has to begin
    for found in _ESCAPE.finditer(text) if "\\u" in text else ():
        code = int(found[1], 16) if found[1] else 0
        is_second = 0xDC00 <= code < 0xE000
        if is_second != (found.start() == open_until) or (open_until >= 0 and not is_second):
            return True
        open_until = found.end() if 0xD800 <= code < 0xDC00 else -1
    return open_until >= 0


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
