"""Who is asked what, and which clicks may be known to those who answer."""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int64

from lrurec.bundle import Bundle
from lrurec.catalogue import Catalogue
from lrurec.errors import InteractionsError
from lrurec.interactions import MIN_CLICKS_TO_EVALUATE, HeldOut, Histories, Interactions, leave_one_out


class Examination(NamedTuple):
    """What every user is asked, in rows of the bundle's catalogue."""

    learnable: Histories
    """Of all users, without what the catalogue doesn't hold: what a baseline may learn from. No answer is among it."""

    asked: HeldOut
    """Histories of those who are asked, without what the catalogue doesn't hold; answers are 0 where it doesn't."""

    clicks_before: Int64[np.ndarray, " users"]
    """Clicks before the answer of everyone who is asked, at least 1; those on unknown items too."""


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """The paper's: everyone with 3 clicks or more is asked for the last one, after all that came before it.

    The click before the last was validation's and is part of the history here. What others clicked later than a
    user's answer is known: the future leaks.
    """

    def examine(self, interactions: Interactions, catalogue: Catalogue) -> Examination:
        """Raises `InteractionsError` if nobody has 3 clicks."""
        histories = interactions.histories_in(catalogue)
        test = leave_one_out(histories).test
        if not len(test.answers):
            raise InteractionsError(f"no user has {MIN_CLICKS_TO_EVALUATE} clicks; there is nobody to evaluate")
        lengths = histories.lengths
        learnable = histories.first(np.where(lengths >= MIN_CLICKS_TO_EVALUATE, lengths - 1, lengths))
        return Examination(learnable.known(), HeldOut(test.histories.known(), test.answers), test.histories.lengths)

    def to_json(self, bundle: Bundle, interactions: Interactions) -> dict[str, Any]:
        return {"protocol": "leave-one-out"}


@dataclass(frozen=True, slots=True)
class TimeSplit:
    """Nobody knows the future: histories are what was clicked before the cut, an answer is the first click since then.

    Everyone is asked who has a click on either side. A bundle knows no more than that only if it was trained on clicks
    before the cut, as by `lrurec train --until CUT`.
    """

    cut: int | float
    """In the unit of the log's timestamps."""

    def examine(self, interactions: Interactions, catalogue: Catalogue) -> Examination:
        """Raises `InteractionsError` if the log has no timestamps, or nobody has a click on either side of the cut."""
        before = interactions.clicks_before(self.cut)
        histories = interactions.histories_in(catalogue)
        users = np.flatnonzero((before > 0) & (before < histories.lengths))
        if not len(users):
            times = interactions.required_times()
            raise InteractionsError(
                f"no user has a click before {self.cut} and one since then; "
                f"the log's are at {times.min()} to {times.max()}, cut it elsewhere"
            )
        known = histories.first(before)
        answers = histories.items[histories.offsets[users] + before[users]]
        return Examination(known.known(), HeldOut(known.take(users).known(), answers), before[users])

    def to_json(self, bundle: Bundle, interactions: Interactions) -> dict[str, Any]:
        return {
            "protocol": "time-split",
            "cut": self.cut,
            "trained_before_cut": self.is_kept_by(bundle, interactions),
        }

    def is_kept_by(self, bundle: Bundle, interactions: Interactions) -> bool:
        """Whether the bundle says that it was trained on exactly this log before the cut.

        False may also mean that it was trained on less, on another log, or converted: who made it must know.
        """
        match bundle.metadata.get("data"):
            case {"fingerprint": fingerprint}:
                return bool(fingerprint == interactions.before(self.cut).fingerprint)
            case _:
                return False


Protocol: TypeAlias = LeaveOneOut | TimeSplit


def time_at_quantile(interactions: Interactions, quantile: float) -> int | float:
    """A time of the log before which at most this share of its clicks was, and no later one would do.

    Raises `InteractionsError` if the log has no timestamps.
    """
    times = interactions.required_times()
    place = min(int(quantile * len(times)), len(times) - 1)
    time: int | float = np.partition(times, place)[place].item()
    return time
