"""The Faust table of user states: the changelog topic is the truth, RocksDB on the local disk is its cache.

One database a partition, opened when the partition is assigned and closed when it is revoked; a partition that isn't
assigned can't be read or written. A state and the changelog offset that it came from are written in one batch, and
without a log of RocksDB's own: what a kill leaves is what was flushed last, which equals some prefix of the changelog,
and the changelog brings the rest.

A worker that was frozen past its session may wake up and append old states behind its successor's. Two things make that
harmless. The successor notices that its own records don't follow each other, and ends before it relies on them. And
whoever restores sees that the newest state of a user is not his last one in the log, and appends it once more, before
compaction can leave the old one alone.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import shutil
import struct
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import faust
import rocksdict
from faust.stores.base import SerializedStore
from faust.tables.table import Table
from faust.types import TP, AppT, CollectionT, EventT

from lrurec.user_state import StateLayout, UserStateError
from stream_app.errors import StateError, foreign_record
from stream_app.record_batches import ChangelogRecords, RecordBatchSchema, changelog_records_of
from stream_app.recovery import OutspokenRecovery
from stream_app.topic_metadata import NO_ID

#: Named apart from this module: mode gives each service its module's logger, and those are quieted (see logs.py).
logger = logging.getLogger("stream_app.local_state")

# User keys are UTF-8, in which the byte 0xff does not occur: these can't be anybody's.
_RESERVED = b"\xff"
_CHANGELOG_OFFSET = b"\xff\xffchangelog-offset"
_LAYOUT = b"\xff\xfflayout"
_CHANGELOG_ID = b"\xff\xffid-of-changelog"
_OVERTAKEN = b"\xff\xffovertaken\xff"  # before a user's key: an older state of his is the last one in the changelog

# What RocksDB says where another process, or this one, has the database open.
_IN_USE = re.compile("While lock file|lock hold by current process")

# What it says where the disk or its owner has to be helped first; setting the database aside would not.
_UNUSABLE = re.compile(
    "No space left|quota exceeded|File too large|Read-only file system|Permission denied|Too many open files"
)

# What it says where a write would have to wait for flushes or compactions.
_STALLED = "Write stall"

#: Between two tries of such a write, between two looks at whether the disk is full, and until the worker is ended.
_STALL_PAUSE_SECONDS = 0.005
_STALL_LOOK_SECONDS = 1.0
_STALL_SECONDS = 60.0

#: What a disk has to take for RocksDB to go on.
_PROBE_BYTES = 4 << 20

_OFFSET = struct.Struct("<q")

#: What a database holds in memory before it is flushed: what a kill leaves to be restored, too.
WRITE_BUFFER_BYTES = 16 << 20

#: Of a write buffer, for each bucket of its hash table: about a state.
_BYTES_PER_BUCKET = 1 << 10

#: A key and the packed state to store under it.
Row = tuple[bytes, bytes]

#: (partition, rows) → the changelog offsets that hold them, acknowledged.
AppendToChangelog = Callable[[int, Sequence[Row]], Awaitable[range]]

#: (partitions) → once nobody else writes to their changelogs any more that can be kept from it.
TakeOver = Callable[[Collection[int]], Awaitable[None]]


@dataclass(frozen=True)
class StoreOptions:
    """What a store of user states needs to know.

    Args:
        layout: every stored state has this layout; a local database with another one is set aside and rebuilt.
        changelog_id: Kafka's id of the changelog topic; a local database of another changelog is refused.
        append: writes to the changelog.
        take_over: called with the partitions that are assigned, before they are restored.
        end_markers: offsets that Kafka takes for itself behind what is appended at once.
        cache_bytes: block cache, shared by all partitions.

    """

    layout: StateLayout
    changelog_id: bytes
    append: AppendToChangelog
    take_over: TakeOver
    end_markers: int
    cache_bytes: int


class UserStateStore(SerializedStore):
    """RocksDB behind Faust's store contract, plus what the pipeline uses from its threads.

    Args:
        url: Faust's, unused.
        app: the Faust app; `conf.tabledir` says where the databases lie.
        table: the table that this is the store of.
        options: see there.

    """

    def __init__(self, url: str, app: AppT, table: CollectionT, *, options: StoreOptions, **kwargs: Any) -> None:
        super().__init__(url, app, table, **kwargs)
        self.layout = options.layout
        self._changelog_id = options.changelog_id
        self._append = options.append
        self._take_over = options.take_over
        self._end_markers = options.end_markers
        self._following: dict[int, int] = {}  # the offset that the next record gets, if nobody else writes one
        self._overtaken: dict[int, frozenset[bytes]] = {}
        self._identity = self.layout.header + struct.pack("<q", self.layout.dtype.itemsize)
        self._cache = rocksdict.Cache(options.cache_bytes)
        self._databases: dict[int, rocksdict.Rdict] = {}
        self._held: dict[int, int | None] = {}  # each database's changelog offset, so that nobody has to read it
        self._standbys: set[int] = set()  # partitions of other workers, whose changelogs are followed
        self.restored = 0  # changelog records of own partitions applied so far: a recovery that goes on is seen by it

    # -- what the pipeline uses

    def load(self, partition: int, keys: Sequence[bytes]) -> list[bytes | None]:
        """The packed states under these keys, None for users without one. Blocks; releases the GIL.

        Raises:
            StateError: the partition is not assigned to this worker, or its database is damaged or can't be used.
        """
        with self._disk_errors_explained(partition):
            return cast("list[bytes | None]", self._database(partition)[list(keys)])

    def persist(self, partition: int, rows: Iterable[Row], changelog_offset: int) -> None:
        """Write states, and the changelog offset that holds the last of them, as one batch. Blocks.

        Raises:
            StateError: the partition is not assigned to this worker, or its database is damaged or can't be used.
        """
        self._write(partition, rows, changelog_offset, self._overtaken.get(partition, frozenset()))

    def persist_appended(self, partition: int, rows: Iterable[Row], offsets: range) -> None:
        """Write states that this worker has appended to the changelog, where these offsets hold them. Blocks.

        Raises:
            StateError: as for `persist`; or somebody else has written to the changelog since the last time.
        """
        last = self.persisted_offset(TP("", partition))
        if last is not None and offsets[-1] <= last:
            return  # a recovery has read them back meanwhile
        following = self._following.get(partition, offsets.start if last is None else last + 1)
        if offsets.start > following:
            raise foreign_record(partition, following)
        self.persist(partition, rows, offsets[-1])
        self._following[partition] = offsets.stop + self._end_markers

    # -- what Faust uses

    def persisted_offset(self, tp: TP) -> int | None:
        """Return the changelog offset up to which the local database is complete."""
        self._database(tp.partition)  # refuses one that is not assigned
        return self._held[tp.partition]

    def set_persisted_offset(self, tp: TP, offset: int) -> None:
        """Remember that the local database holds the changelog up to this offset."""
        self.persist(tp.partition, (), offset)

    def apply_changelog_batch(
        self, batch: Iterable[EventT], to_key: Callable[[Any], Any], to_value: Callable[[Any], Any]
    ) -> None:
        """Restore states from batches of changelog records; see `restore_rows`.

        Faust logs what is raised in here and goes on without those states, so the worker is ended instead.
        """
        try:
            for event in batch:
                partition, records = event.message.partition, changelog_records_of(event)
                if partition not in self._databases:
                    continue  # was read before a rebalance took the partition away
                self._refuse_gap(event.message.tp, records)
                refuse_foreign(partition, records, self.layout)
                keys = list({record.key: None for record in records if record.key is not None})
                stored = dict(zip(keys, self.load(partition, keys), strict=True))
                overtaken = self._overtaken[partition]
                restored = restore_rows(((r.key, r.value) for r in records), stored, overtaken, self.layout)
                self._write(partition, restored.rows, event.message.offset, restored.overtaken)
                self._following[partition] = event.message.offset + 1
                self.restored += 0 if partition in self._standbys else len(records)
        except Exception as error:
            folder = self._folder()
            reason = error if isinstance(error, StateError) else StateError(f"restoring to {folder} failed: {error}")
            self.loop.create_task(self.app.crash(reason))
            raise

    def _refuse_gap(self, tp: TP, read: ChangelogRecords) -> None:
        """A database that misses a part of its changelog would be taken for a whole one, for ever.

        Raises:
            StateError: between what this database holds and where a batch was read from lie offsets.
        """
        following = self._end_of_copy(tp)
        if read.start is not None and read.start > following:
            raise StateError(
                f"partition {tp.partition} of the changelog was read from offset {read.start} on instead of "
                f"{following}: start the worker again, it goes on with what its copy in {self._folder()} holds"
            )

    def _end_of_copy(self, tp: TP) -> int:
        """The first offset of the changelog that this database does not hold."""
        held = self.persisted_offset(tp)
        return 0 if held is None else held + 1

    def refuse_deleted(self, tp: TP, log_start: int) -> None:
        """Check that the log begins before this database ends. Compaction leaves a log's beginning where it was.

        Raises:
            StateError: records between were deleted.
        """
        following = self._end_of_copy(tp)
        if log_start > following:
            raise StateError(
                f"partition {tp.partition} of the changelog begins at offset {log_start}, and this worker's copy of it"
                f" ends before offset {following}: records between were deleted, as cleanup.policy=delete does, and"
                " states with them; go on with a new STREAM_APP_APP_ID, which begins with new states"
            )

    async def on_rebalance(
        self, assigned: set[TP], revoked: set[TP], newly_assigned: set[TP], generation_id: int = 0
    ) -> None:
        """Close the databases of partitions that left, open those that came, be it to write to them or to follow."""
        held = {tp.partition for tp in assigned if tp.topic in self.table.changelog_topic.topics}
        await self._close_all(self._databases.keys() - held)
        self._standbys = held & {tp.partition for tp in self.app.assignor.assigned_standbys()}
        await self._take_over(held - self._standbys)
        for partition in held - self._databases.keys():
            self._databases[partition] = await asyncio.to_thread(self._open, partition)

    async def on_recovery_completed(self, active_tps: set[TP], standby_tps: set[TP]) -> None:
        """Append once more the states that are not the last of their users in the changelog.

        Faust passes over what is raised in here, so the worker is ended instead.
        """
        try:
            for partition in [partition for partition, keys in self._overtaken.items() if keys]:
                if partition not in self._standbys:
                    await self._append_again(partition)
        except Exception as error:
            await self.app.crash(error)
            raise

    async def _append_again(self, partition: int) -> None:
        keys = sorted(self._overtaken[partition])
        rows = [(key, state) for key, state in zip(keys, self.load(partition, keys), strict=True) if state is not None]
        offsets = await self._append(partition, rows)
        self.persist_appended(partition, rows, offsets)
        if offsets[-1] == self.persisted_offset(TP("", partition)):  # else a recovery has read on meanwhile
            self._write(partition, (), offsets[-1], frozenset())
        logger.warning(
            "an older state was the last in the changelog: the newest is appended once more",
            extra={"data": {"partition": partition, "users": len(rows)}},
        )

    async def stop(self) -> None:
        """Close every database."""
        await super().stop()
        await self._close_all(self._databases.keys())

    # -- reading by hand, as a mapping

    def _get(self, key: bytes) -> bytes | None:
        found = (database.get(key) for database in self._databases.values())
        return next((value for value in found if value is not None), None)

    def _contains(self, key: bytes) -> bool:
        return self._get(key) is not None

    def _iteritems(self) -> Iterator[tuple[bytes, bytes]]:
        for database in self._databases.values():
            for key, value in cast("Iterable[tuple[bytes, bytes]]", database.items(read_opt=_in_order())):
                if not key.startswith(_RESERVED):
                    yield key, value

    def _iterkeys(self) -> Iterator[bytes]:
        return (key for key, _ in self._iteritems())

    def _itervalues(self) -> Iterator[bytes]:
        return (value for _, value in self._iteritems())

    def _size(self) -> int:
        return sum(1 for _ in self._iteritems())

    def _set(self, key: bytes, value: bytes | None) -> None:
        raise StateError("user states are written by the pipeline alone, after their changelog record is acknowledged")

    def _del(self, key: bytes) -> None:
        self._set(key, None)

    def _clear(self) -> None:
        self._set(b"", None)

    async def backup_partition(self, tp: TP | int, flush: bool = True, purge: bool = False, keep: int = 1) -> None:
        """Refuse: the changelog is the backup."""
        raise StateError("the changelog topic is the backup of user states; there is no other")

    def restore_backup(self, tp: TP | int, latest: bool = True, backup_id: int = 0) -> None:
        """Refuse: the changelog is the backup."""
        raise StateError("the changelog topic is the backup of user states; a worker restores it by itself")

    def reset_state(self) -> None:
        """Remove the local databases; the changelog rebuilds them."""
        for partition in list(self._databases):
            self._close(partition)
        shutil.rmtree(self._folder(), ignore_errors=True)

    # -- databases

    def _folder(self) -> Path:
        return Path(self.app.conf.tabledir) / self.table_name

    def _database(self, partition: int) -> rocksdict.Rdict:
        try:
            return self._databases[partition]
        except KeyError:
            raise StateError(f"partition {partition} of {self.table_name} is not assigned to this worker") from None

    def _write(self, partition: int, rows: Iterable[Row], offset: int, overtaken: frozenset[bytes]) -> None:
        rows, before = list(rows), self._overtaken.get(partition, frozenset())

        def batch() -> rocksdict.WriteBatch:
            made = rocksdict.WriteBatch(raw_mode=True)
            for key, state in rows:
                made.put(key, state)
            made.put(_CHANGELOG_OFFSET, _OFFSET.pack(offset))
            for key in overtaken - before:
                made.put(_OVERTAKEN + key, b"")
            for key in before - overtaken:
                made.delete(_OVERTAKEN + key)
            return made

        with self._disk_errors_explained(partition):
            write_in_time(self._database(partition), batch)
        self._held[partition] = offset
        self._overtaken[partition] = overtaken

    def _open(self, partition: int) -> rocksdict.Rdict:
        path = self._folder() / str(partition)
        database = None
        try:
            database = open_database(path, self._cache)
            is_of_layout = database.get(_LAYOUT) in {None, self._identity}
            is_of_changelog = database.get(_CHANGELOG_ID) in {None, NO_ID, self._changelog_id}
            self._overtaken[partition] = _overtaken_in(database)
            self._held[partition] = _offset_in(database)
            if is_of_layout and is_of_changelog:
                self._label(database)  # may be what finds it damaged: nothing is written to one that is
        except Exception as error:
            if database is not None:
                with suppress(Exception):  # one that is damaged may say so once more
                    database.close()
            if isinstance(error, StateError):
                raise
            if _IN_USE.search(str(error)):
                raise StateError(
                    f"the state folder {path} is in use by another worker; give each its own STREAM_APP_STATE_DIR"
                ) from None
            if _UNUSABLE.search(str(error)):
                raise _unusable(path, error) from None
            return self._start_over(partition, path, str(error))
        if not is_of_layout:
            database.close()
            return self._start_over(partition, path, "its states have another model, layout or clicks topic")
        if not is_of_changelog:
            database.close()
            raise StateError(
                f"the state folder {path} was filled from another changelog than the one that is there now, which was "
                "deleted and made anew: states may be missing from it; go on with a new STREAM_APP_APP_ID, which "
                "begins with new states"
            )
        return database

    async def _close_all(self, partitions: Collection[int]) -> None:
        """All at once: each is flushed, and waits for the disk to have it."""
        await asyncio.gather(*(asyncio.to_thread(self._close, partition) for partition in partitions))

    def _close(self, partition: int) -> None:
        database = self._databases.pop(partition)  # first: who reads on is told that it isn't assigned
        self._overtaken.pop(partition, None)
        self._held.pop(partition, None)
        self._following.pop(partition, None)
        try:
            database.close()
        except Exception as error:  # noqa: BLE001  (what a bad disk did not take is in the changelog)
            logger.warning("closing local state failed", extra={"data": {"partition": partition, "reason": str(error)}})

    def _label(self, database: rocksdict.Rdict) -> None:
        def batch() -> rocksdict.WriteBatch:
            made = rocksdict.WriteBatch(raw_mode=True)
            made.put(_LAYOUT, self._identity)
            made.put(_CHANGELOG_ID, self._changelog_id)
            return made

        write_in_time(database, batch)

    @contextmanager
    def _disk_errors_explained(self, partition: int) -> Iterator[None]:
        """Errors of RocksDB for an operator; a damaged database is set aside, so that the next start restores it."""
        try:
            yield
        except StateError:
            raise
        except Exception as error:
            path = self._folder() / str(partition)
            if not str(error).startswith("Corruption"):
                raise _unusable(path, error) from error
            self._close(partition)
            try:
                aside = _set_aside(path)
            except OSError as further:
                raise _unusable(path, further) from error
            raise StateError(
                f"the state folder {path} is damaged ({error}) and was set aside as {aside.name}; "
                "start the worker again: it restores these states from the changelog"
            ) from None

    def _start_over(self, partition: int, path: Path, reason: str) -> rocksdict.Rdict:
        try:
            aside = _set_aside(path)
            database = open_database(path, self._cache)
            self._label(database)
            self._overtaken[partition] = frozenset()
            self._held[partition] = None
        except Exception as error:  # noqa: BLE001
            raise _unusable(path, f"{reason}; {error}") from None
        logger.warning(
            "local state set aside, restoring from the changelog",
            extra={"data": {"partition": partition, "reason": reason, "kept_at": str(aside)}},
        )
        return database


class UserStateTable(Table):
    """`user_state`: user id in UTF-8 → packed state, one database a partition."""

    def __init__(self, app: AppT, options: StoreOptions, **kwargs: Any) -> None:
        self._store_options = options
        super().__init__(
            app,
            name="user_state",
            key_type=bytes,
            value_type=bytes,
            schema=RecordBatchSchema(key_serializer="raw", value_serializer="raw", allow_empty=True),
            standby_buffer_size=1,
            recovery_buffer_size=4,  # messages, each a batch of records; with 1, Faust reads the changelog for ever
            **kwargs,
        )

    def _new_store(self) -> UserStateStore:
        return UserStateStore(
            "user-states://",
            self.app,
            self,
            options=self._store_options,
            table_name=self.name,
            key_type=bytes,
            value_type=bytes,
            key_serializer="raw",
            value_serializer="raw",
        )

    @property
    def store(self) -> UserStateStore:
        """The RocksDB store."""
        return cast("UserStateStore", self.data)


def open_database(path: Path, cache: rocksdict.Cache) -> rocksdict.Rdict:
    """The database of one partition; the block cache is that of all of them. Raises what rocksdict does."""
    options = _options(cache)
    # Without the second, rocksdict would take those that the database was written with before.
    database = rocksdict.Rdict(str(path), options=options, column_families={"default": options})
    writes: Any = rocksdict.WriteOptions()  # its stub takes a property for a method
    writes.disable_wal = True
    writes.no_slowdown = True  # it would wait with the interpreter's lock
    database.set_write_options(writes)
    return database


def _options(cache: rocksdict.Cache) -> rocksdict.Options:
    blocks = rocksdict.BlockBasedOptions()
    blocks.set_block_cache(cache)
    blocks.set_bloom_filter(10, block_based=False)
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_block_based_table_factory(blocks)
    options.set_write_buffer_size(WRITE_BUFFER_BYTES)
    options.set_max_write_buffer_number(3)
    # A hash table, not RocksDB's sorted list: each click asks for one key and writes one, and never for a neighbour.
    memtables: Any = rocksdict.MemtableFactory  # its stub takes a static method for another
    options.set_memtable_factory(memtables.hash_link_list(WRITE_BUFFER_BYTES // _BYTES_PER_BUCKET))
    options.set_prefix_extractor(rocksdict.SliceTransform.create_noop())  # what is hashed: the key, all of it
    options.set_allow_concurrent_memtable_write(False)  # which it does not take
    options.set_max_background_jobs(2)
    # A hidden state does not compress, and what else is in a row is not worth the time.
    options.set_compression_type(rocksdict.DBCompressionType.none())
    options.set_keep_log_file_num(2)
    return options


def _in_order() -> rocksdict.ReadOptions:
    """How to iterate: from key to key, and not just within one bucket of the hash table."""
    options = rocksdict.ReadOptions()
    options.set_total_order_seek(True)
    return options


def _set_aside(path: Path) -> Path:
    """Rename a database's folder, for somebody to look at; the one set aside before it is removed."""
    before = list(path.parent.glob(f"{path.name}.set-aside-*"))
    aside = path.with_name(f"{path.name}.set-aside-{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**9:09}")
    path.rename(aside)
    for older in before:
        shutil.rmtree(older, ignore_errors=True)
    return aside


