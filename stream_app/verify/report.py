"""What was found, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass, field

FAULTS = (
    "missing_states",
    "wrong_states",
    "missing_recommendations",
    "wrong_recommendations",
    "conflicting_recommendations",
    "missing_dead_letters",
    "wrong_dead_letters",
)
"""What can be wrong."""

SHOWN = 10
"""Differences that are told in detail."""


@dataclass(slots=True)
class Report:
    """Counts of a verification. Every difference is counted under one of the names of `FAULTS`."""

    users: int = 0
    clicks: int = 0
    verified_users: int = 0
    """Those of whom something could be compared."""
    acknowledged_clicks: int = 0
    """Theirs before the group's committed offsets."""
    unknown_items: int = 0
    passed_over: int = 0
    """Clicks of users outside the sample."""
    poison: int = 0
    states: int = 0
    recommendations: int = 0
    repeated_recommendations: int = 0
    dead_letters: int = 0
    unverifiable_users: int = 0
    """Their first clicks are no longer in the log."""
    overtaken_users: int = 0
    """Their last state in the changelog is older than their newest; whoever restores them appends that once more."""
    every_click: bool = True
    """Whether every click was looked up among the recommendations, or each user's last alone."""
    worst_state_error: float = 0.0
    """The largest distance of a state from the parallel form's, as a share of that one's size."""
    worst_score_error: float = 0.0
    """The largest distance of a score from the parallel form's, in standard deviations of that user's scores."""
    faults: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAULTS, 0))
    differences: list[str] = field(default_factory=list)
    """The first `SHOWN` of each kind, in detail."""

    def fault(self, name: str, detail: str) -> None:
        """Count a difference; the first few are kept in detail."""
        self.faults[name] += 1
        if self.faults[name] <= SHOWN:
            self.differences.append(f"{name.replace('_', ' ')}: {detail}")

    @property
    def is_empty(self) -> bool:
        """Whether there are clicks and none of them could be verified, or was among the sample."""
        return bool(self.clicks or self.passed_over) and not self.verified_users

    @property
    def clean(self) -> bool:
        return not self.is_empty and not any(self.faults.values())

    def as_json(self) -> dict[str, object]:
        """Every count by its name; `faults` by theirs."""
        return {name: getattr(self, name) for name in self.__slots__} | {"clean": self.clean}

    def as_text(self) -> str:
        """A page for an operator."""
        looked_up = (
            "every click's" if self.every_click else "each user's last (the topic is compacted, or PUBLISH=latest)"
        )
        lines = [
            f"{self.clicks:,} clicks of {self.users:,} users; {self.verified_users:,} users verified, with"
            f" {self.acknowledged_clicks:,} acknowledged clicks; {self.unknown_items:,} more on unknown items",
            f"{self.states:,} states; furthest from the parallel form: {self.worst_state_error:.2e} of its size",
            f"{self.recommendations:,} recommendations, {self.repeated_recommendations:,} of them repeated; looked up:"
            f" {looked_up}; each user's last list is the model's, furthest score:"
            f" {self.worst_score_error:.2e} standard deviations",
            f"{self.poison:,} records that are no clicks, {self.dead_letters:,} dead letters",
        ]
        if self.passed_over:
            lines.append(f"{self.passed_over:,} more clicks of users outside the sample")
        if self.unverifiable_users:
            lines.append(f"{self.unverifiable_users:,} users have clicks that the log no longer holds: not verified")
        if self.overtaken_users:
            lines.append(
                f"{self.overtaken_users:,} users' last state in the changelog is not their newest: restart a worker"
            )
        if self.faults["wrong_recommendations"] and not self.faults["wrong_states"]:
            lines.append(
                "the states are right and lists are not: are STREAM_APP_TOP_K, STREAM_APP_EXCLUDE_SEEN and"
                " STREAM_APP_RECENT_ITEMS the worker's?"
            )
        lines += [f"{count:,} {name.replace('_', ' ')}" for name, count in self.faults.items()]
        lines += self.differences
        lines.append("clean" if self.clean else "NOTHING VERIFIED" if self.is_empty else "NOT CLEAN")
        return "\n".join(lines)
