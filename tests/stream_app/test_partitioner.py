"""A key goes where Kafka's own default partitioner sends it."""

from __future__ import annotations

import pytest
from aiokafka.partitioner import DefaultPartitioner, murmur2
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_app.partitioner import partitions_of


@given(st.lists(st.binary(max_size=70), max_size=30), st.integers(1, 2**31 - 1))
@settings(max_examples=300)
def test_the_partition_is_aiokafkas_murmur2(keys, partitions):
    assert partitions_of(keys, partitions).tolist() == [(murmur2(key) & 0x7FFFFFFF) % partitions for key in keys]


@given(st.lists(st.text(max_size=10).map(str.encode), max_size=30), st.integers(1, 300))
def test_aiokafkas_default_partitioner_agrees(keys, count):
    partitions, choose = list(range(count)), DefaultPartitioner()
    assert partitions_of(keys, count).tolist() == [choose(key, partitions, partitions) for key in keys]


@pytest.mark.parametrize(
    ("key", "hashed"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_the_java_clients_own_test_vectors_hold(key, hashed):
    assert partitions_of([key], 2**31 - 1).tolist() == [(hashed & 0x7FFFFFFF) % (2**31 - 1)]


def test_a_long_key_and_no_keys_are_no_special_cases():
    key = b"k" * 1_000_000
    assert partitions_of([key, b""], 97).tolist() == [(murmur2(each) & 0x7FFFFFFF) % 97 for each in (key, b"")]
    assert partitions_of([], 97).tolist() == []
