"""A stock Faust app with a RocksDB table, to see how fast Faust itself brings a table back from its changelog.

Faust's own store, its own options, its own recovery. It says once a second, on stdout, how far it came.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Any

import faust

_LOOK_SECONDS = 0.1


def build(name: str, broker: str, partitions: int, datadir: str) -> faust.App:
    """The app; `faust worker` runs it. Its changelog has the name of ours; there are no clicks for the agent."""
    app = faust.App(
        name,
        broker=f"kafka://{broker}",
        store="rocksdb://",
        datadir=datadir,
        topic_partitions=partitions,
        topic_replication_factor=1,
        topic_disable_leader=True,
        web_enabled=False,
        stream_recovery_delay=0.0,
        table_standby_replicas=0,
    )
    states = app.Table("user_state", key_type=bytes, value_type=bytes, partitions=partitions)

    @app.agent(app.topic("clicks", key_type=bytes, value_type=bytes))
    async def keep(stream: Any) -> None:
        async for key, click in stream.items():
            states[key] = click

    @app.on_partitions_assigned.connect
    async def watch(_: faust.App, assigned: Any, **__: Any) -> None:
        app.add_future(report_recovery(app))

    return app


async def report_recovery(app: faust.App) -> None:
    """Records restored since the last look at which there were none, until there is nothing left."""
    recovery, most, began, said = app.tables.recovery, 0, time.monotonic(), 0.0
    while True:
        left, now = recovery.active_remaining_total(), time.monotonic()
        if left >= most:
            most, began = left, now
        done = bool(most) and app.tables.actives_ready
        if done or (left < most and now > said + 1):
            said = now
            print(json.dumps({"records": most - left, "seconds": now - began, "done": done}), flush=True)
        if done:
            return
        await asyncio.sleep(_LOOK_SECONDS)


if __name__ == "__main__":
    environment = os.environ
    application = build(
        environment["STOCK_NAME"],
        environment["STOCK_BROKER"],
        int(environment["STOCK_PARTITIONS"]),
        environment["STOCK_DATADIR"],
    )
    faust.Worker(application, loglevel="WARNING", redirect_stdouts=False).execute_from_commandline()
