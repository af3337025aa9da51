"""Both forms of the operators, held to plain definitions: a full stable sort, and a loop over clicks.

Numbers are small whole ones or binary fractions, so that float32 sums are exact in any order and equal scores abound.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lrurec.device.operators import TorchOperators, best_keys, keys_of, listed, operators_on
from lrurec.device.staging import waves_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed: torch brings it on Linux")


def of_torch(at_once=1 << 22):
    return TorchOperators(at_once)


def of_triton(programs=1_024):
    from lrurec.device.triton_operators import TritonOperators

    return TritonOperators(programs)


BOTH = [of_torch, pytest.param(of_triton, marks=needs_triton)]


# -- ranking


def ranked(operators, encodings, table, bias, seen, k):
    arrays = (torch.from_numpy(array).to(DEVICE) for array in (encodings, table, bias, seen))
    scores, items = operators.rank(*arrays, k)
    return scores.cpu().numpy(), items.cpu().numpy()


def sorted_in_full(encodings, table, bias, seen, k):
    scores = encodings @ table.T + bias
    np.put_along_axis(scores, seen.astype(np.int64), -np.inf, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.full((len(scores), k), -np.inf, np.float32)
    items = np.zeros((len(scores), k), np.int32)
    best[:, : order.shape[1]] = np.take_along_axis(scores, order, axis=1)
    items[:, : order.shape[1]] = np.where(np.isneginf(best[:, : order.shape[1]]), 0, order)
    return best, items


def whole_numbers(seed, rows, items, width, seen, *, flat=False):
    rng = np.random.default_rng(seed)
    encodings, table = (rng.integers(-2, 3, (size, width)).astype(np.float32) for size in (rows, items))
    bias = np.zeros(items, np.float32) if flat else rng.integers(-3, 4, items).astype(np.float32)
    bias[0] = -np.inf
    return encodings, table * (not flat), bias, rng.integers(0, items, (rows, seen)).astype(np.int32)


def assert_equal_to_a_full_sort(operators, arrays, k):
    for ours, theirs in zip(ranked(operators, *arrays, k), sorted_in_full(*arrays, k), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    items=st.integers(1, 3_000),
    width=st.integers(1, 70),
    seen=st.integers(0, 40),
    k=st.integers(1, 200),
    at_once=st.sampled_from([1, 700, 5_000, 1 << 22]),
)
@settings(max_examples=60)
def test_torchs_lists_are_the_heads_of_full_stable_sorts(seed, rows, items, width, seen, k, at_once):
    at_once = max(at_once, rows * items // 50)  # a product an item takes its time
    assert_equal_to_a_full_sort(of_torch(at_once), whole_numbers(seed, rows, items, width, seen), k)


@needs_triton
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 70),
    items=st.integers(1, 600),
    width=st.integers(1, 70),
    seen=st.integers(0, 30),
    k=st.sampled_from([1, 2, 10, 16, 33]),
    programs=st.sampled_from([1, 4, 1_024]),
)
@settings(max_examples=12)
def test_tritons_lists_are_the_heads_of_full_stable_sorts(seed, rows, items, width, seen, k, programs):
    assert_equal_to_a_full_sort(of_triton(programs), whole_numbers(seed, rows, items, width, seen), k)


@pytest.mark.parametrize("of", BOTH)
@pytest.mark.parametrize("k", [128, 129])
def test_the_longest_list_of_registers_and_the_next_longer_are_right(of, k):
    assert_equal_to_a_full_sort(of(), whole_numbers(1, 2, 300, 8, 3), k)


@pytest.mark.parametrize("of", BOTH)
def test_thousands_of_items_in_several_runs_are_ranked_right(of):
    assert_equal_to_a_full_sort(of(3) if of is of_triton else of(2_000), whole_numbers(2, 2, 5_000, 64, 100), 10)


@pytest.mark.parametrize("of", BOTH)
def test_items_that_all_score_alike_stand_in_row_order(of):
    assert_equal_to_a_full_sort(of(), whole_numbers(3, 3, 700, 4, 20, flat=True), 12)


@pytest.mark.parametrize("of", BOTH)
@pytest.mark.parametrize("items", [1, 2, 130])
def test_a_row_that_has_seen_everything_gets_an_empty_list(of, items):
    encodings, table, bias, _ = whole_numbers(4, 2, items, 4, 0)
    seen = np.stack([np.arange(items), np.arange(items)[::-1]]).astype(np.int32)
    scores, found = ranked(of(), encodings, table, bias, seen, 3)
    assert np.isneginf(scores).all()
    assert not found.any()


@pytest.mark.parametrize("of", BOTH)
def test_a_score_that_is_no_number_is_not_listed_and_leaves_its_neighbours_alone(of):
    encodings, table, bias, seen = whole_numbers(5, 3, 200, 8, 2)
    encodings[1] = np.nan
    table[7] = np.nan
    scores, found = ranked(of(), encodings, table, bias, seen, 5)
    assert np.isneginf(scores[1]).all()
    assert not found[1].any()
    table[7], bias[7] = 0, -np.inf
    others = sorted_in_full(encodings[[0, 2]], table, bias, seen[[0, 2]], 5)
    np.testing.assert_array_equal((scores[[0, 2]], found[[0, 2]]), others)


@pytest.mark.parametrize("of", BOTH)
def test_scores_are_products_of_float32(of):
    rng = np.random.default_rng(6)
    encodings, table = (rng.standard_normal((size, 64)).astype(np.float32) for size in (4, 300))
    scores, found = ranked(of(), encodings, table, np.zeros(300, np.float32), np.zeros((4, 0), np.int32), 20)
    exact = encodings.astype(np.float64) @ table.T.astype(np.float64)
    # TF32 has 11 bits and would be off by 1e-2.
    np.testing.assert_allclose(scores, np.take_along_axis(exact, found.astype(np.int64), axis=1), rtol=0, atol=3e-5)
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :20], rtol=0, atol=3e-5)


@given(
    scores=st.lists(st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0]), min_size=1, max_size=30),
    k=st.integers(1, 40),
)
@example(scores=[-0.0, 0.0, -0.0], k=2)
@example(scores=[float("-inf"), 3.4e38, float("inf"), -1e-45, 1e-45], k=5)
def test_keys_order_as_lists_do_and_give_back_what_they_were_made_of(scores, k):
    column = torch.tensor([scores])
    best, items = listed(best_keys(keys_of(column, torch.arange(1, len(scores) + 1, dtype=torch.int32)), k), k)
    order = sorted((place for place, score in enumerate(scores) if score > -np.inf), key=lambda place: -scores[place])
    width = min(k, len(order))
    assert items[0, :width].tolist() == [place + 1 for place in order[:k]]
    assert best[0, :width].tolist() == column[0, order[:k]].tolist()
    assert not items[0, width:].any()


# -- recurrence


def click_by_click(user, driven, before, decay, half):
    """Encoded as `Operators.recur` has it, but in the order of the log and in plain numpy."""
    state, outcome = before.astype(np.float32), np.empty_like(driven)
    for click, owner in enumerate(user):
        re, im = state[owner]
        drive_re, drive_im = driven[click].reshape(2, -1)
        state[owner] = decay[0] * re - decay[1] * im + drive_re, decay[0] * im + decay[1] * re + drive_im
        if half:
            state[owner] = np.clip(state[owner], -65504, 65504).astype(np.float16)
        outcome[click] = state[owner].ravel()
    return outcome, state


def recurred(operators, user, driven, before, decay):
    waves = waves_of(user)
    by_wave = np.empty_like(driven)
    by_wave[waves.place] = driven
    counts = np.zeros(len(before), np.int32)  # rows without a click are there too
    counts[: len(waves.counts)] = waves.counts
    arrays = (by_wave, before[[*waves.users, *(row for row in range(len(before)) if row not in waves.users)]], decay)
    u, start, eigenvalues = (torch.from_numpy(array).to(DEVICE) for array in arrays)
    after = torch.zeros_like(start)
    indices = (torch.from_numpy(each).to(DEVICE) for each in (counts, waves.starts.astype(np.int32)))
    operators.recur(u, start, after, eigenvalues, *indices, np.diff(waves.starts).tolist())
    return u.cpu().numpy()[waves.place], after.cpu().numpy()[: len(waves.users)], waves.users


@pytest.mark.parametrize("of", BOTH)
@pytest.mark.parametrize("precision", [np.float16, np.float32])
@given(
    user=st.lists(st.integers(0, 4), min_size=1, max_size=24),
    channels=st.sampled_from([1, 6, 130]),
    seed=st.integers(0, 2**32 - 1),
)
@example(user=[3] * 40 + [0, 3, 1], channels=2, seed=0)
@settings(max_examples=12)
def test_the_recurrence_is_the_loop_over_clicks(of, precision, user, channels, seed):
    rng = np.random.default_rng(seed)
    user = np.array(user, np.int32)
    decay = (rng.integers(-3, 4, (2, channels)) / 4).astype(np.float32)
    driven = (rng.integers(-99, 100, (len(user), 2 * channels)) / 8).astype(np.float32)
    before = (rng.integers(-99, 100, (5, 2, channels)) / 8).astype(precision)
    half = precision == np.float16
    expected, states = click_by_click(user, driven, before, decay, half)
    found, after, users = recurred(of(), user, driven, before, decay)
    # Float16's 11 bits times λ's 2 are exact in float32: so rounded, all are equal to the bit.
    np.testing.assert_allclose(found, expected, rtol=0 if half else 1e-5, atol=0 if half else 1e-4)
    np.testing.assert_allclose(after, states[users], rtol=0 if half else 1e-5, atol=0 if half else 1e-4)


@pytest.mark.parametrize("of", BOTH)
def test_a_state_beyond_float16_stays_at_its_largest_number(of):
    before, decay = np.zeros((1, 2, 3), np.float16), np.ones((2, 3), np.float32)
    _, after, _ = recurred(of(), np.zeros(4, np.int32), np.full((4, 6), -1e6, np.float32), before, decay)
    assert np.abs(after).max() == 65504


# -- where


def test_the_cpu_gets_operators_of_torch():
    assert isinstance(operators_on(torch.device("cpu")), TorchOperators)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's launcher is there on a GPU")
def test_where_tritons_kernels_cannot_be_launched_torchs_operators_compute(caplog):
    assert isinstance(operators_on(torch.device("cuda")), TorchOperators)
    assert "can't be launched" in caplog.text


@needs_triton
def test_the_kernels_compile_for_an_h100_and_multiply_no_tf32(tmp_path):
    """The compiler needs no GPU: of this test's process, it has the interpreter's kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_for_h100.py")
    subprocess.run(
        [sys.executable, "-W", "error", script], env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, check=True
    )
