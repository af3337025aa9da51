"""The same work as an idiomatic Quix Streams application: a stateful function of one click at a time.

State on RocksDB with a changelog, librdkafka underneath, checkpoints every five seconds: the library's defaults. The
step is the one of `obvious_worker`. At least once: a click may be applied twice after a crash.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from quixstreams import Application
from quixstreams.state import State

from benchmarks.obvious_worker import FoldedStep, ten_best
from lrurec.bundle import load_bundle


def build(name: str, broker: str, bundle_folder: Path, state_dir: Path) -> Application:
    """The application; `run` runs it."""
    torch.set_num_threads(1)
    bundle = load_bundle(bundle_folder)
    step = FoldedStep(bundle.model)
    ids = ["", *bundle.catalogue.item_ids]
    rows = {item_id: row for row, item_id in enumerate(ids)}
    app = Application(
        broker, consumer_group=name, auto_offset_reset="earliest", state_dir=state_dir, loglevel="WARNING"
    )
    clicks = app.topic("clicks", key_deserializer="bytes", value_deserializer="json")
    recommendations = app.topic(f"{name}-recommendations", key_serializer="bytes", value_serializer="json")

    def recommend(click: dict[str, Any], state: State) -> dict[str, Any]:
        item = rows[click["item_id"]]
        with torch.inference_mode():
            scores, stored = step(item, state.get_bytes("state"))
            state.set_bytes("state", stored)
            return {"user_id": click["user_id"], "items": ten_best(scores, item, ids)}

    app.dataframe(clicks).apply(recommend, stateful=True).to_topic(recommendations)
    return app


if __name__ == "__main__":
    environment = os.environ
    build(
        environment["PEER_NAME"],
        environment["PEER_BROKER"],
        Path(environment["PEER_BUNDLE"]),
        Path(environment["PEER_DATADIR"]),
    ).run()
