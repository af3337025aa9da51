"""The short form of `make chaos`, and that the harness can fail."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.harness import SESSION_SECONDS, Harness, is_once
from tests.chaos.points import POINTS, RESTORING, signal_at
from tests.chaos.schedule import Action, Amounts, Freeze, Kill, Leave, RestartBroker, draw

AMOUNTS = st.builds(
    Amounts,
    kills=st.integers(20, 90),
    leaves=st.integers(0, 5),
    lost_disks=st.integers(0, 8),
    damaged_disks=st.integers(0, 8),
    broker_restarts=st.integers(0, 4),
    zombies=st.integers(0, 4),
)


@given(seed=st.integers(0, 9), amounts=AMOUNTS)
def test_a_seed_gives_one_schedule_with_all_that_was_asked_for(seed: int, amounts: Amounts) -> None:
    actions = draw(seed, amounts, session_seconds=3)
    assert actions == draw(seed, amounts, session_seconds=3)
    kinds = Counter(type(action) for action in actions)
    wanted = {Kill: amounts.kills, Leave: amounts.leaves, Freeze: amounts.zombies}
    assert kinds == Counter(wanted | {RestartBroker: amounts.broker_restarts})
    kills = [action for action in actions if isinstance(action, Kill)]
    by_point = Counter(kill.point for kill in kills)
    assert max(by_point.values()) - min(by_point[point] for point in POINTS) <= 1
    disks = Counter(kill.disk for kill in kills)
    assert disks["lost"] >= amounts.lost_disks
    assert disks["cut"] + disks["flipped"] == amounts.damaged_disks
    assert all(kill.disk == "lost" for kill in kills if kill.point in RESTORING)


def test_more_disks_than_kills_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        draw(1, Amounts(3, 0, 4, 0, 0, 0), session_seconds=3)


def test_a_point_that_is_none_is_refused() -> None:
    with pytest.raises(KeyError):
        signal_at("nowhere", 1, signal.SIGKILL)


async def after(folder: Path, actions: list[Action], **options: Any) -> tuple[Harness, dict[str, Any]]:
    harness = Harness(folder, seed=1, rate=1_000, **options)
    return harness, await harness.run(actions, clicks=4_000)


@pytest.mark.timeout(400)
async def test_kills_between_durable_steps_and_a_zombie_lose_and_double_nothing(tmp_path: Path) -> None:
    points = ["recommendations acknowledged", "changelog sent", "changelog acknowledged", "states written"]
    actions: list[Action] = [Kill(point, 3, "kept") for point in points]
    actions += [
        Kill("states restored", 1, "lost"),
        Freeze("changelog unsent", 3, SESSION_SECONDS + 2),
        Leave(0),
        Kill("drained", 1, "cut"),
    ]
    harness, found = await after(tmp_path, actions)
    assert found["clean"], found["differences"]
    assert found["clicks"] >= 4_000
    assert found["repeated_recommendations"], "no kill fell between an output and its commit: nothing was tested"
    assert harness.counts.all_kills == 6
    assert harness.counts.zombies == harness.counts.leaves == 1


@pytest.mark.timeout(400)
async def test_with_exactly_once_nothing_is_repeated_for_who_reads_committed_records(tmp_path: Path) -> None:
    points = ["recommendations sent", "changelog acknowledged", "offsets uncommitted", "offsets committed"]
    actions: list[Action] = [Kill(point, 3, "kept") for point in points]
    actions += [Kill("states restored", 1, "lost"), Freeze("changelog acknowledged", 3, SESSION_SECONDS + 2)]
    harness, found = await after(tmp_path, actions, guarantee="exactly_once")
    assert found["clean"], found["differences"]
    assert is_once(found), found
    assert harness.counts.all_kills == 5
    assert harness.counts.zombies == 1


@pytest.mark.timeout(400)
async def test_a_worker_that_is_wrong_on_purpose_is_found_out(tmp_path: Path) -> None:
    _, found = await after(tmp_path, [Kill("states written", 5, "kept")] * 4, mutation="apply-twice")
    assert not found["clean"]
    assert found["faults"]["wrong_states"]
    assert found["faults"]["conflicting_recommendations"]
