"""The compiled loops, each against the plain numpy that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from lrurec import kernels
from lrurec.serving import packed_items


@njit
def _to_half_each(x, out):
    for i in range(x.size):
        out[i] = kernels._to_half(x[i])


@njit
def _erf_each(x, out):
    for i in range(x.size):
        out[i] = kernels._erf(x[i])


def to_half(x):
    x = np.asarray(x, np.float32)
    out = np.full_like(x, np.nan)
    _to_half_each(x, out)
    return out


def as_float16(x):
    """What numpy makes of it, with ±inf for what float16 can't hold."""
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


# -- rounding to float16


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
@settings(max_examples=300)
def test_a_number_is_rounded_as_numpy_rounds_it_and_stays_finite(numbers):
    assert (to_half(numbers) == np.clip(as_float16(numbers), -65504, 65504)).all()


def test_every_float16_and_every_boundary_between_two_is_rounded_right():
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # all that are finite, from 0
    between = (halves[:-1].astype(np.float64) + halves[1:]).astype(np.float32) / np.float32(2)  # exact in float32
    tricky = np.concatenate([halves, between, np.nextafter(between, np.float32(np.inf)), np.nextafter(between, 0)])
    for numbers in (tricky, -tricky):
        assert (to_half(numbers) == as_float16(numbers)).all()
    assert (to_half(halves) == halves).all()


def test_ties_go_to_the_even_neighbour():
    step = np.float32(2.0**-10)
    assert to_half([1 + step / 2, 1 + 3 * step / 2]).tolist() == [1, 1 + 2 * step]
    smallest = np.float32(2.0**-24)
    assert to_half([smallest / 2, 3 * smallest / 2]).tolist() == [0, 2 * smallest]


@pytest.mark.parametrize("number", [65504, 65519.996, 65520, 1e6, 3.4028235e38])
def test_what_float16_cannot_hold_becomes_its_largest_number(number):
    assert to_half([number, -number]).tolist() == [65504, -65504]


# -- erf, GELU, LayerNorm


def test_erf_is_within_five_parts_in_ten_million():
    x = np.concatenate([np.linspace(-6, 6, 200_001), np.geomspace(1e-30, 1, 1000)]).astype(np.float32)
    out = np.empty_like(x)
    _erf_each(x, out)
    assert np.abs(out - scipy.special.erf(x.astype(np.float64))).max() < 5e-7
    assert (np.abs(out) <= 1 + 1e-6).all()


def test_gelu_is_the_exact_form_with_erf():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 3, (5, 40)).astype(np.float32)
    y = x.astype(np.float64)
    kernels._gelu(x)
    assert np.abs(x - y * scipy.special.ndtr(y)).max() < 3e-6  # tanh's form is 5e-4 off


@given(st.integers(1, 5), st.integers(2, 70), st.integers(0, 2**32 - 1))
def test_layer_norm_is_the_textbooks(rows, width, seed):
    rng = np.random.default_rng(seed)
    wider = rng.normal(1, 3, (rows, width + 3)).astype(np.float32)
    x, beyond = wider[:, :width], wider[:, width:].copy()
    weight, bias = rng.normal(size=(2, width)).astype(np.float32)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-5) * weight + bias
    kernels._layer_norm(wider, weight, bias, np.float32(1e-5))
    assert np.abs(x - exact).max() < 1e-4
    np.testing.assert_array_equal(wider[:, width:], beyond)


# -- ranking


def rank(encodings, wanted, table, bias, seen, k):
    items, scores = np.full((len(wanted), k), -7, np.int32), np.full((len(wanted), k), 7, np.float32)
    table, bias = (np.insert(each, 0, 0, axis=0).astype(np.float32) for each in (table, bias))  # the padding item's row
    words, biases = packed_items(table, bias)
    kernels.rank(encodings, np.asarray(wanted, np.int64), words, biases, seen, items, scores)
    return items, scores


def fully_sorted(encodings, wanted, table, bias, seen, k):
    """All scores, sorted stably: the lower item row first among equals."""
    items, scores = np.zeros((len(wanted), k), np.int32), np.full((len(wanted), k), -np.inf, np.float32)
    for place, click in enumerate(wanted):
        row = table @ encodings[click] + bias
        row[[item - 1 for item in seen[click] if item]] = -np.inf
        best = np.argsort(-row, kind="stable")[:k]
        scores[place, : len(best)] = row[best]
        items[place, : len(best)] = np.where(np.isneginf(row[best]), 0, best + 1)
    return items, scores


