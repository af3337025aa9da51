"""What happens to whom, drawn from a seed: the same seed gives the same schedule."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tests.chaos.disks import Harm
from tests.chaos.points import FREEZING, POINTS, RESTORING, most_passes


@dataclass(frozen=True)
class Kill:
    """SIGKILL at a point, the count-th time that the worker passes it, after this was done to its disk."""

    point: str
    count: int
    disk: Harm | Literal["kept"]


@dataclass(frozen=True)
class Leave:
    """SIGTERM a moment after it is ready; the worker joins again later."""

    stay_seconds: float
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

    away_seconds: float


@dataclass(frozen=True)
class Slow:
    """Every byte between workers and Kafka takes so much longer, each way."""

    delay_seconds: float
    seconds: float


@dataclass(frozen=True)
class Stall:
    """Nothing passes between workers and Kafka, for longer than a request may take; no connection ends."""

    seconds: float


@dataclass(frozen=True)
class Cut:
    """The connections of all workers to Kafka are reset, several times."""

    times: int


@dataclass(frozen=True)
class FillDisk:
    """The disk takes so many more bytes."""

    room: int


@dataclass(frozen=True)
class JumpClock:
    """The wall clock of a worker is this many hours wrong, one after the other for a moment each."""

    hours: tuple[float, ...]


@dataclass(frozen=True)
class RollingRestart:
    """SIGTERM to one worker after the other, each when the one before is ready again."""


Action: TypeAlias = Kill | Leave | Freeze | RestartBroker | Slow | Stall | Cut | FillDisk | JumpClock | RollingRestart


@dataclass(frozen=True)
class Amounts:
    """How often each thing happens."""

    kills: int = 0
    leaves: int = 0
    lost_disks: int = 0
    damaged_disks: int = 0
    broker_restarts: int = 0
    zombies: int = 0
    slow_networks: int = 0
    stalled_networks: int = 0
    cut_networks: int = 0
    full_disks: int = 0
    clock_jumps: int = 0
    rolling_restarts: int = 0


def draw(seed: int, amounts: Amounts, *, session_seconds: float, request_seconds: float) -> list[Action]:
    """All actions, in an order drawn at random. The kills are spread evenly over the points, the broker's over time.

    Args:
        seed: the same one gives the same schedule.
        amounts: how many of each.
        session_seconds: after which a frozen worker is taken for dead.
        request_seconds: that a request to Kafka may take.
    """
    rng = random.Random(seed)
    actions: list[Action] = list(_kills(rng, amounts))
    actions += [Leave(rng.uniform(0, 2), rng.uniform(0, 2)) for _ in range(amounts.leaves)]
    for point in itertools.islice(itertools.cycle(FREEZING), amounts.zombies):
        actions.append(Freeze(point, rng.randint(1, most_passes(point)), session_seconds + rng.uniform(3, 6)))
    actions += [Slow(rng.uniform(0.05, 0.5), rng.uniform(3, 8)) for _ in range(amounts.slow_networks)]
    actions += [Stall(request_seconds + rng.uniform(1, 4)) for _ in range(amounts.stalled_networks)]
    actions += [Cut(rng.randint(1, 3)) for _ in range(amounts.cut_networks)]
    actions += [FillDisk(rng.randrange(1 << 20)) for _ in range(amounts.full_disks)]
    actions += [JumpClock(_hours(rng)) for _ in range(amounts.clock_jumps)]
    actions += [RollingRestart() for _ in range(amounts.rolling_restarts)]
    rng.shuffle(actions)
    apart = len(actions) / (amounts.broker_restarts + 1)
    for number in range(amounts.broker_restarts, 0, -1):
        actions.insert(round(number * apart), RestartBroker(rng.uniform(0, 2)))
    return actions


def _hours(rng: random.Random) -> tuple[float, ...]:
    """Hours ahead and hours behind in turns."""
    return tuple(sign * rng.uniform(2, 30) for sign in (1, -1, 1, -1))


def _kills(rng: random.Random, amounts: Amounts) -> Iterator[Kill]:
    points = list(itertools.islice(itertools.cycle(POINTS), amounts.kills))
    restoring = sum(point in RESTORING for point in points)
    lost = max(0, amounts.lost_disks - restoring)
    others = amounts.kills - restoring
    if lost + amounts.damaged_disks > others:
        raise ValueError(f"{others} kills are too few for {lost} lost and {amounts.damaged_disks} damaged disks")
    damaged: list[Harm] = [rng.choice(("cut", "flipped")) for _ in range(amounts.damaged_disks)]
    kept = others - lost - amounts.damaged_disks
    disks: list[Harm | Literal["kept"]] = [*["lost"] * lost, *damaged, *["kept"] * kept]
    rng.shuffle(disks)
    for point in points:
        disk = "lost" if point in RESTORING else disks.pop()
        yield Kill(point, rng.randint(1, most_passes(point)), disk)
