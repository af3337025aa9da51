"""Every record is a click or a dead letter, as the schemas say."""

from __future__ import annotations

import json
import math

import pytest
from aiokafka.structs import ConsumerRecord
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.validators import extend

import schemas
from stream_app.messages import (
    REASON_HEADERS,
    ClickLimits,
    DeadLetter,
    decode_clicks,
)

CLICK = schemas.load("click.schema.json")
LETTER_HEADERS = Draft202012Validator(schemas.load("dead-letter-headers.schema.json"))
ROWS = {"A": 1, "B": 2, "Ä": 3}
MAX_BYTES = 300

# The schema's one rule that JSON Schema can't express: 1.0 is no integer here.
in_digits = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
ClickValidator = extend(Draft202012Validator, type_checker=in_digits)


def record(key=b"u", value=b"", *, offset=0, headers=()):
    return ConsumerRecord("clicks", 3, offset, 0, 0, key, value, None, -1, -1, tuple(headers))


def click(**fields):
    return json.dumps({"user_id": "u", "item_id": "A", "timestamp_ms": 5} | fields).encode()


def decode(*records, max_bytes=MAX_BYTES, max_id_bytes=10 * MAX_BYTES):
    return decode_clicks(records, ROWS, ClickLimits(max_bytes, max_id_bytes))


# -- clicks


def test_the_columns_of_a_click_are_its_fields():
    columns = decode(
        record(b"u", click(event_id="e1"), offset=7),
        record("Zoë".encode(), click(user_id="Zoë", item_id="Ä", timestamp_ms=-3), offset=9),
    )
    assert columns.user == [b"u", "Zoë".encode()]
    assert columns.item == [1, 3]
    assert columns.offset == [7, 9]
    assert columns.timestamp_ms == [5, -3]
    assert columns.event_id == ["e1", None]
    assert columns.dead_letters == []
    assert columns.unknown_items == 0


@pytest.mark.parametrize("document", CLICK["examples"])
def test_the_schemas_examples_are_clicks(document):
    key = document["user_id"].encode()
    columns = decode_clicks(
        [record(key, json.dumps(document).encode())], {document["item_id"]: 1}, ClickLimits(MAX_BYTES, MAX_BYTES)
    )
    assert columns.user == [key]


def test_an_unknown_item_is_counted_and_nothing_else():
    columns = decode(record(value=click(item_id="Z"), offset=1), record(value=click(), offset=2))
    assert columns.unknown_items == 1
    assert columns.offset == [2]
    assert columns.dead_letters == []


def test_an_item_without_a_name_is_unknown_and_no_poison():
    assert decode(record(value=click(item_id=""))).unknown_items == 1


@pytest.mark.parametrize("timestamp_ms", [-(2**63), -1, 0, 2**63 - 1])
def test_every_64_bit_timestamp_is_taken(timestamp_ms):
    assert decode(record(value=click(timestamp_ms=timestamp_ms))).timestamp_ms == [timestamp_ms]


def test_a_value_may_be_as_long_as_the_limit_and_no_longer():
    value = click(note="x" * 100)
    assert decode(record(value=value), max_bytes=len(value)).user == [b"u"]
    [letter] = decode(record(value=value), max_bytes=len(value) - 1).dead_letters
    assert letter.value == value


def test_ids_may_be_as_long_as_a_recommendation_has_room_for_and_no_longer():
    value = click(user_id="ü" * 20, event_id='"' * 30)
    room = 40 + 42 + 62  # as key, and in JSON with quotes and escapes
    assert decode(record("ü".encode() * 20, value), max_id_bytes=room).event_id == ['"' * 30]
    [letter] = decode(record("ü".encode() * 20, value), max_id_bytes=room - 1).dead_letters
    reason = "user_id and event_id take 144 bytes of a recommendation; it has room for 143"
    assert text_of(letter)["__streams.errors.message"] == reason
    assert decode(record(value=click(note="x" * 200)), max_id_bytes=100).user == [b"u"]  # only ids are repeated


def test_of_a_name_that_stands_twice_the_last_counts():
    assert decode(record(value=b'{"user_id":"u","item_id":"B","timestamp_ms":1,"item_id":"A"}')).item == [1]


# -- exactly what the schema says


