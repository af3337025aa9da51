"""Records of the clicks topic → columns of clicks, and dead letters of what is none; the contract is in `schemas/`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import orjson

Header = tuple[str, bytes]

#: How many headers, the last ones of a dead letter, are ours.
REASON_HEADERS = 6


class Record(Protocol):
    """What is needed of a consumed Kafka record."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[Header]: ...


class NotAClick(Exception):
    """The record breaks the contract of a click; the text says how."""


class DeadLetter(NamedTuple):
    """A record that is no click: its bytes untouched, its headers followed by the reason."""

    key: bytes | None
    value: bytes | None
    headers: list[Header]


@dataclass(slots=True)
class ClickColumns:
    """One partition's records, decoded: the clicks on known items in log order, one list a field, and what is no click.

    `item` holds item rows, 1..N. `unknown_items` counts the clicks on items that the model doesn't know: no poison, but
    nothing to advance a state with.
    """

    user: list[bytes] = field(default_factory=list)
    item: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    timestamp_ms: list[int] = field(default_factory=list)
    event_id: list[str | None] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    unknown_items: int = 0


class ClickLimits(NamedTuple):
    """What is too large to be a click."""

    max_bytes: int
    """Of a value."""
    max_id_bytes: int
    """Of what a recommendation repeats: the user_id, as its key and in its JSON, and the event_id in its JSON."""


def decode_clicks(records: Iterable[Record], item_rows: Mapping[str, int], limits: ClickLimits) -> ClickColumns:
    """Columns of one partition's records; never raises for what a record holds.

    Args:
        records: in log order.
        item_rows: item id → item row, 1..N.
        limits: a larger record is no click.

    """
    columns = ClickColumns()
    for record in records:
        try:
            key, item_id, timestamp_ms, event_id = _parse(record.key, record.value, limits)
        except NotAClick as reason:
            columns.dead_letters.append(_dead_letter(record, str(reason)))
            continue
        row = item_rows.get(item_id)
        if row is None:
            columns.unknown_items += 1
            continue
        columns.user.append(key)
        columns.item.append(row)
        columns.offset.append(record.offset)
        columns.timestamp_ms.append(timestamp_ms)
        columns.event_id.append(event_id)
    return columns


def _parse(key: bytes | None, value: bytes | None, limits: ClickLimits) -> tuple[bytes, str, int, str | None]:
    if value is None:
        raise NotAClick("the value is null; a click is a JSON object")
    if len(value) > limits.max_bytes:
        raise NotAClick(f"the value has {len(value):,} bytes; at most {limits.max_bytes:,} are taken")
    try:
        click = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise NotAClick(f"the value is not JSON in UTF-8: {error}") from None
    if type(click) is not dict:
        raise NotAClick(f"the value is a JSON {_json_type(click)}; a click is an object")
    user_id, item_id, timestamp_ms = click.get("user_id"), click.get("item_id"), click.get("timestamp_ms")
    if type(user_id) is not str or type(item_id) is not str:
        name = "item_id" if type(user_id) is str else "user_id"
        raise NotAClick(_wrong_type(click, name, "a string"))
    if type(timestamp_ms) is not int:
        raise NotAClick(_wrong_type(click, "timestamp_ms", "an integer"))
    if not -(2**63) <= timestamp_ms < 2**63:
        raise NotAClick(f"timestamp_ms is {timestamp_ms}; it must fit 64 bits with a sign")
    event_id = click.get("event_id")
    if type(event_id) is not str and "event_id" in click:
        raise NotAClick(_wrong_type(click, "event_id", "a string or left out"))
    if key is None:
        raise NotAClick("the key is null; it must be the user_id, so that a user's clicks keep their order")
    if not user_id:
        raise NotAClick("user_id is empty")
    if key != user_id.encode():
        raise NotAClick(f"the key {key[:64]!r} is not the user_id {user_id[:64]!r} in UTF-8")
    if 2 * len(value) > limits.max_id_bytes:  # both ids stand in the value, so a short one needs no closer look
        _refuse_long_ids(key, user_id, event_id, limits.max_id_bytes)
    return key, item_id, timestamp_ms, event_id


def _refuse_long_ids(key: bytes, user_id: str, event_id: str | None, most: int) -> None:
    needed = len(key) + len(orjson.dumps(user_id)) + len(orjson.dumps(event_id))
    if needed > most:
        raise NotAClick(f"user_id and event_id take {needed:,} bytes of a recommendation; it has room for {most:,}")


def _wrong_type(click: Mapping[str, object], name: str, wanted: str) -> str:
    if name not in click:
        return f"{name} is missing; it must be {wanted}"
    return f"{name} is a JSON {_json_type(click[name])}; it must be {wanted}"


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _dead_letter(record: Record, reason: str) -> DeadLetter:
    # The headers' names are those of Kafka Streams' dead letters (KIP-1034).
    origin = {
        "exception": NotAClick.__qualname__,
        "message": reason,
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
    }
    headers = [
        (f"__streams.errors.{name}", str(text).encode(errors="backslashreplace")) for name, text in origin.items()
    ]
    headers.append(("disposition", b"not-a-click"))
    return DeadLetter(record.key, record.value, [*record.headers, *headers])
