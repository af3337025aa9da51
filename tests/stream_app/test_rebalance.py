"""Workers that come, go and return, on a real broker: standbys, static members, and what a rebalance leaves behind."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import rocksdict

from lrurec.bundle import save_bundle
from lrurec.convert import convert
from tests.stream_app.live import (
    Site,
    WorkerProcess,
    click,
    produce,
    producer,
    read_topic,
    recommendations_for,
    run_command,
    wait_until,
)

GOLDEN = Path(__file__).parents[1] / "lrurec" / "golden" / "public_large_d64_b2.npz"

PARTITIONS = list(range(4))


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bundle"
    save_bundle(folder, convert(GOLDEN))
    return folder


@pytest.fixture
def site(bootstrap: str, unique_name: Callable[[str], str], bundle_folder: Path, tmp_path: Path) -> Site:
    made = Site(bootstrap, unique_name("app"), bundle_folder, tmp_path)
    made.create_topics()
    return made


@pytest.fixture
def start(site: Site) -> Iterator[Callable[..., WorkerProcess]]:
    """`start("a")` starts a worker with a state folder of that name; all are killed at the end."""
    with ExitStack() as workers:

        def begin(name: str, **settings: str) -> WorkerProcess:
            made = WorkerProcess(site, name, **{"STATE_DIR": str(site.folder / f"state-{name}"), **settings})
            return workers.enter_context(made)

        yield begin


def share(*workers: WorkerProcess) -> bool:
    """Whether they are ready and have all partitions between them."""
    held = [partition for worker in workers for partition in worker.holds() or []]
    return all(worker.ask("/ready") == 200 for worker in workers) and sorted(held) == PARTITIONS


def tails(*workers: WorkerProcess) -> Callable[[], str]:
    return lambda: "\n---\n".join(worker.tail() for worker in workers)


def behind(worker: WorkerProcess) -> float | None:
    """Changelog records that its standbys have yet to take over; None while there are none."""
    lags = worker.labelled("standby_lag_records")
    return sum(lags) if lags else None


def is_caught_up(standby: WorkerProcess, owner: WorkerProcess) -> bool:
    return standby.standbys() == owner.holds() and behind(standby) == 0


def restored_by(worker: WorkerProcess) -> int:
    """Changelog records that it has read back for partitions of its own."""
    return sum(line["records"] for line in worker.events("restored"))


def states_in(database: Path) -> dict[bytes, bytes]:
    opened = rocksdict.Rdict(str(database), options=rocksdict.Options(raw_mode=True))
    try:
        rows = cast("Iterable[tuple[bytes, bytes]]", opened.items())
        return {key: value for key, value in rows if not key.startswith(b"\xff")}
    finally:
        opened.close()


def database_of(site: Site, name: str, partition: int) -> Path:
    [folder] = (site.folder / f"state-{name}" / site.name).glob(f"v*/tables/user_state/{partition}")
    return folder


async def click_all(site: Site, users: int, item: str, first: int = 0) -> None:
    await produce(site, [click(f"user-{number}", item) for number in range(first, first + users)])


# -- static members


async def test_a_static_member_that_restarts_within_its_session_stops_nobody_and_has_its_partitions_again(
    site: Site, start: Callable[..., WorkerProcess]
) -> None:
    a, b = (start(name, INSTANCE_ID=f"worker-{name}", SESSION_TIMEOUT_SECONDS="30") for name in "ab")
    wait_until(lambda: share(a, b), 60, tails(a, b))
    await click_all(site, 200, "1")
    await recommendations_for(site, 200)
    mine, stops, rebalances = b.holds(), len(a.events("rebalancing")), a.metric("rebalances_total")
    for end in (WorkerProcess.terminate, WorkerProcess.kill):
        end(b)
        b = start("b", INSTANCE_ID="worker-b", SESSION_TIMEOUT_SECONDS="30")
        wait_until(partial(share, a, b), 25, tails(a, b))
        assert b.holds() == mine
        assert (len(a.events("rebalancing")), a.metric("rebalances_total")) == (stops, rebalances)
    await click_all(site, 200, "2", first=200)
    await recommendations_for(site, 400)


async def test_of_two_workers_with_one_name_the_older_ends_with_one_line_and_the_newer_goes_on(
    site: Site, start: Callable[..., WorkerProcess]
) -> None:
    older = start("older", INSTANCE_ID="worker-0")
    wait_until(lambda: share(older), 40, older.tail)
    newer = start("newer", INSTANCE_ID="worker-0")
    assert older.process.wait(40) == 1
    line = older.log.read_text().splitlines()[-1]
    assert line.startswith("Error: another worker has joined the group as STREAM_APP_INSTANCE_ID=worker-0"), line
    wait_until(lambda: share(newer), 20, newer.tail)
    await click_all(site, 50, "1")
    await recommendations_for(site, 50)


# -- standbys


async def test_a_standby_takes_over_with_the_end_of_its_changelog_alone(
    site: Site, start: Callable[..., WorkerProcess]
) -> None:
    workers = {name: start(name, STANDBY_REPLICAS="1") for name in "ab"}
    wait_until(lambda: share(*workers.values()), 40, tails(*workers.values()))
    await click_all(site, 400, "1")
    await recommendations_for(site, 400)
    for gone in ("b", "a"):  # the second time by one that was active before, for what it became a standby of
        leaver, stays = workers[gone], workers["ab".replace(gone, "")]
        wait_until(partial(is_caught_up, stays, leaver), 20, tails(stays, leaver))
        await click_all(site, 40, "2")
        restored = restored_by(stays)
        leaver.kill()
        wait_until(partial(share, stays), 30, stays.tail)
        assert restored_by(stays) - restored <= 40
        if gone == "b":
            workers[gone] = start(gone, STANDBY_REPLICAS="1")
            wait_until(partial(share, *workers.values()), 40, tails(*workers.values()))
    verified = run_command(["verify"], site.environment())
    assert verified.returncode == 0, verified.stdout + verified.stderr


async def test_a_standby_holds_what_the_owner_holds_though_a_zombie_writes_an_old_state(
    site: Site, start: Callable[..., WorkerProcess]
) -> None:
    a, b = (start(name, STANDBY_REPLICAS="1") for name in "ab")
    wait_until(lambda: share(a, b), 40, tails(a, b))
    await click_all(site, 200, "1")
    await recommendations_for(site, 200)
    old = await read_topic(site, site.changelog)
    await click_all(site, 200, "2")
    await recommendations_for(site, 400)
    async with producer(site) as zombie:
        for record in old:
            await zombie.send_and_wait(site.changelog, record.value, record.key, record.partition)
    wait_until(lambda: is_caught_up(a, b) and is_caught_up(b, a), 20, tails(a, b))
    held = {"a": a.holds() or [], "b": b.holds() or []}
    for worker in (a, b):
        worker.kill()
    for owner, standby in (("a", "b"), ("b", "a")):
        for partition in held[owner]:
            states = states_in(database_of(site, standby, partition))
            assert states == states_in(database_of(site, owner, partition))
            assert states


# -- what a rebalance leaves behind


async def test_partitions_that_move_under_load_are_drained_closed_and_written_by_their_next_owner_alone(
    site: Site, start: Callable[..., WorkerProcess]
) -> None:
    a, b = start("a", MAX_BATCH="64"), start("b", MAX_BATCH="64")
    wait_until(lambda: share(a, b), 40, tails(a, b))
    clicking = asyncio.create_task(click_for_ever(site))
    try:
        c = start("c", MAX_BATCH="64")
        await asyncio.to_thread(wait_until, lambda: share(a, b, c), 40, tails(a, b, c))
        [moved] = c.holds() or []
        name = "a" if moved in a.events("ready")[-2]["partitions"] else "b"
        left = database_of(site, name, moved)
        assert states_in(left)  # it can be opened: the worker has closed it
        assert await asyncio.to_thread(c.terminate) == 0, c.tail()
        await asyncio.to_thread(wait_until, lambda: share(a, b), 40, tails(a, b, c))
    finally:
        clicking.cancel()
    await asyncio.to_thread(wait_until, lambda: a.lag() == b.lag() == 0, 40, tails(a, b))
    # A write of one that had lost the partition would have ended the next owner: it checks that its records follow.
    assert [worker.terminate() for worker in (a, b)] == [0, 0], tails(a, b)()
    verified = run_command(["verify"], site.environment())
    assert verified.returncode == 0, verified.stdout + verified.stderr


async def click_for_ever(site: Site) -> None:
    """A few hundred clicks a second, until cancelled."""
    async with producer(site) as client:
        for number in itertools.count():
            key, value = click(f"user-{number % 300}", str(number % 200 + 1))
            await client.send_and_wait(site.clicks, value, key)


def test_time_without_progress_is_measured_and_a_line_says_how_long_a_rebalance_took(
    site: Site, start: Callable[..., WorkerProcess]
) -> None:
    a = start("a")
    wait_until(lambda: a.ask("/live") == 200, 40, a.tail)
    wait_until(lambda: a.metric("stalled_seconds") > 0.3, 10, a.tail)  # while it joins
    wait_until(lambda: share(a), 40, a.tail)
    wait_until(lambda: a.metric("stalled_seconds") == 0, 10, a.tail)  # there is nothing to do
    joined, rebalances = a.metric("unready_seconds_total"), a.metric("rebalances_total")
    assert a.events("ready")[-1]["seconds"] == pytest.approx(joined, abs=0.3)
    b = start("b")
    wait_until(lambda: share(a, b), 40, tails(a, b))
    assert a.metric("rebalances_total") > rebalances
    took = sum(line["seconds"] for line in a.events("ready"))
    assert took > joined
    assert a.metric("unready_seconds_total") == pytest.approx(took, abs=0.5)


def test_a_worker_that_comes_back_gets_the_partitions_that_are_on_its_disk(
    site: Site, start: Callable[..., WorkerProcess]
) -> None:
    a = start("a")
    wait_until(lambda: share(a), 40, a.tail)
    assert a.terminate() == 0, a.tail()
    for partition in (1, 2):  # as if it had had the others only
        shutil.rmtree(database_of(site, "a", partition))
    b = start("b")
    wait_until(lambda: share(b), 40, b.tail)
    a = start("a")
    wait_until(lambda: share(a, b), 40, tails(a, b))
    assert a.holds() == [0, 3]
