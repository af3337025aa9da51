import math

import numpy as np
import pytest
import torch

from lrurec import evaluation
from lrurec.catalogue import Catalogue
from lrurec.errors import InteractionsError
from lrurec.evaluation import MISSED, evaluate, metrics_of, rank_answers, score_by_popularity
from lrurec.interactions import HeldOut, Histories, Interactions, leave_one_out
from lrurec.recommendation import recommend


def histories(users):
    offsets = np.concatenate([[0], np.cumsum([len(user) for user in users])]).astype(np.int64)
    return Histories(np.array([row for user in users for row in user], np.int32), offsets)


def log(users, num_items=20):
    catalogue = Catalogue(f"item-{row}" for row in range(1, num_items + 1))
    return Interactions(tuple(f"u{index}" for index in range(len(users))), catalogue, histories(users))


def random_users(count, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(1, 21, generator.integers(1, 12)).tolist() for _ in range(count)]


def test_metrics_are_means_over_users():
    metrics = metrics_of(np.array([0, 9, 10, 19, 20, MISSED]))
    assert metrics.recall_at_10 == pytest.approx(2 / 6)
    assert metrics.recall_at_20 == pytest.approx(4 / 6)
    assert metrics.ndcg_at_10 == pytest.approx((1 + 1 / math.log2(11)) / 6)
    assert metrics.ndcg_at_20 == pytest.approx((1 + 1 / math.log2(11) + 1 / math.log2(12) + 1 / math.log2(21)) / 6)


def test_every_answer_has_the_place_that_recommending_gives_it(small_bundle, monkeypatch):
    monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH", 30)
    users = random_users(40)
    test = leave_one_out(histories(users)).test
    ranks = rank_answers(evaluation.score_by_model(small_bundle.model), test, window=50, num_rows=21)
    ids = small_bundle.catalogue.item_ids
    for index, (answer, rank) in enumerate(zip(test.answers.tolist(), ranks.tolist(), strict=True)):
        given = [ids[row - 1] for row in test.histories[index].tolist()]
        listed = [item.item_id for item in recommend(small_bundle, given, 20).items]
        assert rank == (listed.index(ids[answer - 1]) if ids[answer - 1] in listed else MISSED)


def test_items_before_the_window_may_be_recommended_again():
    asked = HeldOut(histories([[1, 2, 3], [1, 2, 3]]), np.array([1, 3], np.int32))
    ranks = rank_answers(score_by_popularity(np.array([0, 9, 5, 5, 1])), asked, window=2, num_rows=5)
    assert ranks.tolist() == [0, MISSED]


def test_equal_scores_are_ranked_in_row_order():
    asked = HeldOut(histories([[1], [2]]), np.array([3, 3], np.int32))
    ranks = rank_answers(score_by_popularity(np.array([7, 5, 5, 5])), asked, window=50, num_rows=4)
    assert ranks.tolist() == [1, 1]


def test_an_unknown_answer_is_missed_and_an_unknown_click_skipped(small_bundle):
    known, unknown = log([[1, 2, 3, 4], [5, 6, 7]]), log([[1, 25, 2, 3, 4], [5, 6, 7], [1, 2, 25]], 25)
    with_unknown, without = evaluate(small_bundle, unknown), evaluate(small_bundle, known)
    assert with_unknown.users == 3
    assert with_unknown.model.recall_at_20 * 3 == pytest.approx(without.model.recall_at_20 * 2)


def test_the_clicks_that_are_asked_for_do_not_make_an_item_popular(small_bundle):
    # Item 20 is everybody's last click and nobody's before: the popular baseline cannot know it.
    users = [[*range(first, first + 8), 20] for first in range(1, 11)]
    assert evaluate(small_bundle, log(users)).popular.recall_at_10 == 0


def test_the_json_is_the_contract(small_bundle):
    value = evaluate(small_bundle, log(random_users(10))).to_json()
    four = {"recall@10", "ndcg@10", "recall@20", "ndcg@20"}
    assert set(value) == {"users", "baselines"} | four
    assert set(value["baselines"]["popular"]) == four


def test_a_cold_start_is_ranked_by_the_padding_item(small_bundle):
    asked = HeldOut(histories([[]]), np.array([5], np.int32))
    rank = rank_answers(evaluation.score_by_model(small_bundle.model), asked, window=50, num_rows=21)[0]
    listed = [item.item_id for item in recommend(small_bundle, [], 20).items]
    assert listed[rank] == "item-5"


@pytest.mark.parametrize(("users", "named"), [([[1, 2], [3]], "3 clicks"), ([[21, 22, 23]], "no item")])
def test_a_log_that_nobody_can_be_evaluated_on_is_refused(small_bundle, users, named):
    with pytest.raises(InteractionsError, match=named):
        evaluate(small_bundle, log(users, 25))


def test_evaluating_leaves_no_trace_in_torch(small_bundle):
    before = torch.get_rng_state()
    evaluate(small_bundle, log(random_users(5)))
    assert torch.equal(torch.get_rng_state(), before)
