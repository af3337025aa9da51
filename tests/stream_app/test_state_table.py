"""The local database equals a prefix of the changelog, is nobody else's, and can be lost or harmed at any time."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import faust
import pytest
from aiokafka.structs import ConsumerRecord
from faust.types import TP
from faust.types.tuples import ConsumerMessage
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec.user_state import StateLayout
from stream_app import state_table
from stream_app.errors import StateError
from stream_app.record_batches import ChangelogRecords
from stream_app.state_table import StoreOptions, UserStateStore, restore_rows, user_state_table
from stream_app.topic_metadata import NO_ID
from tests.chaos.disks import Disk

LAYOUT = StateLayout("0123456789abcdef", blocks=1, channels=2, recent_capacity=3)
CHANGELOG = "app-user_state-changelog"
CHANGELOG_ID = bytes(range(16))
CACHE_BYTES = 8 << 20


def state(source_offset: int, clicks: int = 0, layout: StateLayout = LAYOUT) -> bytes:
    row = layout.unpack([None])
    row["source_offset"], row["clicks"] = source_offset, clicks
    return row.tobytes()


async def no_changelog(partition, rows):
    raise AssertionError("nothing is to be appended")


async def nobody_to_take_over_from(partitions):
    pass


def make_store(
    folder: Path,
    layout: StateLayout = LAYOUT,
    changelog_id: bytes = CHANGELOG_ID,
    append=no_changelog,
    take_over=nobody_to_take_over_from,
    end_markers=0,
) -> UserStateStore:
    app = faust.App("app", broker="kafka://", datadir=str(folder), web_enabled=False, topic_partitions=3)
    return user_state_table(app, StoreOptions(layout, changelog_id, append, take_over, end_markers, CACHE_BYTES)).store


async def assign(store: UserStateStore, *partitions: int) -> UserStateStore:
    """What Faust tells a store at a rebalance: the partitions that it has from now on."""
    mine = {TP(topic, partition) for topic in (CHANGELOG, "clicks") for partition in partitions}
    await store.on_rebalance(mine, set(), mine)
    return store


async def assign_in(folder: Path) -> UserStateStore:
    return await assign(make_store(folder), 0)


def read_all(store: UserStateStore, partition: int = 0) -> tuple[dict[bytes, bytes], int | None]:
    return dict(store.items()), store.persisted_offset(TP(CHANGELOG, partition))


@pytest.fixture(autouse=True)
def _quiet_faust(caplog):
    caplog.set_level(logging.WARNING)


@pytest.fixture
async def store(tmp_path):
    """A store that has partition 0."""
    store = await assign_in(tmp_path)
    yield store
    await store.stop()


@pytest.fixture
def database(tmp_path):
    """Where the database of partition 0 lies."""
    return tmp_path / "v1" / "tables" / "user_state" / "0"


# -- load and persist


async def test_what_was_persisted_is_loaded_in_the_order_of_the_keys(store):
    store.persist(0, [(b"a", state(1)), (b"b", state(2))], 7)
    assert store.load(0, [b"b", b"nobody", b"a", b"b"]) == [state(2), None, state(1), state(2)]
    assert store.load(0, []) == []
    assert store.persisted_offset(TP(CHANGELOG, 0)) == 7


async def test_a_new_database_knows_no_user_and_no_offset(store):
    assert read_all(store) == ({}, None)


async def test_the_last_state_of_a_user_counts(store):
    store.persist(0, [(b"a", state(1)), (b"a", state(2))], 7)
    store.persist(0, [(b"a", state(3))], 8)
    assert read_all(store) == ({b"a": state(3)}, 8)


async def test_states_and_offset_outlive_the_process_that_wrote_them(store, tmp_path):
    store.persist(0, [(b"a", state(1))], 7)
    await store.stop()
    again = await assign_in(tmp_path)
    assert read_all(again) == ({b"a": state(1)}, 7)
    await again.stop()


async def test_an_offset_can_be_set_alone(store):
    store.persist(0, [(b"a", state(1))], 7)
    store.set_persisted_offset(TP(CHANGELOG, 0), 9)
    assert read_all(store) == ({b"a": state(1)}, 9)


USERS = 3_000


def written(number: int) -> list[tuple[bytes, bytes]]:
    """The states of one write of many."""
    return [(b"%d" % ((20 * number + place) % USERS), state(number)) for place in range(20)]


def prefix(offset: int | None) -> dict[bytes, bytes]:
    """What a database holds after the writes up to one."""
    return {key: row for number in range(following(offset)) for key, row in written(number)}


def following(offset: int | None) -> int:
    return 0 if offset is None else offset + 1


@contextmanager
def small_write_buffers():
    """What is written is flushed soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_table, "WRITE_BUFFER_BYTES", 64 << 10)
        yield


