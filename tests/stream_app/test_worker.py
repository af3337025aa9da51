"""The worker as other teams meet it: a real broker, foreign clients, kills. See live.py for the oracle."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import signal
import socket
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaConnectionError

from lrurec.bundle import Bundle, load_bundle, save_bundle
from lrurec.convert import convert
from stream_app.dev.kafka.broker import LocalBroker
from stream_app.errors import WorkerError
from stream_app.verify.stored_state import read_state
from stream_app.worker import _StopAsked, _unless_asked, _until_stopped
from tests.stream_app.live import (
    Site,
    WorkerProcess,
    assert_list_is_right,
    click,
    header_name,
    produce,
    producer,
    read_topic,
    read_until,
    recommendations_for,
    run_command,
    source_of,
    wait_until,
    with_raw_header_names,
)

GOLDEN = Path(__file__).parents[1] / "lrurec" / "golden" / "public_large_d64_b2.npz"

#: Scores of the golden model are of the order of 10; equality with the parallel form is stated to 1e-4, plus five
#: printed decimals.
TOLERANCE = 2e-4

#: A float16 state moves this model's scores, with weights ten times a trained one's, by up to a few hundredths.
FLOAT16_TOLERANCE = 0.1


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bundle"
    save_bundle(folder, convert(GOLDEN))
    return folder


@pytest.fixture(scope="module")
def bundle(bundle_folder: Path) -> Bundle:
    return load_bundle(bundle_folder)


@pytest.fixture
def site(bootstrap: str, unique_name: Callable[[str], str], bundle_folder: Path, tmp_path: Path) -> Site:
    made = Site(bootstrap, unique_name("app"), bundle_folder, tmp_path)
    made.create_topics()
    return made


@pytest.fixture
def worker(site: Site) -> Iterator[WorkerProcess]:
    with WorkerProcess(site) as process:
        yield process.wait_ready()


def random_clicks(count: int, users: int, seed: int) -> list[tuple[str, str]]:
    """(user, item) with a few users far busier than the others."""
    rng = random.Random(seed)
    return [(f"user-{int(users * rng.random() ** 3)}", str(rng.randint(1, 200))) for _ in range(count)]


def histories_of(clicks: list[tuple[str, str]]) -> dict[str, list[str]]:
    histories: dict[str, list[str]] = defaultdict(list)
    for user_id, item_id in clicks:
        histories[user_id].append(item_id)
    return histories


def assert_exact(
    recommendations: list[dict[str, Any]], clicks: list[tuple[str, str]], bundle: Bundle, tolerance: float = TOLERANCE
) -> None:
    """Every click has its list, repeated ones are identical, and every user's last list is the oracle's."""
    by_source: dict[tuple[str, int, int], dict[str, Any]] = {}
    for recommendation in recommendations:
        del recommendation["generated_at_ms"]
        assert by_source.setdefault(source_of(recommendation), recommendation) == recommendation
    assert len(by_source) == len(clicks)
    histories = histories_of(clicks)
    numbers = Counter((r["user_id"], r["clicks"]) for r in by_source.values())
    assert numbers == {(user, n): 1 for user, items in histories.items() for n in range(1, len(items) + 1)}
    for recommendation in by_source.values():
        items = histories[recommendation["user_id"]]
        if recommendation["clicks"] == len(items):
            assert_list_is_right(bundle, items, recommendation["items"], tolerance=tolerance)


async def test_every_click_gets_one_list_and_each_users_last_is_the_offline_models(
    site: Site, worker: WorkerProcess, bundle: Bundle
) -> None:
    clicks = random_clicks(4_000, users=150, seed=1)
    await produce(site, [click(user, item, event_id=f"e{n}") for n, (user, item) in enumerate(clicks)])
    recommendations = await recommendations_for(site, len(clicks))
    assert len(recommendations) == len(clicks)
    assert {r["model_version"] for r in recommendations} == {bundle.version}
    assert {r["source"]["event_id"] for r in recommendations} == {f"e{n}" for n in range(len(clicks))}
    assert all(len(r["items"]) == 10 for r in recommendations)
    assert_exact(recommendations, clicks, bundle)


@pytest.mark.timeout(400)
async def test_kills_at_any_moment_and_a_lost_disk_lose_and_double_nothing(site: Site, bundle: Bundle) -> None:
    # Between which two steps a kill falls is left to chance here; tests/chaos has one at each.
    clicks = random_clicks(50_000, users=400, seed=2)  # more than six workers get done
    await produce(site, [click(user, item) for user, item in clicks])
    rng = random.Random(3)
    for attempt in range(6):
        with WorkerProcess(site, MAX_BATCH="256", STATE_DTYPE="float16") as worker:
            worker.wait_ready()
            target = rng.randint(500, 4_000)
            wait_until(lambda: worker.metric("clicks_applied_total") >= target, 60, worker.tail)  # noqa: B023
            worker.kill()
        if attempt % 2:
            shutil.rmtree(site.folder / "state")
    with WorkerProcess(site, STATE_DTYPE="float16") as worker:
        worker.wait_ready()
        recommendations = await recommendations_for(site, len(clicks), 90)
        assert worker.terminate() == 0, worker.tail()
        restored = worker.events("restored")
    assert sum(line["records"] for line in restored) >= len(histories_of(clicks)) / 2
    assert_exact(recommendations, clicks, bundle, FLOAT16_TOLERANCE)


async def test_a_user_with_a_thousand_clicks_in_one_batch_is_advanced_in_order(site: Site, bundle: Bundle) -> None:
    rng = random.Random(4)
    clicks = [("busy", str(rng.randint(1, 200))) for _ in range(1_000)]
    clicks[500:500] = [(f"quiet-{n}", "7") for n in range(20)]
    await produce(site, [click(user, item) for user, item in clicks])
    with WorkerProcess(site):
        recommendations = await recommendations_for(site, len(clicks))
    assert_exact(recommendations, clicks, bundle)


async def test_poison_goes_to_the_dead_letters_untouched_and_stops_nobody(
    site: Site, worker: WorkerProcess, bundle: Bundle
) -> None:
    good = json.dumps({"user_id": "u", "item_id": "1", "timestamp_ms": 1}).encode()
    poison: list[tuple[bytes | None, bytes | None]] = [
        (b"u", b"not json"),
        (b"u", b""),
        (b"u", None),
        (b"u", b"\xff\xfe"),
        (b"u", b"[" * 5_000),
        (b"u", b"null"),
        (b"u", b"[1]"),
        (b"u", b'{"user_id": "u", "item_id": "1"}'),
        (b"u", b'{"user_id": "u", "timestamp_ms": 1}'),
        (b"u", b'{"item_id": "1", "timestamp_ms": 1}'),
        (b"1", b'{"user_id": 1, "item_id": "1", "timestamp_ms": 1}'),
        (b"u", b'{"user_id": "u", "item_id": 1, "timestamp_ms": 1}'),
        (b"u", b'{"user_id": "u", "item_id": "1", "timestamp_ms": "1"}'),
        (b"u", b'{"user_id": "u", "item_id": "1", "timestamp_ms": 1.5}'),
        (b"u", b'{"user_id": "u", "item_id": "1", "timestamp_ms": true}'),
        (b"u", b'{"user_id": "u", "item_id": "1", "timestamp_ms": 99999999999999999999}'),
        (b"u", b'{"user_id": "u", "item_id": "1", "timestamp_ms": 1, "event_id": 5}'),
        (b"u", b'{"user_id": "\\ud800", "item_id": "1", "timestamp_ms": 1}'),
        (b"u", b'{"user_id": "u", "item_id": "1", "timestamp_ms": 1, "x": "' + b"x" * 70_000 + b'"}'),
        (None, good),
        (b"somebody else", good),
        (b"\xff", good),
    ]
    clicks = random_clicks(300, users=20, seed=5)
    records: list[tuple[bytes | None, bytes | None]] = [click(user, item) for user, item in clicks]
    rng = random.Random(6)
    for record in poison:
        records.insert(rng.randint(0, len(records)), record)
    await produce(site, records)
    recommendations = await recommendations_for(site, len(clicks))
    letters = await read_until(site, site.dead_letters, lambda found: len(found) >= len(poison))
    assert_exact(recommendations, clicks, bundle)
    assert Counter((letter.key, letter.value) for letter in letters) == Counter(poison)
    produced = {(r.partition, r.offset): r for r in await read_topic(site, site.clicks)}
    for letter in letters:
        headers = dict(letter.headers)
        origin = produced[int(headers["__streams.errors.partition"]), int(headers["__streams.errors.offset"])]
        assert (origin.key, origin.value) == (letter.key, letter.value)
        assert headers["__streams.errors.topic"].decode() == site.clicks
        assert headers["__streams.errors.exception"]
        assert headers["__streams.errors.message"]
        assert headers["disposition"]


async def test_ids_too_large_for_a_recommendation_are_poison_and_stop_nobody(
    site: Site, admin: AIOKafkaAdminClient, bundle: Bundle
) -> None:
    for topic in (site.recommendations, site.changelog):
        wanted = {"cleanup.policy": "compact", "max.message.bytes": "20000"}
        config = ConfigResource(ConfigResourceType.TOPIC, topic, wanted)
        await admin.alter_configs([config])
    clicks = [("u", "1"), ("x" * 8_000, "2"), ("y" * 9_900, "3"), ("u", "4")]
    await produce(site, [click(user, item) for user, item in clicks])
    with WorkerProcess(site):
        assert_exact(await recommendations_for(site, 3), [c for c in clicks if c[1] != "3"], bundle)
        [letter] = await read_until(site, site.dead_letters, bool)
    assert letter.key == b"y" * 9_900
    for name, value in (("TOP_K", "150"), ("RECENT_ITEMS", "6000")):
        refused = run_command(["worker"], site.environment(WEB_PORT="0", **{name: value}))
        assert refused.returncode == 1
        assert re.search(
            rf"Error: STREAM_APP_{name}={value} is not allowed here: .*max\.message\.bytes", refused.stderr
        )


async def test_header_names_that_are_no_utf8_stop_nobody(site: Site, worker: WorkerProcess, bundle: Bundle) -> None:
    clicks = [(f"user-{n % 3}", str(n + 1)) for n in range(30)]
    async with producer(site) as client:
        batch = with_raw_header_names(client.create_batch())
        for number, (user, item) in enumerate(clicks):
            key, value = click(user, item)
            headers = [(header_name(b"trace \xff"), b"1")] if number % 4 == 1 else []
            batch.append(key=key, value=value, timestamp=None, headers=headers)
        batch.append(key=b"u", value=b"poison", timestamp=None, headers=[(header_name(b"\xc0name"), None)])
        await (await client.send_batch(batch, site.clicks, partition=0))
    assert_exact(await recommendations_for(site, len(clicks)), clicks, bundle)
    [letter] = await read_until(site, site.dead_letters, bool)
    assert (letter.key, letter.value, letter.headers[0]) == (b"u", b"poison", ("\ufffdname", None))


async def test_clicks_are_read_whatever_their_compression(site: Site, worker: WorkerProcess, bundle: Bundle) -> None:
    clicks = random_clicks(500, users=30, seed=10)
    for number, compression in enumerate(["gzip", "snappy", "lz4", "zstd", None]):
        part = clicks[number * 100 : (number + 1) * 100]
        await produce(site, [click(user, item) for user, item in part], compression)
    assert_exact(await recommendations_for(site, len(clicks)), clicks, bundle)


async def test_clicks_of_a_transaction_that_was_given_up_are_never_seen(
    site: Site, worker: WorkerProcess, bundle: Bundle, unique_name: Callable[[str], str]
) -> None:
    kept, given_up = [("kept", str(n)) for n in range(1, 6)], [("given up", str(n)) for n in range(1, 8)]
    async with AIOKafkaProducer(bootstrap_servers=site.bootstrap, transactional_id=unique_name("t")) as client:
        for clicks, end in ((kept, client.commit_transaction), (given_up, client.abort_transaction)):
            await client.begin_transaction()
            for user, item in clicks:
                key, value = click(user, item)
                await client.send_and_wait(site.clicks, value, key)
            await end()
    after = [("after", "9")]
    await produce(site, [click(user, item) for user, item in after])
    assert_exact(await recommendations_for(site, len(kept + after)), kept + after, bundle)
    wait_until(lambda: worker.lag() == 0, 20, worker.tail)  # the ends of transactions are no clicks


async def test_a_record_that_is_large_only_when_unpacked_is_poison_and_stops_nobody(
    site: Site, worker: WorkerProcess, bundle: Bundle
) -> None:
    large = b"x" * 5_000_000
    client = AIOKafkaProducer(bootstrap_servers=site.bootstrap, compression_type="gzip", max_request_size=20_000_000)
    async with client:
        await client.send_and_wait(site.clicks, b"poison", large)
        await client.send_and_wait(site.clicks, b"poison", b"u", headers=[("large", large)])
        await client.send_and_wait(site.clicks, large, b"u")
    clicks = [("u", "1")]
    await produce(site, [click(user, item) for user, item in clicks])
    assert_exact(await recommendations_for(site, 1), clicks, bundle)
    letters = await read_until(site, site.dead_letters, lambda found: len(found) == 3)
    assert all(letter.value is None for letter in letters)
    assert {name for letter in letters for name, _ in letter.headers if name.endswith("left-out")} == {
        f"__streams.errors.{part}-left-out" for part in ("key", "value", "headers")
    }


async def test_clicks_on_unknown_items_are_counted_and_advance_nobody(
    site: Site, worker: WorkerProcess, bundle: Bundle
) -> None:
    known = [("a", "1"), ("a", "2"), ("b", "3")]
    unknown = [("a", "no such item"), ("c", "")]
    order = [known[0], unknown[0], known[1], unknown[1], known[2]]
    await produce(site, [click(user, item) for user, item in order])
    recommendations = await recommendations_for(site, len(known))
    wait_until(lambda: worker.metric("clicks_unknown_item_total") == len(unknown), 20, worker.tail)
    assert_exact(recommendations, known, bundle)
    assert await read_topic(site, site.dead_letters) == []


def wait_shared(one: WorkerProcess, other: WorkerProcess) -> None:
    """Until each of two workers has some of the partitions."""

    def shared() -> bool:
        held = [worker.holds() or [] for worker in (one, other)]
        return all(held) and sorted(partition for each in held for partition in each) == [0, 1, 2, 3]

    wait_until(shared, 60, lambda: one.tail() + other.tail())


async def test_two_workers_share_the_partitions_and_a_third_takes_over_for_one_that_leaves(
    site: Site, bundle: Bundle
) -> None:
    clicks = random_clicks(12_000, users=300, seed=7)
    records = [click(user, item) for user, item in clicks]
    states = [str(site.folder / f"state-{n}") for n in range(3)]
    with (
        WorkerProcess(site, "first", STATE_DIR=states[0]) as first,
        WorkerProcess(site, "second", STATE_DIR=states[1]) as second,
    ):
        first.wait_ready()
        second.wait_ready()
        await produce(site, records[:4_000])
        await recommendations_for(site, 4_000)
        wait_until(
            lambda: min(first.metric("clicks_applied_total"), second.metric("clicks_applied_total")) > 0,
            30,
            lambda: first.tail() + second.tail(),
        )
        await produce(site, records[4_000:8_000])
        assert first.terminate() == 0, first.tail()
        with WorkerProcess(site, "third", STATE_DIR=states[2]) as third:
            third.wait_ready()
            await produce(site, records[8_000:])
            recommendations = await recommendations_for(site, len(clicks), 90)
            assert third.terminate() == 0, third.tail()
        assert second.terminate() == 0, second.tail()
    assert_exact(recommendations, clicks, bundle)


@pytest.mark.parametrize("guarantee", ["at_least_once", "exactly_once"])
async def test_a_standby_takes_over_what_a_killed_worker_had_without_reading_it_back(
    site: Site, bundle: Bundle, guarantee: str
) -> None:
    clicks = random_clicks(6_000, users=300, seed=11)
    records = [click(user, item) for user, item in clicks]
    settings = {"STANDBY_REPLICAS": "1", "GUARANTEE": guarantee}
    with (
        WorkerProcess(site, "first", STATE_DIR=str(site.folder / "first"), **settings) as first,
        WorkerProcess(site, "second", STATE_DIR=str(site.folder / "second"), **settings) as second,
    ):
        wait_shared(first, second)
        await produce(site, records[:4_000])
        await recommendations_for(site, 4_000)
        follows = dict.fromkeys(first.holds() or [], 0.0)
        wait_until(lambda: second.standby_lag() == follows, 20, second.tail)
        first.kill()
        wait_until(lambda: second.holds() == [0, 1, 2, 3], 40, second.tail)
        assert sum(line["records"] for line in second.events("restored")) < 100, second.tail()
        await produce(site, records[4_000:])
        recommendations = await recommendations_for(site, len(clicks), 90)
        assert second.terminate() == 0, second.tail()
    assert_exact(recommendations, clicks, bundle)


@pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL"])
async def test_a_worker_that_is_restarted_under_its_own_name_disturbs_nobody(
    site: Site, bundle: Bundle, end: str
) -> None:
    clicks = random_clicks(3_000, users=100, seed=12)
    records = [click(user, item) for user, item in clicks]

    def start(name: str) -> WorkerProcess:
        return WorkerProcess(
            site, name, STATE_DIR=str(site.folder / name), GROUP_INSTANCE_ID=name, SESSION_TIMEOUT_SECONDS="25"
        )

    with start("first") as first, start("second") as second:
        wait_shared(first, second)
        await produce(site, records[:2_000])
        await recommendations_for(site, 2_000)
        held, rebalances = first.holds(), second.metric("rebalances")
        if end == "SIGTERM":
            assert first.terminate() == 0, first.tail()
        else:
            first.kill()
        with start("first") as again:
            wait_until(lambda: again.holds() == held, 20, again.tail)
            await produce(site, records[2_000:])
            recommendations = await recommendations_for(site, len(clicks), 60)
            assert again.terminate() == 0, again.tail()
        assert second.metric("rebalances") == rebalances, second.tail()
        assert second.terminate() == 0, second.tail()
    assert_exact(recommendations, clicks, bundle)


async def test_a_worker_whose_name_another_one_takes_ends_with_one_line_that_says_so(site: Site) -> None:
    name = {"GROUP_INSTANCE_ID": "pod-0"}
    with WorkerProcess(site, "first", STATE_DIR=str(site.folder / "first"), **name) as first:
        first.wait_ready()
        with WorkerProcess(site, "second", STATE_DIR=str(site.folder / "second"), **name) as second:
            assert first.process.wait(60) == 1, first.tail()
            second.wait_ready()
            wait_until(lambda: second.holds() == [0, 1, 2, 3], 20, second.tail)
            assert second.terminate() == 0, second.tail()
    lines = [line for line in first.log.read_text().splitlines() if not line.startswith("{")]
    assert len(lines) == 1, lines
    assert "GROUP_INSTANCE_ID=pod-0" in lines[0]


@pytest.mark.parametrize("late", [False, True])
async def test_what_keeps_faust_from_starting_is_one_line(late: bool) -> None:
    away = KafkaConnectionError("Unable to bootstrap")

    async def fail() -> None:
        if late:
            await asyncio.sleep(0.01)
        raise away

    parts = SimpleNamespace(
        app=SimpleNamespace(
            wait_until_stopped=asyncio.Event().wait, crash_reason=None, conf=SimpleNamespace(datadir="")
        )
    )
    with pytest.raises(WorkerError, match="Kafka is away"):
        await _until_stopped(cast("Any", parts), asyncio.Event(), asyncio.create_task(fail()), set())


def test_a_spare_worker_is_ready_and_takes_over_for_the_one_that_leaves(
    bootstrap: str, unique_name: Callable[[str], str], bundle_folder: Path, tmp_path: Path
) -> None:
    site = Site(bootstrap, unique_name("app"), bundle_folder, tmp_path, partitions=1)
    site.create_topics()
    with (
        WorkerProcess(site, "one", STATE_DIR=str(tmp_path / "one")) as one,
        WorkerProcess(site, "two", STATE_DIR=str(tmp_path / "two")) as two,
    ):
        both = (one, two)

        def settled() -> bool:
            return [w.ask("/ready") for w in both] == [200, 200] and sorted(w.holds() or [] for w in both) == [[], [0]]

        wait_until(settled, 40, lambda: one.tail() + two.tail())
        holder, spare = both if one.holds() else (two, one)
        assert holder.terminate() == 0, holder.tail()
        wait_until(lambda: spare.holds() == [0] and spare.ask("/ready") == 200, 30, spare.tail)


async def test_sigterm_finishes_commits_and_exits_0(site: Site, worker: WorkerProcess) -> None:
    clicks = random_clicks(500, users=50, seed=8)
    await produce(site, [click(user, item) for user, item in clicks])
    await recommendations_for(site, len(clicks))
    assert worker.terminate() == 0, worker.tail()
    assert await lag_of(site) == 0
    lines = worker.log.read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events[-1] == "stopped"


async def test_sigterm_exits_0_while_the_group_waits_for_a_member_that_hangs(
    site: Site, tmp_path: Path, admin: AIOKafkaAdminClient
) -> None:
    async def state() -> str:
        (answer,) = await admin.describe_consumer_groups([site.name])
        return str(answer.groups[0][2])

    with WorkerProcess(site, "one", STATE_DIR=str(tmp_path / "one"), SESSION_TIMEOUT_SECONDS="40") as one:
        one.wait_ready()
        one.process.send_signal(signal.SIGSTOP)
        with WorkerProcess(site, "two", STATE_DIR=str(tmp_path / "two"), SESSION_TIMEOUT_SECONDS="40") as two:
            async with asyncio.timeout(30):
                while await state() != "PreparingRebalance":  # noqa: ASYNC110  (Kafka's)
                    await asyncio.sleep(0.1)
            assert two.terminate(15) == 0, two.tail()
            assert two.events("stopped"), two.tail()


async def test_clicks_deleted_under_a_worker_that_did_not_read_them_are_told_of_and_counted(
    site: Site, worker: WorkerProcess, admin: AIOKafkaAdminClient
) -> None:
    await produce(site, [click("u", "1")])
    await recommendations_for(site, 1)
    worker.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(1)  # Kafka answers the fetch that is under way
    await produce(site, [click("u", str(number)) for number in range(2, 9)])
    async with AIOKafkaConsumer(bootstrap_servers=site.bootstrap) as consumer:
        logs = [TopicPartition(site.clicks, partition) for partition in range(site.partitions)]
        ends = await consumer.end_offsets(logs)
        await admin.delete_records({log: RecordsToDelete(end - 1) for log, end in ends.items() if end > 1})
    worker.process.send_signal(signal.SIGCONT)
    wait_until(lambda: worker.metric("clicks_deleted_unread") == 6, 30, worker.tail)
    (line,) = worker.events("clicks were deleted before they were read")
    assert (line["from_offset"], line["to_offset"]) == (1, 7)
    assert len(await recommendations_for(site, 2)) == 2


async def test_a_step_of_the_start_that_fails_as_the_worker_is_asked_to_stop_is_no_failure():
    stop = asyncio.Event()

    async def step(error: Exception | None) -> int:
        stop.set()
        if error:
            raise error
        return 7

    with pytest.raises(_StopAsked):
        await _unless_asked(stop, step(OSError("refused")))
    assert await _unless_asked(stop, step(None)) == 7


async def test_a_broker_that_hangs_does_not_hold_up_the_shutdown(bundle_folder: Path, tmp_path: Path) -> None:
    with LocalBroker(tmp_path / "kafka", port=0) as broker:
        site = Site(broker.bootstrap, "app", bundle_folder, tmp_path)
        site.create_topics()
        with WorkerProcess(site, SHUTDOWN_SECONDS="8") as worker:
            worker.wait_ready()
            await produce(site, [click("u", "1")])
            await recommendations_for(site, 1)
            await produce(site, [click("u", str(n)) for n in range(1, 200)])
            assert broker.process is not None
            group = os.getpgid(broker.process.pid)
            os.killpg(group, signal.SIGSTOP)
            try:
                assert worker.terminate(9.5) in {0, 1}, worker.tail()  # the rest for a busy machine
            finally:
                os.killpg(group, signal.SIGCONT)


async def test_without_kafka_a_worker_is_not_ready_and_still_ends_in_time_with_one_line(
    bundle_folder: Path, tmp_path: Path
) -> None:
    with LocalBroker(tmp_path / "kafka", port=0) as broker:
        site = Site(broker.bootstrap, "app", bundle_folder, tmp_path)
        site.create_topics()
        with WorkerProcess(site, SHUTDOWN_SECONDS="4") as worker:
            worker.wait_ready()
            await produce(site, [click("u", "1")])
            await recommendations_for(site, 1)
            broker.kill()
            wait_until(lambda: worker.ask("/ready") == 503, 30, worker.tail)
            assert worker.ask("/live") == 200
            assert worker.terminate(6) == 1
            lines = [line for line in worker.log.read_text().splitlines() if not line.startswith("{")]
            assert [line[:6] for line in lines] == ["Error:"], worker.tail()
            assert "Kafka does not answer" in lines[0]


def test_a_signal_before_kafka_answers_ends_the_start(bundle_folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(40)
        site = Site(f"127.0.0.1:{silent.getsockname()[1]}", "app", bundle_folder, tmp_path)
        with WorkerProcess(site) as worker, silent.accept()[0]:
            assert worker.terminate(10) == 0, worker.tail()


async def lag_of(site: Site) -> int:
    """Records of the clicks topic that the group has not committed."""
    group = AIOKafkaConsumer(bootstrap_servers=site.bootstrap, group_id=site.name, enable_auto_commit=False)
    await group.start()
    try:
        partitions = [TopicPartition(site.clicks, number) for number in range(site.partitions)]
        ends = await group.end_offsets(partitions)
        committed = await asyncio.gather(*(group.committed(tp) for tp in partitions))
        return sum(end - (done or 0) for end, done in zip(ends.values(), committed, strict=True))
    finally:
        await group.stop()


async def test_publish_latest_gives_one_list_per_user_and_micro_batch(site: Site, bundle: Bundle) -> None:
    clicks = random_clicks(1_000, users=20, seed=9)
    await produce(site, [click(user, item) for user, item in clicks])
    histories = histories_of(clicks)

    def last_of_all(records: list[Any]) -> bool:
        lists = [json.loads(record.value) for record in records]
        return {r["user_id"] for r in lists if r["clicks"] == len(histories[r["user_id"]])} == histories.keys()

    with WorkerProcess(site, PUBLISH="latest"):
        records = await read_until(site, site.recommendations, last_of_all)
    assert len(records) < len(clicks) / 2
    for record in records:
        recommendation = json.loads(record.value)
        items = histories[recommendation["user_id"]][: recommendation["clicks"]]
        assert_list_is_right(bundle, items, recommendation["items"], tolerance=TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"CLICKS_TOPIC": "nobody-made-this"}, ["nobody-made-this", "stream-app topics"]),
        ({"PARTITIONS": "5"}, ["4 partitions", "wanted 5"]),
        ({"MODEL": "/nonexistent"}, ["/nonexistent"]),
        ({"TOP_K": "ten"}, ["STREAM_APP_TOP_K", "'ten'", "whole number"]),
        ({"BROKER": "127.0.0.1:1", "BROKER_TIMEOUT_SECONDS": "2"}, ["127.0.0.1:1"]),
        ({"DEVICE": "tpu"}, ["STREAM_APP_DEVICE", "'tpu'", "auto, cpu, cuda"]),
    ],
)
def test_what_cannot_work_is_refused_at_start_in_one_line(
    site: Site, settings: dict[str, str], named: list[str]
) -> None:
    result = run_command(["worker"], site.environment(WEB_PORT="0", **settings))
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("{")]
    assert all(word in line for word in named), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("where", ["v1", "v1/tables"])
def test_a_file_where_a_folder_of_states_should_be_is_one_line_that_says_where(site: Site, where: str) -> None:
    path = site.folder / "state" / site.name / where
    path.parent.mkdir(parents=True)
    path.touch()
    result = run_command(["worker"], site.environment(WEB_PORT="0"))
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("{")]
    assert str(path) in line
    assert "STREAM_APP_STATE_DIR" in line
    assert "Traceback" not in result.stderr


async def test_times_that_kafka_refuses_are_named_with_its_own_settings(bundle_folder: Path, tmp_path: Path) -> None:
    properties = {"group.min.session.timeout.ms": "6000", "transaction.max.timeout.ms": "12000"}
    with LocalBroker(tmp_path / "kafka", port=0, properties=properties) as broker:
        site = Site(broker.bootstrap, "app", bundle_folder, tmp_path)
        site.create_topics()
        short = run_command(["worker"], site.environment(WEB_PORT="0", SESSION_TIMEOUT_SECONDS="3"))
        long = {"GUARANTEE": "exactly_once", "BROKER_TIMEOUT_SECONDS": "5", "SESSION_TIMEOUT_SECONDS": "6"}
        exact = run_command(["worker"], site.environment(WEB_PORT="0", **long))
    for result, names in (
        (short, ["STREAM_APP_SESSION_TIMEOUT_SECONDS=3", "group.min.session.timeout.ms"]),
        (exact, ["15 seconds, which is ten more than STREAM_APP_BROKER_TIMEOUT_SECONDS", "transaction.max.timeout.ms"]),
    ):
        assert result.returncode == 1
        (line,) = [line for line in result.stderr.splitlines() if not line.startswith("{")]
        assert all(name in line for name in names), result.stderr


def test_states_of_another_model_are_refused_not_mixed(site: Site, tmp_path: Path) -> None:
    asyncio.run(produce(site, [click("u", "1")]))
    with WorkerProcess(site):
        asyncio.run(recommendations_for(site, 1))
    other = tmp_path / "other"
    save_bundle(other, convert(GOLDEN.with_name("public_small_d16_b1.npz")))
    with WorkerProcess(site, "other", MODEL=str(other)) as worker:
        assert worker.process.wait(40) == 1
        assert "channels 128 (here 32)" in worker.tail()
        assert "STREAM_APP_APP_ID" in worker.tail()


@pytest.mark.parametrize("disk", ["kept", "lost"])
async def test_an_old_state_that_comes_late_is_noticed_and_the_newest_appended_behind_it(
    bootstrap: str, unique_name: Callable[[str], str], bundle_folder: Path, bundle: Bundle, tmp_path: Path, disk: str
) -> None:
    site = Site(bootstrap, unique_name("app"), bundle_folder, tmp_path, partitions=1)
    site.create_topics()
    clicks = [("overtaken", str(number)) for number in range(1, 30)] + [("another", "7")]
    records = [click(user, item) for user, item in clicks]
    with WorkerProcess(site) as worker:
        await produce(site, records[:10])
        await recommendations_for(site, 10)
        old = (await read_topic(site, site.changelog))[-1]
        await produce(site, records[10:29])
        await recommendations_for(site, 29)
        async with producer(site) as zombie:  # as a worker would that was frozen after its tenth click
            await zombie.send_and_wait(site.changelog, old.value, old.key, old.partition)
        await produce(site, records[29:])
        assert worker.process.wait(30) == 1
        assert "holds a record at offset" in worker.tail()
    if disk == "lost":
        shutil.rmtree(site.folder / "state")
    with WorkerProcess(site, "again") as worker:
        worker.wait_ready()
        assert_exact(await recommendations_for(site, len(clicks)), clicks, bundle)
        assert worker.terminate() == 0, worker.tail()
    assert "the newest is appended once more" in worker.log.read_text()
    verified = run_command(["verify"], site.environment())
    assert verified.returncode == 0, verified.stdout + verified.stderr
    compacted = {record.key: record.value for record in await read_topic(site, site.changelog)}
    kept = read_state(compacted[b"overtaken"])
    assert kept is not None
    assert kept.clicks == 29  # what compaction leaves


@pytest.mark.parametrize("disk", ["kept", "lost"])
async def test_a_clicks_topic_made_anew_is_refused_as_its_clicks_would_be_taken_for_applied_ones(
    site: Site, recreate: Callable[..., Awaitable[None]], disk: str
) -> None:
    await produce(site, [click("u", str(n)) for n in range(1, 60)])
    with WorkerProcess(site) as worker:
        await recommendations_for(site, 59)
        assert worker.terminate() == 0
    await recreate(site.clicks, partitions=site.partitions)
    if disk == "lost":
        shutil.rmtree(site.folder / "state")
    await produce(site, [click("u", "1")])
    with WorkerProcess(site, "again") as worker:
        assert worker.process.wait(40) == 1
        assert re.search(r"Error: .*source_log \w{32} \(here \w{32}\).*STREAM_APP_APP_ID", worker.tail())


async def test_a_lost_changelog_is_refused_though_the_disk_is_lost_too(
    site: Site, recreate: Callable[..., Awaitable[None]]
) -> None:
    await produce(site, [click("u", str(n)) for n in range(1, 20)])
    with WorkerProcess(site) as worker:
        await recommendations_for(site, 19)
        assert worker.terminate() == 0
    shutil.rmtree(site.folder / "state")
    await recreate(site.changelog, partitions=site.partitions, cleanup_policy="compact")
    refused = run_command(["worker"], site.environment(WEB_PORT="0"))
    assert refused.returncode == 1
    assert re.search(rf"Error: topic {site.changelog} was deleted and made anew.*STREAM_APP_APP_ID", refused.stderr)


@pytest.mark.parametrize("kept_disk", [False, True])
async def test_a_changelog_that_was_emptied_is_refused_before_a_click_is_read(
    site: Site, bundle: Bundle, admin: AIOKafkaAdminClient, kept_disk: bool
) -> None:
    await produce(site, [click("u", "1")])
    with WorkerProcess(site) as worker:
        worker.wait_ready()
        await recommendations_for(site, 1)
        assert worker.terminate() == 0, worker.tail()
        kept = shutil.copytree(site.folder / "state", site.folder / "kept")
    await produce(site, [click("u", "2")])
    with WorkerProcess(site) as worker:
        await recommendations_for(site, 2)
        assert worker.terminate() == 0, worker.tail()
    shutil.rmtree(site.folder / "state")
    if kept_disk:
        shutil.move(kept, site.folder / "state")
    await set_policy(admin, site.changelog, "delete")
    logs = [TopicPartition(site.changelog, partition) for partition in range(site.partitions)]
    async with AIOKafkaConsumer(bootstrap_servers=site.bootstrap) as consumer:
        ends = await consumer.end_offsets(logs)
    await admin.delete_records({log: RecordsToDelete(end) for log, end in ends.items()})
    await set_policy(admin, site.changelog, "compact")
    await produce(site, [click("u", "3")])
    with WorkerProcess(site) as worker:
        assert worker.process.wait(60) == 1, worker.tail()
        assert "records between were deleted" in worker.tail()
    assert len(await recommendations_for(site, 2)) == 2


async def set_policy(admin: AIOKafkaAdminClient, topic: str, policy: str) -> None:
    change = ConfigResource(ConfigResourceType.TOPIC, topic, configs={"cleanup.policy": policy})
    await admin.alter_configs([change])


@pytest.mark.parametrize("topic", ["recommendations", "dead_letters", "changelog"])
async def test_a_topic_made_anew_under_a_running_worker_ends_it_with_what_to_do(
    site: Site, worker: WorkerProcess, recreate: Callable[..., Awaitable[None]], topic: str
) -> None:
    name = getattr(site, topic)
    await recreate(name, partitions=2)
    async with producer(site) as client:
        key, value = click("u", "1")
        while worker.process.poll() is None:
            await client.send_and_wait(site.clicks, value, key)
            await client.send_and_wait(site.clicks, b"poison", key)
    assert worker.process.returncode == 1
    line = worker.log.read_text().splitlines()[-1]
    assert re.search(rf"Error: topic {name} was deleted", line), worker.tail()
    assert ("STREAM_APP_APP_ID" in line) == (topic == "changelog")


async def test_a_clicks_topic_made_anew_under_a_running_worker_ends_it(
    site: Site, worker: WorkerProcess, recreate: Callable[..., Awaitable[None]]
) -> None:
    await recreate(site.clicks, partitions=site.partitions)
    assert worker.process.wait(40) == 1
    assert re.search(rf"Error: topic {site.clicks} was deleted .*STREAM_APP_APP_ID", worker.tail())
