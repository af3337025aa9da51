import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrurec.evaluation.strata import POPULARITY, by_history_length, by_popularity, popularity_groups


def members(strata):
    return {stratum.name: np.flatnonzero(stratum.users).tolist() for stratum in strata}


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_every_user_is_in_one_group_of_history_lengths(lengths):
    strata = by_history_length(np.array(lengths))
    assert (np.sum([stratum.users for stratum in strata], axis=0) == 1).all()
    assert all(stratum.users.any() for stratum in strata)


def test_history_lengths_are_grouped_at_their_bounds():
    groups = members(by_history_length(np.array([1, 4, 5, 9, 10, 19, 20, 49, 50, 9_000])))
    assert groups == {"1-4": [0, 1], "5-9": [2, 3], "10-19": [4, 5], "20-49": [6, 7], "50+": [8, 9]}


def test_groups_that_nobody_is_in_are_left_out():
    assert members(by_history_length(np.array([7]))) == {"5-9": [0]}


CLICKS = np.array([0, 10, 4, 4, 4, 3, 5, 0])
"""Of 30: item 1 has the first third; 6, 2 and 3 begin in the second; 4 and 5 in the last; 7 has none."""


def test_items_are_grouped_by_where_they_begin_among_all_clicks():
    groups = [POPULARITY[group] for group in popularity_groups(CLICKS)]
    assert groups[1:] == ["head", "middle", "middle", "tail", "tail", "middle", "unseen"]


@pytest.mark.parametrize("clicks", [np.array([0, 0, 0]), CLICKS])
def test_an_answer_that_the_catalogue_does_not_hold_is_unseen(clicks):
    assert members(by_popularity(np.array([0, 0], np.int32), clicks)) == {"unseen": [0, 1]}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.data())
def test_every_user_is_in_one_group_of_popularity(clicks, data):
    answers = data.draw(st.lists(st.integers(0, len(clicks)), min_size=1, max_size=30))
    strata = by_popularity(np.array(answers, np.int32), np.array([0, *clicks]))
    assert (np.sum([stratum.users for stratum in strata], axis=0) == 1).all()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_no_item_of_a_less_popular_group_has_more_clicks(clicks):
    groups = popularity_groups(np.array([0, *clicks]))[1:]
    order = np.argsort(groups, kind="stable")
    largest_after = [max(np.array(clicks)[groups > group], default=0) for group in groups[order]]
    assert all(np.array(clicks)[order] >= largest_after)