def write_and_be_killed(folder: Path, first: int, stop: int) -> None:
    """Some writes, in a process of its own that ends by a kill while the last of them are being flushed."""
    writer = f"""
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_state_table import assign_in, small_write_buffers, written

async def write():
    with small_write_buffers():
        store = await assign_in(Path({str(folder)!r}))
        for number in range({first}, {stop}):
            store.persist(0, written(number), number)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(write())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", writer], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


def after_the_kill(folder: Path) -> tuple[dict[bytes, bytes], int | None]:
    async def read():
        store = await assign_in(folder)
        found = read_all(store)
        await store.stop()
        return found

    return asyncio.run(read())


def test_a_kill_leaves_the_states_up_to_some_offset(tmp_path):
    first = 0
    for writes in (700, 1, 300, 40, 1_500):
        write_and_be_killed(tmp_path, first, first + writes)
        states, offset = after_the_kill(tmp_path)
        assert states == prefix(offset)
        first = following(offset)
    assert first > 500  # and it had been flushed


@pytest.mark.parametrize("writes", [120, 2_000], ids=["before a compaction", "after some"])
def test_a_list_of_files_that_is_cut_off_anywhere_leaves_the_states_up_to_some_offset_or_none(tmp_path, writes):
    """RocksDB does not miss the end of it."""
    write_and_be_killed(tmp_path / "killed", 0, writes)
    database = Path("v1/tables/user_state/0")
    name = (tmp_path / "killed" / database / "CURRENT").read_text().strip()
    size = (tmp_path / "killed" / database / name).stat().st_size
    offsets = set()
    for length in range(0, size + 1, max(1, size // 40)):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "killed", copy)
        with (copy / database / name).open("r+b") as file:
            file.truncate(length)
        states, offset = after_the_kill(copy)
        assert states == prefix(offset)
        if offset not in offsets:  # and it goes on from there
            write_and_be_killed(copy, following(offset), following(offset) + 900)
            states, last = after_the_kill(copy)
            assert states == prefix(last)
            assert following(last) > following(offset)
        offsets.add(offset)
        shutil.rmtree(copy)
    assert len(offsets) > 2 or writes > 120  # what came before a compaction is gone


def test_the_log_that_an_earlier_version_wrote_is_still_read(tmp_path, database):
    logged = f"""
import asyncio, os, signal, sys
from pathlib import Path
import rocksdict
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_state_table import assign_in, written

async def write():
    store = await assign_in(Path({str(tmp_path)!r}))
    store._databases[0].set_write_options(rocksdict.WriteOptions())
    for number in range(5):
        store.persist(0, written(number), number)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(write())
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", logged], timeout=60, check=False)
    assert after_the_kill(tmp_path) == (prefix(4), 4)


# -- partitions


async def test_a_partition_that_is_not_assigned_can_be_neither_read_nor_written(store):
    for use in (
        lambda: store.load(1, [b"a"]),
        lambda: store.persist(1, [(b"a", state(1))], 7),
        lambda: store.persisted_offset(TP(CHANGELOG, 1)),
    ):
        with pytest.raises(StateError, match="partition 1 of user_state is not assigned to this worker"):
            use()


async def test_partitions_are_databases_of_their_own(store):
    await assign(store, 0, 1)
    store.persist(0, [(b"a", state(1))], 7)
    store.persist(1, [(b"a", state(2))], 3)
    assert store.load(0, [b"a"]) == [state(1)]
    assert store.load(1, [b"a"]) == [state(2)]
    assert [store.persisted_offset(TP(CHANGELOG, partition)) for partition in (0, 1)] == [7, 3]


async def test_a_partition_that_left_is_closed_and_comes_back_with_its_states(store, tmp_path):
    store.persist(0, [(b"a", state(1))], 7)
    await assign(store, 1)
    with pytest.raises(StateError, match=r"partition 0 .* not assigned"):
        store.load(0, [b"a"])
    other = await assign_in(tmp_path)  # closed indeed: another may open it
    await other.stop()
    await assign(store, 0)
    assert read_all(store) == ({b"a": state(1)}, 7)


async def test_partitions_that_stay_are_not_reopened(store):
    store.persist(0, [(b"a", state(1))], 7)
    kept = store._databases[0]
    await assign(store, 0, 1, 2)
    assert store._databases[0] is kept
    assert sorted(store._databases) == [0, 1, 2]


async def test_only_partitions_of_the_changelog_are_opened(tmp_path):
    store = make_store(tmp_path)
    await store.on_rebalance({TP("clicks", 0), TP("another-changelog", 1)}, set(), set())
    assert store._databases == {}


# -- what can't be this worker's states


