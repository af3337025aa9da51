"""A user's state survives as bytes, and bytes of anything else are refused."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lrurec.errors import LRURecError
from lrurec.user_state import FORMAT_VERSION, HEADER_BYTES, StateLayout, UserStateError

LAYOUT = StateLayout("0123456789abcdef", blocks=2, channels=6, recent_capacity=5)

layouts = st.builds(
    StateLayout,
    st.binary(min_size=8, max_size=8).map(bytes.hex),
    blocks=st.integers(1, 5),
    channels=st.integers(1, 300),
    precision=st.sampled_from(["float16", "float32"]),
    recent_capacity=st.integers(1, 300),
    source_log=st.binary(min_size=16, max_size=16).map(bytes.hex),
)


@st.composite
def states(draw, layout=LAYOUT, most=6):
    """Rows of a layout with drawn contents under the layout's own header."""
    rows = draw(arrays(np.uint8, (draw(st.integers(0, most)), layout.dtype.itemsize)))
    rows[:, :HEADER_BYTES] = np.frombuffer(layout.header, np.uint8)
    return [row.tobytes() for row in rows]


@given(layouts, st.data())
def test_unpacking_and_packing_again_gives_the_same_bytes(layout, data):
    packed = data.draw(states(layout, most=3))
    unpacked = layout.unpack(packed)
    assert unpacked.dtype == layout.dtype
    assert unpacked.shape == (len(packed),)
    assert unpacked.tobytes() == b"".join(packed)


@given(states())
def test_unpacked_states_can_be_written_to_and_leave_the_stored_bytes_alone(packed):
    before = [bytes(bytearray(row)) for row in packed]
    unpacked = LAYOUT.unpack(packed)
    unpacked["clicks"] += 1
    unpacked["hidden"] = 1
    assert packed == before


def test_a_user_without_history_has_no_clicks_and_an_empty_state():
    [known, new] = LAYOUT.unpack([LAYOUT.initial_row, None])
    assert known.tobytes() == new.tobytes() == LAYOUT.initial_row
    assert new["source_offset"] == -1
    assert new["clicks"] == new["timestamp_ms"] == 0
    assert not new["recent_items"].any()
    assert not new["hidden"].any()


def test_a_new_users_row_is_never_shared():
    states = LAYOUT.unpack([None, None])
    states["clicks"][0] = 7
    assert states["clicks"].tolist() == [7, 0]
    assert LAYOUT.unpack([None])["clicks"].tolist() == [0]


@given(layouts)
def test_every_field_lies_where_the_module_says(layout):
    offsets = {name: layout.dtype.fields[name][1] for name in layout.dtype.names}
    ring = 4 * layout.recent_capacity
    number = {"float16": 2, "float32": 4}[layout.precision]
    assert offsets == {
        "format_version": 0,
        "blocks": 2,
        "hidden_bytes": 3,
        "channels": 4,
        "recent_capacity": 6,
        "model": 8,
        "source_log": 16,
        "source_offset": 32,
        "clicks": 40,
        "timestamp_ms": 48,
        "recent_items": 56,
        "hidden": 56 + ring,
    }
    assert layout.dtype.itemsize == len(layout.initial_row) == 56 + ring + number * layout.blocks * 2 * layout.channels


@given(layouts)
def test_the_header_can_be_read_without_numpy(layout):
    number = {"float16": 2, "float32": 4}[layout.precision]
    fixed = struct.pack("<HBBHH", FORMAT_VERSION, layout.blocks, number, layout.channels, layout.recent_capacity)
    identities = bytes.fromhex(layout.model + layout.source_log)
    assert layout.header == layout.initial_row[:HEADER_BYTES] == fixed + identities


