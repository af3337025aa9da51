"""What the demo counts: pure state, told about each click sent and each recommendation read."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

K = 10
_LATEST_LATENCIES = 2_000
_LATEST_CLICKS = 40
_ANSWERS_TO_FOLLOW = 12
_LOOK_SECONDS = 2.0
_RATE_WINDOW_SECONDS = 5.0


@dataclass(slots=True)
class Shopper:
    """One session: its clicks so far, and the lists that answered the last two of them."""

    user_id: str
    clicked: list[str] = field(default_factory=list)
    recommended: tuple[str, ...] = ()
    previously: tuple[str, ...] = ()
    answered: int = 0
    """The click that `recommended` answers, counted from 1; 0 before the first."""
    is_over: bool = False
    """Whether the last click of the session is answered."""


class SeenClick(NamedTuple):
    """A click for the list of the latest ones. `place` is where it stood in the list just recommended, from 1."""

    user_id: str
    item_id: str
    verdict: str
    """`first`, `again` (seen before in the session), `hit`, `missed`, or `early` (its list was not there yet)."""
    place: int | None


class _Waiting(NamedTuple):
    shopper: Shopper
    number: int
    """Which click of the session, from 1."""
    sent_at: float
    is_last: bool


class Scoreboard:
    """Counts, latencies and hits.

    Recall: for two clicks of a session in a row, was the second among the K items recommended after the first? Only
    second clicks on items that are new to their session count, since the recommendations leave out seen items. The
    baseline answers the very same clicks with the K most popular items that are new to the session.
    """

    def __init__(self, popular: Sequence[str]) -> None:
        self.sent = 0
        self.answered = 0
        self.dead_letters = 0
        self.judged = 0
        self.hits = 0
        self.popular_hits = 0
        self.users: int = 0
        self.latencies_ms = array("d")
        self.latest_clicks: deque[SeenClick] = deque(maxlen=_LATEST_CLICKS)
        self.followed: Shopper | None = None
        self._popular = popular
        self._shoppers: dict[str, Shopper] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._answer_times: deque[float] = deque()
        self._answers_followed = 0
        self._follow_another_at = -math.inf

    @property
    def lag(self) -> int:
        """Clicks sent that have no recommendation yet."""
        return self.sent - self.answered

    def clicked(self, event_id: str, user_id: str, item_id: str, *, is_last: bool, at: float) -> None:
        """A click was handed to Kafka at `at` (monotonic seconds)."""
        shopper = self._shoppers.get(user_id)
        if shopper is None:
            shopper = self._shoppers[user_id] = Shopper(user_id)
            self.users += 1
        self.latest_clicks.appendleft(self._seen(shopper, item_id))
        shopper.clicked.append(item_id)
        number = len(shopper.clicked)
        self._waiting[event_id] = _Waiting(shopper, number, at, is_last)
        self.sent += 1
        if shopper.answered == number - 1 > 0:
            self._judge(shopper, number - 1, shopper.recommended)

    def recommended(self, event_id: str, items: Sequence[str], at: float, *, timed: bool = True) -> None:
        """A recommendation was read at `at`. One that no click waits for, a duplicate, changes nothing."""
        waiting = self._waiting.pop(event_id, None)
        if waiting is None:
            return
        shopper, number = waiting.shopper, waiting.number
        self.answered += 1
        self._answer_times.append(at)
        if timed:
            self.latencies_ms.append((at - waiting.sent_at) * 1000)
        shopper.previously, shopper.recommended = shopper.recommended, tuple(items[:K])
        shopper.answered = number
        if number < len(shopper.clicked):  # the next click overtook this answer
            self._judge(shopper, number, shopper.recommended)
        if waiting.is_last:
            shopper.is_over = True
            del self._shoppers[shopper.user_id]
        self._follow(shopper, at)

    def _follow(self, shopper: Shopper, at: float) -> None:
        """Stay with a shopper for a while, and look at a finished session for a moment, before taking the next."""
        if shopper is self.followed:
            self._answers_followed += 1
            if shopper.is_over or self._answers_followed == _ANSWERS_TO_FOLLOW:
                self._follow_another_at = at + _LOOK_SECONDS
        elif shopper.answered > 1 and not shopper.is_over and at >= self._follow_another_at:
            self.followed = shopper
            self._answers_followed = 1
            self._follow_another_at = math.inf

    def latency_ms(self, quantile: float, latest: int | None = None) -> float:
        """A quantile in [0, 1] of click sent to recommendation read, over all answers or the latest ones."""
        values = sorted(self.latencies_ms[-latest:] if latest else self.latencies_ms)
        return values[min(len(values) - 1, math.floor(quantile * len(values)))] if values else math.nan

    @property
    def recent_latencies(self) -> tuple[float, float]:
        """p50 and p99 over the latest answers, in ms."""
        return self.latency_ms(0.5, _LATEST_LATENCIES), self.latency_ms(0.99, _LATEST_LATENCIES)

    def rate(self, now: float) -> float:
        """Answers per second over the last few seconds."""
        while self._answer_times and self._answer_times[0] < now - _RATE_WINDOW_SECONDS:
            self._answer_times.popleft()
        if not self._answer_times:
            return 0.0
        return len(self._answer_times) / max(now - self._answer_times[0], 1.0)

    @property
    def recall(self) -> float:
        return self.hits / self.judged if self.judged else math.nan

    @property
    def popular_recall(self) -> float:
        return self.popular_hits / self.judged if self.judged else math.nan

    def _judge(self, shopper: Shopper, number: int, recommended: Sequence[str]) -> None:
        """Count whether click `number + 1` of the session is in the list that answers click `number`."""
        seen, answer = set(shopper.clicked[:number]), shopper.clicked[number]
        if answer in seen:
            return
        self.judged += 1
        self.hits += answer in recommended
        self.popular_hits += answer in self._most_popular(seen)

    def _most_popular(self, seen: set[str]) -> list[str]:
        return [item for item in self._popular[: K + len(seen)] if item not in seen][:K]

    def _seen(self, shopper: Shopper, item_id: str) -> SeenClick:
        verdict, place = "missed", None
        if not shopper.clicked:
            verdict = "first"
        elif item_id in shopper.clicked:
            verdict = "again"
        elif shopper.answered < len(shopper.clicked):
            verdict = "early"
        elif item_id in shopper.recommended:
            verdict, place = "hit", shopper.recommended.index(item_id) + 1
        return SeenClick(shopper.user_id, item_id, verdict, place)