@pytest.mark.parametrize(
    "other",
    [
        replace(LAYOUT, model="fedcba9876543210"),
        replace(LAYOUT, precision="float32"),
        replace(LAYOUT, recent_capacity=4),
        replace(LAYOUT, blocks=2, channels=1),
    ],
    ids=["model", "precision", "ring", "architecture"],
)
async def test_states_of_another_model_or_layout_are_set_aside_whole(store, database, tmp_path, caplog, other):
    store.persist(0, [(b"a", state(1))], 7)
    await store.stop()
    new = await assign(make_store(tmp_path, other), 0)
    assert read_all(new) == ({}, None)
    await new.stop()
    [aside] = database.parent.glob("0.set-aside-*")
    assert [(record.levelname, record.data["reason"], record.data["kept_at"]) for record in caplog.records] == [
        ("WARNING", "its states have another model, layout or clicks topic", str(aside))
    ]
    shutil.rmtree(database)
    aside.rename(database)
    old = await assign_in(tmp_path)
    assert read_all(old) == ({b"a": state(1)}, 7)
    await old.stop()


def test_a_folder_in_use_by_another_process_is_refused(tmp_path, database):
    holder = f"""
import rocksdict, sys
database = rocksdict.Rdict({str(database)!r}, options=rocksdict.Options(raw_mode=True))
print("open", flush=True)
sys.stdin.read()
"""
    database.parent.mkdir(parents=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", holder], **pipes) as process:
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(StateError, match=r"user_state/0 is in use by another worker; .*STREAM_APP_STATE_DIR"):
            asyncio.run(assign_in(tmp_path))
        process.communicate()
    assert list(database.parent.iterdir()) == [database]  # nothing was set aside


async def test_a_folder_in_use_by_another_store_of_this_process_is_refused(store, tmp_path):
    with pytest.raises(StateError, match="is in use by another worker"):
        await assign_in(tmp_path)
    assert read_all(store) == ({}, None)


async def test_a_folder_filled_from_a_changelog_that_was_made_anew_is_refused_and_left_alone(store, tmp_path):
    store.persist(0, [(b"a", state(1))], 7)
    await store.stop()
    with pytest.raises(StateError, match=r"user_state/0 was filled from another changelog .*STREAM_APP_APP_ID"):
        await assign(make_store(tmp_path, changelog_id=bytes(range(16, 32))), 0)
    again = await assign_in(tmp_path)
    assert read_all(again) == ({b"a": state(1)}, 7)
    await again.stop()


async def test_a_folder_filled_when_kafka_gave_no_ids_is_taken_for_this_changelogs(tmp_path):
    old = await assign(make_store(tmp_path, changelog_id=NO_ID), 0)
    old.persist(0, [(b"a", state(1))], 7)
    await old.stop()
    again = await assign_in(tmp_path)
    assert read_all(again) == ({b"a": state(1)}, 7)
    await again.stop()
    with pytest.raises(StateError, match="another changelog"):  # from now on it belongs to this one
        await assign(make_store(tmp_path, changelog_id=bytes(range(16, 32))), 0)


async def test_a_database_that_is_opened_again_has_the_settings_of_today(tmp_path):
    """rocksdict would take those that it was written with, and a small cache of its own."""
    store = await assign_in(tmp_path)
    store.persist(0, prefix(10).items(), 10)
    await store.stop()
    with small_write_buffers():
        again = await assign_in(tmp_path)
        database = again._databases[0]
        assert database.property_value("rocksdb.block-cache-capacity") == str(CACHE_BYTES)
        for number in range(11, 300):
            again.persist(0, written(number), number)
        database.flush()
        assert len(database.live_files()) > 2, "it is written out by the small buffers"
        assert again._cache.get_usage() > 0
        await again.stop()


# -- damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a store with 60 states in partition 0, at changelog offset 7, written out to an SST file."""
    folder = tmp_path_factory.mktemp("whole")

    async def write():
        store = await assign_in(folder)
        store.persist(0, STATES.items(), 7)
        store._databases[0].flush()
        await store.stop()

    asyncio.run(write())
    return folder


STATES = {b"user-%02d" % user: state(user) for user in range(60)}

DAMAGE: dict[str, Callable[[bytearray], bytearray]] = {
    "emptied": lambda data: data[:0],
    "cut in half": lambda data: data[: len(data) // 2],
    "flipped at the beginning": lambda data: bytearray([data[0] ^ 0xFF]) + data[1:],
    "flipped in the middle": lambda data: _flip(data, len(data) // 2, 8),
    "flipped near the end": lambda data: _flip(data, max(0, len(data) - 700), 8),
}


def _flip(data: bytearray, place: int, length: int) -> bytearray:
    data[place : place + length] = bytes(byte ^ 0xFF for byte in data[place : place + length])
    return data


async def after_a_restart(folder: Path) -> tuple[dict[bytes, bytes], int | None]:
    """States and offset that a worker finds; damage that shows only when it reads may end it once."""
    with suppress(StateError):
        return await read_and_stop(folder)
    return await read_and_stop(folder)


async def read_and_stop(folder: Path) -> tuple[dict[bytes, bytes], int | None]:
    store = await assign_in(folder)
    try:
        loaded = zip(STATES, store.load(0, list(STATES)), strict=True)
        return {key: row for key, row in loaded if row is not None}, store.persisted_offset(TP(CHANGELOG, 0))
    finally:
        await store.stop()


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["CURRENT", "MANIFEST", ".sst"])
async def test_a_damaged_database_is_begun_anew(whole, tmp_path, database, name, damage):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    [file] = [file for file in database.iterdir() if name in file.name]
    file.write_bytes(DAMAGE[damage](bytearray(file.read_bytes())))
    # RocksDB may not need what was harmed; and of a MANIFEST it takes the part before the harm.
    assert await after_a_restart(tmp_path) in (({}, None), (STATES, 7))


async def test_a_database_whose_own_description_is_damaged_is_begun_anew_at_once(whole, tmp_path, database):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    [file] = database.glob("*.sst")
    data = bytearray(file.read_bytes())
    file.write_bytes(_flip(data, data.index(b"changelog-offset"), 4))  # beside the layout, which is read first
    store = await assign_in(tmp_path)
    assert read_all(store) == ({}, None)
    await store.stop()


async def test_a_database_that_is_found_damaged_as_it_is_labelled_is_begun_anew(whole, tmp_path, monkeypatch):
    """A compaction in the background finds the damage when it likes; from then on RocksDB refuses what is written."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    label, refusals = UserStateStore._label, [Exception("Corruption: block checksum mismatch")]

    def refused_once(store, database):
        if refusals:
            raise refusals.pop()
        label(store, database)

    monkeypatch.setattr(UserStateStore, "_label", refused_once)
    store = await assign_in(tmp_path)
    assert read_all(store) == ({}, None)
    await store.stop()


async def test_a_damaged_database_is_kept_aside_for_a_look(whole, tmp_path, database, caplog):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (database / "CURRENT").write_bytes(b"MANIF")
    assert await after_a_restart(tmp_path) == ({}, None)
    [aside] = database.parent.glob("0.set-aside-*")
    assert (aside / "CURRENT").read_bytes() == b"MANIF"
    [record] = caplog.records
    assert record.getMessage() == "local state set aside, restoring from the changelog"
    assert (record.data["partition"], record.data["kept_at"]) == (0, str(aside))


@pytest.mark.parametrize("name", ["CURRENT", "MANIFEST", ".sst"])
async def test_a_database_without_one_of_its_files_is_begun_anew(whole, tmp_path, database, name):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    [file] = [file for file in database.iterdir() if name in file.name]
    file.unlink()
    assert await after_a_restart(tmp_path) == ({}, None)


def test_one_wrong_byte_anywhere_never_gives_a_wrong_state(whole, tmp_path_factory):
    database = Path("v1/tables/user_state/0")
    files = sorted(file.name for file in (whole / database).iterdir() if file.stat().st_size and file.name != "LOG")

    @given(st.sampled_from(files), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
    @settings(max_examples=60)
    def states_are_whole_or_gone(name, place, change):
        folder = tmp_path_factory.mktemp("damaged") / "copy"
        shutil.copytree(whole, folder)
        file = folder / database / name
        data = bytearray(file.read_bytes())
        data[int(place * len(data))] ^= change
        file.write_bytes(data)
        assert asyncio.run(after_a_restart(folder)) in ((STATES, 7), ({}, None))
        shutil.rmtree(folder)

    states_are_whole_or_gone()


async def test_damage_found_while_clicks_flow_ends_the_worker_and_the_next_start_begins_anew(whole, tmp_path, database):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    [file] = database.glob("*.sst")
    file.write_bytes(_flip(bytearray(file.read_bytes()), 100, 8))  # in the block of the first users
    store = await assign_in(tmp_path)
    with pytest.raises(StateError, match=r"user_state/0 is damaged .* was set aside as 0\.set-aside-"):
        store.load(0, list(STATES))
    with pytest.raises(StateError, match="not assigned"):
        store.persist(0, [(b"a", state(1))], 8)
    await store.stop()
    again = await assign_in(tmp_path)
    assert read_all(again) == ({}, None)
    await again.stop()


async def test_only_the_newest_of_the_folders_set_aside_is_kept(whole, tmp_path, database):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for damage in (b"first", b"second"):
        (database / "CURRENT").write_bytes(damage)
        assert await after_a_restart(tmp_path) == ({}, None)
    [aside] = database.parent.glob("0.set-aside-*")
    assert (aside / "CURRENT").read_bytes() == b"second"


async def test_a_folder_removed_under_a_running_worker_is_named_with_what_to_do(store, tmp_path, database):
    store.persist(0, [(b"a", state(1))], 7)
    shutil.rmtree(tmp_path / "v1")

    def write_until_a_new_file_is_begun():
        for number in range(100):
            store.persist(0, [(b"%d" % user, random.randbytes(LAYOUT.dtype.itemsize)) for user in range(5_000)], number)

    with pytest.raises(StateError, match=r"user_state/0 can't be used \(.*\): see to its disk and start the worker"):
        write_until_a_new_file_is_begun()
    await store.stop()
    again = await assign_in(tmp_path)
    assert read_all(again) == ({}, None)
    await again.stop()


def test_a_folder_that_the_system_refuses_to_open_is_named_and_not_set_aside(tmp_path, database):
    database.parent.mkdir(parents=True)
    limited = f"""
import asyncio, resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_state_table import assign_in
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))
try:
    asyncio.run(assign_in(Path({str(tmp_path)!r})))
