"""What is added is read back, each user's entries together and in order."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from stream_app.verify.ledger import BUCKETS, Entry, Ledger

entries = st.builds(
    Entry, st.integers(0, 255), st.integers(0, 2**31), st.integers(0, 2**63 - 1), st.binary(max_size=3), st.binary()
)


@given(st.lists(entries, max_size=60))
@settings(max_examples=30)
def test_every_entry_comes_back_once_with_its_users_others_in_order(tmp_path_factory, added):
    ledger = Ledger(tmp_path_factory.mktemp("ledger"))
    for entry in added:
        ledger.add(entry)
    buckets = [entries for entries in ledger.buckets() if entries]
    assert sorted(entry for bucket in buckets for entry in bucket) == sorted(added)
    for key in {entry.key for entry in added}:
        [bucket] = [bucket for bucket in buckets if key in {entry.key for entry in bucket}]
        assert [entry for entry in bucket if entry.key == key] == [entry for entry in added if entry.key == key]


def test_more_than_a_buffer_goes_to_the_disk_meanwhile(tmp_path):
    ledger = Ledger(tmp_path)
    for number in range(100):
        ledger.add(Entry(0, 0, number, b"user", bytes(10_000)))
    [file] = tmp_path.iterdir()
    assert file.stat().st_size > 900_000
    [bucket] = [entries for entries in ledger.buckets() if entries]
    assert [entry.offset for entry in bucket] == list(range(100))


def test_users_are_spread_over_the_buckets_in_a_sample_too(tmp_path):
    ledger = Ledger(tmp_path, sample=0.1)
    sizes = defaultdict(int)
    for number in range(100_000):
        if ledger.keeps(key := b"user-%d" % number):
            ledger.add(Entry(0, 0, 0, key, b""))
    for bucket in ledger.buckets():
        sizes[len(bucket)] += 1
    assert sum(size * count for size, count in sizes.items()) in range(9_500, 10_500)
    assert max(sizes) < 4 * 10_000 / BUCKETS


def test_a_whole_sample_keeps_everybody(tmp_path):
    ledger = Ledger(tmp_path)
    assert all(ledger.keeps(b"%d" % number) for number in range(10_000))
