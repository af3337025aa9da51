"""A replayed log is a stream of contract events, each user's in order."""

from __future__ import annotations

import asyncio
import gzip
import re
import time

import orjson
import polars as pl
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from lrurec.errors import InteractionsError
from lrurec.interactions import read_interactions
from stream_app.dev.click_log import LoggedClick, interleave, read_clicks
from stream_app.dev.replay import ClickTooLarge, click_event, paced, replay
from stream_app.errors import BrokerUnavailable, TopicsError
from stream_app.messages import ClickLimits, decode_clicks
from stream_app.settings import Settings

POSITIONS = "user_id,item_id,position\nu1,A,1\nu1,B,2\nu1,A,3\nu2,C,1\nu2,A,2\nü3,B,1\n"
PARTITIONS = 4


@pytest.fixture
def write_log(tmp_path):
    def write(text, name="log.csv"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


@pytest.fixture
async def settings(bootstrap, create_topic):
    return Settings(broker=bootstrap, clicks_topic=await create_topic("clicks", partitions=PARTITIONS))


async def read_topic(settings, count):
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.broker, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.assign([TopicPartition(settings.clicks_topic, number) for number in range(PARTITIONS)])
        await consumer.seek_to_beginning()
        async with asyncio.timeout(20):
            return [await consumer.getone() for _ in range(count)]
    finally:
        await consumer.stop()


async def test_every_click_of_the_log_becomes_an_event_of_the_contract(settings, write_log):
    clicks = read_clicks(write_log(POSITIONS, "log.csv.gz"))
    before = time.time_ns() // 1_000_000
    done = await replay(settings, clicks)
    records = await read_topic(settings, len(clicks))
    after = time.time_ns() // 1_000_000

    assert done.sent == done.acknowledged == 6
    decoded = decode_clicks(records, {"A": 1, "B": 2, "C": 3}, ClickLimits(1_000, 1_000))
    assert not decoded.dead_letters
    assert not decoded.unknown_items
    assert all(before <= stamp <= after for stamp in decoded.timestamp_ms)
    history = {user: [] for user in decoded.user}
    for user, item in zip(decoded.user, decoded.item, strict=True):
        history[user].append(item)
    assert history == {b"u1": [1, 2, 1], b"u2": [3, 1], "ü3".encode(): [2]}


async def test_a_users_clicks_share_a_partition(settings):
    await replay(settings, [LoggedClick(f"u{n % 5}", "A", n) for n in range(50)])
    partitions = {}
    for record in await read_topic(settings, 50):
        partitions.setdefault(record.key, set()).add(record.partition)
    assert all(len(each) == 1 for each in partitions.values())


async def test_a_log_with_timestamps_keeps_them_in_their_order(settings, write_log):
    log = "user_id,item_id,timestamp\nu1,late,30\nu2,early,10\nu1,middle,20.5\n"
    clicks = read_clicks(write_log(log))
    assert clicks == [
        LoggedClick("u2", "early", 10_000),
        LoggedClick("u1", "middle", 20_500),
        LoggedClick("u1", "late", 30_000),
    ]
    _, value = click_event(clicks[0], now_ms=99)
    assert orjson.loads(value) == {"user_id": "u2", "item_id": "early", "timestamp_ms": 10_000}


def test_ties_in_time_are_broken_by_position(write_log):
    log = "user_id,item_id,timestamp_ms,position\nu1,second,5,2\nu1,first,5,1\n"
    assert [click.item_id for click in read_clicks(write_log(log))] == ["first", "second"]


@pytest.fixture
def write_times(tmp_path):
    """Writes a log of one user whose clicks on A, B, … have these times; answers its path."""

    def write(column, times, kind):
        items = [chr(ord("A") + number) for number in range(len(times))]
        table = pl.DataFrame({"user_id": ["u"] * len(times), "item_id": items, column: pl.Series(times)})
        path = tmp_path / f"log.{kind}"
        {"csv": table.write_csv, "jsonl": table.write_ndjson, "parquet": table.write_parquet}[kind](path)
        return path

    return write


IMPOSSIBLE_TIMES = [
    ("timestamp_ms", 99999999999999999999),
    ("timestamp_ms", -99999999999999999999),
    ("timestamp_ms", 2**63),
    ("timestamp_ms", 1e300),
    ("timestamp", 99999999999999999999),
    ("timestamp", 2**63 // 1000 + 1),
    ("timestamp", -1e16),
    ("timestamp", 1e300),
]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("column", "time"), IMPOSSIBLE_TIMES)
def test_a_time_beyond_64_bits_is_one_line_naming_column_row_and_value(write_times, column, time, kind):
    kind_of_number = pl.Float64 if isinstance(time, float) else pl.Int64 if abs(time) < 2**63 else pl.Int128
    path = write_times(column, pl.Series([1, time], dtype=kind_of_number), kind)
    with pytest.raises(InteractionsError) as refused:
        read_clicks(path)
    if kind == "parquet" and kind_of_number == pl.Int128:
        assert re.search(r"log\.parquet .*more than 64 bits", str(refused.value))
    else:
        exact = kind != "jsonl" or kind_of_number == pl.Int64 or time == 2**63  # JSON's larger numbers are fractions
        pattern = shown(time if exact else float(time))
        assert re.search(rf"log\.{kind}: in data row 2 {column} is '?{pattern}'?; .*64 bits", str(refused.value))
    assert "\n" not in str(refused.value)


def shown(time):
    """A pattern for a number as any of the formats writes it."""
    return time if isinstance(time, int) else f"{time:.0e}".replace("e+", r"(?:\.0)?e\+?")


@pytest.mark.parametrize("kind", ["csv", "parquet"])  # JSON has no such numbers
@pytest.mark.parametrize("column", ["timestamp", "timestamp_ms"])
@pytest.mark.parametrize("time", ["inf", "-inf", "nan"])
def test_a_time_that_is_no_finite_number_is_one_line(write_times, column, time, kind):
    with pytest.raises(InteractionsError, match=rf"(?i)in data row 2 {column} is '?{time}'?; ") as refused:
        read_clicks(write_times(column, [1.0, float(time)], kind))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("column", "times", "milliseconds"),
    [
        ("timestamp_ms", [2**63 - 1, 2**53 + 1, -(2**63)], [-(2**63), 2**53 + 1, 2**63 - 1]),
        ("timestamp", [2**63 // 1000, -(2**63 // 1000)], [-(2**63 // 1000) * 1000, 2**63 // 1000 * 1000]),
        ("timestamp_ms", [1.7e12 + 0.25, 5.0], [5, 1_700_000_000_000]),
        ("timestamp", [9.2e15, 0.125], [125, 9_200_000_000_000_000_000]),
    ],
)
def test_the_times_of_64_bits_are_kept_to_the_millisecond(write_times, column, times, milliseconds, kind):
    clicks = read_clicks(write_times(column, times, kind))
    assert [click.timestamp_ms for click in clicks] == milliseconds


def test_times_within_one_millisecond_keep_their_order(write_log):
    log = "user_id,item_id,timestamp\nu,second,5.0002\nu,first,5.0001\n"
    assert [(click.item_id, click.timestamp_ms) for click in read_clicks(write_log(log))] == [
        ("first", 5_000),
        ("second", 5_000),
    ]


def test_positions_alone_interleave_users_the_same_way_every_time(write_log):
    rows = [f"u{user},i{place},{place}\n" for user in range(20) for place in range(5)]
    log = read_interactions(write_log("user_id,item_id,position\n" + "".join(rows)))
    clicks = list(interleave(log, active=4))

    assert clicks == list(interleave(log, active=4))
    assert len(clicks) == 100
    for user in log.user_ids:
        assert [item for who, item in clicks if who == user] == [f"i{place}" for place in range(5)]
    assert len({user for user, _ in clicks[:10]}) > 1
    assert {user for user, _ in clicks[:5]} <= {"u0", "u1", "u2", "u3", "u4"}


def test_a_file_that_is_no_log_is_refused_with_what_it_needs(write_log):
    with pytest.raises(InteractionsError, match="it needs user_id, item_id and one of"):
        read_clicks(write_log("title\nx\n"))


async def test_the_rate_is_kept_whatever_a_click_takes():
    slow_clicks = 3

    async def seconds(rate, count):
        began = time.monotonic()
        async for number in paced(range(count), rate):
            if number < slow_clicks:
                await asyncio.sleep(0.02)  # the subject: a slow consumer must not slow the schedule
        return time.monotonic() - began

    assert 0.19 <= await seconds(rate=100, count=20) < 0.5


async def test_a_missing_topic_is_one_clear_line(bootstrap, unique_name):
    settings = Settings(broker=bootstrap, clicks_topic=unique_name("nowhere"))
    with pytest.raises(TopicsError, match=r"missing on .*nowhere.*stream-app topics"):
        await replay(settings, [LoggedClick("u", "i", 1)])


async def test_no_broker_is_one_clear_line(unused_tcp_port):
    with pytest.raises(BrokerUnavailable, match="stream-app broker"):
        await replay(Settings(broker=f"127.0.0.1:{unused_tcp_port}"), [LoggedClick("u", "i", 1)])


HUGE = "x" * 3_000_000


@pytest.mark.parametrize(("user_id", "item_id"), [(HUGE, "i"), ("u", HUGE)])
async def test_a_click_larger_than_kafka_takes_is_one_short_line_with_its_user_and_sizes(settings, user_id, item_id):
    with pytest.raises(ClickTooLarge) as error:
        await replay(settings, [LoggedClick("before", "i", 1), LoggedClick(user_id, item_id, 1)])
    message = str(error.value)
    assert f"click of user {user_id[:40]!r}" in message
    assert f"{len(user_id):,} bytes of key" in message
    assert "at most 1,048,576 bytes" in message
    assert "\n" not in message
    assert len(message) < 400


async def test_a_click_larger_than_its_topic_takes_names_the_topics_limit(bootstrap, create_topic):
    settings = Settings(broker=bootstrap, clicks_topic=await create_topic("clicks", max_message_bytes="20000"))
    with pytest.raises(
        ClickTooLarge, match=r"user 'u' is larger .* at most max\.message\.bytes of topic clicks-.*; shorten"
    ):
        await replay(settings, [LoggedClick("u", "x" * 30_000, 1)])
