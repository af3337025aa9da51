"""schemas/user-state.json is true: a reader that knows nothing but that document understands our states."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import schemas
from lrurec.user_state import FORMAT_VERSION, StateLayout

DOCUMENT = schemas.load("user-state.json")
STRUCT_CODES = {"u1": "B", "u2": "H", "i4": "i", "i8": "q", "f2": "e", "f4": "f", "b8": "8s", "b16": "16s"}

layouts = st.builds(
    StateLayout,
    st.binary(min_size=8, max_size=8).map(bytes.hex),
    blocks=st.integers(1, 4),
    channels=st.integers(1, 20),
    precision=st.sampled_from(["float16", "float32"]),
    recent_capacity=st.integers(1, 30),
    source_log=st.binary(min_size=16, max_size=16).map(bytes.hex),
)


def read(data: bytes) -> dict[str, Any]:
    """Every field of a packed state, by the document alone."""
    values: dict[str, Any] = {}
    for field in DOCUMENT["fields"]:
        code, shape = STRUCT_CODES[type_of(field, values)], shape_of(field, values)
        numbers = struct.unpack_from(
            f"<{code}" if code.endswith("s") else f"<{math.prod(shape)}{code}", data, offset_of(field, values)
        )
        values[field["name"]] = nested(list(numbers), shape)
    return values | {name: values[name].hex() for name in ("model", "source_log")}


def type_of(field: dict[str, Any], values: dict[str, Any]) -> str:
    if isinstance(field["type"], str):
        return field["type"]
    [(name, types)] = field["type"].items()
    return types[str(values[name])]


def shape_of(field: dict[str, Any], values: dict[str, Any]) -> list[int]:
    return [values.get(size, size) for size in field["shape"]]


def offset_of(field: dict[str, Any], values: dict[str, Any]) -> int:
    return field["offset"] + sum(values[name] * size for name, size in field.get("plus", {}).items())


def nested(numbers: list[Any], shape: list[int]) -> Any:
    return np.array(numbers, object).reshape(shape).tolist() if shape else numbers[0]


@given(layouts, st.data())
def test_a_reader_of_the_document_finds_every_field(layout, data):
    state = layout.unpack([None])
    drawn = {
        "source_offset": data.draw(st.integers(-1, 2**63 - 1)),
        "clicks": data.draw(st.integers(0, 2**63 - 1)),
        "timestamp_ms": data.draw(st.integers(-(2**63), 2**63 - 1)),
    }
    for name, value in drawn.items():
        state[name] = value
    state["recent_items"][0] = np.arange(7, 7 + layout.recent_capacity)
    state["hidden"][0].flat = np.linspace(-2, 2, state["hidden"][0].size)
    found = read(state.tobytes())
    assert found == {
        "format_version": FORMAT_VERSION,
        "blocks": layout.blocks,
        "hidden_bytes": 2 if layout.precision == "float16" else 4,
        "channels": layout.channels,
        "recent_capacity": layout.recent_capacity,
        "model": layout.model,
        "source_log": layout.source_log,
        **drawn,
        "recent_items": list(range(7, 7 + layout.recent_capacity)),
        "hidden": state["hidden"][0].tolist(),
    }


@given(layouts)
def test_the_documented_fields_follow_each_other_without_gaps_and_fill_the_row(layout):
    values = read(layout.initial_row)
    end = 0
    for field in DOCUMENT["fields"]:
        assert offset_of(field, values) == end == layout.dtype.fields[field["name"]][1]
        end += math.prod(shape_of(field, values)) * struct.calcsize("<" + STRUCT_CODES[type_of(field, values)])
    assert end == layout.dtype.itemsize
    assert tuple(field["name"] for field in DOCUMENT["fields"]) == layout.dtype.names


@pytest.mark.parametrize("size", DOCUMENT["sizes"])
def test_the_documented_sizes_are_right(size):
    precision = {2: "float16", 4: "float32"}[size["hidden_bytes"]]
    layout = StateLayout("00" * 8, size["blocks"], size["channels"], precision, size["recent_capacity"])
    assert layout.dtype.itemsize == size["bytes"]


@pytest.mark.parametrize("example", DOCUMENT["examples"])
def test_the_documented_example_reads_as_it_says(example):
    data = bytes.fromhex(example["hex"])
    values = example["values"]
    assert read(data) == values
    sizes = (values["blocks"], values["channels"], "float16", values["recent_capacity"])
    layout = StateLayout(values["model"], *sizes, values["source_log"])
    [state] = layout.unpack([data])
    assert state["clicks"] == values["clicks"]
    assert state["recent_items"].tolist() == values["recent_items"]


def test_every_type_and_field_is_explained():
    assert DOCUMENT["types"].keys() == STRUCT_CODES.keys()
    assert all(len(field["meaning"]) > 20 for field in DOCUMENT["fields"])
