"""What `STREAM_APP_PUBLISH=latest` is worth on a backlog where few users click a lot.

    python -m benchmarks.latest                   400,000 clicks, users by Zipf's law with exponent 1.2, three rounds

With `latest` a user's last click of a micro-batch alone is ranked and published; every click advances the state. Both
work off the same backlog in turns. Counted are the clicks that have become durable, as the worker's own /metrics says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from benchmarks import backlog
from benchmarks.machine import processor
from stream_app.dev.kafka.broker import LocalBroker

Publish: TypeAlias = Literal["each", "latest"]

EXPONENT = 1.2


def main() -> None:
    """Print a line a round, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latest", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clicks", type=int, default=400_000)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--items", type=int, default=3_416)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {vars(options)}")
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(Path(folder), options.clicks, options.users, options.items, options.rounds)
    ratios = [latest / each for each, latest in zip(rates["each"], rates["latest"], strict=True)]
    for name, column in {**rates, "latest / each": ratios}.items():
        print(
            f"{name:>14}: median {statistics.median(column):10,.2f}   min {min(column):,.2f}   max {max(column):,.2f}"
        )
    print(json.dumps({"benchmark": "latest", **vars(options), "clicks_per_second": rates}))


def measure(folder: Path, clicks: int, users: int, items: int, rounds: int) -> dict[Publish, list[float]]:
    """Clicks a second of both, a figure a round."""
    bundle = folder / "bundle"
    backlog.write_bundle(bundle, items)
    weights = np.arange(1, users + 1) ** -EXPONENT
    rates: dict[Publish, list[float]] = {"each": [], "latest": []}
    with LocalBroker(folder / "kafka", port=0, heap_mb=1024) as broker:
        asyncio.run(backlog.produce_backlog(broker.bootstrap, clicks, weights / weights.sum(), items))
        for number in range(rounds):
            for publish, found in rates.items():
                place = folder / f"{publish}-{number}"
                found.append(run(broker.bootstrap, bundle, place, clicks, publish))
            print(f"round {number + 1}: " + ", ".join(f"{name} {each[-1]:,.0f}/s" for name, each in rates.items()))
    return rates


def run(bootstrap: str, bundle: Path, folder: Path, clicks: int, publish: Publish) -> float:
    """Clicks a second from the first that are durable to the last."""
    port = backlog.free_port()
    environment = backlog.worker_environment(
        bootstrap, bundle, folder, "at_least_once", PUBLISH=publish, WEB_PORT=str(port)
    )
    points: list[tuple[float, int]] = []
    deadline = time.monotonic() + 60 + backlog.ROUND_SECONDS
    with backlog.worker(environment, folder.with_suffix(".log")):
        while not points or points[-1][1] < clicks:
            if time.monotonic() > deadline:
                raise TimeoutError
            durable = backlog.durable_clicks(port)
            if durable and (not points or durable > points[-1][1]):
                points.append((time.monotonic(), durable))
            time.sleep(0.05)
    backlog.prove(environment)
    (start, first), (stop, last) = points[0], points[-1]
    return (last - first) / (stop - start)


if __name__ == "__main__":
    main()
