import gzip
import json
import os
import tracemalloc

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lrurec import log_files
from lrurec.errors import InteractionsError
from lrurec.log_files import read_batches, read_log


@pytest.fixture
def small_pieces(monkeypatch):
    """Batches of 3 rows and blocks of 64 bytes, so that a short file is many."""
    monkeypatch.setattr(log_files, "BATCH_ROWS", 3)
    monkeypatch.setattr(log_files, "BLOCK_BYTES", 64)


def json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def click(**changes):
    return {"user_id": "u", "item_id": "a", "position": 1} | changes


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_batches_are_the_log_in_its_order(tmp_path, name):
    log = pl.DataFrame(
        {
            "user_id": [f"u{k % 7}" for k in range(40)],
            "item_id": [f"ä{k}" for k in range(40)],
            "title": ['"two\nlines", said'] * 40,
            "position": range(40),
        }
    )
    path = tmp_path / name
    if name.endswith(".parquet"):
        log.write_parquet(path, row_group_size=5)
    else:
        content = (log.write_csv() if ".csv" in name else log.write_ndjson()).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert len(list(read_batches(path))) > 5
    assert read_log(path).equals(log.drop("title"))


def test_gzip_files_one_after_the_other_are_one_file(tmp_path):
    halves = [b"user_id,item_id,position\nu,a,1\n", b"u,b,2\n"]
    (tmp_path / "a.csv.gz").write_bytes(b"".join(map(gzip.compress, halves)))
    assert read_log(tmp_path / "a.csv.gz").rows() == [("u", "a", 1), ("u", "b", 2)]


def test_a_fraction_in_a_late_batch_makes_a_column_of_fractions(tmp_path, small_pieces):
    (tmp_path / "a.csv").write_text("user_id,item_id,position\n" + "u,a,1\n" * 5 + "u,a,1.5\n")
    assert read_log(tmp_path / "a.csv")["position"].to_list() == [1.0] * 5 + [1.5]


def test_ids_may_be_numbers_here_and_text_there(tmp_path, small_pieces):
    path = json_lines(tmp_path / "a.jsonl", [click(user_id=7)] * 4 + [click(user_id="7b")] * 4)
    assert read_log(path)["user_id"].to_list() == ["7"] * 4 + ["7b"] * 4


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl"])
def test_an_error_in_a_late_batch_names_its_row_in_the_file(tmp_path, small_pieces, name):
    good, bad = ("u,a,1\n", "u,,2\n") if "csv" in name else (json.dumps(c) + "\n" for c in (click(), click(item_id="")))
    text = ("user_id,item_id,position\n" if "csv" in name else "") + good * 20 + bad + good * 20
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    with pytest.raises(InteractionsError, match=rf"{name}: in data row 21 item_id is empty"):
        read_log(tmp_path / name)


LATE_FAULTS = {
    "a column that ends": ([{"user_id": "u", "item_id": "a"}], "row 21 position is empty"),
    "a column that begins": ([click(timestamp=1)], "row 21 timestamp is given, .* all or none"),
    "ids that become fractions": ([click(item_id=1.5)], "ids must be text or whole numbers"),
    "no JSON": ([], "data row 21 is not JSON"),
    "a list for an id": ([click(user_id=["u"])], "row 21 user_id is .* text or whole numbers"),
    "an object for an id": ([click(item_id={"a": 1})], "row 21 item_id is .* text or whole numbers"),
    "a truth for an id": ([click(item_id=True)], "row 21 item_id is True; ids must be text or whole numbers"),
    "half a character": ([click(user_id="\ud800")], "data row 21 is not JSON"),
}


@pytest.mark.parametrize("fault", LATE_FAULTS)
def test_what_goes_wrong_late_in_json_lines_is_one_line(tmp_path, small_pieces, fault):
    rows, message = LATE_FAULTS[fault]
    path = json_lines(tmp_path / "a.jsonl", [click()] * 20 + rows)
    if not rows:
        path.write_text(path.read_text() + "{]\n")
    with pytest.raises(InteractionsError, match=message) as refused:
        read_log(path)
    assert "\n" not in str(refused.value)


def test_ids_of_several_kinds_in_json_are_the_same_text(tmp_path):
    rows = [click(user_id=7, position="3"), click(user_id="7", position=2), click(user_id="u", position=1)]
    assert read_log(json_lines(tmp_path / "a.jsonl", rows)).rows() == [("7", "a", 3), ("7", "a", 2), ("u", "a", 1)]


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path):
    path = json_lines(tmp_path / "a.jsonl", [click()])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_log(path)) == 1


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(InteractionsError, match="is not a file"):
        read_log(tmp_path / "a.csv")


NANOSECONDS = 1_700_000_000_000_000_000


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
@pytest.mark.parametrize("rows_between", [0, 9])
@pytest.mark.parametrize("fraction_first", [False, True])
def test_numbers_that_would_lose_their_order_beside_a_fraction_are_refused(
    tmp_path, name, rows_between, fraction_first
):
    positions = [NANOSECONDS + 1, *[5] * rows_between, 1.5]
    rows = [click(position=position) for position in (reversed(positions) if fraction_first else positions)]
    path = json_lines(tmp_path / name, rows)
    if name == "a.csv":
        pl.DataFrame({key: [str(row[key]) for row in rows] for key in click()}).write_csv(path)
    with pytest.raises(InteractionsError, match=r"fraction"):
        read_log(path)


