"""The shop's sessions are split by time, and replayed as real users would click."""

from __future__ import annotations

from itertools import islice

import pytest

from lrurec.interactions import read_interactions
from stream_app.dev.demo.shop import CLICKS_FILE, Shop


@pytest.fixture(scope="module")
def shop():
    return Shop.load()


def test_training_and_held_out_sessions_are_all_sessions_and_none_twice(shop):
    whole = read_interactions(CLICKS_FILE)
    assert shop.training.user_ids + shop.held_out.user_ids == whole.user_ids
    assert len(shop.training.user_ids) == pytest.approx(0.8 * len(whole.user_ids), abs=1)


def test_every_item_has_a_title(shop):
    assert set(shop.held_out.catalogue.item_ids) <= set(shop.items)
    assert shop.title("no such item") == "no such item"


def test_a_second_pass_has_user_ids_of_its_own(shop):
    clicks = len(shop.held_out.histories.items)
    both = list(islice(shop.held_out_clicks(), 2 * clicks))
    first, second = ({each.user_id for each in half} for half in (both[:clicks], both[clicks:]))
    assert first == set(shop.held_out.user_ids)
    assert len(second) == len(first)
    assert not first & second


def test_a_session_keeps_its_order_and_ends_with_its_last_click(shop):
    clicks = list(islice(shop.held_out_clicks(), len(shop.held_out.histories.items)))
    sessions = {}
    for click in clicks:
        sessions.setdefault(click.user_id, []).append(click)
    for user, user_id in enumerate(shop.held_out.user_ids):
        items = [shop.held_out.catalogue.item_id(row) for row in shop.held_out.histories[user].tolist()]
        assert [click.item_id for click in sessions[user_id]] == items
        assert [click.is_last for click in sessions[user_id]] == [False] * (len(items) - 1) + [True]


def test_many_shoppers_click_in_turn(shop):
    assert len({click.user_id for click in islice(shop.held_out_clicks(), 50)}) > 10


def test_popular_items_come_by_their_clicks_in_training(shop):
    counts = [int((shop.training.histories.items == row).sum()) for row in shop.training.catalogue.rows(shop.popular)]
    assert counts == sorted(counts, reverse=True)


def test_the_training_log_reads_as_the_training_sessions(shop, tmp_path):
    shop.write_training_log(tmp_path / "clicks.csv")
    written = read_interactions(tmp_path / "clicks.csv")
    assert written.user_ids == shop.training.user_ids
    assert written.histories.items.tolist() == shop.training.histories.items.tolist()
