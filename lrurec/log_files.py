"""Files of clicks, read batch by batch: CSV, Parquet or JSON Lines, the first and the last also with .gz.

No file is in memory as a whole. What is, beside the rows that a caller keeps, doesn't grow with the file: blocks and
batches in flight, measured at less than 400 MB, also of a Parquet file that is one row group.
"""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, cast

import orjson
import polars as pl
import pyarrow as pa
from pyarrow import parquet

from lrurec.errors import InteractionsError

ID_COLUMNS = ("user_id", "item_id")

ORDER_COLUMNS = ("timestamp_ms", "timestamp", "position")
"""At least one is needed. With several, the first decides and the next break its ties; then the order in the file."""

TIME_COLUMNS = ("timestamp_ms", "timestamp")
"""Those of `ORDER_COLUMNS` that say when, not only in which order."""

BATCH_ROWS = 1 << 17

BLOCK_BYTES = 1 << 24
"""Of a file of JSON Lines, which is cut after its line ends."""

MAX_LINE_BYTES = 1 << 24

_GZIP = b"\x1f\x8b"
"""How every gzip file begins."""

_BEYOND_64_BITS = 2.0**63
"""The least number that a signed 64-bit integer does not hold."""

_BEYOND_FLOATS = 2**53
"""From here on a 64-bit float does not tell whole numbers from their neighbours."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_SHOWN_CHARACTERS = 60
_SHOWN_COLUMNS = 20
"""Of a value that is refused."""


def read_log(path: Path) -> pl.DataFrame:
    """All rows of a log in the file's order, as `read_batches` gives them; they are in memory with their texts."""
    return pl.concat(read_batches(path), how="vertical_relaxed")


def read_batches(path: Path) -> Iterator[pl.DataFrame]:
    """The rows of a log in the file's order, checked, about `BATCH_ROWS` at a time and at least one in all.

    Columns: those of `ID_COLUMNS` as text, and those of `ORDER_COLUMNS` that the log has. The latter are int64, or
    float64 in a batch where a number has a fraction; every batch has the same. Raises `InteractionsError`, with one
    line, for a file that is no log; the batches before the fault have been given by then.
    """
    order: list[str] = []
    rows = 0
    with_fractions, beyond_floats = set[str](), set[str]()
    for batch in filter(len, _raw_batches(path)):
        order = order or [name for name in ORDER_COLUMNS if name in batch.columns]
        checked = _checked(batch, order, path, rows)
        with_fractions |= {name for name in order if checked[name].dtype == pl.Float64}
        beyond_floats |= {name for name in order if _has_beyond_floats(checked[name])}
        for name in sorted(with_fractions & beyond_floats):
            raise InteractionsError(
                f"{path}: {name} has numbers with a fraction, and others beyond 2^53, which would lose their order "
                "beside them; give whole numbers, or a larger unit"
            )
        yield checked
        rows += len(batch)
    if not rows:
        raise InteractionsError(f"{path} has no rows; it must hold a log of clicks")


def refuse_values(column: pl.Series, bad: pl.Series, path: Path, allowed: str, *, rows_before: int = 0) -> None:
    """Raise `InteractionsError` for the first value of a column of a log that is bad; `allowed` says what would do."""
    if (rows := bad.arg_true()).len():
        value = column[rows[0]]
        given = repr(value) if isinstance(value, str) else "empty" if value is None else str(value)
        _refuse_rows(bad, path, f"{column.name} is {given[:_SHOWN_CHARACTERS]}; {allowed}", rows_before)


def _has_beyond_floats(numbers: pl.Series) -> bool:
    """Whether there are whole numbers among them that would not stay what they are."""
    return numbers.dtype == pl.Int64 and bool(((numbers > _BEYOND_FLOATS) | (numbers < -_BEYOND_FLOATS)).any())


def _raw_batches(path: Path) -> Iterator[pl.DataFrame]:
    """The columns of a log that we know, as they lie in the file; a needed one may be missing after the first batch."""
    name = path.name.lower()
    ending = next((known for known in _READERS if name.removesuffix(".gz").endswith(known)), None)
    if ending is None or (name.endswith(".gz") and ending == ".parquet"):
        raise InteractionsError(f"{path}: unknown kind of file; allowed are .csv, .csv.gz, .jsonl, .jsonl.gz, .parquet")
    if path.exists() and not path.is_file():
        raise InteractionsError(f"{path} is not a file; it must be one, as it is read more than once")
    with _faults_in_one_line(path):
        _require_content(path, is_gzip=name.endswith(".gz"))
        yield from _READERS[ending](path)


