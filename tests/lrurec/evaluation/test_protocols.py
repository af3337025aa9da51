import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lrurec.bundle import make_bundle
from lrurec.catalogue import Catalogue
from lrurec.errors import InteractionsError
from lrurec.evaluation.protocols import LeaveOneOut, TimeSplit, time_at_quantile
from tests.lrurec.evaluation.logs import lists, log, some_users

CATALOGUE = Catalogue(f"item-{row}" for row in range(1, 21))
"""Of the items 1 to 20; 21 to 25 are unknown to it."""


@st.composite
def timed_logs(draw):
    """(users, their times): items 1 to 25, times 0 to 20, never falling within a user."""
    users = draw(some_users(least=1, most=25, min_size=1))
    times = [sorted(draw(st.lists(st.integers(0, 20), min_size=len(user), max_size=len(user)))) for user in users]
    return users, times


@given(some_users(least=1, most=25))
def test_leave_one_out_asks_for_the_last_click_of_whoever_has_three(users):
    assume(any(len(user) >= 3 for user in users))
    examination = LeaveOneOut().examine(log(users, 25), CATALOGUE)
    long = [user for user in users if len(user) >= 3]
    assert lists(examination.asked.histories) == [[row for row in user[:-1] if row <= 20] for user in long]
    assert examination.asked.answers.tolist() == [user[-1] if user[-1] <= 20 else 0 for user in long]
    assert examination.clicks_before.tolist() == [len(user) - 1 for user in long]


@given(some_users(least=1, most=25))
def test_leave_one_out_lets_everything_but_the_answers_be_learnt(users):
    assume(any(len(user) >= 3 for user in users))
    learnable = LeaveOneOut().examine(log(users, 25), CATALOGUE).learnable
    expected = [user[:-1] if len(user) >= 3 else user for user in users]
    assert lists(learnable) == [[row for row in user if row <= 20] for user in expected]


@given(timed_logs(), st.integers(0, 20))
def test_a_time_split_never_uses_a_click_at_or_after_the_cut(timed, cut):
    users, times = timed
    past = [[row for row, time in zip(*both, strict=True) if time < cut] for both in zip(users, times, strict=True)]
    future = [[row for row, time in zip(*both, strict=True) if time >= cut] for both in zip(users, times, strict=True)]
    asked = [index for index in range(len(users)) if past[index] and future[index]]
    assume(asked)
    examination = TimeSplit(cut).examine(log(users, 25, times), CATALOGUE)
    assert lists(examination.learnable) == [[row for row in user if row <= 20] for user in past]
    assert lists(examination.asked.histories) == [[row for row in past[index] if row <= 20] for index in asked]
    assert examination.asked.answers.tolist() == [future[index][0] if future[index][0] <= 20 else 0 for index in asked]
    assert examination.clicks_before.tolist() == [len(past[index]) for index in asked]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_the_cut_is_the_last_with_no_more_than_the_quantile_before_it(times, quantile):
    cut = time_at_quantile(log([[1] * len(times)], times=[sorted(times)]), quantile)
    assert sum(time < cut for time in times) <= quantile * len(times)
    assert all(sum(time < later for time in times) > quantile * len(times) for later in times if later > cut)


def test_nanoseconds_are_cut_to_the_digit():
    times = [1_700_000_000_000_000_000 + step for step in range(10)]
    interactions = log([list(range(1, 11))], times=[times])
    assert time_at_quantile(interactions, 0.5) == times[5]
    assert TimeSplit(times[5]).examine(interactions, CATALOGUE).asked.answers.tolist() == [6]


def test_a_log_without_timestamps_cannot_be_cut():
    for cut in (lambda: time_at_quantile(log([[1, 2]]), 0.9), lambda: TimeSplit(5).examine(log([[1, 2]]), CATALOGUE)):
        with pytest.raises(InteractionsError, match="column timestamp or timestamp_ms") as refused:
            cut()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("cut", [-1, 0, 3, 99])
def test_a_cut_that_leaves_nobody_to_ask_is_refused_and_the_times_are_named(cut):
    with pytest.raises(InteractionsError, match=rf"before {cut} and one since then; .* 0 to 5"):
        TimeSplit(cut).examine(log([[1, 2], [3]], times=[[0, 1], [5]]), CATALOGUE)


class TestTheReportOfATimeSplit:
    LOG = log([[1, 2, 3], [4, 5]], times=[[0, 1, 5], [2, 6]])

    def report(self, small_bundle, metadata):
        bundle = make_bundle(small_bundle.config, small_bundle.model.state_dict(), small_bundle.catalogue, metadata)
        return TimeSplit(5).to_json(bundle, self.LOG)

    def test_says_that_a_bundle_of_the_log_before_the_cut_was_trained_before_it(self, small_bundle):
        metadata = {"data": {"fingerprint": self.LOG.before(5).fingerprint}}
        assert self.report(small_bundle, metadata) == {"protocol": "time-split", "cut": 5, "trained_before_cut": True}

    def test_does_not_say_so_of_any_other(self, small_bundle):
        others = [{}, {"data": None}, *({"data": {"fingerprint": each}} for each in (self.LOG.fingerprint, None))]
        assert not any(self.report(small_bundle, metadata)["trained_before_cut"] for metadata in others)
