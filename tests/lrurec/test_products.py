"""Products are what numpy's are, and a row's have the same bits wherever it stands."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from lrurec.filtered_ranking import supported
from lrurec.products import COLUMNS, ROWS, multiply, pack

WORDS = [np.dtype(np.float32), *(np.dtype(product.word) for product in supported())]


@njit
def _multiply(x, words, start, least, sums):
    return multiply(x, words, start, least, sums)


def rows_in(matrix, word):
    """As `multiply` wants them: float32 as they are, bytes as words, each pair of two twice."""
    if word == np.float32:
        return matrix.astype(np.float32)
    in_word = word.itemsize
    padded = np.zeros((len(matrix), -(-matrix.shape[1] // in_word) * in_word), np.uint8)
    padded[:, : matrix.shape[1]] = matrix
    if in_word == 2:
        return np.repeat(padded.view(np.uint16), 2, axis=1).view(np.int32)
    return padded.view(np.int32)


@st.composite
def products(draw):
    """Whole numbers: exact in every word, and in any order."""
    rng, width = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.integers(1, 80))
    x, columns = rng.integers(0, 20, (ROWS, width)), rng.integers(-20, 21, (COLUMNS, width))
    start, least = rng.integers(-1_000, 1_000, COLUMNS), rng.integers(-2_000, 3_000, ROWS)
    return x, columns, start, least


@pytest.mark.parametrize("word", WORDS, ids=str)
@given(product=products())
def test_a_product_is_numpys_and_names_the_rows_that_reach_their_limit(word, product):
    x, columns, start, least = product
    words = pack(columns.astype(np.float32 if word == np.float32 else np.int8), word)
    sums = np.full((ROWS, COLUMNS + 5), 7, word)  # its rows are further apart than they are long
    reached = _multiply(rows_in(x, word), words[0], start.astype(word), least.astype(word), sums[:, 2:-3])
    expected = x @ columns.T + start
    np.testing.assert_array_equal(sums[:, 2:-3], expected)
    assert (sums[:, :2] == 7).all()
    assert (sums[:, -3:] == 7).all()
    assert [bool(reached >> row & 1) for row in range(ROWS)] == (expected >= least[:, None]).any(1).tolist()


@given(columns=st.integers(1, 200), width=st.integers(1, 90), seed=st.integers(0, 2**32 - 1))
def test_float32_sums_run_over_the_width_in_order_for_every_row_and_column(columns, width, seed):
    rng = np.random.default_rng(seed)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((ROWS, width), (columns, width)))
    words, least, zeros = pack(weight, np.dtype(np.float32)), np.zeros(ROWS, np.float32), np.zeros(COLUMNS, np.float32)
    sums = np.empty((len(words), ROWS, COLUMNS), np.float32)
    for group, out in zip(words, sums, strict=True):
        _multiply(x, group, zeros, least, out)
    found = sums.transpose(1, 0, 2).reshape(ROWS, -1)
    assert not found[:, columns:].any()
    # In float64 a product of float32 is exact, and so nearly is its sum: rounded to float32 it is the fused operation.
    total = np.zeros((ROWS, columns), np.float32)
    for x_i, weight_i in zip(x.T.astype(np.float64), weight.T.astype(np.float64), strict=True):
        total = (total.astype(np.float64) + np.outer(x_i, weight_i)).astype(np.float32)
    np.testing.assert_allclose(found[:, :columns], total, rtol=1e-6, atol=1e-6)
    for shift in range(1, ROWS):
        moved = np.empty((ROWS, COLUMNS), np.float32)
        for group, out in zip(words, sums, strict=True):
            _multiply(np.roll(x, shift, 0), group, zeros, least, moved)
            assert np.roll(moved, -shift, 0).tobytes() == out.tobytes()


def test_what_is_no_number_reaches_no_limit():
    x, sums = np.ones((ROWS, 1), np.float32), np.empty((ROWS, COLUMNS), np.float32)
    x[2] = np.nan
    words = pack(np.ones((COLUMNS, 1), np.float32), np.dtype(np.float32))
    least = np.full(ROWS, -np.inf, np.float32)
    assert _multiply(x, words[0], np.zeros(COLUMNS, np.float32), least, sums) == 0b111011
