import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrurec.evaluation import ranking
from lrurec.evaluation.metrics import LIST_LENGTH
from lrurec.evaluation.ranking import (
    MISSED,
    lists_by_model,
    ranks_in,
    score_by_popularity,
    top_lists,
)
from lrurec.recommendation import recommend
from lrurec.threads import limited_threads
from tests.lrurec.evaluation.logs import histories, random_users, some_users


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(ranking, "TOKENS_PER_BATCH", 30)


def listed(bundle, rows, k=20):
    return [bundle.catalogue.rows([item.item_id])[0] for item in recommend(bundle, rows, k).items]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("threads", [1, 3])
def test_every_list_is_what_recommending_gives(small_bundle, threads):
    asked = histories([*random_users(40), [], list(range(1, 20))])
    with limited_threads(threads):
        lists = lists_by_model(small_bundle.model, asked, window=50)
    ids = small_bundle.catalogue.item_ids
    for index, given_list in enumerate(lists.tolist()):
        expected = listed(small_bundle, [ids[row - 1] for row in asked[index].tolist()])
        assert given_list == expected + [0] * (LIST_LENGTH - len(expected))


@given(some_users(least=1), st.lists(st.integers(0, 3), min_size=21, max_size=21), st.integers(1, 5))
def test_a_list_is_the_full_sort_by_score_and_row_without_the_window(users, clicks, window):
    lists = top_lists(score_by_popularity(np.array(clicks)), histories(users), window=window, num_rows=21)
    for user, given_list in zip(users, lists.tolist(), strict=True):
        left = sorted(set(range(1, 21)) - set(user[-window:]), key=lambda row: (-clicks[row], row))
        assert given_list == left + [0] * (LIST_LENGTH - len(left))


def test_a_list_ends_where_the_catalogue_does():
    lists = top_lists(score_by_popularity(np.array([9, 1, 0, 5])), histories([[3], []]), window=5, num_rows=4)
    assert lists[:, :4].tolist() == [[1, 2, 0, 0], [3, 1, 2, 0]]
    assert not lists[:, 4:].any()


def test_what_is_beyond_the_list_is_missed():
    lists = np.array([[3, 1], [2, 0]], np.int32)
    assert ranks_in(lists, np.array([1, 1], np.int32)).tolist() == [1, MISSED]


def test_an_unknown_answer_is_missed_also_where_the_list_has_room():
    assert ranks_in(np.array([[2, 0]], np.int32), np.array([0], np.int32)).tolist() == [MISSED]


def test_items_before_the_window_may_be_recommended_again(small_bundle):
    lists = lists_by_model(small_bundle.model, histories([[1, 2, 3]]), window=2)
    assert set(lists[0].tolist()) == {0, *range(1, 21)} - {2, 3}


def test_a_cold_start_is_ranked_by_the_padding_item(small_bundle):
    lists = lists_by_model(small_bundle.model, histories([[]]), window=50)
    assert lists[0].tolist() == listed(small_bundle, [])


def test_nobody_asked_is_no_special_case(small_bundle):
    assert lists_by_model(small_bundle.model, histories([]), window=50).shape == (0, LIST_LENGTH)


def test_no_batch_has_more_scores_than_its_budget(monkeypatch):
    monkeypatch.setattr(ranking, "SCORES_PER_BATCH", 100)
    sizes = []

    def score(part):
        sizes.append(len(part) * 21)
        return torch.zeros(len(part), 21)

    top_lists(score, histories(random_users(50)), window=50, num_rows=21)
    assert max(sizes) <= 100
    assert sum(sizes) == 50 * 21