except Exception as error:
    print(type(error).__name__, error)
"""
    command = [sys.executable, "-W", "ignore", "-c", limited]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(f"StateError the state folder {database} can't be used (IO error: "), done
    assert "see to its disk" in done.stdout
    assert not list(database.parent.glob("*set-aside*"))


async def write_until_it_is_refused(folder: Path) -> None:
    with small_write_buffers():
        store = make_store(folder)
        try:
            await assign(store, 0)
            for number in itertools.count(following(store.persisted_offset(TP(CHANGELOG, 0)))):
                store.persist(0, written(number), number)
        finally:
            await store.stop()


async def assert_whole_and_in_place(folder: Path, database: Path) -> None:
    store = await assign_in(folder)
    states, offset = read_all(store)
    await store.stop()
    assert states == prefix(offset)
    assert [path.name for path in database.parent.iterdir()] == [database.name]  # nothing was set aside


@pytest.fixture
async def disk(tmp_path):
    disk = await Disk.make(tmp_path)
    yield disk
    await disk.close()


@contextmanager
def largest_file(size: int):
    """Files of this process can't grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_is_named_wherever_it_is_met_and_all_is_there_once_it_has_room(disk):
    if not disk.is_real:
        pytest.skip("this machine lets nobody but root mount a disk; limits on files are tested below")
    folder = disk.folder / "state"
    for room in (1 << 20, 0, 12 << 10, 24 << 10, 28 << 10, 32 << 10, 36 << 10):
        await disk.fill(room)
        with pytest.raises(StateError, match=r"No space left.*: see to its disk and start the worker again"):
            await write_until_it_is_refused(folder)
        await disk.make_room()
        await assert_whole_and_in_place(folder, folder / "v1" / "tables" / "user_state" / "0")