@contextmanager
def _faults_in_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except pl.exceptions.NoDataError as error:
        raise InteractionsError(f"{path} is empty; it must hold a log of clicks") from error
    except (pl.exceptions.PolarsError, pa.ArrowException, UnicodeDecodeError, zlib.error, EOFError, OSError) as error:
        # The libraries raise an OSError of their own over a damaged file; the system's have a name for the fault.
        if isinstance(error, OSError) and error.strerror:
            raise InteractionsError(f"{path} cannot be read: {error.strerror}") from error
        reason = str(error).partition("\n")[0]
        raise InteractionsError(f"{path} cannot be read as its name says ({reason}); is the file whole?") from error


def _require_content(path: Path, *, is_gzip: bool) -> None:
    # Polars would read every file of a folder, and a plain file whatever its name says.
    with path.open("rb") as file:
        start = file.read(len(_GZIP))
    if not start:
        raise pl.exceptions.NoDataError
    if is_gzip and start != _GZIP:
        raise gzip.BadGzipFile("it is not compressed by gzip")


def _csv_batches(path: Path) -> Iterator[pl.DataFrame]:
    # Everything as text: an id such as 007 must not become the number 7. Polars uncompresses by itself.
    scan = pl.scan_csv(path, infer_schema=False, glob=False)
    known = _require_columns(scan.collect_schema().names(), path)
    yield from scan.select(known).collect_batches(chunk_size=BATCH_ROWS)


def _parquet_batches(path: Path) -> Iterator[pl.DataFrame]:
    # Arrow reads, because polars aborts the whole process over some damaged files.
    with parquet.ParquetFile(path, pre_buffer=False) as file:
        known = _require_columns(file.schema_arrow.names, path)
        for name in known:
            kind = file.schema_arrow.field(name).type
            if not any(is_kind(kind) for is_kind in _PARQUET_KINDS):
                raise InteractionsError(f"{path}: column {name} is {kind}; it must be text or numbers")
        for batch in file.iter_batches(BATCH_ROWS, columns=known):
            batch.validate(full=True)
            # Column by column, without the schema's own metadata: damaged, those make polars panic.
            yield pl.DataFrame([pl.Series(name, batch.column(name)) for name in known])


_PARQUET_KINDS = (
    pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_dictionary, pa.types.is_integer,
    pa.types.is_floating, pa.types.is_decimal128, pa.types.is_boolean, pa.types.is_null,
)  # fmt: skip
"""Those that polars takes over; what they hold is checked with all others."""


def _json_batches(path: Path) -> Iterator[pl.DataFrame]:
    """Each block has types of its own: a file whose ids are numbers here and text there is read all the same."""
    with cast("BinaryIO", gzip.open(path)) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        rows = 0
        for block in _blocks_of_lines(file, path):
            lines = [line for line in block.removeprefix(_BYTE_ORDER_MARK).splitlines() if not line.isspace() and line]
            clicks = [_json_click(line, path, rows + number) for number, line in enumerate(lines, start=1)]
            if not rows:
                _require_columns(sorted({name for click in clicks for name in click}), path)
            columns = {name: [click.get(name) for click in clicks] for name in (*ID_COLUMNS, *ORDER_COLUMNS)}
            yield pl.DataFrame(
                [
                    pl.Series(name, [None if value is None else str(value) for value in columns[name]], pl.String)
                    for name in ID_COLUMNS
                ]
                + [
                    _json_numbers(name, columns[name])
                    for name in ORDER_COLUMNS
                    if any(name in click for click in clicks)
                ]
            )
            rows += len(lines)


def _json_click(line: bytes, path: Path, row: int) -> dict[str, Any]:
    """A line's object, its ids text or whole numbers, what it is ordered by numbers or text."""
    try:
        click = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise InteractionsError(f"{path}: data row {row} is not JSON ({error})") from error
    if type(click) is not dict:
        raise InteractionsError(f"{path}: data row {row} is no JSON object; it must be one click")
    for names, kinds, allowed in _JSON_KINDS:
        for name in names:
            if type(value := click.get(name)) not in kinds:
                given = repr(value)[:_SHOWN_CHARACTERS]
                raise InteractionsError(f"{path}: in data row {row} {name} is {given}; {allowed}")
    return cast("dict[str, Any]", click)


_JSON_KINDS = (
    (ID_COLUMNS, {str, int, NoneType}, "ids must be text or whole numbers"),
    (ORDER_COLUMNS, {str, int, float, NoneType}, "it must be a number"),
)


def _json_numbers(name: str, values: list[Any]) -> pl.Series:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {float}:
        return pl.Series(name, values, pl.Float64)
    if kinds == {int}:
        with suppress(OverflowError, TypeError):
            return pl.Series(name, values, pl.Int64)
    return pl.Series(name, [None if value is None else str(value) for value in values], pl.String)