texts = st.one_of(st.sampled_from(["u", "v", "A", "B", ""]), st.text(max_size=4))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1]),
    st.floats(),
    st.sampled_from([1.0, -0.0, 1e3, 2.0**62]),
    texts,
)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2))
valid_clicks = st.fixed_dictionaries(
    {
        "user_id": st.just("u") | st.text(min_size=1, max_size=4),
        "item_id": texts,
        "timestamp_ms": st.integers(-(2**63), 2**63 - 1),
    },
    optional={"event_id": texts, "page": anything},
)


@st.composite
def nearly_valid(draw):
    """(key, value) of a click with none, one or two things wrong."""
    fields = draw(valid_clicks)
    key = draw(st.just(fields["user_id"].encode("utf-8", "surrogatepass")) | st.sampled_from([b"u", b"", None]))
    for name in draw(st.lists(st.sampled_from(["user_id", "item_id", "timestamp_ms", "event_id"]), max_size=2)):
        fields.pop(name, None)
        if draw(st.booleans()):
            fields[name] = draw(anything)
    document = draw(st.just(fields) | st.just(fields) | st.just(fields) | anything)
    text = json.dumps(document, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    value = bytearray(text.encode("utf-8", "surrogatepass"))
    if draw(st.integers(0, 4)) == 0:
        place = draw(st.integers(0, len(value)))
        value[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return key, bytes(value)


def keeps_the_contract(key, value):
    """The judge: Python's own JSON and jsonschema, with the rules that the schema states in words."""
    if value is None or len(value) > MAX_BYTES:
        return False
    try:
        text = value.decode()
        document = json.loads(text, parse_constant=_refuse, parse_float=_double, parse_int=_integer)
        json.dumps(document, ensure_ascii=False).encode()  # refuses lone surrogates
    except ValueError:
        return False
    return ClickValidator(CLICK).is_valid(document) and key == document["user_id"].encode()


def _refuse(name):
    raise ValueError(name)


def _double(text):
    if math.isinf(float(text)):
        raise ValueError(text)
    return float(text)


def _integer(text):
    _double(text)
    return int(text)


@given(nearly_valid())
@example((b"u", b'{"user_id":"u","item_id":"A","timestamp_ms":1.0}'))
@example((b"u", b'{"user_id":"u","item_id":"A","timestamp_ms":-9223372036854775809}'))
@example((b"u", b'{"user_id":"u","item_id":"A","timestamp_ms":1,"page":1e999}'))
@example((b"u", b'{"user_id":"u","item_id":"A","timestamp_ms":1,"page":NaN}'))
@example((b"u", b'{"user_id":"u","item_id":"A","timestamp_ms":1,"page":"\\ud800"}'))
@example((b"u", b'\xef\xbb\xbf{"user_id":"u","item_id":"A","timestamp_ms":1}'))
@example((b"u", '{"user_id":"u","item_id":"A","timestamp_ms":1}'.encode("utf-16")))
@settings(max_examples=800)
def test_exactly_those_records_are_clicks_that_the_schema_and_the_key_rule_accept(key_and_value):
    columns = decode(record(*key_and_value))
    taken = len(columns.user) + columns.unknown_items
    assert taken == keeps_the_contract(*key_and_value)
    assert taken + len(columns.dead_letters) == 1


def test_the_judge_of_these_tests_takes_and_refuses():
    assert keeps_the_contract(b"u", click(event_id="e"))
    assert not keeps_the_contract(b"u", click(event_id=None))
    assert not keeps_the_contract(b"v", click())


@given(st.binary(max_size=8) | st.none(), st.binary(max_size=60) | st.none())
@settings(max_examples=300)
def test_no_bytes_whatever_raise(key, value):
    columns = decode(record(key, value))
    assert len(columns.user) + columns.unknown_items + len(columns.dead_letters) == 1


# -- dead letters

POISON = {
    "null value": (b"u", None, "the value is null"),
    "empty value": (b"u", b"", "not JSON"),
    "truncated JSON": (b"u", click()[:-1], "not JSON"),
    "text after the JSON": (b"u", click() + b"}", "not JSON"),
    "no UTF-8": (b"u", click().replace(b'"A"', b'"\xff"'), "not JSON"),
    "an array": (b"u", b"[1]", "a JSON array; a click is an object"),
    "a string": (b"u", b'"u"', "a JSON string"),
    "a number": (b"u", b"1", "a JSON number"),
    "null": (b"u", b"null", "a JSON null"),
    "no user_id": (b"u", b'{"item_id":"A","timestamp_ms":1}', "user_id is missing; it must be a string"),
    "no item_id": (b"u", b'{"user_id":"u","timestamp_ms":1}', "item_id is missing; it must be a string"),
    "no timestamp_ms": (b"u", b'{"user_id":"u","item_id":"A"}', "timestamp_ms is missing; it must be an integer"),
    "number for user_id": (b"1", click(user_id=1), "user_id is a JSON number; it must be a string"),
    "null for item_id": (b"u", click(item_id=None), "item_id is a JSON null"),
    "string for timestamp_ms": (b"u", click(timestamp_ms="5"), "timestamp_ms is a JSON string"),
    "fraction for timestamp_ms": (
        b"u",
        click(timestamp_ms=5.5),
        "timestamp_ms is a JSON number; it must be an integer",
    ),
    "boolean for timestamp_ms": (b"u", click(timestamp_ms=True), "timestamp_ms is a JSON boolean"),
    "timestamp_ms beyond 64 bits": (b"u", click(timestamp_ms=2**63), "64 bits"),
    "null for event_id": (b"u", click(event_id=None), "event_id is a JSON null; it must be a string or left out"),
    "number for event_id": (b"u", click(event_id=7), "event_id is a JSON number"),
    "too long": (b"u", click(note="x" * MAX_BYTES), f"at most {MAX_BYTES} are taken"),
    "no key": (None, click(), "the key is null; it must be the user_id"),
    "empty key": (b"", click(), "the key b'' is not the user_id 'u'"),
    "another user's key": (b"v", click(), "the key b'v' is not the user_id 'u' in UTF-8"),
    "key in other letters": (b"U", click(), "the key b'U' is not the user_id 'u' in UTF-8"),
    "key in another encoding": ("Zoë".encode("latin-1"), click(user_id="Zoë"), "is not the user_id 'Zoë' in UTF-8"),
    "empty user_id": (b"", click(user_id=""), "user_id is empty"),
    "neither key nor value": (None, None, "the value is null"),
}


@pytest.mark.parametrize(("key", "value", "reason"), POISON.values(), ids=POISON.keys())
def test_poison_becomes_a_dead_letter_with_its_bytes_untouched_and_the_reason(key, value, reason):
    columns = decode(
        record(value=click(), offset=990), record(key, value, offset=991), record(value=click(), offset=992)
    )
    assert columns.offset == [990, 992]
    assert columns.unknown_items == 0
    [letter] = columns.dead_letters
    assert (letter.key, letter.value) == (key, value)
    assert [name for name, _ in letter.headers] == [
        "__streams.errors.exception",
        "__streams.errors.message",
        "__streams.errors.topic",
        "__streams.errors.partition",
        "__streams.errors.offset",
        "disposition",
    ]
    headers = text_of(letter)
    LETTER_HEADERS.validate(headers)
    assert reason in headers["__streams.errors.message"]
    assert headers["__streams.errors.exception"] == "NotAClick"
    assert headers["__streams.errors.topic"] == "clicks"
    assert headers["__streams.errors.partition"] == "3"
    assert headers["__streams.errors.offset"] == "991"


@given(st.lists(st.tuples(st.text(max_size=3) | st.just("disposition"), st.binary(max_size=3) | st.none()), max_size=4))
def test_the_records_own_headers_come_first_and_unchanged(headers):
    [letter] = decode(record(value=b"poison", headers=headers)).dead_letters
    assert letter.headers[: len(headers)] == headers
    assert len(letter.headers) == len(headers) + 6


def test_the_reason_is_the_last_headers_and_nothing_else_is_added():
    [letter] = decode(record(value=b"poison")).dead_letters
    assert len(letter.headers) == REASON_HEADERS


def test_a_reason_quotes_only_the_beginning_of_what_a_stranger_sent():
    value = click(user_id="u" * 100_000)
    [letter] = decode(record(b"k" * 100_000, value), max_bytes=1_000_000).dead_letters
    assert len(text_of(letter)["__streams.errors.message"]) < 300


def test_dead_letters_keep_the_order_of_the_log():
    columns = decode(*(record(value=b"%d" % number, offset=number) for number in range(20)))
    assert [letter.value for letter in columns.dead_letters] == [b"%d" % number for number in range(20)]


def text_of(letter: DeadLetter) -> dict[str, str]:
    return {name: value.decode() for name, value in letter.headers}
