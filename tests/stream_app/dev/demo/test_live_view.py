"""What the demo shows can be read on any screen, and says what changed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from stream_app.dev.demo.live_view import View
from stream_app.dev.demo.scoreboard import Scoreboard
from stream_app.dev.demo.shop import Shop


@pytest.fixture(scope="module")
def shop():
    return Shop.load()


@pytest.fixture
def board(shop):
    board = Scoreboard(shop.popular)
    lists = [["A1", "B4", "C5"], ["B4", "A1", "P1"]]
    for number, (item, recommended) in enumerate(zip(["A13", "A16"], lists, strict=True)):
        board.clicked(str(number), "s1", item, is_last=False, at=number)
        board.recommended(str(number), recommended, number + 0.012)
    board.clicked("2", "s1", "B4", is_last=False, at=2)
    return board


def text_of(renderable, width, height):
    console = Console(width=width, height=height, record=True, file=io.StringIO())
    console.print(renderable, height=height)
    return console.export_text()


def test_the_screen_shows_titles_moves_and_counts(shop, board):
    text = text_of(View(shop, "127.0.0.1:9092", 5000).screen(board, now=2), 120, 34)
    assert "2 of 5,000 clicks" in text
    assert "p50 12 ms" in text
    assert shop.title("A16") in text
    first, second, third = (
        next(line for line in text.splitlines() if f" {rank}  " in line and "$" in line) for rank in (1, 2, 3)
    )
    assert "↑1" in first
    assert shop.title("B4") in first
    assert "↓1" in second
    assert "new" in third
    assert f"left the list: {shop.title('C5')}" in text
    assert "✓ 1" in text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (200, 60)])
def test_it_fits_any_screen(shop, board, width, height):
    lines = text_of(View(shop, "127.0.0.1:9092", None).screen(board, now=2), width, height).splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_nothing_to_show_yet_is_shown_as_nothing(shop):
    view, board = View(shop, "127.0.0.1:9092", None), Scoreboard(shop.popular)
    assert "–" in view.line(board, now=0)
    assert "waiting for somebody" in text_of(view.screen(board, now=0), 120, 34)


def test_the_summary_says_what_the_recall_counts(shop, board):
    summary = View(shop, "127.0.0.1:9092", 3).summary(board, seconds=2)
    assert "3 clicks of 1 shoppers, 2 recommendations in 2.0 s: 1 clicks/s" in summary
    assert "in 50.0% of 2 cases" in summary
    assert "next clicks on items new to their session" in summary
    assert "dead letters: 0" in summary


def test_a_summary_of_no_time_at_all_counts_nothing(shop, board):
    assert "in 0.0 s: 0 clicks/s" in View(shop, "127.0.0.1:9092", 3).summary(board, seconds=-0.001)
