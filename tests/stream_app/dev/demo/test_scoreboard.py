"""The demo counts what it says it counts."""

from __future__ import annotations

import math

import pytest

from stream_app.dev.demo.scoreboard import Scoreboard

POPULAR = [f"p{number}" for number in range(30)]


class Story:
    """Tells a scoreboard what happened, one event a second unless said otherwise."""

    def __init__(self):
        self.board = Scoreboard(POPULAR)
        self.now = 0.0
        self.sent = 0

    def click(self, user, item, *, is_last=False):
        event = str(self.sent)
        self.sent += 1
        self.now += 1
        self.board.clicked(event, user, item, is_last=is_last, at=self.now)
        return event

    def answer(self, event, *items, after=0.01):
        self.now += after
        self.board.recommended(event, items, self.now)


@pytest.fixture
def story():
    return Story()


def test_lag_is_clicks_without_a_recommendation(story):
    first, second = story.click("u", "a"), story.click("v", "a")
    assert story.board.lag == 2
    story.answer(first, "x")
    assert story.board.lag == 1
    story.answer(second, "x")
    assert (story.board.lag, story.board.sent, story.board.answered, story.board.users) == (0, 2, 2, 2)


def test_a_duplicate_recommendation_changes_nothing(story):
    event = story.click("u", "a")
    story.answer(event, "b")
    story.answer(event, "c")
    assert story.board.answered == 1
    assert len(story.board.latencies_ms) == 1


def test_the_next_click_counts_as_a_hit_when_it_was_in_the_list_before(story):
    story.answer(story.click("u", "a"), "b", "c")
    story.answer(story.click("u", "c"), "d")
    story.answer(story.click("u", "e"), "f")
    assert (story.board.judged, story.board.hits) == (2, 1)
    assert story.board.recall == 0.5


def test_only_the_first_ten_items_of_a_list_count(story):
    story.answer(story.click("u", "a"), *[f"i{place}" for place in range(11)])
    story.click("u", "i10")
    assert (story.board.judged, story.board.hits) == (1, 0)


def test_next_clicks_on_items_seen_in_the_session_are_left_out(story):
    story.answer(story.click("u", "a"), "b")
    story.answer(story.click("u", "a"), "b")
    assert story.board.judged == 0
    assert math.isnan(story.board.recall)


def test_a_recommendation_that_the_next_click_overtook_is_judged_when_it_comes(story):
    first = story.click("u", "a")
    second = story.click("u", "b")
    third = story.click("u", "c")
    story.answer(first, "b")
    story.answer(second, "x")
    story.answer(third, "y")
    assert (story.board.judged, story.board.hits) == (2, 1)


def test_users_are_judged_apart(story):
    story.answer(story.click("u", "a"), "b")
    story.answer(story.click("v", "x"), "y")
    story.click("v", "b")
    story.click("u", "b")
    assert (story.board.judged, story.board.hits) == (2, 1)


def test_the_baseline_answers_the_same_clicks_with_the_most_popular_unseen_items(story):
    story.answer(story.click("u", "p0"), "x")
    story.answer(story.click("u", "p10"), "x")  # tenth most popular but for p0, which is seen
    story.answer(story.click("u", "p12"), "x")  # the tenth is p11 now
    assert (story.board.judged, story.board.popular_hits) == (2, 1)


def test_latencies_are_from_sending_to_reading(story):
    for milliseconds in (30, 10, 20):
        story.answer(story.click("u", "a"), "b", after=milliseconds / 1000)
    assert list(story.board.latencies_ms) == pytest.approx([30, 10, 20])
    assert story.board.latency_ms(0.5) == pytest.approx(20)
    assert story.board.latency_ms(0.99) == pytest.approx(30)


def test_no_latency_is_not_a_number_rather_than_an_error(story):
    assert math.isnan(story.board.latency_ms(0.99))


def test_an_over_session_is_forgotten(story):
    story.answer(story.click("u", "a", is_last=True), "b")
    story.click("u", "b")
    assert story.board.judged == 0
    assert story.board.users == 2


def test_the_verdict_of_a_click_is_its_place_in_the_list_before(story):
    story.answer(story.click("u", "a"), "b", "c")
    story.answer(story.click("u", "c"), "d")
    story.answer(story.click("u", "c"), "d")
    story.click("u", "e")
    story.click("u", "f")
    verdicts = [(click.verdict, click.place) for click in reversed(story.board.latest_clicks)]
    assert verdicts == [("first", None), ("hit", 2), ("again", None), ("missed", None), ("early", None)]


def test_one_shopper_is_followed_until_the_session_ends(story):
    story.answer(story.click("u", "a"), "b")
    story.answer(story.click("u", "b"), "c")
    assert story.board.followed.user_id == "u"
    story.answer(story.click("v", "a"), "b")
    story.answer(story.click("v", "b"), "c")
    assert story.board.followed.user_id == "u"
    story.answer(story.click("u", "d", is_last=True), "e")
    assert story.board.followed.is_over
    for item in "xyz":
        story.answer(story.click("v", item), "c")
    assert story.board.followed.user_id == "v"


def test_the_rate_is_of_the_last_seconds(story):
    for _ in range(100):
        story.answer(story.click("u", "a"), "b")
    assert story.board.rate(story.now) == pytest.approx(1, abs=0.3)