@st.composite
def rankings(draw):
    """Small whole numbers: products without rounding, full of ties."""
    seed, n, d, items = (draw(st.integers(*bounds)) for bounds in ((0, 2**32 - 1), (1, 90), (1, 9), (1, 200)))
    rng = np.random.default_rng(seed)
    encodings, table = rng.integers(-2, 3, (n, d)), rng.integers(-2, 3, (items, d))
    bias = rng.integers(-3, 4, items).astype(np.float32)
    bias[rng.random(items) < draw(st.sampled_from([0, 0.2, 1]))] = -np.inf
    seen = rng.integers(0, items + 1, (n, draw(st.integers(0, 8)))).astype(np.int32)
    wanted = rng.integers(0, n, draw(st.integers(0, 80)))
    return encodings.astype(np.float32), wanted, table.astype(np.float32), bias, seen


@given(rankings(), st.integers(1, 70))
@settings(max_examples=300)
def test_a_ranking_equals_a_full_stable_sort(ranking, k):
    encodings, wanted, table, bias, seen = ranking
    found = rank(encodings, wanted, table, bias, seen, k)
    expected = fully_sorted(encodings, wanted, table, bias, seen, k)
    assert (found[0] == expected[0]).all()
    assert (found[1] == expected[1]).all()


@given(st.integers(1, 5), st.integers(1, 60), st.integers(1, 25), st.integers(0, 2**32 - 1))
def test_the_best_columns_are_those_of_a_stable_sort(rows, columns, k, seed):
    choice = np.array([-np.inf, np.nan, -1, 0, 0.5, 2], np.float32)
    scores = np.random.default_rng(seed).choice(choice, (rows, columns))
    found = np.full((rows, k), 7, np.int32)
    kernels.best_of(scores, found)
    for row, columns_found in zip(scores, found.tolist(), strict=True):
        best = [column for column in np.argsort(-row, kind="stable") if np.isfinite(row[column])][:k]
        assert columns_found == best + [0] * (k - len(best))


def test_a_user_who_has_seen_everything_gets_an_empty_list():
    table = np.ones((3, 2), np.float32)
    seen = np.array([[1, 2, 3]], np.int32)
    items, scores = rank(np.ones((1, 2), np.float32), [0], table, np.zeros(3), seen, 2)
    assert items.tolist() == [[0, 0]]
    assert scores.tolist() == [[-np.inf, -np.inf]]


def test_what_each_click_has_seen_is_left_out_of_its_own_list_alone():
    table, bias = np.zeros((5, 1), np.float32), np.array([5, 4, 3, 2, 1], np.float32)
    seen = np.array([[1, 0], [2, 1], [0, 0]], np.int32)
    items, _ = rank(np.zeros((3, 1), np.float32), [2, 1, 0], table, bias, seen, 2)
    assert items.tolist() == [[1, 2], [3, 4], [2, 3]]


@pytest.mark.parametrize(("d", "items"), [(1, 1), (16, 50), (50, 1_000), (64, 3_416), (128, 500)])
def test_a_click_is_ranked_to_the_same_bits_in_any_company(d, items):
    rng = np.random.default_rng(d + items)
    encodings = rng.normal(size=(40, d)).astype(np.float32)
    table, bias = rng.normal(size=(items, d)), rng.normal(size=items)
    seen = np.zeros((40, 0), np.int32)
    k = min(items, 50)
    together = rank(encodings, range(40), table, bias, seen, k)
    for company in ([3], [39], [5, 3], range(0, 40, 4), range(17), range(7, 40), rng.permutation(40)):
        items_, scores = rank(encodings, company, table, bias, seen, k)
        assert scores.tobytes() == together[1][list(company)].tobytes()
        assert items_.tobytes() == together[0][list(company)].tobytes()


def test_every_float16_is_widened_exactly_and_narrowed_to_itself():
    half = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(128, 512)
    rows = np.full((128, 520), 77, np.int16)  # among other columns
    rows[:, 3:515] = half.view(np.int16)
    wide, back = np.empty(half.shape, np.float32), np.full(rows.shape, 77, np.int16)
    kernels.widen(rows, 3, wide)
    np.testing.assert_array_equal(wide, half.astype(np.float32))
    assert np.array_equal(np.signbit(wide), np.signbit(half))
    kernels.narrow(wide, 3, back)
    found = np.ascontiguousarray(back[:, 3:515]).view(np.float16)
    np.testing.assert_array_equal(found, half)
    assert np.array_equal(np.signbit(found), np.signbit(half))
    back[:, 3:515] = 77
    assert (back == 77).all()