async def test_files_that_may_not_grow_are_a_full_disk(tmp_path, database):
    for size in (256 << 10, *range(0, 60 << 10, 4 << 10)):
        with largest_file(size), pytest.raises(StateError, match=r"File too large.*: see to its disk and start"):
            await write_until_it_is_refused(tmp_path)
        await assert_whole_and_in_place(tmp_path, database)


async def test_writes_that_have_to_wait_for_the_disk_leave_the_interpreter_to_others_and_are_all_there(
    tmp_path, monkeypatch
):
    waits, sleep = [], time.sleep

    def noting(seconds):
        waits.append(seconds)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", noting)
    with small_write_buffers():
        store = await assign_in(tmp_path)
        for number in range(30):
            store.persist(0, [(b"%d-%d" % (number, user), random.randbytes(1_000)) for user in range(200)], number)
        assert waits, "RocksDB's own waiting would hold the interpreter's lock"
        assert len(read_all(store)[0]) == 6_000
        await store.stop()


class StalledDatabase:
    """RocksDB where no flush comes to an end."""

    def __init__(self, folder):
        self.folder = folder

    def path(self):
        return str(self.folder)

    def write(self, batch):
        raise Exception("Result incomplete: Write stall")


async def test_a_write_that_waits_for_a_full_disk_ends_with_a_line(disk, monkeypatch):
    if not disk.is_real:
        pytest.skip("this machine lets nobody but root mount a disk")
    monkeypatch.setattr(state_table, "_STALL_LOOK_SECONDS", 0.05)
    await disk.fill(0)
    with pytest.raises(StateError, match=r"can't be used \(.*No space left.*: see to its disk"):
        state_table.write_in_time(StalledDatabase(disk.folder), bytes)
    assert list(disk.folder.iterdir()) == []


async def test_a_write_does_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(state_table, "_STALL_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(state_table, "_STALL_SECONDS", 0.2)
    with pytest.raises(StateError, match=r"RocksDB has waited for it for 0\.2 seconds\): see to its disk"):
        state_table.write_in_time(StalledDatabase(tmp_path), bytes)
    assert list(tmp_path.iterdir()) == []


async def test_a_database_that_has_to_wait_as_it_is_opened_is_not_set_aside(whole, tmp_path, database, monkeypatch):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)

    def waits_for_ever(store, database):
        raise StateError("RocksDB has waited")

    with monkeypatch.context() as patch:
        patch.setattr(UserStateStore, "_label", waits_for_ever)
        with pytest.raises(StateError, match="RocksDB has waited"):
            await assign_in(tmp_path)
    assert [path.name for path in database.parent.iterdir()] == [database.name]
    assert await after_a_restart(tmp_path) == (STATES, 7)


