"""The oracle's judge and the worker's decoder, which share no code, agree on every record."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stream_app.messages import ClickLimits, decode_clicks
from stream_app.verify.judge import judge
from tests.stream_app.test_messages import MAX_BYTES, nearly_valid, record


def the_worker(key, value, most=MAX_BYTES):
    """(user, item, time, event id) by the worker; None for a dead letter."""
    item_rows = Everything()
    columns = decode_clicks([record(key, value)], item_rows, ClickLimits(most, 10 * most))
    if columns.dead_letters:
        return None
    return columns.user[0], item_rows.asked, columns.timestamp_ms[0], columns.event_id[0]


class Everything(dict):
    """A catalogue that knows every item."""

    def get(self, item_id, default=None):
        self.asked = item_id
        return 1


@given(nearly_valid())
@settings(max_examples=1_000)
@example((b"u", b'{"user_id":"u","item_id":"B","timestamp_ms":1,"item_id":"A"}'))
@example((b"u", b'{"user_id":"u","item_id":"A","timestamp_ms":1,"x":NaN}'))
@example((b"u", b'{"user_id":"u","item_id":"A","timestamp_ms":1,"x":1e999}'))
@example((b"u", b'{"user_id":"u","item_id":"A","timestamp_ms":1,"x":"\\ud800"}'))
@example((b"u", b'\xef\xbb\xbf{"user_id":"u","item_id":"A","timestamp_ms":1}'))
@example((b"u", b'{"user_id":"u","item_id":"A","timestamp_ms":-0}'))
@example((b"u", b" " * (MAX_BYTES - 30)))
def test_they_agree_on_what_is_nearly_a_click(key_and_value):
    assert judge(*key_and_value, MAX_BYTES) == the_worker(*key_and_value)


@given(st.none() | st.binary(max_size=8), st.none() | st.binary(max_size=40))
def test_they_agree_on_any_bytes(key, value):
    assert judge(key, value, MAX_BYTES) == the_worker(key, value)


PIECES = ["\\ud83d", "\\ude00", "\\uD83D\\uDE00", "\\\\", "\\u0041", "\\n", "ud83d", "a", "\U0001f600", '\\"', "[", "}"]


@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=4).map("".join), min_size=3, max_size=3), st.booleans())
@settings(max_examples=500)
def test_they_agree_on_escapes_also_where_a_later_name_hides_them(strings, in_an_array):
    first, second, name = strings
    hidden = f'["{first}"]' if in_an_array else f'"{first}"'
    text = f'{{"user_id":"u","x":{hidden},"x":"{second}","{name}":1,"item_id":"A","timestamp_ms":1}}'
    assert judge(b"u", text.encode(), MAX_BYTES) == the_worker(b"u", text.encode())


def test_half_a_pair_that_a_later_name_hides_is_no_click():
    value = b'{"user_id":"u","x":"\\ud83d","x":"ok","item_id":"A","timestamp_ms":1}'
    assert judge(b"u", value, MAX_BYTES) is None is the_worker(b"u", value)


@pytest.mark.parametrize("brackets", ["[]", "{}"])
@pytest.mark.parametrize("levels", [2, 500, 900, 990, 1023, 1024, 1025, 3000])
def test_they_agree_on_nesting_and_1024_levels_are_the_most(levels, brackets):
    deep = {"[]": "[" * (levels - 1) + "]" * (levels - 1), "{}": '{"a":' * (levels - 1) + "1" + "}" * (levels - 1)}
    text = f'{{"user_id":"u","item_id":"A","timestamp_ms":1,"y":"[[{{","x":{deep[brackets]}}}'
    assert judge(b"u", text.encode(), 10**6) == the_worker(b"u", text.encode(), 10**6)
    assert (judge(b"u", text.encode(), 10**6) is not None) == (levels <= 1024)


def test_nesting_without_end_is_no_click():
    value = b'{"user_id":"u","item_id":"A","timestamp_ms":1,"x":' + b"[" * 200_000
    assert judge(b"u", value, 10**6) is None