def write_in_time(database: rocksdict.Rdict, batch: Callable[[], rocksdict.WriteBatch]) -> None:
    """Write a batch, which is made anew for each try, though RocksDB would have to wait for its disk.

    It would wait with the interpreter's lock, so that the whole worker stands still, and for ever where the disk is
    full.

    Raises:
        StateError: the disk takes nothing any more, or is too slow.
        Exception: what rocksdict raises.
    """
    began = looked = time.monotonic()
    while True:
        try:
            database.write(batch())
        except Exception as error:
            if _STALLED not in str(error):
                raise
        else:
            return
        now, path = time.monotonic(), Path(database.path())
        if now > began + _STALL_SECONDS:
            raise _unusable(path, f"RocksDB has waited for it for {_STALL_SECONDS:g} seconds")
        if now > looked + _STALL_LOOK_SECONDS:
            _probe(path)
            looked = now
        time.sleep(_STALL_PAUSE_SECONDS)


def _probe(folder: Path) -> None:
    """Write to a folder what RocksDB may need to go on, and remove it.

    Raises:
        StateError: that can't be done.
    """
    probe = folder / "probe"
    try:
        probe.write_bytes(bytes(_PROBE_BYTES))
    except OSError as error:
        raise _unusable(folder, str(error)) from None
    finally:
        with suppress(OSError):
            probe.unlink()


