"""How much malformed messages slow a worker: half a backlog of them, beside a backlog of valid clicks alone.

    python -m benchmarks.poison                      a million malformed messages among a million clicks, three rounds
    python -m benchmarks.poison --messages 20000 --rounds 1

A round works both backlogs off in turn, each by a fresh worker on the same real broker. Counted is what a consumer
could read: recommendations and dead letters, from the first to the last. Then `stream-app verify` has to be clean, and
every malformed message has to be in the dead letters as it was: key, value and headers, found by the partition and
offset that its letter names.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition

from benchmarks.backlog import PARTITIONS, SCRIPTS, create_topics, prove, running, write_bundle
from benchmarks.machine import machine
from stream_app.dev.kafka.broker import LocalBroker
from stream_app.messages import REASON_HEADERS, DeadLetter
from stream_app.publisher import Publisher, acknowledged
from stream_app.settings import Settings

ITEMS = 3_416
USERS = 50_000

CHUNK = 4_096

#: One malformed message in so many has a megabyte.
LARGE_ONE_IN = 2_000

#: A round's program may be silent for this long before the first, or the next, sign of life.
SILENT_SECONDS = 90.0

#: Names a malformed message's kind, in a header that its dead letter carries on.
KIND = "kind-of-poison"


def main() -> None:
    """Measure and print a table, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.poison", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--messages", type=int, default=1_000_000, help="malformed ones; among as many valid clicks")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(Path(folder), options.messages, options.rounds)
    report(rates, vars(options))


def measure(folder: Path, messages: int, rounds: int) -> dict[str, list[float]]:
    """Messages a second of each backlog, one figure a round."""
    # A number of messages for each backlog: clicks alone, and as many again that are none.
    backlogs = {"clean": messages, "poisoned": 2 * messages}
    bundle = folder / "bundle"
    write_bundle(bundle, ITEMS)
    rates: dict[str, list[float]] = {"clean": [], "poisoned": []}
    with LocalBroker(folder / "kafka", port=0, heap_mb=1024) as broker:
        for topic, size in backlogs.items():
            asyncio.run(produce(broker.bootstrap, topic, size))
        for number in range(rounds):
            for topic, size in backlogs.items():
                rates[topic].append(work_off(broker.bootstrap, bundle, folder / f"{topic}-{number}", topic, size))
            print(f"round {number + 1}: " + ", ".join(f"{name} {each[-1]:,.0f}/s" for name, each in rates.items()))
    return rates


def report(rates: Mapping[str, list[float]], options: Mapping[str, int]) -> None:
    """Medians, spread, ratio; machine and versions."""
    ratios = [poisoned / clean for poisoned, clean in zip(rates["poisoned"], rates["clean"], strict=True)]
    print(f"\n{machine('faust-streaming', 'aiokafka', 'rocksdict', 'orjson')}\n{options}")
    valid = [rate / 2 for rate in rates["poisoned"]]
    for name, each in {**rates, "valid clicks": valid, "ratio": ratios}.items():
        print(f"{name:>12}: median {statistics.median(each):>10,.2f}   min {min(each):,.2f}   max {max(each):,.2f}")
    figures = {"messages_per_second": rates, "ratio": statistics.median(ratios)}
    print(json.dumps({"benchmark": "poison", **options, **figures}))


# -- what is produced


async def produce(bootstrap: str, topic: str, size: int) -> None:
    """Write a backlog: valid clicks, and for the poisoned one every second message none."""
    await create_topics(bootstrap, {topic: "delete"})
    publisher = Publisher(Settings(broker=bootstrap).kafka_client())
    await publisher.start([topic])
    rng = random.Random(0)  # noqa: S311
    try:
        for first in range(0, size, CHUNK):
            numbers = range(first, min(first + CHUNK, size))
            letters = [some_message(rng, number, poisoned=topic == "poisoned") for number in numbers]
            # Dead letters are records of any kind, whole and with headers; what else would be sent by the batch?
            await acknowledged(await publisher.send_dead_letters(topic, letters), topic, 60)
    finally:
        await publisher.stop()


