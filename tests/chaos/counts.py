"""What has happened in a run, and whether that is what was asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tests.chaos.schedule import Amounts

_HARMS = ("cut", "flipped")


@dataclass
class Counts:
    """What has happened."""

    clicks: int = 0
    poison: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    """By point."""
    kills_elsewhere: int = 0
    """Of workers that did not pass their point in time."""
    disks: Counter[str] = field(default_factory=Counter)
    """Lost and damaged ones."""
    leaves: int = 0
    rolling_restarts: int = 0
    zombies: int = 0
    broker_restarts: int = 0
    slow_networks: int = 0
    stalled_networks: int = 0
    cut_networks: int = 0
    cut_connections: int = 0
    full_disks: int = 0
    clock_jumps: int = 0
    rebalances: int = 0
    """By the number that Kafka gives each."""
    ended_by_themselves: Counter[str] = field(default_factory=Counter)
    """By the reason they gave."""

    @property
    def all_kills(self) -> int:
        return self.kills.total() + self.kills_elsewhere

    def as_json(self) -> dict[str, Any]:
        """Field → number, or what it is made up of."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def short_of(self, amounts: Amounts, *, clicks: int, rebalances: int) -> list[str]:
        """What has happened less often than asked for, a line each."""
        happened = {
            **{name: getattr(self, name) for name in asdict(amounts) if hasattr(self, name)},
            "kills": self.kills.total(),
            "lost_disks": self.disks["lost"],
            "damaged_disks": sum(self.disks[harm] for harm in _HARMS),
            "clicks": self.clicks,
            "rebalances": self.rebalances,
        }
        wanted = {**asdict(amounts), "clicks": clicks, "rebalances": rebalances}
        return [
            f"{happened[name]:,} {name.replace('_', ' ')} of {most:,}"
            for name, most in wanted.items()
            if happened[name] < most
        ]

    def __str__(self) -> str:
        return (
            f"{self.clicks:,} clicks, {self.poison:,} poison; {self.all_kills} kills, {self.disks.total()} disks lost"
            f" or damaged, {self.full_disks} full, {self.leaves} left and joined again, {self.rolling_restarts} rolling"
            f" restarts, {self.zombies} zombies, {self.broker_restarts} broker restarts; network {self.slow_networks}"
            f" times slow, {self.stalled_networks} stalled, {self.cut_networks} cut; {self.clock_jumps} clocks jumped;"
            f" {self.rebalances} rebalances"
        )