def test_empty_lines_at_the_end_are_no_clicks(tmp_path, small_pieces):
    path = json_lines(tmp_path / "a.jsonl", [click()] * 3)
    path.write_text(path.read_text() + "\n" * 200)
    assert len(read_log(path)) == 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_of_one_endless_line_is_refused_before_it_is_in_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(log_files, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(log_files, "MAX_LINE_BYTES", 1 << 16)
    content = b"[" + b'{"user_id": "u"},' * 500_000
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    tracemalloc.start()
    with pytest.raises(InteractionsError, match="one click a line"):
        read_log(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_folder_is_no_log_whatever_is_in_it(tmp_path):
    (tmp_path / "logs.csv").mkdir()
    (tmp_path / "logs.csv" / "a.csv").write_text("user_id,item_id,position\nu,a,1\n")
    with pytest.raises(InteractionsError, match=r"logs\.csv is not a file"):
        read_log(tmp_path / "logs.csv")


def test_a_name_with_wildcards_is_that_file_alone(tmp_path):
    for name in ("a[1].csv", "a1.csv"):
        (tmp_path / name).write_text(f"user_id,item_id,position\n{name},a,1\n")
    assert read_log(tmp_path / "a[1].csv")["user_id"].to_list() == ["a[1].csv"]


@pytest.fixture(scope="module")
def parquet_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "a.parquet"
    pl.DataFrame([click(user_id=f"u{k % 7}", position=k) for k in range(300)]).write_parquet(path)
    return path.read_bytes()


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_parquet_file_is_read_or_refused_in_one_line(tmp_path, parquet_bytes, data):
    damaged = bytearray(parquet_bytes)
    places = st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(places, min_size=1, max_size=4)):
        damaged[place] = value
    (tmp_path / "a.parquet").write_bytes(damaged[: data.draw(st.integers(4, len(damaged)))])
    assert fault_of(tmp_path / "a.parquet").count("\n") == 0


def test_no_damaged_byte_of_a_parquet_file_ends_the_process(tmp_path, parquet_bytes):
    """Polars 2.1 aborts over some of these; Arrow refuses them or reads what is there."""
    faults = set()
    for place in range(4, len(parquet_bytes)):
        damaged = bytearray(parquet_bytes)
        damaged[place] = 127
        (tmp_path / "a.parquet").write_bytes(damaged)
        faults.add(fault_of(tmp_path / "a.parquet"))
    assert len(faults) > 10


def fault_of(path):
    """What a log is refused for; nothing if it is read."""
    try:
        read_log(path)
    except InteractionsError as error:
        return str(error)
    return ""


def test_a_parquet_column_of_times_is_refused_by_its_name(tmp_path):
    log = pl.DataFrame([click()]).with_columns(position=pl.lit("2024-01-01").str.to_datetime())
    log.write_parquet(tmp_path / "a.parquet")
    with pytest.raises(InteractionsError, match="column position is timestamp"):
        read_log(tmp_path / "a.parquet")


def test_a_parquet_column_of_a_kind_that_nobody_orders_by_is_refused(tmp_path):
    columns = [pa.array(["u"]), pa.array(["a"]), pa.array([1], pa.decimal256(40))]
    parquet.write_table(pa.Table.from_arrays(columns, list(click())), tmp_path / "a.parquet")
    with pytest.raises(InteractionsError, match="column position is decimal256"):
        read_log(tmp_path / "a.parquet")


def test_a_column_that_a_parquet_file_has_twice_is_refused(tmp_path):
    columns = [pa.array(["u"]), pa.array(["a"]), pa.array([1]), pa.array(["v"])]
    table = pa.Table.from_arrays(columns, ["user_id", "item_id", "position", "user_id"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InteractionsError, match="user_id more than once"):
        read_log(tmp_path / "a.parquet")


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    pl.DataFrame({"user_id": [], "item_id": [], "position": []}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(InteractionsError, match="no rows"):
        read_log(tmp_path / "a.parquet")


def test_a_reader_may_stop_in_the_middle(tmp_path, small_pieces):
    (tmp_path / "a.csv").write_text("user_id,item_id,position\n" + "u,a,1\n" * 1000)
    batches = read_batches(tmp_path / "a.csv")
    assert len(next(batches)) == 3
    batches.close()


def test_a_refusal_of_columns_is_one_short_line_whatever_the_header_holds(tmp_path):
    path = tmp_path / "wide.csv"
    path.write_text(",".join(f"column_{index}_{'x' * 500}" for index in range(3_000)) + "\n1\n")
    with pytest.raises(InteractionsError, match="2,980 more") as refused:
        read_log(path)
    assert len(str(refused.value)) < 3_000
