"""How fast a lost disk comes back: the worker's recovery from the changelog, beside Faust's own.

    python -m benchmarks.recovery                    a million states, one round
    python -m benchmarks.recovery --states 50000 --rounds 1

Both are whole processes that start on an empty folder and read the same topic of the same real broker; they take turns.
Counted are the records that each has restored, from the first of them until it is ready or the time is up, by its own
account: the worker's log, and Faust's count of what is left. `most memory` is the most that each process had.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.backlog import PARTITIONS, SCRIPTS, write_bundle
from benchmarks.machine import machine, resident_mb
from lrurec.bundle import load_bundle
from lrurec.serving import state_layout
from lrurec.user_state import StateLayout
from stream_app.dev.kafka.broker import LocalBroker
from stream_app.micro_batch import KeyValue
from stream_app.publisher import Publisher, acknowledged
from stream_app.settings import Settings
from stream_app.topics import verify_topics

ITEMS = 3_416
CHUNK = 10_000


class Recovery(NamedTuple):
    """What one process did."""

    records: int
    seconds: float
    most_mb: float
    """Resident memory, the most it had."""


def main() -> None:
    """Measure and print a table, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--states", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300, help="for each process in each round, at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        state_bytes, recoveries = measure(Path(folder), options.states, options.rounds, options.seconds)
    report(state_bytes, recoveries, vars(options))


def measure(folder: Path, states: int, rounds: int, seconds: float) -> tuple[int, dict[str, list[Recovery]]]:
    """Bytes of a state, and the recoveries of each program, one a round."""
    bundle = folder / "bundle"
    write_bundle(bundle, ITEMS)
    recoveries: dict[str, list[Recovery]] = {"stream-app": [], "faust": []}
    with LocalBroker(folder / "kafka", port=0, heap_mb=1024) as broker:
        environment = {
            "STREAM_APP_BROKER": broker.bootstrap,
            "STREAM_APP_MODEL": str(bundle),
            "STREAM_APP_WEB_PORT": "0",
        }
        settings = Settings.from_environment(environment)
        topics = [SCRIPTS / "stream-app", "topics"]
        subprocess.run(topics, env=os.environ | environment, check=True, capture_output=True, timeout=60)
        began = time.monotonic()
        state_bytes = asyncio.run(fill_changelog(settings, states))
        print(f"{states:,} states of {state_bytes:,} bytes written in {time.monotonic() - began:.0f} s")
        for number in range(rounds):
            recoveries["faust"].append(run_faust(settings, folder / f"faust-{number}", states, seconds))
            recoveries["stream-app"].append(run_ours(environment, folder / f"ours-{number}", states, seconds))
            rates = (f"{name} {each[-1].records / each[-1].seconds:,.0f}/s" for name, each in recoveries.items())
            print(f"round {number + 1}: " + ", ".join(rates))
    return state_bytes, recoveries


def report(state_bytes: int, recoveries: Mapping[str, list[Recovery]], options: Mapping[str, Any]) -> None:
    """Medians, spread, ratio; machine and versions."""
    rates = {name: [each.records / each.seconds for each in rounds] for name, rounds in recoveries.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["stream-app"], rates["faust"], strict=True)]
    print(f"\n{machine('faust-streaming', 'aiokafka', 'rocksdict')}\n{options}")
    for name, each in rates.items():
        spread = f"min {min(each):,.0f}   max {max(each):,.0f}"
        most = max(recovery.most_mb for recovery in recoveries[name])
        megabytes = statistics.median(each) * state_bytes / 1e6
        print(f"{name:>12}: median {statistics.median(each):>9,.0f} states/s   {spread}   {megabytes:.1f} MB/s"
              f"   most memory {most:,.0f} MB")  # fmt: skip
    print(f"{'ratio':>12}: median {statistics.median(ratios):.1f}   min {min(ratios):.1f}   max {max(ratios):.1f}")
    figures = {"state_bytes": state_bytes, "states_per_second": rates, "ratio": statistics.median(ratios)}
    print(json.dumps({"benchmark": "recovery", **options, **figures}))


