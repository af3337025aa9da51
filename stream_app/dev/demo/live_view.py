"""The demo's screen: what is drawn from a scoreboard, for a terminal and for a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, TypedDict

from rich.console import Group, RenderableType
from rich.layout import Layout
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from stream_app.dev.demo.scoreboard import K, Scoreboard, SeenClick, Shopper
from stream_app.dev.demo.shop import Shop

_BAR_CELLS = 30
_CLICKS_OF_FOLLOWED = 4  # with the list of 10, what a terminal of 24 lines can hold


class _OneLine(TypedDict):
    """Arguments of a text that is cut rather than wrapped."""

    no_wrap: bool
    overflow: Literal["ellipsis"]


_ONE_LINE: Final[_OneLine] = {"no_wrap": True, "overflow": "ellipsis"}


@dataclass(frozen=True)
class View:
    """Draws scoreboards of one demo."""

    shop: Shop
    bootstrap: str
    wanted: int | None
    """Clicks after which the demo ends."""

    def screen(self, board: Scoreboard, now: float) -> RenderableType:
        """A full screen: counts on top, below them one shopper's list and everybody's latest clicks."""
        layout = Layout()
        layout.split_column(Layout(self._counts(board, now), size=6), Layout(name="below"))
        layout["below"].split_row(Layout(self._followed(board.followed), ratio=3), Layout(self._latest(board), ratio=2))
        return layout

    def line(self, board: Scoreboard, now: float) -> str:
        """The counts as one line, where there is no terminal to draw on."""
        p50, p99 = board.recent_latencies
        return (
            f"{self._progress(board)} clicks  {board.rate(now):,.0f}/s"
            f"  latency p50 {_ms(p50)} p99 {_ms(p99)}  lag {board.lag:,}"
            f"  recall@{K} {_percent(board.recall)} (most popular {_percent(board.popular_recall)})"
            f"  dead letters {board.dead_letters:,}"
        )

    def summary(self, board: Scoreboard, seconds: float) -> str:
        seconds = max(0.0, seconds)
        rate = board.answered / seconds if seconds else 0.0
        lines = [
            f"{board.sent:,} clicks of {board.users:,} shoppers,"
            f" {board.answered:,} recommendations in {seconds:.1f} s: {rate:,.0f} clicks/s",
            f"latency, click sent to recommendation read:"
            f" p50 {_ms(board.latency_ms(0.5))}, p99 {_ms(board.latency_ms(0.99))}",
            f"the next click was among the {K} items just recommended in {_percent(board.recall)} of {board.judged:,}"
            f" cases; among the {K} most popular in {_percent(board.popular_recall)}"
            " (next clicks on items new to their session)",
            f"dead letters: {board.dead_letters:,}",
        ]
        return "\n".join(lines)

    def _progress(self, board: Scoreboard) -> str:
        return f"{board.answered:,}" if self.wanted is None else f"{board.answered:,} of {self.wanted:,}"

    def _counts(self, board: Scoreboard, now: float) -> RenderableType:
        p50, p99 = board.recent_latencies
        figures = Text.assemble(
            *((self._progress(board), "bold"), " clicks   "),
            *((f"{board.rate(now):,.0f}", "bold"), "/s   "),
            *("latency p50 ", (_ms(p50), "bold"), " p99 ", (_ms(p99), "bold")),
            *("   lag ", (f"{board.lag:,}", "bold")),
            *("   dead letters ", (f"{board.dead_letters:,}", "bold red" if board.dead_letters else "bold")),
            **_ONE_LINE,
        )
        recall = Table.grid(padding=(0, 2))
        recall.add_row("LRURec", _bar(board.recall, "green"), Text(_percent(board.recall), "bold green"))
        recall.add_row("most popular", _bar(board.popular_recall, "yellow"), _percent(board.popular_recall))
        caption = Text(
            f"Of {board.judged:,} next clicks on items new to their session, among the {K} just recommended:",
            "dim",
            **_ONE_LINE,
        )
        title = f"[bold]stream-app demo[/]  Kafka {self.bootstrap}  [dim]Ctrl-C ends it[/]"
        return Panel(Group(figures, caption, recall), title=title, title_align="left")

    def _followed(self, shopper: Shopper | None) -> RenderableType:
        if shopper is None:
            waiting = Text("waiting for somebody's second click", "dim")
            return Panel(waiting, title="One shopper", title_align="left")
        clicks = shopper.clicked[: shopper.answered][-_CLICKS_OF_FOLLOWED:]
        history = Table.grid(padding=(0, 1))
        for age, item_id in enumerate(reversed(clicks)):
            style = "bold cyan" if age == 0 else "dim"
            history.add_row(Text("clicked" if age == 0 else "before", style), Text(self.shop.title(item_id), style))
        title = f"One shopper: {shopper.user_id}, {shopper.answered} clicks"
        return Panel(
            Group(history, Text(), self._list(shopper)),
            title=title + (", session over" if shopper.is_over else ""),
            title_align="left",
        )

    def _list(self, shopper: Shopper) -> RenderableType:
        """The list just recommended, with what changed against the one before."""
        table = Table.grid(padding=(0, 2))
        for rank, item_id in enumerate(shopper.recommended):
            move, style = _move(item_id, rank, shopper.previously)
            item = self.shop.items.get(item_id)
            price = f"${item.price_usd}" if item else ""
            table.add_row(Text(f"{rank + 1:>2}"), Text(move, style), Text(self.shop.title(item_id), style), price)
        gone = [self.shop.title(item) for item in shopper.previously if item not in shopper.recommended]
        left = Text(f"left the list: {', '.join(gone)}" if gone else "", "dim")
        return Group(table, Text(), left)

    def _latest(self, board: Scoreboard) -> RenderableType:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        table.add_column(no_wrap=True)
        for click in board.latest_clicks:
            verdict, style = _verdict(click)
            table.add_row(Text(click.user_id, "dim"), Text(self.shop.title(click.item_id)), Text(verdict, style))
        return Panel(table, title="Latest clicks: ✓ place in the list", title_align="left")


def _move(item_id: str, rank: int, previously: tuple[str, ...]) -> tuple[str, str]:
    if item_id not in previously:
        return "new", "bold green"
    moved = previously.index(item_id) - rank
    if moved > 0:
        return f"↑{moved}", "green"
    return (f"↓{-moved}", "red") if moved < 0 else ("", "")


def _verdict(click: SeenClick) -> tuple[str, str]:
    if click.verdict == "hit":
        return f"✓ {click.place}", "bold green"
    return {"missed": ("✗", "red"), "first": ("first", "dim"), "again": ("again", "dim")}.get(click.verdict, ("", ""))


def _bar(share: float, style: str) -> Text:
    cells = 0 if math.isnan(share) else round(share * _BAR_CELLS)
    return Text.assemble(("█" * cells, style), ("░" * (_BAR_CELLS - cells), "dim"))


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.1%}"


def _ms(milliseconds: float) -> str:
    return "–" if math.isnan(milliseconds) else f"{milliseconds:,.0f} ms"