# -- recovery


def changelog_event(
    store: UserStateStore,
    rows: list[tuple[bytes | None, bytes | None]],
    offset: int,
    start: int | None = None,
) -> faust.Event:
    """A batch of changelog records that ends at this offset, as the transport delivers it.

    It was read from `start` on, which is not known if nothing is said.
    """
    first = offset - len(rows) + 1
    records = [
        ConsumerRecord(CHANGELOG, 0, first + place, 0, 0, key, value, None, -1, -1, ())
        for place, (key, value) in enumerate(rows)
    ]
    tp = TP(CHANGELOG, 0)
    read = ChangelogRecords(records, start)
    message = ConsumerMessage(CHANGELOG, 0, offset, 0.0, 0, None, None, read, None, tp=tp)
    return store.app.create_event(None, read, None, message)


def restore(store: UserStateStore, *events: faust.Event) -> None:
    store.apply_changelog_batch(events, store.table._to_key, store.table._to_value)


async def test_a_changelog_that_was_not_read_on_from_where_the_database_ends_is_refused(store, monkeypatch):
    ends: list[BaseException] = []

    async def crash(error: BaseException) -> None:
        ends.append(error)

    monkeypatch.setattr(store.app, "crash", crash)
    restore(store, changelog_event(store, [(b"a", state(1))], 4), changelog_event(store, [(b"b", state(2))], 5))
    restore(store, changelog_event(store, [(b"b", state(2))], 5))  # again, as after a rebalance
    with pytest.raises(StateError, match="read from offset 7 on instead of 6"):
        restore(store, changelog_event(store, [(b"c", state(3))], 7, start=7))
    await asyncio.sleep(0)
    assert read_all(store) == ({b"a": state(1), b"b": state(2)}, 5)
    assert len(ends) == 1


async def test_nor_may_the_beginning_be_missing_of_an_empty_database(store, monkeypatch):
    async def ignore(error: BaseException) -> None: ...

    monkeypatch.setattr(store.app, "crash", ignore)
    with pytest.raises(StateError, match="read from offset 7 on instead of 0"):
        restore(store, changelog_event(store, [(b"c", state(3))], 7, start=7))
    restore(store, changelog_event(store, [(b"c", state(3))], 7, start=0))
    assert read_all(store) == ({b"c": state(3)}, 7)


@pytest.mark.parametrize("held", [None, 4])
async def test_a_changelog_whose_beginning_was_deleted_is_refused_where_this_copy_needs_it(store, held):
    if held is not None:
        restore(store, changelog_event(store, [(b"a", state(1))], held))
    following = 0 if held is None else held + 1
    with pytest.raises(
        StateError, match=rf"begins at offset {following + 1}.*ends before offset {following}.*STREAM_APP_APP_ID"
    ):
        store.refuse_deleted(TP(CHANGELOG, 0), following + 1)
    store.refuse_deleted(TP(CHANGELOG, 0), following)


states_of_users = st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.integers(-1, 9)), max_size=20)


@given(states_of_users, states_of_users)
@settings(max_examples=200)
def test_the_highest_source_offset_of_a_user_wins_whatever_the_order(log, kept):
    stored = {key: state(offset, clicks=1000) for key, offset in kept}
    records = [(key, state(offset, clicks)) for clicks, (key, offset) in enumerate(log)]
    rows, overtaken = restore_rows(records, stored, frozenset(), LAYOUT)
    assert len(dict(rows)) == len(rows)
    after = stored | dict(rows)
    for key in after:
        offsets = [offset for user, offset in log if user == key]
        mine = [LAYOUT.unpack([stored[key]])["source_offset"][0]] if key in stored else []
        assert LAYOUT.unpack([after[key]])["source_offset"][0] == max(offsets + mine)
        assert (key in overtaken) == (bool(offsets) and offsets[-1] < max(offsets + mine))


@given(states_of_users, st.data())
@settings(max_examples=100)
def test_restoring_does_not_depend_on_order_or_batches(log, data):
    rows = [(key, state(offset, clicks=offset)) for key, offset in log]  # one state an offset, as a changelog has it
    whole = dict(restore_rows(rows, {}, frozenset(), LAYOUT).rows)
    stored, shuffled = {}, data.draw(st.permutations(rows))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    for start, stop in itertools.pairwise([0, *cuts, len(rows)]):
        stored |= dict(restore_rows(shuffled[start:stop], stored, frozenset(), LAYOUT).rows)
    assert stored == whole


def test_of_two_states_with_one_source_offset_the_later_in_the_log_wins():
    records = [(b"a", state(5, 1)), (b"a", state(5, 2))]
    assert restore_rows(records, {}, frozenset(), LAYOUT) == ([(b"a", state(5, 2))], frozenset())


