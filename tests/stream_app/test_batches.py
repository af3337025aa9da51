"""What is packed is a record batch as aiokafka writes it and reads it, with every record in its place."""

from __future__ import annotations

import random

import pytest
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_app.batches import BATCH_BYTES, Packer

TIME_MS = 1_700_000_000_123
PRODUCER = 4_000_000_007, 3, 123_456_789

texts = st.one_of(st.binary(max_size=9), st.integers(0, 20_000).map(bytes))
records = st.lists(st.tuples(texts, texts), min_size=1, max_size=150)


def built(batch):
    batch.records._set_producer_state(*PRODUCER)
    return bytes(batch.records._build())


def built_by_aiokafka(rows, *, transactional=0):
    batch = BatchBuilder(1 << 30, 0, is_transactional=transactional)
    for key, value in rows:
        assert batch.append(timestamp=TIME_MS, key=key, value=value, headers=[]) is not None
    batch._set_producer_state(*PRODUCER)
    return bytes(batch._build())


def read(data):
    batches = MemoryRecords(data)
    batch = batches.next_batch()
    assert batch.validate_crc()
    assert not batches.has_next()
    return [(record.key, record.value) for record in batch]


@given(records, st.sampled_from([1, 200, 3_000, BATCH_BYTES]), st.booleans())
@settings(max_examples=200)
def test_a_batch_has_the_bytes_that_aiokafka_writes(rows, most, transactional):
    left = list(rows)
    for batch in Packer(most, transactional=transactional).pack_for(3, rows, TIME_MS):
        here, left = left[: batch.records.record_count()], left[batch.records.record_count() :]
        assert built(batch) == built_by_aiokafka(here, transactional=int(transactional))
        assert batch.records.size() == len(built(batch))
        assert batch.partition == 3
    assert left == []


@given(records, st.sampled_from([1, 200, 3_000]))
def test_a_batch_is_full_and_no_larger_than_it_may_be(rows, most):
    batches = Packer(most).pack_for(0, rows, TIME_MS)
    left = list(rows)
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        count = batch.records.record_count()
        assert batch.records.size() <= most or count == 1
        if following is not None:
            assert len(built_by_aiokafka(left[: count + 1])) > most
        left = left[count:]


@given(records, st.integers(1, 70))
def test_each_record_goes_with_its_keys_partition_and_keeps_its_order(rows, partitions):
    choose, everywhere, found = DefaultPartitioner(), list(range(partitions)), {}
    for batch in Packer(2_000).pack(rows, partitions, TIME_MS):
        found.setdefault(batch.partition, []).extend(read(built(batch)))
    for partition, arrived in found.items():
        assert arrived == [row for row in rows if choose(row[0], everywhere, everywhere) == partition]
    assert sum(map(len, found.values())) == len(rows)


@given(st.dictionaries(st.integers(0, 200), st.lists(st.tuples(texts, texts), max_size=20), max_size=9))
def test_records_for_given_partitions_stay_with_them(rows):
    packed = Packer(2_000).pack_each(rows, TIME_MS)
    found = {
        partition: [row for batch in batches for row in read(built(batch))] for partition, batches in packed.items()
    }
    assert found == {partition: some for partition, some in rows.items() if some}


@pytest.mark.parametrize("count", [63, 64, 65, 8_191, 8_192, 8_193])
def test_numbers_that_take_another_byte_are_no_special_cases(count):
    rows = [(b"", b"")] * count
    [batch] = Packer(BATCH_BYTES).pack_for(0, rows, TIME_MS)
    assert built(batch) == built_by_aiokafka(rows)


def test_a_record_larger_than_every_limit_is_a_batch_by_itself():
    large = random.Random(1).randbytes(3 * BATCH_BYTES)
    batches = Packer(10 * BATCH_BYTES).pack_for(0, [(b"a", b"1"), (b"b", large), (b"c", b"3")], TIME_MS)
    assert [read(built(batch)) for batch in batches] == [[(b"a", b"1")], [(b"b", large)], [(b"c", b"3")]]


def test_no_records_are_no_batches():
    packer = Packer(BATCH_BYTES)
    assert (packer.pack([], 3, TIME_MS), packer.pack_for(0, [], TIME_MS), packer.pack_each({}, TIME_MS)) == ([], [], {})


def test_a_batch_that_is_built_again_has_the_same_bytes():
    [batch] = Packer(BATCH_BYTES).pack_for(0, [(b"a", b"1")], TIME_MS)
    assert built(batch) == built(batch)
