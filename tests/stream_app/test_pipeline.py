"""States between computation and disk. The order of the pipeline's steps is tested by kills, in test_worker.py."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from stream_app.micro_batch import KeyValue
from stream_app.pipeline import _UnpersistedStates

PARTITIONS, USERS = 2, 3


class SlowDisk:
    """The store as the pipeline sees it: it holds what has been persisted, later than what has been computed."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, bytes], bytes] = {}

    def load(self, partition: int, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.rows.get((partition, key)) for key in keys]


users = st.tuples(st.integers(0, PARTITIONS - 1), st.integers(0, USERS - 1).map(lambda n: b"user-%d" % n))
micro_batches = st.lists(st.tuples(st.sets(users, min_size=1), st.integers(0, 2)), max_size=30)


@settings(deadline=None, max_examples=200)
@given(micro_batches)
def test_a_load_always_finds_the_newest_state_however_far_the_disk_lags(
    batches: list[tuple[set[tuple[int, bytes]], int]],
) -> None:
    disk = SlowDisk()
    states = _UnpersistedStates(disk)  # type: ignore[arg-type]
    newest: dict[tuple[int, bytes], bytes] = {}
    waiting: list[tuple[int, dict[tuple[int, bytes], bytes]]] = []
    for number, (touched, writes) in enumerate(batches, start=1):
        states.forget_persisted()
        for partition in range(PARTITIONS):
            keys = [b"user-%d" % n for n in range(USERS)]
            assert states.load(partition, keys) == [newest.get((partition, key)) for key in keys]
        rows = dict.fromkeys(touched, b"state-%d" % number)
        by_partition: dict[int, list[KeyValue]] = {}
        for (partition, key), state in rows.items():
            by_partition.setdefault(partition, []).append(KeyValue(key, state))
        states.remember(number, by_partition)
        newest |= rows
        waiting.append((number, rows))
        for _ in range(min(writes, len(waiting))):
            done, persisted = waiting.pop(0)
            disk.rows |= persisted
            states.persisted = done


def test_persisted_states_are_not_kept() -> None:
    disk = SlowDisk()
    states = _UnpersistedStates(disk)  # type: ignore[arg-type]
    states.remember(1, {0: [KeyValue(b"u", b"one")]})
    states.remember(2, {0: [KeyValue(b"u", b"two")]})
    states.persisted = 1
    states.forget_persisted()
    assert states.load(0, [b"u"]) == [b"two"]
    states.persisted = 2
    states.forget_persisted()
    assert states.load(0, [b"u"]) == [None]
