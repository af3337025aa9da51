"""Partitions are shared out evenly, stay where they are, and go where their states are."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_app.assignment import Held, distribute

SETS = st.sets(st.integers(0, 12))
MEMBERS = st.dictionaries(st.sampled_from("abcdef"), st.builds(Held, SETS, SETS), min_size=1)


@given(MEMBERS, st.integers(1, 12), st.integers(0, 4))
def test_each_partition_has_one_active_and_its_standbys_on_other_members_whatever_was_before(
    before: dict[str, Held], partitions: int, replicas: int
) -> None:
    unchanged = copy.deepcopy(before)
    after = distribute(before, partitions, replicas)
    assert before == unchanged
    assert after.keys() == before.keys()
    for partition in range(partitions):
        assert sum(partition in held.actives for held in after.values()) == 1
        assert sum(partition in held.standbys for held in after.values()) == min(replicas, len(before) - 1)
    assert all(not held.actives & held.standbys for held in after.values())
    assert all(held.actives | held.standbys <= set(range(partitions)) for held in after.values())
    counts = [len(held.actives) for held in after.values()]
    assert max(counts) - min(counts) <= 1


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 3))
def test_what_is_shared_out_stays(members: int, partitions: int, replicas: int) -> None:
    first = distribute({f"m{n}": Held() for n in range(members)}, partitions, replicas)
    assert distribute(first, partitions, replicas) == first


@pytest.mark.parametrize("gone", ["m0", "m1", "m2"])
def test_partitions_of_a_member_that_is_gone_go_to_their_standbys(gone: str) -> None:
    before = distribute({f"m{n}": Held() for n in range(3)}, 12, 1)
    del before[gone]
    after = distribute(before, 12, 1)
    for member, held in before.items():
        assert held.actives < after[member].actives <= held.actives | held.standbys


def test_a_member_that_joins_gets_its_share_though_there_are_standbys() -> None:
    before = distribute({"a": Held(), "b": Held()}, 4, 1)
    after = distribute({**before, "c": Held()}, 4, 1)
    assert sorted(len(held.actives) for held in after.values()) == [1, 1, 2]


def test_who_gives_a_partition_up_becomes_its_standby() -> None:
    after = distribute({"a": Held(), "b": Held(), "owner": Held({0, 1, 2})}, 3, 1)
    assert (after["owner"].actives, after["a"].actives, after["b"].actives) == ({0}, {1}, {2})
    assert after["owner"].standbys == {1, 2}


def test_a_free_partition_goes_where_its_states_are() -> None:
    after = distribute({"a": Held(standbys={1}), "b": Held(standbys={0})}, 2, 0)
    assert after == {"a": Held({1}), "b": Held({0})}


def test_a_restarted_member_gets_what_is_on_its_disk_and_takes_nothing_that_would_stay() -> None:
    everything = Held({0, 1, 2, 3})
    for disk in ({0, 1}, {1, 2}, {2, 3}, {0, 3}):
        assert distribute({"stayed": everything, "came back": Held(standbys=disk)}, 4, 0)["came back"].actives == disk
    halves = {"a": Held({0, 1}), "b": Held({2, 3})}
    after = distribute({**halves, "stale": Held(standbys={0, 1, 2, 3})}, 4, 0)
    assert len(after["a"].actives & {0, 1}) + len(after["b"].actives & {2, 3}) == 3


def test_a_partition_that_two_claim_has_one_owner() -> None:
    after = distribute({"a": Held({0, 1}), "b": Held({0, 1})}, 2, 0)
    assert sorted(tuple(held.actives) for held in after.values()) == [(0,), (1,)]