def test_records_without_a_key_are_passed_over():
    rows = [(b"a", state(1)), (None, state(9)), (None, None)]
    assert restore_rows(rows, {}, frozenset(), LAYOUT) == ([(b"a", state(1))], frozenset())


def test_a_tombstone_removes_no_state_which_has_to_be_appended_again():
    rows = [(b"a", state(1)), (b"a", None), (b"b", None), (b"c", None), (b"d", None), (b"d", state(2))]
    stored = {b"b": state(7)}
    restored = restore_rows(rows, stored, frozenset(), LAYOUT)
    assert restored == ([(b"a", state(1)), (b"d", state(2))], frozenset({b"a", b"b"}))


@pytest.mark.parametrize(
    ("key", "foreign", "difference"),
    [
        (
            b"b",
            state(1, layout=replace(LAYOUT, model="fedcba9876543210")),
            r"model fedcba9876543210 \(here 0123456789abcdef\)",
        ),
        (b"b", state(1, layout=replace(LAYOUT, precision="float32")), r"hidden_bytes 4 \(here 2\)"),
        (b"b", state(1)[:-1], "75 bytes, not 76"),
        (b"b", b"", "0 bytes, not 76"),
        (b"\xff\xffchangelog-offset", state(1), r"key b'\\xff\\xffchangelog-offset' is no user_id"),
    ],
)
async def test_a_foreign_record_in_the_changelog_is_refused_with_where_it_is_and_what_to_do(
    store, monkeypatch, key, foreign, difference
):
    async def ignore(error: BaseException) -> None: ...

    monkeypatch.setattr(store.app, "crash", ignore)
    with pytest.raises(StateError, match=rf"in partition 0 at offset 1: .*{difference}") as error:
        restore(store, changelog_event(store, [(b"a", state(1)), (key, foreign)], 1))
    assert "a new STREAM_APP_APP_ID begins with new states" in str(error.value)


async def test_a_changelog_is_restored_with_its_offset(store):
    first = changelog_event(store, [(b"a", state(1)), (b"b", state(2)), (b"a", state(3))], 41)
    second = changelog_event(store, [(b"b", state(0)), (b"c", state(4))], 43)
    restore(store, first)
    assert read_all(store) == ({b"a": state(3), b"b": state(2)}, 41)
    restore(store, second)
    assert read_all(store) == ({b"a": state(3), b"b": state(2), b"c": state(4)}, 43)


async def test_a_batch_of_nothing_but_tombstones_still_moves_the_offset(store):
    restore(store, changelog_event(store, [(b"a", None), (None, None)], 9))
    assert read_all(store) == ({}, 9)


async def test_a_foreign_state_in_the_changelog_crashes_the_app_and_restores_nothing_of_its_batch(store):
    with pytest.raises(StateError, match="does not fit this worker"):
        restore(store, changelog_event(store, [(b"a", state(1)), (b"b", b"foreign")], 41))
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))
    assert isinstance(store.app.crash_reason, StateError)
    assert read_all(store) == ({}, None)


# -- old states that come late


class Changelog:
    """The rows appended to it, at the offsets where it says that they are."""

    def __init__(self, end: int):
        self.end, self.appended = end, []

    async def append(self, partition, rows):
        self.appended.append((partition, rows))
        self.end += len(rows)
        return range(self.end - len(rows), self.end)


async def test_a_newest_state_that_is_not_the_last_in_the_log_is_appended_once_more(tmp_path):
    changelog = Changelog(end=44)
    store = await assign(make_store(tmp_path, append=changelog.append), 0)
    restore(store, changelog_event(store, [(b"a", state(8)), (b"b", state(9)), (b"c", state(5))], 41))
    restore(store, changelog_event(store, [(b"b", state(3)), (b"a", state(7))], 43))
    await store.on_recovery_completed({TP(CHANGELOG, 0)}, set())
    assert changelog.appended == [(0, [(b"a", state(8)), (b"b", state(9))])]
    assert read_all(store) == ({b"a": state(8), b"b": state(9), b"c": state(5)}, 45)
    await store.on_recovery_completed({TP(CHANGELOG, 0)}, set())
    assert len(changelog.appended) == 1
    await store.stop()


async def test_a_kill_before_that_leaves_it_to_the_next_start(store, tmp_path):
    restore(store, changelog_event(store, [(b"a", state(8)), (b"a", state(7))], 43))
    await store.stop()
    changelog = Changelog(end=44)
    again = await assign(make_store(tmp_path, append=changelog.append), 0)
    await again.on_recovery_completed({TP(CHANGELOG, 0)}, set())
    assert changelog.appended == [(0, [(b"a", state(8))])]
    assert read_all(again) == ({b"a": state(8)}, 44)
    await again.stop()
    assert await read_and_stop_overtaken(tmp_path) == frozenset()


