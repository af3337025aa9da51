"""The durable order, step by step with acknowledgements given by hand, and states between computation and disk."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
from aiokafka.errors import KafkaError
from aiokafka.structs import ConsumerRecord
from faust.types import TP
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec.bundle import Bundle, make_bundle
from lrurec.catalogue import Catalogue
from lrurec.config import LRURecConfig
from lrurec.engine import Clicks
from lrurec.model import LRURec
from lrurec.serving import CompiledEngine, state_layout
from stream_app.delivery import AtLeastOnce, Topics
from stream_app.errors import WorkerError
from stream_app.messages import ClickLimits, DeadLetter
from stream_app.metrics import Metrics
from stream_app.micro_batch import KeyValue, MicroBatcher, Outbox
from stream_app.pipeline import Pipeline, _UnpersistedStates
from stream_app.recommendations import RecommendationEncoder
from stream_app.record_batches import Polled
from tests.stream_app.test_state_table import assign, changelog_event, make_store, restore

PARTITIONS, USERS = 2, 3


class SlowDisk:
    """The store as the pipeline sees it: it holds what has been persisted, later than what has been computed."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, bytes], bytes] = {}

    def load(self, partition: int, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.rows.get((partition, key)) for key in keys]


users = st.tuples(st.integers(0, PARTITIONS - 1), st.integers(0, USERS - 1).map(lambda n: b"user-%d" % n))
EVERYBODY = [(partition, [b"user-%d" % n for n in range(USERS)]) for partition in range(PARTITIONS)]


@settings(deadline=None, max_examples=400)
@given(st.lists(st.sets(users, min_size=1), max_size=12), st.data())
def test_a_computation_has_the_newest_state_however_early_it_was_loaded_and_however_far_the_disk_lags(
    batches: list[set[tuple[int, bytes]]], data: st.DataObject
) -> None:
    disk = SlowDisk()
    states = _UnpersistedStates(disk)  # type: ignore[arg-type]
    newest: dict[tuple[int, bytes], bytes] = {}
    waiting: list[tuple[int, dict[tuple[int, bytes], bytes]]] = []

    def persist_some() -> None:
        for _ in range(data.draw(st.integers(0, len(waiting)))):
            done, persisted = waiting.pop(0)
            disk.rows |= persisted
            if data.draw(st.booleans()):  # else it is noted later
                states.persisted = done

    def lend_the_partitions(number: int) -> None:
        """Others have them for a while, which they get only once all is persisted."""
        disk.rows |= dict.fromkeys(newest, b"by others before %d" % number)
        newest.update(disk.rows)

    ahead = states.load(EVERYBODY)
    for number, touched in enumerate(batches, start=1):
        loaded, early = ahead, data.draw(st.booleans())
        persist_some()
        if early:  # the next one's, before this one is computed
            ahead = states.load(EVERYBODY)
            persist_some()
        rows = list(loaded.rows)
        for place, row in zip(*states.newer_than(loaded), strict=True):
            assert row is not rows[place], "it was known"
            rows[place] = row
        assert rows == [newest.get((partition, key)) for partition, keys in EVERYBODY for key in keys]
        renewed = {user: b"state-%d of %d %b" % (number, *user) for user in touched}
        by_partition: dict[int, list[KeyValue]] = {}
        for (partition, key), state in renewed.items():
            by_partition.setdefault(partition, []).append((key, state))
        states.remember(number, by_partition)
        newest |= renewed
        waiting.append((number, renewed))
        if not early:
            persist_some()
            if not waiting and states.persisted == number and data.draw(st.booleans()):
                lend_the_partitions(number)
            ahead = states.load(EVERYBODY)


def test_persisted_states_are_not_kept() -> None:
    disk, wanted = SlowDisk(), [(0, [b"u"])]
    states = _UnpersistedStates(disk)  # type: ignore[arg-type]
    states.remember(1, {0: [(b"u", b"one")]})
    states.remember(2, {0: [(b"u", b"two")]})
    states.persisted = 1
    assert states.newer_than(states.load(wanted)) == ([], [])
    assert states.load(wanted).rows == [b"two"]
    states.persisted = 2
    assert states.newer_than(states.load(wanted)) == ([], [])
    assert states.load(wanted).rows == [None]