def _blocks_of_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The file in pieces of about `BLOCK_BYTES` that end where a line ends; pieces of white space are left out."""
    while block := file.read(BLOCK_BYTES):
        rest = file.readline(MAX_LINE_BYTES)
        if len(rest) == MAX_LINE_BYTES:
            raise InteractionsError(
                f"{path} has a line of more than {MAX_LINE_BYTES >> 20} MiB; it must hold one click a line"
            )
        if block.strip() or rest.strip():
            yield block + rest


_READERS = {
    ".csv": _csv_batches,
    ".jsonl": _json_batches,
    ".ndjson": _json_batches,
    ".parquet": _parquet_batches,
}


def _require_columns(names: Sequence[str], path: Path) -> list[str]:
    """The columns to read. Raises if one that is needed is not there."""
    order = [name for name in ORDER_COLUMNS if name in names]
    if not order or any(name not in names for name in ID_COLUMNS):
        needed = f"user_id, item_id and one of {', '.join(ORDER_COLUMNS)}"
        given = ", ".join(repr(name[:_SHOWN_CHARACTERS]) for name in names[:_SHOWN_COLUMNS])
        more = f" and {len(names) - _SHOWN_COLUMNS:,} more" if len(names) > _SHOWN_COLUMNS else ""
        raise InteractionsError(f"{path} has columns {given}{more}; it needs {needed}")
    for name in (*ID_COLUMNS, *order):
        # Polars adds to the name of a second column, Arrow and JSON don't.
        if f"{name}_duplicated_0" in names or names.count(name) > 1:
            raise InteractionsError(f"{path} has column {name} more than once; which one counts?")
    return [*ID_COLUMNS, *order]


def _checked(batch: pl.DataFrame, order: Sequence[str], path: Path, rows_before: int) -> pl.DataFrame:
    """The batch with ids as text and numbers to order by. `rows_before` are those of the batches before."""
    for name in ORDER_COLUMNS:
        if name in batch.columns and name not in order:
            given = batch[name].is_not_null()
            _refuse_rows(given, path, f"{name} is given, in the rows before it is not; give all or none", rows_before)
    columns = [_ids(_column(batch, name), path, rows_before) for name in ID_COLUMNS]
    columns += [_numbers(_column(batch, name), path, rows_before) for name in order]
    return pl.DataFrame(columns)


def _column(batch: pl.DataFrame, name: str) -> pl.Series:
    """A column of the batch, all null where none of its rows has it."""
    if name in batch.columns and batch[name].dtype != pl.Null:
        return batch[name]
    return pl.Series(name, [None] * len(batch), pl.String)


def _ids(column: pl.Series, path: Path, rows_before: int) -> pl.Series:
    name = column.name
    if column.dtype not in (pl.String, pl.Categorical, pl.Enum) and not column.dtype.is_integer():
        raise InteractionsError(f"{path}: column {name} is {column.dtype}; ids must be text or whole numbers")
    ids = column.cast(pl.String)
    _refuse_rows(ids.is_null() | (ids == ""), path, f"{name} is empty; every click needs one", rows_before)
    broken = ids.str.contains("\n", literal=True) | ids.str.contains("\r", literal=True)
    _refuse_rows(broken, path, f"{name} holds a line break; an id must be one line", rows_before)
    return ids


def _numbers(column: pl.Series, path: Path, rows_before: int) -> pl.Series:
    if not column.dtype.is_numeric() and column.dtype != pl.String:
        raise InteractionsError(f"{path}: column {column.name} is {column.dtype}; it must be numbers")
    # Whole numbers stay whole: nanoseconds don't fit a float.
    whole = column.cast(pl.Int64, strict=False)
    if column.dtype.is_integer() or (column.dtype == pl.String and whole.null_count() == 0):
        numbers, good = whole, whole.is_not_null()
    else:
        numbers = column.cast(pl.Float64, strict=False)
        good = (numbers.abs() < _BEYOND_64_BITS).fill_null(value=False)  # polars holds NaN for the greatest number
        if column.dtype == pl.String:
            good &= (whole.abs() <= _BEYOND_FLOATS).fill_null(value=True)
    allowed = (
        "it orders the clicks of a user, and must be a number that fits 64 bits, or 53 beside numbers with a fraction"
    )
    refuse_values(column, ~good, path, allowed, rows_before=rows_before)
    return numbers


def _refuse_rows(bad: pl.Series, path: Path, fault: str, rows_before: int) -> None:
    if (row := bad.arg_true()).len():
        raise InteractionsError(f"{path}: in data row {rows_before + row[0] + 1} {fault}")