def test_a_state_on_the_wire_has_these_bytes():
    log = "00112233445566778899aabbccddeeff"
    layout = StateLayout("0123456789abcdef", blocks=1, channels=2, recent_capacity=2, source_log=log)
    state = layout.unpack([None])
    state["source_offset"], state["clicks"], state["timestamp_ms"] = 0x0102030405060708, 3, -2
    state["recent_items"], state["hidden"] = [7, 0x01020304], [[[1.0, -2.0], [0.5, 65504.0]]]
    assert state.tobytes().hex(" ", -8).split() == [
        "0200010202000200",
        "0123456789abcdef",
        "0011223344556677",
        "8899aabbccddeeff",
        "0807060504030201",
        "0300000000000000",
        "feffffffffffffff",
        "0700000004030201",
        "003c00c00038ff7b",
    ]


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_the_byte_order_does_not_depend_on_the_machine(precision):
    for name, (kind, *_) in replace(LAYOUT, precision=precision).dtype.fields.items():
        assert kind.base.str[0] in "<|", name  # numpy writes = for the machine's own, and < here
    states = LAYOUT.unpack([None])
    states["clicks"] = np.array([5], ">i8")
    states["hidden"] = np.ones((1, 2, 2, 6), ">f4")
    assert states["clicks"].tobytes() == struct.pack("<q", 5)
    assert states["hidden"].tobytes() == struct.pack("<e", 1) * 24


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=4))
def test_a_row_of_another_length_is_refused_even_if_the_lengths_add_up(differences):
    row = LAYOUT.initial_row
    rows = [(row + bytes(40))[: len(row) + difference] for difference in differences]
    if any(differences):
        with pytest.raises(UserStateError, match=rf"bytes, not {len(row):,}"):
            LAYOUT.unpack(rows)
    else:
        assert len(LAYOUT.unpack(rows)) == len(rows)


def test_bytes_that_are_no_state_are_called_that():
    with pytest.raises(UserStateError, match=r"has 3 bytes, not .*: these bytes are no user state at all"):
        LAYOUT.unpack([None, b"abc"])


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (replace(LAYOUT, model="fedcba9876543210"), r"model fedcba9876543210 \(here 0123456789abcdef\)"),
        (replace(LAYOUT, source_log="ab" * 16), r"source_log (ab){16} \(here 0{32}\)"),
        (replace(LAYOUT, blocks=3), r"blocks 3 \(here 2\)"),
        (replace(LAYOUT, channels=8), r"channels 8 \(here 6\)"),
        (replace(LAYOUT, precision="float32"), r"hidden_bytes 4 \(here 2\)"),
        (replace(LAYOUT, recent_capacity=6), r"recent_capacity 6 \(here 5\)"),
        # The same length, told apart by the header alone:
        (replace(LAYOUT, blocks=1, channels=12), r"blocks 1 \(here 2\), channels 12 \(here 6\)"),
        (replace(LAYOUT, channels=3, precision="float32"), r"hidden_bytes 4 \(here 2\), channels 3 \(here 6\)"),
    ],
)
def test_a_state_of_another_model_or_layout_is_refused_with_the_difference_and_what_to_do(other, difference):
    with pytest.raises(UserStateError, match=difference) as error:
        LAYOUT.unpack([None, other.initial_row, None])
    assert "go on with the bundle and the settings that wrote it, or begin with new states" in str(error.value)
    assert isinstance(error.value, LRURecError)


def test_a_state_of_another_format_version_is_refused():
    newer = struct.pack("<H", FORMAT_VERSION + 1) + bytes(len(LAYOUT.initial_row) - 2)
    with pytest.raises(UserStateError, match=r"written with format_version 3 \(here 2\);"):
        LAYOUT.unpack([newer])


@given(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255), st.integers(0, 2))
def test_any_change_of_a_header_is_noticed_in_any_row(place, change, row):
    changed = bytearray(LAYOUT.initial_row)
    changed[place] ^= change
    rows = [LAYOUT.initial_row] * 3
    rows[row] = bytes(changed)
    with pytest.raises(UserStateError):
        LAYOUT.unpack(rows)


def test_no_users_are_no_states():
    assert LAYOUT.unpack([]).shape == (0,)


@given(arrays(np.float16, (2, 2, 6), elements=st.floats(width=16)))
def test_hidden_numbers_are_kept_to_the_bit(hidden):
    states = LAYOUT.unpack([None])
    states["hidden"] = hidden
    again = LAYOUT.unpack([states.tobytes()])
    assert again["hidden"].tobytes() == hidden.astype("<f2").tobytes()
