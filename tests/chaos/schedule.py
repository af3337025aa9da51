"""What happens to whom, drawn from a seed: the same seed gives the same schedule."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tests.chaos.points import FREEZING, POINTS, RESTORING, most_passes

Disk: TypeAlias = Literal["kept", "lost", "cut", "flipped"]


@dataclass(frozen=True)
class Kill:
    """SIGKILL at a point, the count-th time that the worker passes it, after this was done to its disk."""

    point: str
    count: int
    disk: Disk


@dataclass(frozen=True)
class Leave:
    """SIGTERM; the worker joins again later."""

    away_seconds: float


@dataclass(frozen=True)
class Freeze:
    """SIGSTOP at a point for longer than a session, so that others take over; then it wakes up and goes on."""

    point: str
    count: int
    seconds: float


@dataclass(frozen=True)
class RestartBroker:
    """Kafka is killed and started again."""


Action: TypeAlias = Kill | Leave | Freeze | RestartBroker


@dataclass(frozen=True)
class Amounts:
    """How often each thing happens."""

    kills: int
    leaves: int
    lost_disks: int
    damaged_disks: int
    broker_restarts: int
    zombies: int


def draw(seed: int, amounts: Amounts, *, session_seconds: float) -> list[Action]:
    """All actions, in an order drawn at random. The kills are spread evenly over the points, the broker's over time."""
    rng = random.Random(seed)
    actions: list[Action] = list(_kills(rng, amounts))
    actions += [Leave(rng.uniform(0, 2)) for _ in range(amounts.leaves)]
    for point in itertools.islice(itertools.cycle(FREEZING), amounts.zombies):
        actions.append(Freeze(point, rng.randint(1, most_passes(point)), session_seconds + rng.uniform(3, 6)))
    rng.shuffle(actions)
    apart = len(actions) / (amounts.broker_restarts + 1)
    for number in range(amounts.broker_restarts, 0, -1):
        actions.insert(round(number * apart), RestartBroker())
    return actions


def _kills(rng: random.Random, amounts: Amounts) -> Iterator[Kill]:
    points = list(itertools.islice(itertools.cycle(POINTS), amounts.kills))
    restoring = sum(point in RESTORING for point in points)
    lost = max(0, amounts.lost_disks - restoring)
    others = amounts.kills - restoring
    if lost + amounts.damaged_disks > others:
        raise ValueError(f"{others} kills are too few for {lost} lost and {amounts.damaged_disks} damaged disks")
    damaged: list[Disk] = [rng.choice(("cut", "flipped")) for _ in range(amounts.damaged_disks)]
    disks: list[Disk] = [*["lost"] * lost, *damaged, *["kept"] * (others - lost - amounts.damaged_disks)]
    rng.shuffle(disks)
    for point in points:
        disk = "lost" if point in RESTORING else disks.pop()
        yield Kill(point, rng.randint(1, most_passes(point)), disk)