def _unusable(path: Path, error: Exception | str) -> StateError:
    return StateError(
        f"the state folder {path} can't be used ({error}): see to its disk and start the worker again; what is missing "
        "there is restored from the changelog"
    )


def _offset_in(database: rocksdict.Rdict) -> int | None:
    packed = database.get(_CHANGELOG_OFFSET)
    return None if packed is None else int(_OFFSET.unpack(packed)[0])


def _overtaken_in(database: rocksdict.Rdict) -> frozenset[bytes]:
    after = cast("Iterable[bytes]", database.keys(from_key=_OVERTAKEN, read_opt=_in_order()))
    keys = itertools.takewhile(lambda key: key.startswith(_OVERTAKEN), after)
    return frozenset(key.removeprefix(_OVERTAKEN) for key in keys)


class Restored(NamedTuple):
    """What changelog records leave behind."""

    rows: list[Row]
    overtaken: frozenset[bytes]
    """Users whose last record in the log, so far, is older than their newest state."""


def restore_rows(
    records: Iterable[tuple[bytes | None, bytes | None]],
    stored: dict[bytes, bytes | None],
    overtaken: frozenset[bytes],
    layout: StateLayout,
) -> Restored:
    """Changelog records, on top of what is stored: per user the highest source offset wins, whatever the order. Pure.

    Nobody here writes tombstones or records without a key. A tombstone is passed over, and overtakes the user's state:
    compaction would remove that.
    """
    newest: dict[bytes, bytes] = {}
    behind = set(overtaken)
    place = layout.place_of("source_offset")

    def offset_of(state: bytes) -> int:
        return int(_OFFSET.unpack_from(state, place)[0])

    for key, state in records:
        if key is None:
            continue
        known = newest.get(key) or stored.get(key)
        if state is None:
            if known is not None:
                behind.add(key)
        elif known is None or offset_of(state) >= offset_of(known):
            newest[key] = state
            behind.discard(key)
        else:
            behind.add(key)
    return Restored(list(newest.items()), frozenset(behind))


