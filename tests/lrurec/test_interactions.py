import gzip
import tracemalloc

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrurec import interactions as interactions_module
from lrurec import log_files
from lrurec.catalogue import Catalogue
from lrurec.errors import InteractionsError
from lrurec.interactions import Histories, leave_one_out, read_interactions

ROWS = [("u2", "b", 5), ("u1", "a", 9), ("u2", "c", 1), ("u1", "b", 3), ("u2", "a", 5)]
"""Users in the order u2, u1; u2's clicks at 5 are tied and stay in file order."""

EXPECTED = {"u2": ["c", "b", "a"], "u1": ["b", "a"]}


def as_dict(interactions):
    ids = interactions.catalogue.item_ids
    return {
        user: [ids[row - 1] for row in interactions.histories[index]]
        for index, user in enumerate(interactions.user_ids)
    }


def write(path, table):
    match path.name.removesuffix(".gz").rpartition(".")[2]:
        case "csv":
            content = table.write_csv().encode()
        case "jsonl" | "ndjson":
            content = table.write_ndjson().encode()
        case _:
            table.write_parquet(path)
            return path
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("order", ["timestamp", "timestamp_ms", "position"])
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.CSV", "a.jsonl", "a.jsonl.gz", "a.ndjson", "a.parquet"])
def test_every_kind_of_file_and_order_is_read_alike(tmp_path, name, order):
    table = pl.DataFrame(ROWS, schema=["user_id", "item_id", order], orient="row")
    interactions = read_interactions(write(tmp_path / name.lower(), table))
    assert as_dict(interactions) == EXPECTED
    assert list(as_dict(interactions)) == ["u2", "u1"]
    assert interactions.catalogue.item_ids == ("a", "b", "c")


def test_other_columns_are_ignored(tmp_path):
    table = pl.DataFrame({"user_id": ["u"], "price": [1.5], "item_id": ["a"], "position": [1]})
    assert as_dict(read_interactions(write(tmp_path / "a.csv", table))) == {"u": ["a"]}


