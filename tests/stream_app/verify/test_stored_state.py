"""A reader that knows the schema alone reads what the worker's layout writes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stream_app.verify.stored_state import read_state, source_offset_of
from tests.schemas.test_user_state_layout import layouts


@given(layouts, st.integers(0, 70), st.integers(0, 2**40), st.data())
def test_every_field_is_read_as_the_worker_wrote_it(layout, clicks, offset, data):
    history = np.arange(1, clicks + 1)
    row = layout.unpack([None])
    row["source_offset"], row["clicks"], row["timestamp_ms"] = offset, clicks, 5
    for number, item in enumerate(history):
        row["recent_items"][0, number % layout.recent_capacity] = item
    row["hidden"][0].flat = np.linspace(-2, 2, row["hidden"][0].size)
    state = read_state(row.tobytes())
    assert (state.model, state.source_log) == (layout.model, layout.source_log)
    assert (state.source_offset, state.clicks, state.timestamp_ms) == (offset, clicks, 5)
    assert state.recent_items.tolist() == history[max(0, clicks - layout.recent_capacity) :].tolist()
    assert np.array_equal(state.hidden, row["hidden"][0].astype(float))
    packed = row.tobytes()
    assert source_offset_of(packed) == offset
    assert source_offset_of(packed[:39]) is None
    assert source_offset_of(b"\1\0" + packed[2:]) is None
    cut = data.draw(st.integers(0, len(packed) - 1))
    assert read_state(packed[:cut]) is None
    assert read_state(packed + b"\0") is None
    assert read_state(b"\1\0" + packed[2:]) is None  # another format version
