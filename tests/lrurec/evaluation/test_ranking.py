import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrurec.evaluation import ranking
from lrurec.evaluation.metrics import LIST_LENGTH
from lrurec.evaluation.ranking import (
    MISSED,
    rank_answers,
    ranks_in,
    score_by_model,
    score_by_popularity,
    top_lists,
)
from lrurec.interactions import HeldOut, leave_one_out
from lrurec.recommendation import recommend
from tests.lrurec.evaluation.logs import histories, random_users, some_users


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(ranking, "TOKENS_PER_BATCH", 30)


def listed(bundle, rows, k=20):
    return [bundle.catalogue.rows([item.item_id])[0] for item in recommend(bundle, rows, k).items]


@pytest.mark.usefixtures("small_batches")
def test_every_answer_has_the_place_that_recommending_gives_it(small_bundle):
    test = leave_one_out(histories(random_users(40))).test
    ranks = rank_answers(score_by_model(small_bundle.model), test, window=50, num_rows=21)
    ids = small_bundle.catalogue.item_ids
    for index, (answer, rank) in enumerate(zip(test.answers.tolist(), ranks.tolist(), strict=True)):
        rows = listed(small_bundle, [ids[row - 1] for row in test.histories[index].tolist()])
        assert rank == (rows.index(answer) if answer in rows else MISSED)


@pytest.mark.usefixtures("small_batches")
def test_every_list_is_what_recommending_gives(small_bundle):
    asked = histories([*random_users(40), [], list(range(1, 20))])
    lists = top_lists(score_by_model(small_bundle.model), asked, window=50, num_rows=21)
    ids = small_bundle.catalogue.item_ids
    for index, given_list in enumerate(lists.tolist()):
        expected = listed(small_bundle, [ids[row - 1] for row in asked[index].tolist()])
        assert given_list == expected + [0] * (LIST_LENGTH - len(expected))


@given(some_users(least=1), st.lists(st.integers(0, 3), min_size=21, max_size=21), st.integers(1, 5), st.data())
def test_a_place_in_the_list_is_the_rank_also_among_equals(users, clicks, window, data):
    answers = data.draw(st.lists(st.integers(0, 20), min_size=len(users), max_size=len(users)))
    asked = HeldOut(histories(users), np.array(answers, np.int32))
    score, sizes = score_by_popularity(np.array(clicks)), {"window": window, "num_rows": 21}
    assert (
        ranks_in(top_lists(score, asked.histories, **sizes), asked.answers) == rank_answers(score, asked, **sizes)
    ).all()


def test_a_list_ends_where_the_catalogue_does():
    lists = top_lists(score_by_popularity(np.array([9, 1, 0, 5])), histories([[3], []]), window=5, num_rows=4)
    assert lists[:, :4].tolist() == [[1, 2, 0, 0], [3, 1, 2, 0]]
    assert not lists[:, 4:].any()


def test_what_is_beyond_the_list_is_missed():
    lists = np.array([[3, 1], [2, 0]], np.int32)
    assert ranks_in(lists, np.array([1, 1], np.int32)).tolist() == [1, MISSED]


def test_an_unknown_answer_is_missed_also_where_the_list_has_room():
    assert ranks_in(np.array([[2, 0]], np.int32), np.array([0], np.int32)).tolist() == [MISSED]


def test_items_before_the_window_may_be_recommended_again():
    asked = HeldOut(histories([[1, 2, 3], [1, 2, 3]]), np.array([1, 3], np.int32))
    ranks = rank_answers(score_by_popularity(np.array([0, 9, 5, 5, 1])), asked, window=2, num_rows=5)
    assert ranks.tolist() == [0, MISSED]


def test_equal_scores_are_ranked_in_row_order():
    asked = HeldOut(histories([[1], [2]]), np.array([3, 3], np.int32))
    ranks = rank_answers(score_by_popularity(np.array([7, 5, 5, 5])), asked, window=50, num_rows=4)
    assert ranks.tolist() == [1, 1]


def test_a_cold_start_is_ranked_by_the_padding_item(small_bundle):
    asked = HeldOut(histories([[]]), np.array([5], np.int32))
    rank = rank_answers(score_by_model(small_bundle.model), asked, window=50, num_rows=21)[0]
    assert listed(small_bundle, [])[rank] == 5


def test_no_batch_has_more_scores_than_its_budget(monkeypatch):
    monkeypatch.setattr(ranking, "SCORES_PER_BATCH", 100)
    sizes = []

    def score(part):
        sizes.append(len(part) * 21)
        return torch.zeros(len(part), 21)

    top_lists(score, histories(random_users(50)), window=50, num_rows=21)
    assert max(sizes) <= 100
    assert sum(sizes) == 50 * 21
