"""Machine code on disk: kept where it can be, and compiled again where what is kept is of no use."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrurec import kernels
from lrurec.compiled import _inlined, compiled

SOURCE = "from lrurec.compiled import compiled\n\n@compiled(nogil=True)\ndef twice(x):\n    return 2 * x\n"


def test_machine_code_is_kept_where_it_can_be():
    assert Path(kernels.advance.stats.cache_path).is_dir()


def test_a_function_whose_code_has_no_place_on_disk_is_compiled_all_the_same():
    found = {}
    exec("def twice(x):\n    return 2 * x", found)  # noqa: S102  (of no file: numba finds no folder for it either)
    twice = compiled(nogil=True)(found["twice"])
    assert twice(21) == 42
    assert twice.signatures


def twice_in(folder: Path) -> Any:
    """The function of a module in this folder, as another process would have it."""
    path = folder / "module_of_twice.py"
    if not path.exists():
        path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.twice


def files_of(folder: Path, suffix: str) -> list[Path]:
    return list((folder / "__pycache__").glob(f"*{suffix}"))


def of_another_version(index: Path) -> None:
    """An index that names a class that is gone."""
    with index.open("rb") as file:
        version = pickle.load(file)  # noqa: S301  (just written)
    index.write_bytes(pickle.dumps(version, -1) + pickle.dumps(Gone, 0).replace(b"Gone", b"None_such"))


class Gone: ...


HARMS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "an empty index": (".nbi", lambda path: path.write_bytes(b"")),
    "half an index": (".nbi", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])),
    "an index of another version": (".nbi", of_another_version),
    "no machine code": (".nbc", Path.unlink),
    "empty machine code": (".nbc", lambda path: path.write_bytes(b"")),
    "half the machine code": (".nbc", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_kept_and_harmed_is_compiled_again_and_kept(tmp_path, harm):
    assert twice_in(tmp_path)(21) == 42
    suffix, do = HARMS[harm]
    (path,) = files_of(tmp_path, suffix)
    do(path)
    again = twice_in(tmp_path)
    assert again(21) == 42
    assert not again.stats.cache_hits
    third = twice_in(tmp_path)
    assert third(21) == 42
    assert third.stats.cache_hits


def test_what_another_version_of_a_file_was_compiled_into_is_compiled_again(tmp_path, monkeypatch):
    # Numba looks at a function's own file alone.
    assert twice_in(tmp_path)(21) == 42
    monkeypatch.setattr("lrurec.compiled._inlined", lambda: "another version's")
    again = twice_in(tmp_path)
    assert again(21) == 42
    assert not again.stats.cache_hits


@pytest.mark.parametrize("changed", ["products.py", "bfloat16.py"])
def test_every_file_that_is_compiled_into_others_counts(tmp_path, monkeypatch, changed):
    for name in ("products.py", "bfloat16.py"):
        (tmp_path / name).write_text("one = 1\n")
    monkeypatch.setattr("lrurec.compiled.__file__", str(tmp_path / "compiled.py"))
    before = _inlined.__wrapped__()
    (tmp_path / changed).write_text("one = 2\n")
    assert _inlined.__wrapped__() != before


@pytest.mark.parametrize("harmed", [False, True])
def test_where_the_disk_is_full_nothing_is_kept(tmp_path, monkeypatch, harmed):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if harmed:
        assert twice_in(tmp_path)(21) == 42
        (index,) = files_of(tmp_path, ".nbi")
        index.write_bytes(b"")
    twice = twice_in(tmp_path)
    monkeypatch.setattr(twice._cache._cache_file, "_open_for_write", full)
    assert twice(21) == 42
    assert not any(index.stat().st_size for index in files_of(tmp_path, ".nbi"))


def test_where_nothing_is_to_be_compiled_it_is_the_function_itself():
    program = "import lrurec.kernels as kernels; print(type(kernels.advance).__name__)"
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-c", program]
    assert subprocess.check_output(command, env=environment, text=True, timeout=60) == "function\n"
