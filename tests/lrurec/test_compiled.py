from pathlib import Path

from lrurec import kernels
from lrurec.compiled import compiled


def test_machine_code_is_kept_where_it_can_be():
    assert Path(kernels.advance.stats.cache_path).is_dir()


def test_a_function_whose_code_has_no_place_on_disk_is_compiled_all_the_same():
    found = {}
    exec("def twice(x):\n    return 2 * x", found)  # noqa: S102  (of no file: numba finds no folder for it either)
    twice = compiled(nogil=True)(found["twice"])
    assert twice(21) == 42
    assert twice.signatures