async def read_and_stop_overtaken(folder):
    store = await assign_in(folder)
    overtaken = store._overtaken[0]
    await store.stop()
    return overtaken


async def test_a_newer_state_behind_an_old_one_leaves_nothing_to_mend(store):
    restore(store, changelog_event(store, [(b"a", state(8)), (b"a", state(7))], 41))
    restore(store, changelog_event(store, [(b"a", state(8))], 42))
    await store.on_recovery_completed({TP(CHANGELOG, 0)}, set())
    assert read_all(store) == ({b"a": state(8)}, 42)


async def test_a_record_of_somebody_else_between_ones_own_is_noticed_and_nothing_written(store):
    store.persist_appended(0, [(b"a", state(1))], range(4))
    store.persist_appended(0, [(b"a", state(2))], range(4, 6))
    with pytest.raises(StateError, match=r"holds a record at offset 6 that this worker did not write.*start it again"):
        store.persist_appended(0, [(b"a", state(3))], range(7, 8))
    assert read_all(store) == ({b"a": state(2)}, 5)


async def test_what_a_recovery_has_read_back_meanwhile_is_not_written_again(store):
    restore(store, changelog_event(store, [(b"a", state(1)), (b"a", state(2))], 5))
    store.persist_appended(0, [(b"a", state(1))], range(4, 5))
    assert read_all(store) == ({b"a": state(2)}, 5)


async def test_the_ends_of_ones_own_transactions_are_no_records_of_somebody_else(tmp_path):
    store = await assign(make_store(tmp_path, end_markers=1), 0)
    restore(store, changelog_event(store, [], 9, start=0))  # the log ends with what was given up, and holds nothing yet
    store.persist_appended(0, [(b"a", state(1))], range(10, 14))
    store.persist_appended(0, [(b"a", state(2))], range(15, 16))
    assert read_all(store) == ({b"a": state(2)}, 15)
    with pytest.raises(StateError, match="holds a record at offset 17 that this worker did not write"):
        store.persist_appended(0, [(b"a", state(3))], range(18, 19))
    await store.stop()


@pytest.mark.parametrize("start", [11, 12])
async def test_a_record_of_somebody_else_is_noticed_however_the_log_that_was_restored_ended(store, start):
    restore(store, changelog_event(store, [(b"a", state(1))], 7))
    restore(store, changelog_event(store, [], 9, start=8))
    with pytest.raises(StateError, match="holds a record at offset 10 that"):
        store.persist_appended(0, [(b"a", state(2))], range(start, start + 1))


async def test_partitions_are_taken_over_from_their_last_owner_before_anything_of_them_is_opened(tmp_path, database):
    taken_over = []

    async def take_over(partitions):
        assert not database.exists()
        taken_over.append(set(partitions))

    store = await assign(make_store(tmp_path, take_over=take_over), 0, 2)
    shutil.rmtree(database)
    await assign(store, 2)
    await assign(store, 2)  # whoever had it in between
    assert taken_over == [{0, 2}, {2}, {2}]
    await store.stop()


async def test_a_failure_to_append_ends_the_worker(tmp_path):
    async def refuse(partition, rows):
        raise StateError("refused")

    store = await assign(make_store(tmp_path, append=refuse), 0)
    restore(store, changelog_event(store, [(b"a", state(8)), (b"a", state(7))], 43))
    with pytest.raises(StateError, match="refused"):
        await store.on_recovery_completed({TP(CHANGELOG, 0)}, set())
    assert isinstance(store.app.crash_reason, StateError)
    await store.stop()


# -- as a mapping, for people


async def test_states_can_be_looked_at_by_hand_over_all_partitions(store):
    await assign(store, 0, 1)
    store.persist(0, [(b"a", state(1))], 7)
    store.persist(1, [(b"b", state(2))], 8)
    assert dict(store.items()) == {b"a": state(1), b"b": state(2)}
    assert sorted(store) == [b"a", b"b"]
    assert sorted(store.values()) == sorted([state(1), state(2)])
    assert len(store) == 2
    assert store[b"b"] == state(2)
    assert b"a" in store
    assert b"nobody" not in store


async def test_only_the_pipeline_writes(store):
    for write in (lambda: store.__setitem__(b"a", state(1)), lambda: store.__delitem__(b"a"), store.clear):
        with pytest.raises(StateError, match="written by the pipeline alone"):
            write()
    with pytest.raises(StateError, match="changelog topic is the backup"):
        await store.backup_partition(0)
    with pytest.raises(StateError, match="changelog topic is the backup"):
        store.restore_backup(0)


async def test_a_reset_removes_the_local_states(store, tmp_path, database):
    store.persist(0, [(b"a", state(1))], 7)
    await store.stop()
    store.reset_state()
    assert not database.exists()
    again = await assign_in(tmp_path)
    assert read_all(again) == ({}, None)
    await again.stop()
