import numpy as np
import pytest

from lrurec.evaluation.bootstrap import intervals, intervals_of_difference
from lrurec.evaluation.metrics import GAINS, Metrics, metrics_of
from lrurec.evaluation.ranking import MISSED


def random_ranks(generator, users, hit=0.3):
    """A share of hits, spread evenly over the first 20 places."""
    return np.where(generator.random(users) < hit, generator.integers(0, 20, users), MISSED)


def of_each_user(ranks):
    return np.array([metrics_of(ranks[user : user + 1]) for user in range(len(ranks))])


def test_an_interval_is_that_of_users_drawn_one_by_one():
    generator = np.random.default_rng(0)
    ranks = random_ranks(generator, 300)
    drawn = of_each_user(ranks)[generator.integers(0, 300, (4_000, 300))].mean(1)
    made = intervals(ranks, resamples=20_000)
    assert np.array([made.low, made.high]) == pytest.approx(np.quantile(drawn, [0.025, 0.975], axis=0), abs=4e-3)


def test_a_difference_is_drawn_in_pairs():
    generator = np.random.default_rng(1)
    ranks = random_ranks(generator, 300)
    other = np.where(generator.random(300) < 0.9, ranks, random_ranks(generator, 300))
    differences = of_each_user(ranks) - of_each_user(other)
    drawn = differences[generator.integers(0, 300, (4_000, 300))].mean(1)
    made = intervals_of_difference(ranks, other, resamples=20_000)
    assert np.array([made.low, made.high]) == pytest.approx(np.quantile(drawn, [0.025, 0.975], axis=0), abs=4e-3)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(2)
    truth = 0.3 * GAINS[:20].mean(0)
    held = []
    for _ in range(400):
        low, high = intervals(random_ranks(generator, 400), resamples=1_000)
        held.append((np.array(low) <= truth) & (truth <= np.array(high)))
    # 400 trials of 95% have a standard deviation of 1.1%.
    assert np.mean(held, axis=0) == pytest.approx(0.95, abs=0.035)


def test_what_is_certain_has_no_width():
    assert intervals(np.zeros(50, np.int64)) == (Metrics(1, 1, 1, 1), Metrics(1, 1, 1, 1))
    ranks = random_ranks(np.random.default_rng(3), 50)
    assert intervals_of_difference(ranks, ranks) == (Metrics(0, 0, 0, 0), Metrics(0, 0, 0, 0))


def test_equal_seeds_give_equal_intervals_and_others_do_not():
    ranks = random_ranks(np.random.default_rng(4), 200)
    assert intervals(ranks) == intervals(ranks)
    assert intervals(ranks) != intervals(ranks, seed=1)


def test_the_json_names_every_metric_with_its_bounds():
    ranks = random_ranks(np.random.default_rng(5), 200)
    metrics, bounds = metrics_of(ranks).to_json(), intervals(ranks).to_json()
    assert set(bounds) == set(metrics)
    assert all(bounds[name][0] < metrics[name] < bounds[name][1] for name in metrics)