async def fill_changelog(settings: Settings, states: int) -> int:
    """Write one state each of so many users, where their clicks would be; the bytes of a state."""
    topics = await verify_topics(settings)
    assert settings.model is not None
    layout = state_layout(
        load_bundle(settings.model),
        settings.state_dtype,
        settings.recent_items,
        source_log=topics[settings.clicks_topic].id.hex(),
    )
    publisher = Publisher(settings.kafka_client())
    await publisher.start([settings.changelog_topic])
    try:
        for first in range(0, states, CHUNK):
            rows = some_states(layout, range(first, min(first + CHUNK, states)))
            batches = publisher.pack(settings.changelog_topic, rows, time.time_ns() // 1_000_000)
            await acknowledged([publisher.send(settings.changelog_topic, batches)], "the states", 60)
    finally:
        await publisher.stop()
    return layout.dtype.itemsize


def some_states(layout: StateLayout, users: range) -> list[KeyValue]:
    """States as a busy shop's users have them; only their size and their variety matter here."""
    rng = np.random.default_rng(users.start)
    rows = layout.unpack([None] * len(users))
    rows["source_offset"] = users
    rows["clicks"] = rng.integers(1, 1_000, len(users))
    rows["recent_items"] = rng.integers(1, ITEMS, rows["recent_items"].shape)
    rows["hidden"] = rng.standard_normal(rows["hidden"].shape, np.float32)
    packed, size = rows.tobytes(), layout.dtype.itemsize
    return [(b"user-%d" % user, packed[place * size : (place + 1) * size]) for place, user in enumerate(users)]


def run_ours(environment: Mapping[str, str], folder: Path, states: int, seconds: float) -> Recovery:
    """`stream-app worker`, by its log lines `restoring` and `restored`."""
    command = [str(SCRIPTS / "stream-app"), "worker"]

    def progress(line: Mapping[str, Any]) -> tuple[int, float, bool] | None:
        if line.get("event") not in {"restoring", "restored"}:
            return None
        return line["records"], line["records"] / line["records_per_second"], line["event"] == "restored"

    with running(command, {**environment, "STREAM_APP_STATE_DIR": str(folder)}, folder) as process:
        return watch(process, folder.with_suffix(".log"), progress, range(states, states + 1), seconds)


def run_faust(settings: Settings, folder: Path, states: int, seconds: float) -> Recovery:
    """`benchmarks.stock_table`, by what it prints; before its first look a few records are restored already."""
    environment = {
        "STOCK_NAME": settings.app_id,
        "STOCK_BROKER": settings.broker,
        "STOCK_PARTITIONS": str(PARTITIONS),
        "STOCK_DATADIR": str(folder),
    }

    def progress(line: Mapping[str, Any]) -> tuple[int, float, bool] | None:
        return (line["records"], line["seconds"], line["done"]) if "seconds" in line else None

    with running([sys.executable, "-m", "benchmarks.stock_table", "worker"], environment, folder) as process:
        return watch(process, folder.with_suffix(".log"), progress, range(int(0.999 * states), states + 1), seconds)


@contextmanager
def running(command: list[str], environment: Mapping[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the length of a block, asked to end and then ended by its own id; its folder goes with it."""
    with folder.with_suffix(".log").open("wb") as output:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)  # the next round's process would wait for the group to miss this one
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def watch(
    process: subprocess.Popen[bytes],
    log: Path,
    progress: Callable[[Mapping[str, Any]], tuple[int, float, bool] | None],
    states: range,
    seconds: float,
) -> Recovery:
    """Follow the log until the process has restored everything, or for so long after its first line about it."""
    began, records, took, done = 0.0, 0, 0.0, False
    give_up = time.monotonic() + 180
    while not done and not (began and time.monotonic() > began + seconds):
        if process.poll() is not None or (not began and time.monotonic() > give_up):
            sys.exit(f"{log.stem} restored nothing, or ended; the end of its log:\n{log.read_text()[-2000:]}")
        for found in filter(None, map(progress, json_lines(log))):
            records, took, done = found
            began = began or time.monotonic()
        time.sleep(0.2)
    if done and records not in states:
        sys.exit(
            f"{log.stem} restored {records:,} states, and not {states}; the end of its log:\n{log.read_text()[-2000:]}"
        )
    return Recovery(records, took, resident_mb(process.pid, "VmHWM"))


def json_lines(log: Path) -> list[Mapping[str, Any]]:
    """The lines of a log that are whole JSON objects."""
    lines = log.read_text(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


if __name__ == "__main__":
    main()