def test_ids_may_be_numbers_and_leading_zeros_are_kept(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id,position\n1,007,1\n1,7,2\n")
    assert as_dict(read_interactions(tmp_path / "a.csv")) == {"1": ["007", "7"]}


def test_a_second_order_column_breaks_ties_of_the_first(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id,position,timestamp\nu,b,2,5\nu,a,1,5\nu,c,0,9\n")
    assert as_dict(read_interactions(tmp_path / "a.csv")) == {"u": ["a", "b", "c"]}


def test_nanoseconds_are_not_rounded(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp\nu,b,1700000000000000001\nu,a,1700000000000000000\n")
    assert as_dict(read_interactions(tmp_path / "a.csv")) == {"u": ["a", "b"]}


def test_fractions_of_seconds_are_understood(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp\nu,b,10.5\nu,a,9\n")
    assert as_dict(read_interactions(tmp_path / "a.csv")) == {"u": ["a", "b"]}


HEADER = "user_id,item_id,position\n"

FAULTS = {
    "no such file": ("a.csv", None),
    "unknown kind": ("a.xlsx", b"abc"),
    "compressed parquet": ("a.parquet.gz", gzip.compress(b"abc")),
    "nothing": ("a.csv", b""),
    "no rows": ("a.csv", HEADER.encode()),
    "a column twice": ("a.csv", b"user_id,item_id,user_id,position\nu,a,v,1\n"),
    "no user_id": ("a.csv", b"user,item_id,position\nu,a,1\n"),
    "no item_id": ("a.csv", b"user_id,item,position\nu,a,1\n"),
    "no order": ("a.csv", b"user_id,item_id\nu,a\n"),
    "an empty user": ("a.csv", (HEADER + "u,a,1\n,a,2\n").encode()),
    "an empty item": ("a.csv", (HEADER + "u,,1\n").encode()),
    "an empty position": ("a.csv", (HEADER + "u,a,\n").encode()),
    "a position that is no number": ("a.csv", (HEADER + "u,a,first\n").encode()),
    "NaN": ("a.csv", (HEADER + "u,a,1.5\nu,b,nan\n").encode()),
    "infinity": ("a.csv", (HEADER + "u,a,inf\n").encode()),
    "beyond 64 bits": ("a.csv", (HEADER + "u,a,99999999999999999999\n").encode()),
    "far beyond 64 bits": ("a.csv", (HEADER + "u,a,-1e300\n").encode()),
    "beyond 64 bits in JSON": ("a.jsonl", b'{"user_id": "u", "item_id": "a", "position": 99999999999999999999}\n'),
    "far beyond 64 bits in JSON": ("a.jsonl", b'{"user_id": "u", "item_id": "a", "position": 1e300}\n'),
    "a line break in an id": ("a.csv", (HEADER + 'u,"a\nb",1\n').encode()),
    "ragged lines": ("a.csv", (HEADER + "u,a,1,9,9\n").encode()),
    "not gzip": ("a.csv.gz", HEADER.encode()),
    "truncated gzip": ("a.csv.gz", gzip.compress((HEADER + "u,a,1\n" * 1000).encode())[:30]),
    "not parquet": ("a.parquet", b"PAR1 or so"),
    "not JSON": ("a.jsonl", b"{]\n"),
    "null in JSON": ("a.jsonl", b'{"user_id": null, "item_id": "a", "position": 1}\n'),
    "fractional ids": ("a.jsonl", b'{"user_id": 1.5, "item_id": "a", "position": 1}\n'),
    "a truth for a position": ("a.jsonl", b'{"user_id": "u", "item_id": "a", "position": true}\n'),
    "not UTF-8": ("a.csv", HEADER.encode() + b"\xff\xfe,a,1\n"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_log_that_cannot_be_is_refused_in_one_line(tmp_path, fault):
    name, content = FAULTS[fault]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InteractionsError) as refused:
        read_interactions(tmp_path / name)
    assert "\n" not in str(refused.value)
    assert name in str(refused.value)


def test_an_error_names_the_row(tmp_path):
    (tmp_path / "a.csv").write_text(HEADER + "u,a,1\nu,,2\n")
    with pytest.raises(InteractionsError, match="row 2"):
        read_interactions(tmp_path / "a.csv")


@pytest.mark.parametrize("value", ["", "first", "nan", "inf", "1e300", "-99999999999999999999", "9223372036854775808"])
def test_a_number_that_orders_nothing_is_named_with_its_row_and_column(tmp_path, value):
    (tmp_path / "a.csv").write_text(HEADER + f"u,a,1\nu,b,{value}\n")
    with pytest.raises(InteractionsError, match=rf"a\.csv: in data row 2 position is ('{value}'|empty); .*64 bits"):
        read_interactions(tmp_path / "a.csv")


def test_a_value_that_is_refused_is_shown_in_part_when_it_is_long(tmp_path):
    (tmp_path / "a.csv").write_text(HEADER + f"u,a,{'9' * 100_000}\n")
    with pytest.raises(InteractionsError) as refused:
        read_interactions(tmp_path / "a.csv")
    assert len(str(refused.value)) < 300


def test_the_outermost_numbers_of_64_bits_are_taken(tmp_path):
    rows = "u,a,9223372036854775807\nu,b,-9223372036854775808\nu,c,9223372036854775806\n"
    (tmp_path / "a.csv").write_text(HEADER + rows)
    assert as_dict(read_interactions(tmp_path / "a.csv")) == {"u": ["b", "c", "a"]}


CLICKS = st.tuples(st.sampled_from("ABCDé"), st.sampled_from(["x", "y", "z", "10", "9"]), st.integers(-2, 2))


@given(
    st.lists(st.tuples(CLICKS, st.integers(0, 1)), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
)
def test_a_log_in_any_order_is_grouped_and_sorted_however_it_is_cut(tmp_path_factory, rows, batch, slab, fractions):
    path = tmp_path_factory.mktemp("log") / "a.csv"
    scale = 0.5 if fractions else 1
    lines = [f"{user},{item},{time * scale},{place}" for (user, item, time), place in rows]
    path.write_text("\n".join(["user_id,item_id,timestamp,position", *lines]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_files, "BATCH_ROWS", batch)
        patch.setattr(interactions_module, "CLICKS_PER_SLAB", slab)
        log = read_interactions(path)
    expected = {}
    for (user, item, time), place in rows:
        expected.setdefault(user, []).append((time, place, item))
    in_order = {user: [item for *_, item in sorted(clicks, key=lambda c: c[:2])] for user, clicks in expected.items()}
    assert as_dict(log) == in_order
    assert list(log.user_ids) == list(expected)
    assert list(log.catalogue.item_ids) == sorted({item for (_, item, _), _ in rows})


def test_grouping_costs_no_more_than_the_stated_bytes_a_click(tmp_path, monkeypatch):
    monkeypatch.setattr(log_files, "BATCH_ROWS", 1 << 12)
    monkeypatch.setattr(interactions_module, "CLICKS_PER_SLAB", 1 << 12)
    clicks = 300_000
    random = np.random.default_rng(0)
    columns = {name: random.integers(0, 500, clicks) for name in ("user_id", "item_id", "timestamp")}
    pl.DataFrame(columns).write_csv(tmp_path / "a.csv")
    tracemalloc.start()
    log = read_interactions(tmp_path / "a.csv")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(log.histories.items) == clicks
    # Of 12 + 16 bytes, numpy's: the 16 of the rows in the file's order are polars', which are not traced.
    assert peak / clicks < 12 + 8
    assert kept / clicks < 4 + 8 + 2


def histories(*items):
    lengths = [len(each) for each in items]
    flat = np.array([row for each in items for row in each], np.int32)
    return Histories(flat, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def lists(histories):
    return [histories[user].tolist() for user in range(len(histories))]


@given(st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=6))
def test_leave_one_out_cuts_as_the_paper_does(users):
    split = leave_one_out(histories(*users))
    long = [user for user in users if len(user) >= 3]
    assert lists(split.train) == [user[:-2] if len(user) >= 3 else user for user in users]
    assert lists(split.validation.histories) == [user[:-2] for user in long]
    assert split.validation.answers.tolist() == [user[-2] for user in long]
    assert lists(split.test.histories) == [user[:-1] for user in long]
    assert split.test.answers.tolist() == [user[-1] for user in long]


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=5), st.integers(0, 4))
def test_histories_can_be_cut_and_filtered(users, count):
    made = histories(*users)
    assert lists(made.last(count)) == [user[-count:] if count else [] for user in users]
    assert lists(made.known()) == [[row for row in user if row] for user in users]
    assert lists(made.take(np.arange(len(users))[::-1].copy())) == users[::-1]


def test_some_users_keep_the_rows_of_the_whole_catalogue(tmp_path):
    interactions = read_interactions(
        write(tmp_path / "a.csv", pl.DataFrame(ROWS, schema=["user_id", "item_id", "position"], orient="row"))
    )
    assert as_dict(interactions.take(slice(1, None))) == {"u1": EXPECTED["u1"]}
    assert interactions.take(slice(1, None)).catalogue == interactions.catalogue


def timed(tmp_path, name="a.csv", column="timestamp", rows=ROWS):
    return read_interactions(
        write(tmp_path / name, pl.DataFrame(rows, schema=["user_id", "item_id", column], orient="row"))
    )


@pytest.mark.parametrize("column", ["timestamp", "timestamp_ms"])
def test_every_click_keeps_its_time_in_the_order_of_the_items(tmp_path, column):
    assert timed(tmp_path, column=column).times.tolist() == [1, 5, 5, 3, 9]


def test_a_log_of_positions_has_no_times(tmp_path):
    interactions = timed(tmp_path, column="position")
    assert interactions.times is None
    for asked in (interactions.required_times, lambda: interactions.clicks_before(5), lambda: interactions.before(5)):
        with pytest.raises(InteractionsError, match=r"position .* needs a column timestamp or timestamp_ms"):
            asked()


def test_milliseconds_are_the_times_where_a_log_has_seconds_too(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp,timestamp_ms,position\nu,b,1,1400,1\nu,a,1,1300,0\n")
    assert read_interactions(tmp_path / "a.csv").times.tolist() == [1300, 1400]


def test_times_are_no_part_of_the_fingerprint(tmp_path):
    later = [(user, item, time + 1) for user, item, time in ROWS]
    assert timed(tmp_path).fingerprint == timed(tmp_path, "b.csv", rows=later).fingerprint


def test_some_users_keep_their_times(tmp_path):
    assert timed(tmp_path).take(slice(1, None)).times.tolist() == [3, 9]


@given(
    st.lists(st.tuples(st.sampled_from("uvw"), st.sampled_from("abcd"), st.integers(0, 9)), min_size=1, max_size=20),
    st.integers(0, 10),
)
def test_a_log_before_a_time_is_that_of_the_file_as_it_was_then(tmp_path_factory, rows, time):
    folder = tmp_path_factory.mktemp("log")
    rows = sorted(rows, key=lambda row: row[2])
    earlier = [row for row in rows if row[2] < time]
    whole = timed(folder, "whole.csv", rows=rows)
    if not earlier:
        with pytest.raises(InteractionsError, match=f"before {time}; its first is at {rows[0][2]}"):
            whole.before(time)
        return
    cut, expected = whole.before(time), timed(folder, "earlier.csv", rows=earlier)
    assert as_dict(cut) == as_dict(expected)
    assert cut.fingerprint == expected.fingerprint
    assert cut.times.tolist() == expected.times.tolist()
    assert whole.clicks_before(time).tolist() == [sum(row[0] == user for row in earlier) for user in whole.user_ids]


def test_items_unknown_to_another_catalogue_are_row_zero(tmp_path):
    interactions = read_interactions(
        write(tmp_path / "a.csv", pl.DataFrame(ROWS, schema=["user_id", "item_id", "position"], orient="row"))
    )
    assert lists(interactions.histories_in(Catalogue(["c", "a"]))) == [[1, 0, 2], [0, 2]]


def test_the_fingerprint_is_of_the_content_not_of_the_file(tmp_path):
    table = pl.DataFrame(ROWS, schema=["user_id", "item_id", "position"], orient="row")
    one, other = (read_interactions(write(tmp_path / name, table)) for name in ("a.csv", "b.parquet"))
    assert one.fingerprint == other.fingerprint
    changed = read_interactions(write(tmp_path / "c.csv", table.with_columns(position=-pl.col("position"))))
    assert changed.fingerprint != one.fingerprint


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=9), st.integers(1, 4), st.data())
def test_histories_are_sliced_alike_whatever_the_slabs(users, slab, data):
    whole = histories(*users)
    chosen = data.draw(st.lists(st.integers(0, len(users) - 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interactions_module, "CLICKS_PER_SLAB", slab)
        assert lists(whole.take(np.array(chosen, np.int64))) == [users[user] for user in chosen]
        assert lists(whole.last(2)) == [user[-2:] for user in users]
        assert lists(whole.known()) == [[row for row in user if row] for user in users]
