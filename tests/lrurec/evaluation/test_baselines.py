"""Each baseline against the plain loops that it stands for."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrurec.evaluation import baselines
from lrurec.evaluation.baselines import DAMPING, lists_of_baselines, similarities
from lrurec.evaluation.metrics import LIST_LENGTH
from lrurec.evaluation.protocols import Examination
from lrurec.interactions import HeldOut
from tests.lrurec.evaluation.logs import NUM_ITEMS, histories, some_users

ROWS = range(1, NUM_ITEMS + 1)


def popularity(users):
    counts = Counter(row for user in users for row in user)
    return [0, *(counts[row] for row in ROWS)]


def similarity(users, i, j):
    sets = [set(user) for user in users]
    both, one, other = (sum(wanted <= user for user in sets) for wanted in ({i, j}, {i}, {j}))
    return both / math.sqrt((one + DAMPING) * (other + DAMPING)) if i != j else 0.0


def by_last_item(users, window):
    after = Counter(pair for user in users for pair in pairwise(user))
    return [after[window[-1], row] if window else 0 for row in ROWS]


def by_item_knn(users, window):
    return [sum(similarity(users, item, row) / age for age, item in enumerate(window[::-1], 1)) for row in ROWS]


def best(scores, users, window):
    """Highest score first, then most clicks, then row order; without the window."""
    clicks = popularity(users)
    order = sorted((-round(score, 6), -clicks[row], row) for row, score in zip(ROWS, scores, strict=True))
    rows = [row for *_, row in order if row not in window]
    return rows[:LIST_LENGTH] + [0] * (LIST_LENGTH - len(rows))


def made_lists(learnt, asked, window):
    held_out = HeldOut(histories(asked), np.zeros(len(asked), np.int32))
    examination = Examination(histories(learnt), held_out, np.ones(len(asked), np.int64))
    return {
        name: lists.tolist()
        for name, lists in lists_of_baselines(examination, window=window, num_rows=NUM_ITEMS + 1).items()
    }


@given(some_users(least=1), some_users(least=1), st.integers(1, 6))
def test_lists_are_those_of_the_plain_loops(learnt, asked, window):
    made = made_lists(learnt, asked, window)
    windows = [user[-window:] for user in asked]
    assert made["popular"] == [best(popularity(learnt)[1:], learnt, each) for each in windows]
    assert made["last_item"] == [best(by_last_item(learnt, each), learnt, each) for each in windows]


@given(some_users(least=1, min_size=1), some_users(least=1), st.integers(1, 6))
def test_item_knn_scores_are_those_of_the_plain_loops(learnt, asked, window):
    windows = [user[-window:] for user in asked]
    made = baselines.score_by_item_knn(histories(learnt), NUM_ITEMS + 1)(histories(windows)).numpy()
    assert made[:, 0] == pytest.approx(0)
    for scores, each in zip(made[:, 1:], windows, strict=True):
        assert scores == pytest.approx(by_item_knn(learnt, each), abs=1e-5)


def test_what_is_clicked_by_the_same_users_is_recommended():
    learnt = [[1, 2]] * 5 + [[1, 3]] * 4 + [[4, 5]] * 6
    assert made_lists(learnt, [[1], [5]], 10)["item_knn"] == [
        best(by_item_knn(learnt, [1]), learnt, [1]),
        best(by_item_knn(learnt, [5]), learnt, [5]),
    ]
    assert [each[:2] for each in made_lists(learnt, [[1], [5]], 10)["item_knn"]] == [[2, 3], [4, 1]]


def test_who_has_no_click_is_recommended_the_most_popular():
    made = made_lists([[1, 2], [2, 3], [3, 2]], [[]], 10)
    assert made["last_item"] == made["item_knn"] == made["popular"]
    assert made["popular"][0][:4] == [2, 3, 1, 4]


@given(some_users(least=1, min_size=1))
def test_similarities_are_the_damped_cosine(users):
    made = similarities(histories(users), NUM_ITEMS + 1).toarray()
    expected = [[similarity(users, i, j) for j in ROWS] for i in ROWS]
    assert made[1:, 1:] == pytest.approx(np.array(expected), abs=1e-6)


@given(some_users(least=1, min_size=1), st.integers(1, 60))
def test_similarities_do_not_depend_on_the_blocks_they_are_counted_in(users, products):
    whole = similarities(histories(users), NUM_ITEMS + 1).toarray()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "PRODUCTS_PER_BLOCK", products)
        assert (similarities(histories(users), NUM_ITEMS + 1).toarray() == whole).all()


@given(some_users(least=1, min_size=1), st.integers(1, 4))
def test_an_item_keeps_its_nearest_neighbours_the_lower_row_among_equals(users, neighbours):
    whole = similarities(histories(users), NUM_ITEMS + 1).toarray()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "NEIGHBOURS", neighbours)
        kept = similarities(histories(users), NUM_ITEMS + 1).toarray()
    for before, after in zip(whole, kept, strict=True):
        nearest = sorted(np.flatnonzero(before), key=lambda row: (-before[row], row))[:neighbours]
        assert sorted(nearest) == np.flatnonzero(after).tolist()
        assert (after[nearest] == before[nearest]).all()


def test_only_the_last_clicks_of_a_user_say_which_items_are_alike(monkeypatch):
    monkeypatch.setattr(baselines, "COUNTED_CLICKS", 2)
    assert (similarities(histories([[1, 2, 3]]), 4).toarray() == similarities(histories([[2, 3]]), 4).toarray()).all()
