"""Workers that are wrong on purpose, by name: the harness has to find each out.

Each undoes one thing that `docs/guarantees.md` relies on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import stream_app.delivery
import stream_app.micro_batch
import stream_app.state_table
from stream_app.delivery import AtLeastOnce
from stream_app.pipeline import Pipeline
from stream_app.state_table import Restored, UserStateStore


def acknowledge_early() -> None:
    """Clicks are acknowledged before anything that they led to is durable."""
    send_outputs = Pipeline._send_outputs

    async def mutated(self: Any) -> None:
        batch = await self._encoded.get()
        for event in batch.events:
            event.ack()
        self._encoded._queue.appendleft(batch)
        await send_outputs(self)

    Pipeline._send_outputs = mutated  # type: ignore[method-assign]


def swap_outputs_and_changelog() -> None:
    """A state is in the changelog and in RocksDB before the recommendations up to it are sent."""

    async def keep(self: Any, parcel: Any) -> None:
        pass

    send_outputs, persist = AtLeastOnce.send_outputs, Pipeline._persist

    async def persist_then_send(self: Any) -> None:
        batch = await self._logged.get()
        self._logged._queue.appendleft(batch)
        await persist(self)
        await send_outputs(self._delivery, batch.parcel)
        await stream_app.delivery.acknowledged(batch.parcel.outputs_in_flight, "recommendations or dead letters", 30)

    AtLeastOnce.send_outputs = keep  # type: ignore[method-assign]
    Pipeline._persist = persist_then_send  # type: ignore[method-assign]


def apply_twice() -> None:
    """The offset in a state is not looked at: what was applied and not committed is applied again."""
    stream_app.micro_batch.not_applied_yet = lambda user, offset, applied: np.arange(len(user))


def restore_without_the_guard() -> None:
    """The last record of a user in the changelog wins, though a frozen worker may have written it late."""

    def last_wins(records: Any, stored: Any, overtaken: Any, layout: Any) -> Restored:
        return Restored(list({key: state for key, state in records if key and state}.items()), frozenset())

    stream_app.state_table.restore_rows = last_wins


def drop_the_fence() -> None:
    """A worker doesn't notice that another one has written to its changelog, and doesn't mend what is overtaken."""

    def persist_appended(self: UserStateStore, partition: int, rows: Any, offsets: range) -> None:
        self.persist(partition, rows, offsets[-1])

    UserStateStore.persist_appended = persist_appended  # type: ignore[method-assign]
    restore_without_the_guard()


MUTATIONS: dict[str, Callable[[], None]] = {
    "acknowledge-early": acknowledge_early,
    "swap-outputs-and-changelog": swap_outputs_and_changelog,
    "apply-twice": apply_twice,
    "restore-without-the-guard": restore_without_the_guard,
    "drop-the-fence": drop_the_fence,
}
