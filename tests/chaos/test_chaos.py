"""The short form of `make chaos`, and that the harness can fail."""

from __future__ import annotations

import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.clock import let_jump
from tests.chaos.counts import Counts
from tests.chaos.harness import Harness, is_once
from tests.chaos.points import POINTS, RESTORING, signal_at
from tests.chaos.schedule import (
    Action,
    Amounts,
    Cut,
    FillDisk,
    Freeze,
    JumpClock,
    Kill,
    Leave,
    RestartBroker,
    RollingRestart,
    Slow,
    Stall,
    draw,
)
from tests.chaos.stage import REQUEST_SECONDS, SESSION_SECONDS, terminate
from tests.chaos.workers import Workers
from tests.stream_app.live import wait_until

FEW = st.integers(0, 4)
AMOUNTS = st.builds(
    Amounts,
    kills=st.integers(20, 90),
    leaves=FEW,
    lost_disks=st.integers(0, 8),
    damaged_disks=st.integers(0, 8),
    broker_restarts=FEW,
    zombies=FEW,
    slow_networks=FEW,
    stalled_networks=FEW,
    cut_networks=FEW,
    full_disks=FEW,
    clock_jumps=FEW,
    rolling_restarts=FEW,
)


def drawn(seed: int, amounts: Amounts) -> list[Action]:
    return draw(seed, amounts, session_seconds=3, request_seconds=5)


@given(seed=st.integers(0, 9), amounts=AMOUNTS)
def test_a_seed_gives_one_schedule_with_all_that_was_asked_for(seed: int, amounts: Amounts) -> None:
    actions = drawn(seed, amounts)
    assert actions == drawn(seed, amounts)
    assert Counter(type(action) for action in actions) == Counter(
        {
            Kill: amounts.kills,
            Leave: amounts.leaves,
            Freeze: amounts.zombies,
            RestartBroker: amounts.broker_restarts,
            Slow: amounts.slow_networks,
            Stall: amounts.stalled_networks,
            Cut: amounts.cut_networks,
            FillDisk: amounts.full_disks,
            JumpClock: amounts.clock_jumps,
            RollingRestart: amounts.rolling_restarts,
        }
    )
    assert all(action.seconds > 5 for action in actions if isinstance(action, Stall))
    kills = [action for action in actions if isinstance(action, Kill)]
    by_point = Counter(kill.point for kill in kills)
    assert max(by_point.values()) - min(by_point[point] for point in POINTS) <= 1
    disks = Counter(kill.disk for kill in kills)
    assert disks["lost"] >= amounts.lost_disks
    assert disks["cut"] + disks["flipped"] == amounts.damaged_disks
    assert all(kill.disk == "lost" for kill in kills if kill.point in RESTORING)


def test_more_disks_than_kills_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        drawn(1, Amounts(kills=3, lost_disks=4))


def test_a_point_that_is_none_is_refused() -> None:
    with pytest.raises(KeyError):
        signal_at("nowhere", 1, signal.SIGKILL)


def test_what_happened_less_often_than_asked_for_is_told() -> None:
    counts = Counts(clicks=1_500, kills=Counter(drained=2), disks=Counter(lost=1, cut=1), full_disks=1, rebalances=9)
    amounts = Amounts(kills=2, lost_disks=1, damaged_disks=1, full_disks=1)
    assert counts.short_of(amounts, clicks=1_500, rebalances=9) == []
    more = replace(amounts, kills=3, damaged_disks=2, zombies=1)
    assert counts.short_of(more, clicks=2_000, rebalances=10) == [
        "2 kills of 3",
        "1 damaged disks of 2",
        "0 zombies of 1",
        "1,500 clicks of 2,000",
        "9 rebalances of 10",
    ]


def test_a_jumping_clock_is_hours_wrong_and_leaves_the_monotonic_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, getattr(time, name))  # put back at the end
    true, began, seen = time.time, time.monotonic(), set()

    def saw_both() -> bool:
        seen.update({round((time.time() - true()) / 3600), round((time.time_ns() / 1e9 - true()) / 3600)})
        return seen == {5, -7}

    let_jump([5, -7], seconds=0.05)
    wait_until(saw_both, 10)
    assert time.monotonic() - began < 60


async def test_a_worker_that_is_asked_to_end_as_soon_as_it_is_forked_ends_well(tmp_path: Path) -> None:
    async with Workers() as workers:
        for number in range(10):
            worker = await workers.start(tmp_path / f"log-{number}", {})
            assert await terminate(worker) == 0, worker.last_words()


async def after(folder: Path, actions: list[Action], **options: Any) -> tuple[Harness, dict[str, Any]]:
    harness = Harness(folder, seed=1, rate=2_000, **options)
    return harness, await harness.run(actions, clicks=4_000)


@pytest.mark.timeout(400)
async def test_kills_between_durable_steps_and_a_zombie_lose_and_double_nothing(tmp_path: Path) -> None:
    points = ["recommendations acknowledged", "changelog sent", "changelog acknowledged", "states written"]
    actions: list[Action] = [Kill(point, 3, "kept") for point in points]
    actions += [
        Kill("states restored", 1, "lost"),
        Freeze("changelog unsent", 3, SESSION_SECONDS + 2),
        Leave(0, 0),
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
    harness, found = await after(tmp_path, actions, settings={"GUARANTEE": "exactly_once"})
    assert found["clean"], found["differences"]
    assert found["every_click"]
    assert is_once(found), found
    assert harness.counts.all_kills == 5
    assert harness.counts.zombies == 1


@pytest.mark.timeout(400)
async def test_a_bad_network_a_full_disk_a_jumping_clock_and_a_rolling_restart_lose_and_double_nothing(
    tmp_path: Path,
) -> None:
    actions: list[Action] = [
        Slow(delay_seconds=0.2, seconds=2),
        FillDisk(room=1 << 19),
        Stall(REQUEST_SECONDS + 1),
        JumpClock((5, -7, 30)),
        Cut(times=2),
        RollingRestart(),
    ]
    harness, found = await after(tmp_path, actions)
    assert found["clean"], found["differences"]
    wanted = Amounts(
        slow_networks=1, stalled_networks=1, cut_networks=1, full_disks=1, clock_jumps=1, rolling_restarts=1
    )
    assert harness.counts.short_of(wanted, clicks=4_000, rebalances=6) == []
    assert harness.counts.cut_connections


@pytest.mark.timeout(400)
async def test_a_worker_that_is_wrong_on_purpose_is_found_out(tmp_path: Path) -> None:
    _, found = await after(tmp_path, [Kill("states written", 5, "kept")] * 4, mutation="apply-twice")
    assert not found["clean"]
    assert found["faults"]["wrong_states"]
    assert found["faults"]["conflicting_recommendations"]
