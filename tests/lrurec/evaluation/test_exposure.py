import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrurec.evaluation.exposure import exposure_of, exposure_to_json

CLICKS = np.array([0, 7, 3, 1, 0])


def answers(*rows):
    return np.array(rows, np.int32)


def test_coverage_is_the_share_of_the_catalogue_in_anybodys_first_places():
    lists = np.array([[1, 2], [1, 3]], np.int32)
    assert exposure_of(lists, answers(1, 1), CLICKS, 1).coverage == 1 / 4
    assert exposure_of(lists, answers(1, 1), CLICKS, 2).coverage == 3 / 4


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True), min_size=1, max_size=6))
def test_gini_is_half_the_mean_difference_of_two_items_relative_to_their_mean(rows):
    lists = np.array([row + [0] * (3 - len(row)) for row in rows], np.int32)
    shown = [sum(item in row for row in rows) for item in range(1, 5)]
    expected = np.mean([abs(one - other) for one in shown for other in shown]) / (2 * np.mean(shown))
    assert exposure_of(lists, answers(*[1] * len(rows)), CLICKS, 3).gini == pytest.approx(expected)


def test_gini_is_nothing_where_all_items_are_shown_equally_often():
    assert exposure_of(np.array([[1, 2], [3, 4]], np.int32), answers(1, 1), CLICKS, 2).gini == 0


def test_lift_compares_what_is_shown_with_what_is_clicked():
    lists = np.array([[1, 2], [1, 0]], np.int32)
    shown, clicked = (math.log(8) * 2 + math.log(4)) / 3, (math.log(2) + math.log(1)) / 2
    lift = exposure_of(lists, answers(3, 0), CLICKS, 2).popularity_lift
    assert lift == pytest.approx(math.exp(shown - clicked))
    assert exposure_of(np.array([[3], [2]], np.int32), answers(2, 3), CLICKS, 1).popularity_lift == pytest.approx(1)


def test_empty_lists_show_nothing():
    assert exposure_of(np.zeros((2, 3), np.int32), answers(1, 2), CLICKS, 2) == (0, 0, 0)


def test_the_json_has_every_figure_at_both_lengths():
    names = {f"{name}@{k}" for name in ("coverage", "gini", "popularity_lift") for k in (10, 20)}
    assert set(exposure_to_json(np.array([[1] + [2] * 19], np.int32), answers(1), CLICKS)) == names
