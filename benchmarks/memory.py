"""How much memory a worker takes while it works off a long backlog, and while the broker stalls in the middle of one.

    python -m benchmarks.memory                      10 million clicks, then stalls over a million more
    python -m benchmarks.memory --clicks 100000 --stalled-clicks 50000 --stall-seconds 3

The demo shop's real clicks, again and again with user ids of their own, so that there are new users to the end.
Resident memory is sampled each second beside the clicks worked off, which are the recommendations that a consumer could
read. The growth after the first fifth is fitted by least squares. 10 million clicks take 30 GB of disk. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from aiokafka import AIOKafkaConsumer, TopicPartition

from benchmarks.backlog import PARTITIONS, SCRIPTS, create_topics
from benchmarks.machine import machine, resident_mb
from lrurec.bundle import make_bundle, save_bundle
from lrurec.catalogue import Catalogue
from lrurec.config import LRURecConfig
from lrurec.interactions import read_interactions
from lrurec.model import LRURec
from stream_app.dev.click_log import interleave
from stream_app.dev.demo.shop import CLICKS_FILE
from stream_app.dev.kafka.broker import LocalBroker
from stream_app.micro_batch import KeyValue
from stream_app.publisher import Publisher, acknowledged
from stream_app.settings import Settings

CHUNK = 10_000
ACTIVE_USERS = 1_000

#: Shares of the backlog after which the broker stalls.
STALLS = (0.25, 0.5, 0.75)

SILENT_SECONDS = 180.0


class Sample(NamedTuple):
    """One look at the worker."""

    seconds: float
    clicks: int
    resident_mb: float
    stalled: bool


def main() -> None:
    """Measure and print the curves, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clicks", type=int, default=10_000_000)
    parser.add_argument("--stalled-clicks", type=int, default=1_000_000)
    parser.add_argument("--stall-seconds", type=float, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.clicks, options.stalled_clicks, options.stall_seconds)
    print(f"\n{machine('faust-streaming', 'aiokafka', 'rocksdict')}\n{vars(options)}")
    print(json.dumps({"benchmark": "memory", **vars(options), **figures}))


def measure(folder: Path, clicks: int, stalled_clicks: int, stall_seconds: float) -> dict[str, Any]:
    """Both parts, on one broker."""
    bundle = folder / "bundle"
    write_shop_bundle(bundle)
    with LocalBroker(folder / "kafka", port=0, heap_mb=1024) as broker:
        began = time.monotonic()
        for topic, size in (("long", clicks), ("stalled", stalled_clicks)):
            asyncio.run(produce(broker.bootstrap, topic, size))
        print(f"{clicks + stalled_clicks:,} clicks written in {time.monotonic() - began:.0f} s")
        flat = work_off(broker, bundle, folder, "long", clicks)
        stalled = work_off(broker, bundle, folder, "stalled", stalled_clicks, stall_seconds)
    return report_curve(flat, clicks) | report_stalls(stalled)


def report_curve(samples: list[Sample], clicks: int) -> dict[str, Any]:
    """Memory at each tenth of the backlog, and how it grows after the first fifth."""
    done = np.array([sample.clicks for sample in samples], np.float64)
    resident = np.array([sample.resident_mb for sample in samples])
    tenths = {f"{tenth}0%": round(float(np.interp(clicks * tenth / 10, done, resident))) for tenth in range(1, 11)}
    late = done >= clicks / 5
    slope = float(np.polyfit(done[late] / 1e6, resident[late], 1)[0]) if len(set(done[late])) > 1 else float("nan")
    seconds = samples[-1].seconds - samples[0].seconds
    print(f"\nresident MB after so much of {clicks:,} clicks, in {seconds:.0f} s: {tenths}")
    print(f"after the first fifth: {slope:+.2f} MB for a million clicks; most ever {resident.max():,.0f} MB")
    return {"resident_mb": tenths, "slope_mb_per_million_clicks": slope, "most_mb": float(resident.max())}


def report_stalls(samples: list[Sample]) -> dict[str, Any]:
    """The most memory while the broker stood still, and otherwise."""
    most = {
        name: max(sample.resident_mb for sample in samples if sample.stalled == stalled)
        for name, stalled in (("running", False), ("stalled", True))
    }
    print(
        f"the broker stopped {len(STALLS)} times: "
        f"most {most['stalled']:,.0f} MB meanwhile, {most['running']:,.0f} MB otherwise"
    )
    return {"stalled_most_mb": most["stalled"], "not_stalled_most_mb": most["running"]}


