"""What is the device engine's own: buckets, waves, precision. What every engine does is in `test_serving`."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lrurec.device.engine import SMALLEST_BUCKET, TorchEngine, float32_products
from lrurec.device.operators import TorchOperators
from lrurec.engine import Clicks
from lrurec.serving import CompiledEngine, state_layout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

TOLERANCE = 3e-5
"""Of scores in float32, between the forms."""


needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed: torch brings it on Linux")


def of_triton():
    from lrurec.device.triton_operators import TritonOperators

    return TritonOperators(programs=2)


BOTH = [TorchOperators, pytest.param(of_triton, marks=needs_triton)]


def on_device(bundle, precision="float32", operators=None):
    layout = state_layout(bundle, precision, recent_capacity=7)
    return TorchEngine(bundle, layout, top_k=10, exclude_seen=True, device=DEVICE, max_batch=1, operators=operators)


def columns(user, seed=0):
    """Clicks of these users on items 1 to 20, at offsets 0, 1, …"""
    offset = np.arange(len(user))
    item = np.random.default_rng(seed).integers(1, 21, len(user)).astype(np.int32)
    return Clicks(np.array(user, np.int32), item, offset, 1000 + offset)


def advance(engine, clicks, states=None):
    if states is None:
        states = engine.layout.unpack([None] * 40)
    return engine.advance(states, clicks, np.arange(len(clicks.user)))


@needs_triton
@pytest.mark.parametrize("precision", ["float16", "float32"])
@given(user=st.lists(st.integers(0, 39), min_size=1, max_size=70), seed=st.integers(0, 2**32 - 1))
@example(user=[5] * 60 + [1, 2, 5], seed=1)
@settings(max_examples=6)
def test_tritons_kernels_and_the_cpu_engine_give_the_same(small_bundle, precision, user, seed):
    layout = state_layout(small_bundle, precision, recent_capacity=7)
    compiled = CompiledEngine(small_bundle, layout, top_k=10, exclude_seen=True, max_batch=64)
    engine = on_device(small_bundle, precision, of_triton())
    (ours, theirs), clicks = (engine.layout.unpack([None] * 40) for _ in range(2)), columns(user, seed)
    for part in (slice(0, len(user) // 2), slice(len(user) // 2, None)):
        batch = Clicks(*(column[part] for column in clicks))
        (ours, found), (theirs, expected) = advance(engine, batch, ours), advance(compiled, batch, theirs)
        half = precision == "float16"  # two roundings of nearly the same number can be a float16 apart
        np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-2 if half else TOLERANCE)
        np.testing.assert_allclose(
            ours["hidden"], theirs["hidden"], rtol=1e-2 if half else 0, atol=1e-2 if half else TOLERANCE
        )
        for column in ("recent_items", "clicks", "source_offset", "timestamp_ms"):
            assert (ours[column] == theirs[column]).all()
        assert (found.clicks == expected.clicks).all()


@pytest.mark.parametrize("of", BOTH)
@given(user=st.lists(st.integers(0, 39), min_size=1, max_size=32), seed=st.integers(0, 2**32 - 1))
@example(user=[3, 3, 3, 9], seed=0)
@settings(max_examples=4)
def test_what_an_earlier_micro_batch_left_in_a_bucket_changes_nothing(small_bundle, of, user, seed):
    fresh, used = (on_device(small_bundle, "float16", of()) for _ in range(2))
    states = None
    for clicks in (SMALLEST_BUCKET, SMALLEST_BUCKET, 2 * SMALLEST_BUCKET):  # states of 0 would hide much
        states, _ = advance(used, columns(np.arange(clicks) % (clicks - 1)), states)  # of nearly as many users
    for ours, theirs in zip(advance(used, columns(user, seed)), advance(fresh, columns(user, seed)), strict=True):
        assert b"".join(map(bytes, ours)) == b"".join(map(bytes, theirs))


@pytest.mark.parametrize("clicks", [1, SMALLEST_BUCKET, SMALLEST_BUCKET + 1, 100])
def test_micro_batches_of_any_size_are_taken_whatever_the_engine_was_made_for(small_bundle, clicks):
    engine = on_device(small_bundle)
    states, ranking = advance(engine, columns(np.arange(clicks) % 40))
    assert states["clicks"].sum() == clicks
    assert ranking.items.shape == (clicks, 10)


@pytest.mark.parametrize(("max_batch", "sizes"), [(1, [16]), (32, [16, 32]), (40, [16, 32, 64])])
def test_warming_up_makes_a_bucket_for_every_size_of_a_usual_micro_batch(small_bundle, max_batch, sizes):
    engine = on_device(small_bundle)
    engine._warm_up(max_batch)
    assert sorted(engine._buckets) == sizes


class Calls(TorchDispatchMode):
    """What torch is asked for inside, and on which shapes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.made.append((str(function), [getattr(argument, "shape", argument) for argument in arguments]))
        return function(*arguments, **(options or {}))


def calls_of(engine, user):
    with Calls() as calls:
        engine.advance(engine.layout.unpack([None] * 40), columns(user), np.arange(0))
    return calls.made


ONE_USERS, EVERYBODYS = [3] * 250, list(range(40)) * 6


@pytest.mark.parametrize("user", [ONE_USERS, EVERYBODYS])
def test_dense_products_are_as_many_whoevers_the_clicks_are(small_bundle, user):
    products = [name for name, _ in calls_of(on_device(small_bundle), user) if "addmm" in name]
    assert len(products) == 4 * 2  # of each of two blocks: in, out, up, down


class Still(TorchOperators):
    """In the place of kernels that are launched alike whatever the clicks."""

    captured = True

    def recur(self, *_):
        pass


def test_but_for_its_kernels_a_step_is_the_same_calls_whatever_the_clicks_and_none_waits_for_the_device(small_bundle):
    """As a CUDA graph takes for granted."""
    engine = on_device(small_bundle, operators=Still())
    calls_of(engine, ONE_USERS)
    made = calls_of(engine, ONE_USERS)
    assert made == calls_of(engine, EVERYBODYS)
    assert not [name for name, _ in made if "_local_scalar_dense" in name or "nonzero" in name]


def allow_by_the_old_setting() -> None:
    torch.set_float32_matmul_precision("medium")


def allow_by_the_new_ones() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


@pytest.mark.parametrize("allow", [allow_by_the_old_setting, allow_by_the_new_ones])
def test_products_are_of_float32_whatever_the_process_allows(small_bundle, allow):
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    clicks, old = columns(range(40)), torch.get_float32_matmul_precision()
    expected = advance(on_device(small_bundle), clicks)[1].scores
    allow()
    allowed = [backend.fp32_precision for backend in backends]
    try:
        with float32_products():
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert advance(on_device(small_bundle), clicks)[1].scores.tobytes() == expected.tobytes()
        assert [backend.fp32_precision for backend in backends] == allowed
    finally:
        torch.set_float32_matmul_precision(old)