def refuse_foreign(partition: int, records: Iterable[Any], layout: StateLayout) -> None:
    """Check that records of a changelog are states of this layout, or tombstones.

    Raises:
        StateError: one is not; it says which, and what to do.
    """
    size, header = layout.dtype.itemsize, layout.header
    for record in records:
        key, state = record.key, record.value
        if key is None or state is None:
            continue
        if key.startswith(_RESERVED):
            raise _foreign_state(partition, record.offset, f"its key {key[:64]!r} is no user_id in UTF-8")
        if len(state) != size or not state.startswith(header):
            try:
                layout.unpack([state])
            except UserStateError as error:
                raise _foreign_state(partition, record.offset, str(error)) from None


def _foreign_state(partition: int, offset: int, reason: str) -> StateError:
    return StateError(
        f"the changelog does not fit this worker, in partition {partition} at offset {offset}: {reason}; "
        "a new STREAM_APP_APP_ID begins with new states"
    )


def user_state_table(app: faust.App, options: StoreOptions) -> UserStateTable:
    """The table, registered with the app."""
    tables = cast("Any", app.tables)
    tables._recovery = OutspokenRecovery(app, tables, beacon=tables.beacon, loop=tables.loop)
    return cast("UserStateTable", app.tables.add(UserStateTable(app, options)))
