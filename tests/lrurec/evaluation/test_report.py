import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec.errors import InteractionsError
from lrurec.evaluation import LeaveOneOut, TimeSplit, evaluate, lists_by_model, metrics_of, ranks_in
from lrurec.evaluation.table import table_of
from lrurec.interactions import leave_one_out
from tests.lrurec.evaluation.logs import histories, log, random_users

FOUR = {"recall@10", "ndcg@10", "recall@20", "ndcg@20"}
BASELINES = {"popular", "last_item", "item_knn"}


def timed_log(count=30):
    users = random_users(count)
    return log(
        users, times=[[10 * place + index % 7 for place in range(len(user))] for index, user in enumerate(users)]
    )


def test_the_metrics_are_those_of_the_ranks(small_bundle):
    users = random_users(40)
    test = leave_one_out(histories(users)).test
    lists = lists_by_model(small_bundle.model, test.histories, window=50)
    assert evaluate(small_bundle, log(users)).model == metrics_of(ranks_in(lists, test.answers))


def test_an_unknown_answer_is_missed_and_an_unknown_click_skipped(small_bundle):
    known, unknown = log([[1, 2, 3, 4], [5, 6, 7]]), log([[1, 25, 2, 3, 4], [5, 6, 7], [1, 2, 25]], 25)
    with_unknown, without = evaluate(small_bundle, unknown), evaluate(small_bundle, known)
    assert with_unknown.users == 3
    assert with_unknown.unknown_answers == 1
    assert with_unknown.model.recall_at_20 * 3 == pytest.approx(without.model.recall_at_20 * 2)


def test_the_clicks_that_are_asked_for_are_nobodys_knowledge(small_bundle):
    # Item 20 is everybody's last click and nobody's before: no baseline can know it.
    users = [[*range(first, first + 8), 20] for first in range(1, 11)]
    result = evaluate(small_bundle, log(users))
    assert all(metrics.recall_at_10 == 0 for metrics in result.baselines.values())
    assert set(result.by_popularity) == {"unseen"}


def test_what_always_follows_is_found_by_the_last_item(small_bundle):
    users = [[(start + place) % 20 + 1 for place in range(4)] for start in range(20)]
    assert evaluate(small_bundle, log(users)).baselines["last_item"].ndcg_at_10 == 1


@given(st.integers(0, 1_000))
@settings(max_examples=20)
def test_groups_are_all_users_and_their_weighted_mean_is_the_whole(small_bundle, seed):
    result = evaluate(small_bundle, log(random_users(30, seed)))
    for groups in (result.by_history_length, result.by_popularity):
        users = [group.users for group in groups.values()]
        assert sum(users) == result.users
        for name, whole in result.metrics.items():
            parts = [group.metrics[name] for group in groups.values()]
            assert np.average(parts, axis=0, weights=users) == pytest.approx(np.array(whole))


def test_the_difference_is_to_the_baseline_with_the_best_ndcg(small_bundle):
    result = evaluate(small_bundle, log(random_users(60)))
    best = max(result.baselines, key=lambda name: result.baselines[name].ndcg_at_10)
    assert result.difference.baseline == best
    assert np.array(result.difference.metrics) == pytest.approx(np.subtract(result.model, result.baselines[best]))


def test_the_json_is_the_contract_and_more(small_bundle):
    value = evaluate(small_bundle, log(random_users(40))).to_json()
    assert {"users", "baselines"} | FOUR <= set(value)
    assert set(value["baselines"]) == BASELINES
    assert all(set(baseline) == FOUR for baseline in value["baselines"].values())
    assert value["protocol"] == "leave-one-out"
    assert set(value["intervals"]) == set(value["exposure"]) == BASELINES | {"model"}
    assert value["bootstrap"]["resamples"] >= 1_000
    assert set(value["model_minus_best_baseline"]) == FOUR | {"baseline", "intervals"}
    for groups in (value["by_history_length"], value["by_popularity"]):
        assert all(set(group) == BASELINES | {"users", "model"} for group in groups.values())


def test_a_time_split_says_where_it_cut(small_bundle):
    value = evaluate(small_bundle, timed_log(), TimeSplit(40)).to_json()
    assert (value["protocol"], value["cut"], value["trained_before_cut"]) == ("time-split", 40, False)


def test_clicks_after_the_cut_change_nothing_but_the_answers(small_bundle):
    one, other = timed_log(), timed_log()
    is_answer = (other.times >= 40) & (np.roll(other.times, 1) < 40)
    later = (other.times >= 40) & ~is_answer
    assert later.sum() > 20
    other.histories.items[later] = other.histories.items[later] % 20 + 1
    assert evaluate(small_bundle, one, TimeSplit(40)) == evaluate(small_bundle, other, TimeSplit(40))


def test_the_table_shows_every_figure_that_is_compared(small_bundle):
    result = evaluate(small_bundle, log(random_users(40)), LeaveOneOut())
    table = table_of(result)
    for metrics in result.metrics.values():
        assert f"{metrics.ndcg_at_10:.4f}" in table
    assert f"{result.difference.metrics.recall_at_20:+.4f}" in table
    assert all(f"{name} " in table for name in [*result.metrics, *result.by_history_length, *result.by_popularity])
    assert max(map(len, table.splitlines())) <= 120


def test_the_table_warns_of_a_bundle_that_may_know_the_answers(small_bundle):
    assert "lrurec train --until 40" in table_of(evaluate(small_bundle, timed_log(), TimeSplit(40)))


@pytest.mark.parametrize(("users", "named"), [([[1, 2], [3]], "3 clicks"), ([[21, 22, 23]], "no item")])
def test_a_log_that_nobody_can_be_evaluated_on_is_refused(small_bundle, users, named):
    with pytest.raises(InteractionsError, match=named):
        evaluate(small_bundle, log(users, 25))


def test_evaluating_leaves_no_trace_in_torch(small_bundle):
    before = torch.get_rng_state()
    evaluate(small_bundle, log(random_users(5)))
    assert torch.equal(torch.get_rng_state(), before)