def some_message(rng: random.Random, number: int, *, poisoned: bool) -> DeadLetter:
    """A click; or one made malformed, with its kind in a header."""
    user, item = rng.randrange(USERS), rng.randint(1, ITEMS)
    time_ms = ODD_TIMES_MS[number // 2 % 50] if number // 2 % 50 < len(ODD_TIMES_MS) else 1_700_000_000_000 + number
    click = {"user_id": f"user-{user}", "item_id": f"item-{item}", "timestamp_ms": time_ms}
    key = click["user_id"].encode()  # type: ignore[attr-defined]
    if not (poisoned and number % 2):
        return DeadLetter(key, orjson.dumps(click), [])
    kinds = list(POISON)
    kind = "a megabyte" if number // 2 % LARGE_ONE_IN == 0 else kinds[number // 2 % len(kinds)]
    key_of_it, value = (POISON | LARGE)[kind](rng, key, click)
    return DeadLetter(key_of_it, value, [(KIND, kind.encode())])


#: Unusual, and valid: the beginning of the year 0, the end of 9999, and what 64 bits hold.
ODD_TIMES_MS = (-62_167_219_200_000, 253_402_300_799_999, -(2**63), 2**63 - 1)

#: (random, key, click) → key and value of a message that is no click.
Malformed = Callable[[random.Random, bytes, dict[str, Any]], tuple[bytes | None, bytes | None]]


def _with(**fields: Any) -> Malformed:
    return lambda _, key, click: (key, orjson.dumps(click | fields))


def _with_time(text: bytes) -> Malformed:
    return lambda _, key, click: (key, orjson.dumps(click | {"timestamp_ms": 0})[:-2] + text + b"}")


def _without(name: str) -> Malformed:
    return lambda _, key, click: (key, orjson.dumps({each: click[each] for each in click if each != name}))


POISON: dict[str, Malformed] = {
    "random bytes": lambda rng, key, _: (key, rng.randbytes(rng.randrange(300))),
    "random key": lambda rng, _, click: (rng.randbytes(8), orjson.dumps(click)),
    "deep arrays": lambda _, key, __: (key, b"[" * 1_500 + b"]" * 1_500),
    "deep objects, left open": lambda _, key, __: (key, b'{"user_id":' * 300),
    "a number of 400 digits": _with_time(b"9" * 400),
    "beyond 64 bits": _with_time(b"18446744073709551616"),
    "1e400": _with_time(b"1e400"),
    "NaN": _with_time(b"NaN"),
    "a fraction": _with_time(b"1.5"),
    "a time in words": _with(timestamp_ms="0000-01-01T00:00:00Z"),
    "a lone surrogate": lambda _, key, click: (key, orjson.dumps(click).replace(b"user-", b"\\ud800")),
    "bad UTF-8": lambda _, key, click: (key, orjson.dumps(click).replace(b"user-", b"\xc3\x28\xff")),
    "a key twice": lambda _, key, click: (key, orjson.dumps(click)[:-1] + b',"user_id":"somebody"}'),
    "a wrong type": _with(user_id=17),
    "null in a field": _with(item_id=None),
    "a missing field": _without("item_id"),
    "no object": lambda _, key, click: (key, orjson.dumps(list(click.values()))),
    "nothing": lambda _, key, __: (key, b""),
    "somebody's key": lambda _, __, click: (b"somebody", orjson.dumps(click)),
    "no key": lambda _, __, click: (None, orjson.dumps(click)),
    "a tombstone": lambda _, key, __: (key, None),
    "neither key nor value": lambda *_: (None, None),
}
LARGE: dict[str, Malformed] = {"a megabyte": _with(padding="x" * 1_000_000)}


# -- how it is worked off


def work_off(bootstrap: str, bundle: Path, folder: Path, topic: str, size: int) -> float:
    """Messages a second of a fresh worker with default settings; ends here if anything it did was wrong."""
    settings = {
        "BROKER": bootstrap,
        "MODEL": str(bundle),
        "APP_ID": folder.name,
        "CLICKS_TOPIC": topic,
        "RECOMMENDATIONS_TOPIC": f"{folder.name}-recommendations",
        "DEAD_LETTER_TOPIC": f"{folder.name}-dead-letter",
        "STATE_DIR": str(folder),
        "WEB_PORT": "0",
    }
    environment = os.environ | {f"STREAM_APP_{key}": text for key, text in settings.items()}
    subprocess.run([SCRIPTS / "stream-app", "topics"], env=environment, check=True, capture_output=True, timeout=60)
    outputs = [TopicPartition(settings["RECOMMENDATIONS_TOPIC"], partition) for partition in range(PARTITIONS)]
    outputs.append(TopicPartition(settings["DEAD_LETTER_TOPIC"], 0))
    with running([str(SCRIPTS / "stream-app"), "worker"], environment, folder.with_suffix(".log")):
        rate = asyncio.run(rate_of(bootstrap, outputs, size))
    prove(environment)
    asyncio.run(compare(bootstrap, topic, settings["DEAD_LETTER_TOPIC"]))
    return rate


async def rate_of(bootstrap: str, outputs: list[TopicPartition], size: int) -> float:
    """Records a second that these partitions grew by, from the first sight of any until there are so many.

    Raises:
        TimeoutError: nothing came for too long.
    """
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
    await consumer.start()
    try:
        points = [(time.monotonic(), 0)]
        while points[-1][1] < size:
            now, count = time.monotonic(), sum((await consumer.end_offsets(outputs)).values())
            if count > points[-1][1]:
                points.append((now, count))
            elif now > points[-1][0] + SILENT_SECONDS:
                raise TimeoutError
            await asyncio.sleep(0.05)
    finally:
        await consumer.stop()
    (start, first), (stop, last) = points[1], points[-1]
    return (last - first) / max(stop - start, 0.05)


async def compare(bootstrap: str, topic: str, letters_topic: str) -> None:
    """End here unless the dead letters are the malformed messages, each as it was."""
    malformed = {
        (record.partition, record.offset): digest(record, record.headers)
        async for record in every_record(bootstrap, topic)
        if record.headers
    }
    seen, wrong = set(), 0
    async for letter in every_record(bootstrap, letters_topic):
        origin = dict(letter.headers[-REASON_HEADERS:])
        place = int(origin["__streams.errors.partition"]), int(origin["__streams.errors.offset"])
        seen.add(place)
        wrong += malformed.get(place) != digest(letter, letter.headers[:-REASON_HEADERS])
    missing = len(malformed.keys() - seen)
    if wrong or missing:
        sys.exit(
            f"{letters_topic}: {missing:,} of {len(malformed):,} malformed messages missing, {wrong:,} letters wrong"
        )
    print(f"{letters_topic}: {len(malformed):,} malformed messages, all there as they were")


def digest(record: Any, headers: Any) -> bytes:
    """Key, value and these headers in 8 bytes."""
    return blake2b(repr((record.key, record.value, list(headers))).encode(), digest_size=8).digest()


async def every_record(bootstrap: str, topic: str) -> AsyncIterator[Any]:
    """The records of a topic up to its present end."""
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest", max_partition_fetch_bytes=4 << 20
    )
    await consumer.start()
    try:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
        left = sum((await consumer.end_offsets(partitions)).values())
        while left:
            for records in (await consumer.getmany(timeout_ms=1_000)).values():
                left -= len(records)
                for record in records:
                    yield record
    finally:
        await consumer.stop()


if __name__ == "__main__":
    main()
