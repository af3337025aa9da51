"""The filter may only save work: every list equals that of a full sort, to the bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from lrurec import filtered_ranking
from lrurec.byte_kernels import exact_score
from lrurec.filtered_ranking import FilteredRanker

pytestmark = pytest.mark.skipif(not filtered_ranking.supported(), reason="this CPU doesn't multiply bytes (VNNI, AVX2)")


def ranked(table, bias, encodings, wanted, seen, k):
    """By each instruction of this CPU; they agree to the bit."""
    lists = []
    for product in filtered_ranking.supported():
        items, scores = np.empty((len(wanted), k), np.int32), np.empty((len(wanted), k), np.float32)
        FilteredRanker(table, bias, product).rank(encodings, wanted, seen, items, scores)
        lists.append((items, scores))
    for items, scores in lists[1:]:
        np.testing.assert_array_equal(items, lists[0][0])
        np.testing.assert_array_equal(scores, lists[0][1])
    return lists[0]


@njit
def _score_each(x, table, bias, scores):
    for row in range(table.shape[0]):
        scores[row] = exact_score(x, table[row], bias[row])


def sorted_in_full(table, bias, encoding, seen, k):
    scores = np.empty(len(table), np.float32)
    _score_each(encoding, table, bias, scores)
    scores[[item - 1 for item in seen if item]] = -np.inf
    order = np.argsort(-scores, kind="stable")[:k]
    best = np.full(k, -np.inf, np.float32)
    best[: len(order)] = scores[order]
    items = np.zeros(k, np.int32)
    items[: len(order)] = np.where(np.isneginf(scores[order]), 0, order + 1)
    return items, best


def assert_equal_to_a_full_sort(table, bias, encodings, seen, k):
    wanted = np.arange(len(encodings))[::-1].copy()
    items, scores = ranked(table, bias, encodings, wanted, seen, k)
    for place, row in enumerate(wanted):
        expected_items, expected_scores = sorted_in_full(table, bias, encodings[row], seen[row], k)
        assert items[place].tolist() == expected_items.tolist()
        assert scores[place].tolist() == expected_scores.tolist()


@given(
    items=st.integers(1, 300),
    width=st.integers(1, 70),
    rows=st.integers(1, 14),
    k=st.integers(1, 40),
    spread=st.sampled_from([0.0, 1e-6, 1e-3, 0.3, 1e4]),
    bias=st.sampled_from([0.0, 1e-4, 3.0, 1e5]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=150)
def test_lists_equal_those_of_a_full_sort_be_items_ever_so_alike(items, width, rows, k, spread, bias, seed):
    rng = np.random.default_rng(seed)
    # A common part beside differences of every size: what byte products can't tell apart, float32 must.
    table = (rng.standard_normal(width) + spread * rng.standard_normal((items, width))).astype(np.float32)
    table[rng.random(items) < 0.2] = table[0]
    biases = (bias * rng.standard_normal(items)).round(rng.integers(0, 6)).astype(np.float32)
    encodings = rng.standard_normal((rows, width)).astype(np.float32)
    seen = rng.integers(0, items + 1, (rows, 5)).astype(np.int32)
    assert_equal_to_a_full_sort(table, biases, encodings, seen, k)


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_a_large_catalogue_in_any_order_is_ranked_right(order):
    rng = np.random.default_rng(3)
    table = (0.3 * rng.standard_normal((20_000, 64))).astype(np.float32)
    bias = (rng.standard_normal(20_000) - 8).astype(np.float32)
    encodings = rng.standard_normal((7, 64)).astype(np.float32)
    if order != "random":
        by_score = np.argsort(table @ encodings[0] + bias)
        table = table[by_score if order == "ascending" else by_score[::-1]]
        bias = bias[by_score if order == "ascending" else by_score[::-1]]
    assert_equal_to_a_full_sort(table, bias, encodings, np.zeros((7, 0), np.int32), 10)


@pytest.mark.parametrize("alike", [False, True])
def test_what_comes_after_thousands_of_longer_items_is_ranked_right(alike):
    # Those come first by their length, all of it across every encoding. After them groups of low biases beside high, or
    # of items that byte products can hardly tell apart.
    rng = np.random.default_rng(7)
    bias = np.concatenate([np.zeros(4_096), np.zeros(400) if alike else rng.uniform(-5, 5, 400)]).astype(np.float32)
    table = np.zeros((len(bias), 16), np.float32)
    table[:4_096, 0] = 30
    directions = rng.standard_normal(15) + (1e-3 if alike else 1) * rng.standard_normal((400, 15))
    lengths = 10 - bias[4_096:] / 2
    table[4_096:, 1:] = directions / np.linalg.norm(directions, axis=1, keepdims=True) * lengths[:, None]
    encodings = 0.3 * rng.standard_normal((40, 16)).astype(np.float32)
    encodings[:, 0] = 0
    # Every second row has seen half of its best, twice.
    best = np.argsort(-(encodings @ table.T + bias), axis=1)[:, :20:2].repeat(2, 1).astype(np.int32) + 1
    best[::2] = 0
    assert_equal_to_a_full_sort(table, bias, encodings, best, 10)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e15])
def test_encodings_of_any_size_are_ranked_right(scale):
    rng = np.random.default_rng(4)
    table, bias = rng.standard_normal((200, 16)).astype(np.float32), np.zeros(200, np.float32)
    encodings = (scale * rng.standard_normal((3, 16))).astype(np.float32)
    assert_equal_to_a_full_sort(table, bias, encodings, np.zeros((3, 1), np.int32), 10)


def test_encodings_that_round_to_nothing_leave_room_for_what_float32_errs_by():
    # Thousands of long items across the encodings, one of them with a component along these a hair below the others'.
    rng, width = np.random.default_rng(3), 2_049
    base = np.full(width, rng.uniform(0.5, 1), np.float32)
    base[-1] = 0
    encodings = (1e-33 * base.astype(np.float64) * rng.uniform(1, 2, (40, 1))).astype(np.float32)
    table = np.zeros((4_160, width), np.float32)
    table[:4_096, -1] = 3 * np.linalg.norm(base)
    hairs = 1 - np.arange(1, 200, 3, dtype=np.float32) * np.float32(2.0**-24)
    table[: len(hairs), :-1] = base[:-1] * hairs[:, None]
    table[4_096:] = base
    for left in range(13):
        seen = np.setdiff1d(np.arange(len(hairs)), left).astype(np.int32)[None].repeat(40, 0) + 1
        assert_equal_to_a_full_sort(table, np.zeros(len(table), np.float32), encodings, seen, 1)


@pytest.mark.parametrize("nobody", [-3, 0, 201, 10**8])
def test_a_seen_item_that_there_is_not_leaves_out_nothing(nobody):
    rng = np.random.default_rng(8)
    table, bias = rng.standard_normal((200, 8)).astype(np.float32), np.zeros(200, np.float32)
    encodings = rng.standard_normal((2, 8)).astype(np.float32)
    of_all = ranked(table, bias, encodings, np.arange(2), np.zeros((2, 0), np.int32), 10)
    found = ranked(table, bias, encodings, np.arange(2), np.full((2, 3), nobody, np.int32), 10)
    np.testing.assert_array_equal(found, of_all)


def test_what_a_row_gets_does_not_depend_on_the_rows_beside_it():
    rng = np.random.default_rng(5)
    table, bias = rng.standard_normal((500, 64)).astype(np.float32), rng.standard_normal(500).astype(np.float32)
    encodings, seen = rng.standard_normal((20, 64)).astype(np.float32), rng.integers(0, 500, (20, 9)).astype(np.int32)
    together = ranked(table, bias, encodings, np.arange(20), seen, 10)
    for row in range(20):
        alone = ranked(table, bias, encodings, np.array([row]), seen, 10)
        assert np.array_equal(alone[0][0], together[0][row])
        assert np.array_equal(alone[1][0], together[1][row])


def test_an_encoding_that_is_no_number_gives_an_empty_list():
    table, bias = np.ones((9, 8), np.float32), np.zeros(9, np.float32)
    encodings = np.full((1, 8), np.nan, np.float32)
    items, scores = ranked(table, bias, encodings, np.array([0]), np.zeros((1, 0), np.int32), 3)
    assert not items.any()
    assert np.isneginf(scores).all()


@pytest.mark.parametrize("width", [1, 2, 3, 8, 64, 70, 513, 3_000])
def test_products_as_large_as_bytes_can_make_them_are_summed_right(width):
    # Rows along an encoding, and against it, have the greatest products; rows of one number the most of them.
    rng = np.random.default_rng(6)
    encodings = np.stack([np.ones(width), rng.standard_normal(width), np.eye(width)[0]]).astype(np.float32)
    directions = np.concatenate([encodings, -encodings]).repeat(30, 0)
    table = (directions * (1 + rng.random((len(directions), 1)) / 50)).astype(np.float32)
    seen = np.zeros((3, 0), np.int32)
    assert_equal_to_a_full_sort(table, np.zeros(len(table), np.float32), encodings, seen, 20)
