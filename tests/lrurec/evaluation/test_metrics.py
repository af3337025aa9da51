import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrurec.evaluation.metrics import GAINS, metrics_of
from lrurec.evaluation.ranking import MISSED


def test_metrics_are_means_over_users():
    metrics = metrics_of(np.array([0, 9, 10, 19, 20, MISSED]))
    assert metrics.recall_at_10 == pytest.approx(2 / 6)
    assert metrics.recall_at_20 == pytest.approx(4 / 6)
    assert metrics.ndcg_at_10 == pytest.approx((1 + 1 / math.log2(11)) / 6)
    assert metrics.ndcg_at_20 == pytest.approx((1 + 1 / math.log2(11) + 1 / math.log2(12) + 1 / math.log2(21)) / 6)


def test_the_json_has_the_names_of_the_contract():
    assert metrics_of(np.array([0])).to_json() == dict.fromkeys(["recall@10", "ndcg@10", "recall@20", "ndcg@20"], 1.0)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40))
def test_the_histogram_of_places_is_all_that_metrics_need(ranks):
    histogram = np.bincount(np.minimum(ranks, 20), minlength=21)
    assert histogram @ GAINS / len(ranks) == pytest.approx(np.array(metrics_of(np.array(ranks))))