class _Named(str):
    """A record of the journal: what it is called, and where it lies."""

    offset: int


class Journal:
    """A Kafka, a disk and events that write down what happens, and acknowledge when the test says so."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.open: dict[str, asyncio.Future[Any]] = {}
        self.before_the_disk: Callable[[], object] = lambda: None
        self.before_the_preparation: Callable[[], object] = lambda: None
        self.before_the_computation: Callable[[], object] = lambda: None
        self.before_the_encoding: Callable[[], object] = lambda: None
        self.ends: list[Mapping[int, int]] = []
        self.wanted: list[str] = []

    def _future(self, step: str) -> asyncio.Future[Any]:
        self.steps.append(step)
        self.open[step] = asyncio.get_running_loop().create_future()
        return self.open[step]

    def acknowledge(self, step: str) -> None:
        self.open.pop(step).set_result([70])

    # as the publisher
    def pack(self, topic: str, records: Sequence[KeyValue], timestamp_ms: int) -> list[Any]:
        return [SimpleNamespace(name=record[1].decode()) for record in records]

    def pack_each(self, records: Mapping[int, Sequence[KeyValue]], timestamp_ms: int) -> dict[int, list[Any]]:
        return {partition: [self._batch(rows)] for partition, rows in records.items()}

    def _batch(self, records: Sequence[KeyValue]) -> Any:
        names = "+".join(record[1].decode() for record in records)
        return SimpleNamespace(name=names, records=SimpleNamespace(record_count=lambda: len(records)))

    def send(self, topic: str, batches: Sequence[Any]) -> asyncio.Future[Any]:
        return self._future(f"{topic} {'+'.join(batch.name for batch in batches)}")

    async def send_dead_letters(self, topic: str, letters: Sequence[DeadLetter]) -> list[asyncio.Future[Any]]:
        return [self._future(f"{topic} {(letter.value or b'').decode()}") for letter in letters]

    # as the store
    def load(self, partition: int, keys: Sequence[bytes]) -> list[bytes | None]:
        return [None] * len(keys)

    def persist_appended(self, partition: int, rows: Sequence[KeyValue], offsets: range) -> None:
        self.before_the_disk()
        names = "+".join(row[1].decode() for row in rows)
        self.steps.append(f"disk {names} up to {offsets[-1]}")

    # as events and the computation
    def event(self, *records: str, ends: Mapping[int, int] | None = None) -> Any:
        """A poll of these records, each in all partitions that have an end, else in one."""
        polled: dict[TP, Any] = {TP("clicks", partition): [] for partition in ends or {3: 1}}
        for tp, found in polled.items():
            for number, name in enumerate(reversed(records), 1):
                found.insert(0, _Named(name))
                found[0].offset = (ends or {3: len(records)})[tp.partition] - number
        return SimpleNamespace(
            message=SimpleNamespace(value=Polled(polled, lambda: self.wanted.append("+".join(records)))),
            ack=lambda: self.steps.append(f"ack {'+'.join(records)}"),
        )

    def decode(self, batches: Sequence[Sequence[str]]) -> Any:
        self.before_the_preparation()
        return SimpleNamespace(records=[record for batch in batches for record in batch], users=[(3, [b"u"])])

    def unpack(self, rows: Sequence[bytes | None]) -> Any:
        return rows

    def advance(self, arrived: Any, states: Any) -> tuple[Outbox, Any]:
        self.before_the_computation()
        assert states == [None]
        records = arrived.records
        if records == ["poison"]:
            return Outbox(dead_letters={3: [DeadLetter(None, b"letter-poison", [])]}), None
        outbox = Outbox(
            dead_letters={3: [DeadLetter(None, f"letter-{record}".encode(), []) for record in records]},
            states={3: [(f"user-{record}".encode(), f"state-{record}".encode()) for record in records]},
            applied=len(records),
        )
        return outbox, records

    def write(self, answers: Any, now_ms: int) -> dict[int, list[KeyValue]]:
        self.before_the_encoding()
        return {3: [(b"u", f"list-{record}".encode()) for record in answers]}


@pytest.fixture
async def journal() -> Journal:
    return Journal()


@asynccontextmanager
async def a_pipeline(
    journal: Journal, max_batch: int, max_wait_seconds: float = 0
) -> AsyncIterator[tuple[Pipeline, asyncio.Task[None]]]:
    topics = Topics("recommendations", "dead-letters", "changelog")
    part: Any = journal
    delivery = AtLeastOnce(part, topics, timeout_seconds=5)
    made = Pipeline(part, part, delivery, Metrics(), max_batch=max_batch, max_wait_seconds=max_wait_seconds)
    running = asyncio.create_task(made.run())
    try:
        yield made, running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
async def pipeline(journal: Journal) -> AsyncIterator[tuple[Pipeline, asyncio.Task[None]]]:
    async with a_pipeline(journal, max_batch=2) as made:
        yield made


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  (the condition is the journal's, in which nobody signals)
            await asyncio.sleep(0)


async def settled() -> None:
    """Whatever could go on without a further acknowledgement has gone on; the threads too."""
    for _ in range(200):
        await asyncio.sleep(0.0005)


async def test_each_step_waits_until_the_one_before_it_is_durable(
    journal: Journal, pipeline: tuple[Pipeline, asyncio.Task[None]]
) -> None:
    await pipeline[0].put(journal.event("a"))
    await until(lambda: len(journal.open) == 2)
    await settled()
    assert journal.steps == ["recommendations list-a", "dead-letters letter-a"]
    journal.acknowledge("recommendations list-a")
    await settled()
    assert "changelog state-a" not in journal.steps, "the dead letter is not durable yet"
    journal.acknowledge("dead-letters letter-a")
    await until(lambda: "changelog state-a" in journal.steps)
    await settled()
    assert journal.steps[2:] == ["changelog state-a"], "the changelog is not durable yet"
    journal.acknowledge("changelog state-a")
    await until(lambda: "ack a" in journal.steps)
    assert journal.steps[3:] == ["disk state-a up to 70", "ack a"]


async def test_micro_batches_overtake_each_other_in_no_step(
    journal: Journal, pipeline: tuple[Pipeline, asyncio.Task[None]]
) -> None:
    await pipeline[0].put(journal.event("a"))
    await until(lambda: "dead-letters letter-a" in journal.open)
    await pipeline[0].put(journal.event("b"))
    await until(lambda: "dead-letters letter-b" in journal.open)
    for step in ("recommendations list-b", "dead-letters letter-b"):
        journal.acknowledge(step)
    await settled()
    assert not [step for step in journal.steps if step.startswith(("changelog", "disk", "ack"))]
    for step in ("recommendations list-a", "dead-letters letter-a"):
        journal.acknowledge(step)
    await until(lambda: "changelog state-b" in journal.open)
    journal.acknowledge("changelog state-b")
    await settled()
    assert not [step for step in journal.steps if step.startswith(("disk", "ack"))]
    journal.acknowledge("changelog state-a")
    await until(lambda: "ack b" in journal.steps)
    assert journal.steps[-4:] == ["disk state-a up to 70", "ack a", "disk state-b up to 70", "ack b"]


async def test_states_count_as_persisted_only_when_the_disk_has_them(
    journal: Journal, pipeline: tuple[Pipeline, asyncio.Task[None]]
) -> None:
    written = threading.Event()
    journal.before_the_disk = lambda: written.wait(5)
    await pipeline[0].put(journal.event("a"))
    for step in ("recommendations list-a", "dead-letters letter-a", "changelog state-a"):
        await until(lambda: step in journal.open)  # noqa: B023
        journal.acknowledge(step)
    await settled()
    assert pipeline[0]._unpersisted.persisted == 0
    written.set()
    await until(lambda: "ack a" in journal.steps)
    assert pipeline[0]._unpersisted.persisted == 1


async def test_no_more_is_taken_while_a_full_micro_batch_waits(
    journal: Journal, pipeline: tuple[Pipeline, asyncio.Task[None]]
) -> None:
    computing = threading.Event()
    journal.before_the_computation = lambda: computing.wait(5)
    await pipeline[0].put(journal.event("a"))  # is being computed
    await settled()
    await pipeline[0].put(journal.event("b"))  # is prepared meanwhile
    await settled()
    waiting = asyncio.create_task(pipeline[0].put(journal.event("c", "d")))
    await settled()
    assert not waiting.done()
    computing.set()
    await asyncio.wait_for(waiting, 5)


@pytest.mark.parametrize("refused", ["recommendations list-a", "dead-letters letter-a", "changelog state-a"])
async def test_a_refused_record_ends_the_pipeline_and_nothing_is_acknowledged(
    journal: Journal, pipeline: tuple[Pipeline, asyncio.Task[None]], refused: str
) -> None:
    await pipeline[0].put(journal.event("a"))
    for step in ("recommendations list-a", "dead-letters letter-a", "changelog state-a"):
        await until(lambda: step in journal.open)  # noqa: B023
        if step == refused:
            journal.open.pop(step).set_exception(KafkaError("refused"))
            break
        journal.acknowledge(step)
    with pytest.raises(WorkerError, match="refused"):
        await asyncio.wait_for(asyncio.shield(pipeline[1]), 5)
    assert not [step for step in journal.steps if step.startswith(("disk", "ack"))]


def raise_an_error() -> None:
    raise RuntimeError("a bug")


@pytest.mark.parametrize(
    "where", ["before_the_preparation", "before_the_computation", "before_the_encoding", "before_the_disk"]
)
async def test_an_error_in_a_thread_ends_the_pipeline_and_nothing_is_acknowledged(
    journal: Journal, pipeline: tuple[Pipeline, asyncio.Task[None]], where: str
) -> None:
    setattr(journal, where, raise_an_error)
    await pipeline[0].put(journal.event("a"))
    if where == "before_the_disk":
        for step in ("recommendations list-a", "dead-letters letter-a", "changelog state-a"):
            await until(lambda: step in journal.open)  # noqa: B023
            journal.acknowledge(step)
    with pytest.raises(RuntimeError, match="a bug"):
        await asyncio.wait_for(asyncio.shield(pipeline[1]), 5)
    assert not [step for step in journal.steps if step.startswith(("disk", "ack"))]


async def test_a_micro_batch_is_prepared_while_the_one_before_it_is_computed(
    journal: Journal, pipeline: tuple[Pipeline, asyncio.Task[None]]
) -> None:
    prepared, both = [], threading.Event()

    def prepare() -> None:
        prepared.append(None)
        if len(prepared) == 2:
            both.set()

    journal.before_the_preparation = prepare
    journal.before_the_computation = lambda: both.wait(5) or raise_an_error()
    await pipeline[0].put(journal.event("a"))
    await until(lambda: len(prepared) == 1)
    await pipeline[0].put(journal.event("b"))
    await until(lambda: "recommendations list-b" in journal.open)


async def test_a_micro_batch_is_computed_while_the_one_before_it_is_encoded(
    journal: Journal, pipeline: tuple[Pipeline, asyncio.Task[None]]
) -> None:
    computed, both = [], threading.Event()

    def compute() -> None:
        computed.append(None)
        if len(computed) == 2:
            both.set()

    journal.before_the_computation = compute
    journal.before_the_encoding = lambda: both.wait(5) or raise_an_error()
    await pipeline[0].put(journal.event("a"))
    await until(lambda: len(computed) == 1)
    await pipeline[0].put(journal.event("b"))
    await until(lambda: "recommendations list-b" in journal.open)


async def test_poison_alone_becomes_a_dead_letter_and_is_acknowledged(
    journal: Journal, pipeline: tuple[Pipeline, asyncio.Task[None]]
) -> None:
    await pipeline[0].put(journal.event("poison"))
    await until(lambda: "dead-letters letter-poison" in journal.open)
    journal.acknowledge("dead-letters letter-poison")
    await until(lambda: "ack poison" in journal.steps)


async def test_more_is_fetched_when_a_micro_batch_is_computed_though_it_is_not_encoded(
    journal: Journal,
) -> None:
    computing, encoding = threading.Event(), threading.Event()
    journal.before_the_computation = lambda: computing.wait(5)
    journal.before_the_encoding = lambda: encoding.wait(5)
    async with a_pipeline(journal, max_batch=10) as (pipeline, _):
        await pipeline.put(journal.event("a"))
        await pipeline.put(journal.event("b"))
        await settled()
        assert journal.wanted == []
        computing.set()
        await until(lambda: bool(journal.wanted))
        assert journal.wanted == ["b"]  # of one micro-batch; that of an earlier poll says nothing
        encoding.set()


async def test_more_is_fetched_while_a_micro_batch_waits_for_more(journal: Journal) -> None:
    async with a_pipeline(journal, max_batch=10, max_wait_seconds=5.0) as (pipeline, _):
        await pipeline.put(journal.event("a"))
        await until(lambda: journal.wanted == ["a"])
        await pipeline.put(journal.event("b"))
        await until(lambda: journal.wanted == ["a", "b"])
        assert not journal.open


async def test_the_clicks_of_an_event_count_one_by_one(journal: Journal) -> None:
    preparing = threading.Event()
    journal.before_the_preparation = lambda: preparing.wait(5)
    async with a_pipeline(journal, max_batch=3) as (pipeline, _):
        puts = [asyncio.create_task(pipeline.put(journal.event(*names))) for names in ("a", "bc", "d")]
        await settled()
        preparing.set()
        changelog = await until_the_first_micro_batch_is_in_the_changelog(journal)
        assert changelog == "changelog state-a+state-b+state-c"
        await asyncio.gather(*puts)


async def test_a_delivery_learns_where_each_partition_goes_on(
    journal: Journal, pipeline: tuple[Pipeline, asyncio.Task[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, preparing = AtLeastOnce.pack, threading.Event()

    def noting(self: AtLeastOnce, outbox: Outbox, ends: Mapping[int, int], now_ms: int) -> Any:
        journal.ends.append(ends)
        return pack(self, outbox, ends, now_ms)

    monkeypatch.setattr(AtLeastOnce, "pack", noting)
    journal.before_the_preparation = lambda: preparing.wait(5)
    for ends in ({3: 6, 5: 20}, {3: 7}):  # two micro-batches: what comes behind them is put together
        await pipeline[0].put(journal.event("a", ends=ends))
        await settled()
    await pipeline[0].put(journal.event("b", ends={3: 8}))
    waiting = asyncio.create_task(pipeline[0].put(journal.event("c", ends={3: 10})))
    await settled()
    preparing.set()
    await until(lambda: len(journal.ends) == 3)
    assert journal.ends == [{3: 6, 5: 20}, {3: 7}, {3: 10}]
    await asyncio.wait_for(waiting, 5)


async def test_a_micro_batch_holds_as_many_events_as_fit(
    journal: Journal, pipeline: tuple[Pipeline, asyncio.Task[None]]
) -> None:
    first, full = journal.event("a"), asyncio.create_task(pipeline[0].put(journal.event("b", "c", "d")))
    await pipeline[0].put(first)
    await full
    await until(lambda: "dead-letters letter-a" in journal.open or "dead-letters letter-d" in journal.open)
    for step in list(journal.open):
        journal.acknowledge(step)
    await until(lambda: any(step.startswith("changelog") for step in journal.steps))
    changelog = next(step for step in journal.steps if step.startswith("changelog"))
    assert changelog in {"changelog state-a", "changelog state-b+state-c+state-d"}


async def until_the_first_micro_batch_is_in_the_changelog(journal: Journal) -> str:
    """The names of its states."""
    await until(lambda: bool(journal.open))
    await settled()
    for step in list(journal.open):
        journal.acknowledge(step)
    await until(lambda: any(step.startswith("changelog") for step in journal.steps))
    return next(step for step in journal.steps if step.startswith("changelog"))


async def test_a_micro_batch_waits_for_more_as_long_as_it_may(journal: Journal) -> None:
    async with a_pipeline(journal, max_batch=10, max_wait_seconds=5.0) as (pipeline, _):
        await pipeline.put(journal.event("a"))
        await settled()
        await pipeline.put(journal.event(*"bcdefghij"))
        changelog = await until_the_first_micro_batch_is_in_the_changelog(journal)
        assert changelog.startswith("changelog state-a+state-b+")


# -- with real states, a real store, and a log that acknowledges at once


class Log:
    """A changelog that takes everything, and a disk that may be kept waiting."""

    end_markers = 0

    def __init__(self) -> None:
        self.rows: list[KeyValue] = []
        self.may_write = asyncio.Event()
        self.may_write.set()

    def pack(self, outbox: Outbox, ends: Mapping[int, int], now_ms: int) -> Outbox:
        return outbox

    async def send_outputs(self, parcel: Outbox) -> None:
        pass

    async def send_states(self, parcel: Outbox) -> None:
        pass

    async def appended(self, parcel: Outbox) -> dict[int, range]:
        await self.may_write.wait()
        found = {}
        for partition, rows in parcel.states.items():
            found[partition] = range(len(self.rows), len(self.rows) + len(rows))
            self.rows += rows
        return found


class Shop:
    """One user's clicks, one micro-batch each."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        self.layout = state_layout(bundle, "float16", 5)
        self.engine = CompiledEngine(bundle, self.layout, top_k=3, exclude_seen=True)
        ids = ["", *bundle.catalogue.item_ids]
        rows = {item_id: row for row, item_id in enumerate(ids) if row}
        encoder = RecommendationEncoder(ids, bundle.version, "clicks")
        batcher = MicroBatcher(self.engine, rows, encoder, ClickLimits(1_000, 1_000))
        self.ids, self.log, self.acknowledged = ids, Log(), list[int]()
        self.store = make_store(folder, layout=self.layout)
        log: Any = self.log
        self.pipeline = Pipeline(batcher, self.store, log, Metrics(), max_batch=1, max_wait_seconds=0)

    async def click(self, offset: int) -> None:
        value = orjson.dumps({"user_id": "u", "item_id": self.ids[1 + offset], "timestamp_ms": offset})
        record: Any = ConsumerRecord("clicks", 0, offset, 0, 0, b"u", value, None, -1, -1, ())
        message = SimpleNamespace(value=Polled({TP("clicks", 0): [record]}))
        event: Any = SimpleNamespace(message=message, ack=lambda: self.acknowledged.append(offset))
        await self.pipeline.put(event)

    def state(self) -> Any:
        return self.layout.unpack(self.store.load(0, [b"u"]))[0]

    def after(self, offsets: Sequence[int]) -> Any:
        """The state that clicks at these offsets give, computed at once."""
        places = np.array(offsets)
        none = np.zeros(len(places), np.int64)
        clicks = Clicks(none.astype(np.int32), (1 + places).astype(np.int32), places, places)
        return self.engine.advance(self.layout.unpack([None]), clicks, none[:0])[0][0]


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    model = LRURec(LRURecConfig(num_items=12, hidden_units=8, num_blocks=2))
    catalogue = Catalogue(f"i{row}" for row in range(1, 13))
    shop = Shop(make_bundle(model.config, model.state_dict(), catalogue), tmp_path)
    await assign(shop.store, 0)
    running = asyncio.create_task(shop.pipeline.run())
    yield shop
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await shop.store.stop()


async def test_a_users_next_click_finds_his_state_wherever_the_one_before_is_on_its_way(shop: Shop) -> None:
    shop.log.may_write.clear()
    for offset in range(4):
        await shop.click(offset)
    await settled()
    shop.log.may_write.set()
    for offset in range(4, 12):
        await shop.click(offset)
    await until(lambda: len(shop.acknowledged) == 12)
    assert shop.state().tobytes() == shop.after(range(12)).tobytes()


async def test_a_partition_that_comes_back_goes_on_from_what_its_other_owner_made_of_it(shop: Shop) -> None:
    await shop.click(0)
    await until(lambda: shop.acknowledged == [0])
    await assign(shop.store)  # away
    shop.log.rows.append((b"u", shop.after(range(2)).tobytes()))
    await assign(shop.store, 0)
    restore(shop.store, changelog_event(shop.store, shop.log.rows[1:], 1))
    await shop.click(2)
    await until(lambda: shop.acknowledged == [0, 2])
    assert shop.state().tobytes() == shop.after(range(3)).tobytes()