def write_shop_bundle(folder: Path) -> None:
    """A model of the shop's items with random weights; memory does not depend on their values."""
    torch.manual_seed(0)
    items = read_interactions(CLICKS_FILE).catalogue.item_ids
    config = LRURecConfig(num_items=len(items))
    save_bundle(folder, make_bundle(config, LRURec(config).state_dict(), Catalogue(list(items))))


async def produce(bootstrap: str, topic: str, size: int) -> None:
    """Write so many clicks of the shop's log, each pass over it with user ids of its own."""
    await create_topics(bootstrap, {topic: "delete"})
    log = [(user.encode(), item.encode()) for user, item in interleave(read_interactions(CLICKS_FILE), ACTIVE_USERS)]
    publisher = Publisher(Settings(broker=bootstrap).kafka_client())
    await publisher.start([topic])
    try:
        for first in range(0, size, CHUNK):
            rows = [_click(log, number) for number in range(first, min(first + CHUNK, size))]
            batches = publisher.pack(topic, rows, time.time_ns() // 1_000_000)
            await acknowledged([publisher.send(topic, batches)], topic, 60)
    finally:
        await publisher.stop()


def _click(log: list[tuple[bytes, bytes]], number: int) -> KeyValue:
    user, item = log[number % len(log)]
    key = b"%b.%d" % (user, number // len(log))
    return (key, b'{"user_id":"%b","item_id":"%b","timestamp_ms":%d}' % (key, item, 1_700_000_000_000 + number))


def work_off(
    broker: LocalBroker, bundle: Path, folder: Path, topic: str, size: int, stall_seconds: float = 0
) -> list[Sample]:
    """Samples of a fresh worker with default settings, from its start to the end of the backlog."""
    name = f"memory-{topic}"
    settings = {
        "BROKER": broker.bootstrap,
        "MODEL": str(bundle),
        "APP_ID": name,
        "CLICKS_TOPIC": topic,
        "RECOMMENDATIONS_TOPIC": f"{name}-recommendations",
        "DEAD_LETTER_TOPIC": f"{name}-dead-letter",
        "STATE_DIR": str(folder / name),
        "WEB_PORT": "0",
    }
    environment = os.environ | {f"STREAM_APP_{key}": text for key, text in settings.items()}
    subprocess.run([SCRIPTS / "stream-app", "topics"], env=environment, check=True, capture_output=True, timeout=60)
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen([SCRIPTS / "stream-app", "worker"], env=environment, stdout=output, stderr=output)
    try:
        return asyncio.run(follow(process, broker, settings["RECOMMENDATIONS_TOPIC"], size, stall_seconds))
    except (TimeoutError, OSError):
        sys.exit(f"the worker on {topic} ended or stood still; the end of its log:\n{log.read_text()[-2000:]}")
    finally:
        process.kill()
        process.wait(10)


async def follow(
    process: subprocess.Popen[bytes], broker: LocalBroker, topic: str, size: int, stall_seconds: float
) -> list[Sample]:
    """Look each second until the backlog is worked off; stop the broker on the way, if for some seconds.

    Raises:
        TimeoutError: nothing was worked off for too long.
        OSError: the worker is gone.
    """
    consumer = AIOKafkaConsumer(bootstrap_servers=broker.bootstrap)
    await consumer.start()
    samples: list[Sample] = []
    stalls = [int(size * share) for share in STALLS] if stall_seconds else []
    began = moved = time.monotonic()
    done = 0
    try:
        while done < size:
            await asyncio.sleep(1)
            ends = await consumer.end_offsets([TopicPartition(topic, partition) for partition in range(PARTITIONS)])
            now = time.monotonic()
            if sum(ends.values()) > done:
                done, moved = sum(ends.values()), now
            elif now > moved + SILENT_SECONDS:
                raise TimeoutError
            samples.append(Sample(now - began, done, resident_mb(process.pid), stalled=False))
            if stalls and done >= stalls[0]:
                del stalls[0]
                samples += await stalled_samples(process, broker, began, done, stall_seconds)
    finally:
        await consumer.stop()
    return samples


async def stalled_samples(
    process: subprocess.Popen[bytes], broker: LocalBroker, began: float, done: int, seconds: float
) -> list[Sample]:
    """Stop the broker, look at the worker each second, let the broker go on."""
    assert broker.process is not None
    os.killpg(broker.process.pid, signal.SIGSTOP)
    samples = []
    try:
        for _ in range(max(1, round(seconds))):
            await asyncio.sleep(1)
            samples.append(Sample(time.monotonic() - began, done, resident_mb(process.pid), stalled=True))
    finally:
        os.killpg(broker.process.pid, signal.SIGCONT)
    return samples


if __name__ == "__main__":
    main()
