"""The program that anybody would write first: an idiomatic Faust agent, one click at a time.

A table on RocksDB, one torch step, torch's top-10, one send per click. The model is folded before the loop, as anybody
would who measured it once. It keeps no fence and no order between output and changelog; it is measured, not offered.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faust
import numpy as np
import torch

from lrurec.bundle import load_bundle
from lrurec.model import LRURec
from lrurec.recurrence import from_planes, planes


class Click(faust.Record):
    """A click event."""

    user_id: str
    item_id: str
    timestamp_ms: int


class FoldedStep:
    """One recurrent step of one user, everything constant computed beforehand."""

    def __init__(self, model: LRURec) -> None:
        self._model = model
        self._embedded = model.layer_norm(model.item_embedding.weight)
        self._blocks: list[Any] = list(model.blocks)
        self._decay = [block.lru.eigenvalues() for block in self._blocks]
        width, channels = model.config.hidden_units, model.config.state_channels
        self._drive = [_linear_of(lambda x, lru=block.lru: lru.drive(x).flatten(1), width) for block in self._blocks]
        self._read = [
            _linear_of(lambda h, lru=block.lru: lru.read(h.unflatten(1, (2, -1))), 2 * channels)
            for block in self._blocks
        ]
        self._shape = (len(self._blocks), channels)

    def __call__(self, item: int, stored: bytes | None) -> tuple[torch.Tensor, bytes]:
        hidden = np.zeros(self._shape, np.complex64) if stored is None else np.frombuffer(stored, np.complex64)
        state = torch.from_numpy(hidden.reshape(self._shape).copy())
        x = self._embedded[item][None]
        for index, block in enumerate(self._blocks):
            driven = torch.nn.functional.linear(x, *self._drive[index])
            state[index] = self._decay[index] * state[index] + from_planes(driven.view(2, -1))
            x = block._join(torch.nn.functional.linear(planes(state[index]).view(1, -1), *self._read[index]), x)
        return self._model.scores(x)[0], state.numpy().tobytes()


def ten_best(scores: torch.Tensor, clicked: int, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The best items but the one just clicked, as a recommendation names them."""
    scores[0] = scores[clicked] = -torch.inf
    best, top = scores.topk(10)
    return [{"item_id": ids[row], "score": score} for row, score in zip(top.tolist(), best.tolist(), strict=True)]


def _linear_of(function: Callable[[torch.Tensor], torch.Tensor], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of an affine function of rows of this width."""
    bias = function(torch.zeros(1, width))[0]
    return (function(torch.eye(width)) - bias).T.contiguous(), bias


def build(name: str, broker: str, bundle_folder: Path, partitions: int, datadir: Path) -> faust.App:
    """The app; `faust worker` runs it."""
    torch.set_num_threads(1)
    bundle = load_bundle(bundle_folder)
    step = FoldedStep(bundle.model)
    ids = ["", *bundle.catalogue.item_ids]
    rows = {item_id: row for row, item_id in enumerate(ids)}
    app = faust.App(
        name,
        broker=f"kafka://{broker}",
        store="rocksdb://",
        datadir=str(datadir),
        topic_partitions=partitions,
        topic_replication_factor=1,
        topic_disable_leader=True,
        web_enabled=False,
        stream_recovery_delay=0.0,
        table_standby_replicas=0,
    )
    clicks = app.topic("clicks", key_type=bytes, value_type=Click)
    recommendations = app.topic(f"{name}-recommendations", key_type=bytes, value_serializer="json")
    states = app.Table("states", key_type=bytes, value_type=bytes, partitions=partitions)

    @app.agent(clicks)
    async def recommend(stream: Any) -> None:
        with torch.inference_mode():
            async for key, click in stream.items():
                item = rows[click.item_id]
                scores, states[key] = step(item, states.get(key))
                items = ten_best(scores, item, ids)
                await recommendations.send(key=key, value={"user_id": click.user_id, "items": items})

    return app


if __name__ == "__main__":
    environment = os.environ
    application = build(
        environment["PEER_NAME"],
        environment["PEER_BROKER"],
        Path(environment["PEER_BUNDLE"]),
        int(environment["PEER_PARTITIONS"]),
        Path(environment["PEER_DATADIR"]),
    )
    faust.Worker(application, loglevel="WARNING", redirect_stdouts=False).execute_from_commandline()
