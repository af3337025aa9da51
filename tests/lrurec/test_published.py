"""A checkpoint made to do harm becomes one line: no code is run, no memory is filled, no other exception gets out."""

from __future__ import annotations

import functools
import io
import os
import pickle
import re
import struct
import time
import zipfile
from collections import OrderedDict
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrurec import published
from lrurec.config import LRURecConfig
from lrurec.convert import _published_shapes, convert
from lrurec.errors import CheckpointError

EMBEDDING, BIAS = "embedding.token.weight", "model.bias"
INPUT_BIAS = "model.lru_blocks.0.lru_layer.in_proj.bias"

TOO_MUCH = 200 << 20
"""Bytes; each bomb below asks for gigabytes."""

SECONDS = 5.0


def honest(items=3, d=2):
    """A published state_dict of the smallest size."""
    shapes = _published_shapes(LRURecConfig(num_items=items, hidden_units=d, num_blocks=1))
    generator = torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=dtype, generator=generator) for name, (shape, dtype) in shapes.items()}


def save_npz(path, arrays, compress=zipfile.ZIP_STORED):
    """Entries of a `.npz`: arrays, or the bytes of whatever is not one."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", array if isinstance(array, bytes) else npy(array))


def npy(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=True)
    return buffer.getvalue()


def npy_with_header(text, data=b""):
    header = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


class Stored:
    """A storage in an archive, and how many numbers it is said to have."""

    def __init__(self, numel, key="0"):
        self.numel, self.key = numel, key


class Call:
    """Is unpickled by a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, value.key, "cpu", value.numel) if isinstance(value, Stored) else None


def view(stored, shape, stride, metadata=None):
    """A tensor of a storage, as torch.save writes it."""
    marks = () if metadata is None else (metadata,)
    return Call(torch._utils._rebuild_tensor_v2, stored, 0, shape, stride, False, OrderedDict(), *marks)


def save_pth(path, value, records=(), compress=zipfile.ZIP_STORED):
    """A `.pth` as torch lays it out, with a pickle and numbers that torch would never write."""
    buffer = io.BytesIO()
    if isinstance(value, bytes):
        buffer.write(value)
    else:
        _Pickler(buffer, 2).dump(value)
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("m/data.pkl", buffer.getvalue())
        archive.writestr("m/byteorder", "little")
        for key, data in enumerate(records):
            archive.writestr(f"m/data/{key}", data)
        archive.writestr("m/version", "3\n")


def save_legacy(path, value):
    torch.save(value, path, _use_new_zipfile_serialization=False)


@contextmanager
def bounded():
    """Fails if the block's peak of memory or time is what only a bomb takes."""
    status = Path("/proc/self/status")
    if not status.exists():  # no Linux: time alone
        before = 0
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _peak(status)
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SECONDS
    if before:
        assert _peak(status) - before < TOO_MUCH


def _peak(status):
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])


def refused(path):
    """The line that a file is refused with."""
    with bounded(), pytest.raises(CheckpointError) as error:
        convert(path)
    line = str(error.value)
    assert line.isprintable()
    assert len(line) < 600
    assert path.name in line
    for advice in ("weights_only", "safe_globals", "allow_pickle", "pickle.load", "torch.load", "trust"):
        assert advice not in line
    return line


def test_what_the_attacks_are_made_of_is_read_when_it_is_honest(tmp_path):
    tensors = honest()
    save_npz(tmp_path / "a.npz", {name: tensor.numpy() for name, tensor in tensors.items()}, zipfile.ZIP_DEFLATED)
    save_legacy(tmp_path / "legacy.pth", tensors)
    torch.save(tensors, tmp_path / "b.pth")
    data = tensors[BIAS].numpy().tobytes()
    save_pth(tmp_path / "by_hand.pth", {BIAS: view(Stored(4), (4,), (1,))}, [data])
    versions = {convert(tmp_path / name).version for name in ("a.npz", "legacy.pth", "b.pth")}
    assert len(versions) == 1
    assert "lacks" in refused(tmp_path / "by_hand.pth") or "is none" in refused(tmp_path / "by_hand.pth")


# -- code


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class Innocent:
    """What an honest program might save beside its tensors."""


def by_instruction(marker):
    """Protocol 0's INST: a call without a GLOBAL."""
    return b"(S'" + str(marker).encode() + b"'\niposix\nmkdir\n."


CODE = {
    "pth": lambda path, marker: torch.save({BIAS: Payload(marker)}, path),
    "legacy pth": lambda path, marker: save_legacy(path, {BIAS: Payload(marker)}),
    "plain pickle": lambda path, marker: path.write_bytes(pickle.dumps(Payload(marker))),
    "deep in a pth": lambda path, marker: torch.save({"epoch": [{"a": (1, [Payload(marker)])}], **honest()}, path),
    "a pth of protocol 4": lambda path, marker: save_pth(path, pickle.dumps(Payload(marker), 4)),
    "a pth of protocol 0": lambda path, marker: save_pth(path, by_instruction(marker)),
    "a call in two steps": lambda path, marker: save_pth(path, {BIAS: Call(functools.partial(os.mkdir, str(marker)))}),
    "eval": lambda path, marker: save_pth(path, {BIAS: Call(eval, f"__import__('os').mkdir({str(marker)!r})")}),
    "a legacy storage": lambda path, marker: path.write_bytes(
        b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}, {}, [Payload(marker)]))
    ),
}

CODE_IN_NPZ = {
    "npz": lambda path, marker: np.savez(path, **{BIAS: np.array([Payload(marker)], dtype=object)}),
    "pickle as npz": lambda path, marker: path.write_bytes(pickle.dumps(Payload(marker))),
    "pickle in a npz": lambda path, marker: save_npz(path, {BIAS: pickle.dumps(Payload(marker))}),
    "an object in a record": lambda path, marker: save_npz(
        path, {BIAS: np.array([(Payload(marker), 1.0)], dtype=[("a", object), ("b", "f4")])}
    ),
}


@pytest.mark.parametrize("save", CODE.values(), ids=CODE)
def test_code_in_a_pth_is_refused_and_not_run(tmp_path, save):
    save(tmp_path / "evil.pth", tmp_path / "was-run")
    refused(tmp_path / "evil.pth")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("save", CODE_IN_NPZ.values(), ids=CODE_IN_NPZ)
def test_code_in_a_npz_is_refused_and_not_run(tmp_path, save):
    save(tmp_path / "evil.npz", tmp_path / "was-run")
    refused(tmp_path / "evil.npz")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("save", [torch.save, lambda value, path: save_legacy(path, value)], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Innocent(), f"{Innocent.__module__}.Innocent"),
        (Payload("was-run"), "posix.mkdir"),
        (np.float64(0.5), "numpy._core.multiarray.scalar"),
    ],
    ids=["object", "code", "number of numpy"],
)
def test_what_is_no_tensor_in_a_pth_is_named(tmp_path, save, value, named):
    save({BIAS: torch.ones(3), "best": value}, tmp_path / "a.pth")
    line = refused(tmp_path / "a.pth")
    assert f"a.pth holds something other than tensors: the global {named}; nothing in it was run" in line


def test_a_program_in_a_pth_is_refused_without_advice_to_run_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "program.pth", "w") as archive:  # as torch.jit.save lays it out
        for name in ("version", "constants.pkl", "data.pkl"):
            archive.writestr(f"program/{name}", "3\n")
    assert "holds something other than tensors; nothing in it was run" in refused(tmp_path / "program.pth")


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02cos\x1b[31m set weights_only=False\nsystem\n.",
        b"\x80\x02ccollections\nOrderedDict\n\xfe.",
        b"S'\\?'\n.",
        pickle.dumps({"\x1b[2Jweights_only": 3}, 2),
    ],
)
def test_a_text_made_to_mislead_is_not_repeated(tmp_path, pickled):
    (tmp_path / "a.pth").write_bytes(pickled)
    save_pth(tmp_path / "b.pth", pickled)
    refused(tmp_path / "a.pth")
    refused(tmp_path / "b.pth")


# -- bombs

BOMBS = {
    "a buffer filled by a call": ({BIAS: Call(bytearray, 4 << 30)}, []),
    "a storage made by a call": ({BIAS: Call(torch.FloatTensor, 1 << 33)}, []),
    "one number seen as 10^12": ({EMBEDDING: view(Stored(1), (10**6, 10**6), (0, 0))}, [b"\0" * 4]),
    "a storage beyond its record": ({BIAS: view(Stored(1 << 30), (1 << 30,), (1,))}, [b"\0" * 4]),
    "a view beyond its storage": ({BIAS: view(Stored(1), (4,), (1,))}, [b"\0" * 4]),
    "a record that is not there": ({BIAS: view(Stored(1, "7"), (1,), (1,))}, []),
    "a negative size": ({BIAS: view(Stored(-4), (4,), (1,))}, [b"\0" * 4]),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_that_asks_for_more_than_the_file_holds_is_refused(tmp_path, bomb):
    value, records = BOMBS[bomb]
    save_pth(tmp_path / "bomb.pth", value, records)
    refused(tmp_path / "bomb.pth")


def test_a_pickle_that_takes_for_ever_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "PICKLE_BYTES", 20_000)  # the real one takes ten seconds
    endless = b"\x80\x02)" + b"\x85" * 10_000_000 + b"."
    (tmp_path / "legacy.pth").write_bytes(endless)
    save_pth(tmp_path / "a.pth", endless)
    for name in ("legacy.pth", "a.pth"):
        assert "far more than" in refused(tmp_path / name)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_whole_model_of_one_number_is_refused(tmp_path, legacy):
    one = {dtype: torch.zeros((), dtype=dtype) for dtype in (torch.float32, torch.complex64)}
    shapes = _published_shapes(LRURecConfig(num_items=10**7, hidden_units=100, num_blocks=1))
    tensors = {name: one[dtype].expand(shape) for name, (shape, dtype) in shapes.items()}
    torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    assert "would unpack to 4," in refused(tmp_path / "a.pth")


def test_a_pth_whose_numbers_unpack_to_gigabytes_is_refused(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}, 2))
        with archive.open("m/data/0", "w", force_zip64=True) as entry:
            for _ in range(64):
                entry.write(bytes(16 << 20))
    assert path.stat().st_size < 8 << 20
    refused(path)


def test_a_npz_that_unpacks_to_gigabytes_is_refused(tmp_path):
    path = tmp_path / "bomb.npz"
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 28}, 1)}}"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(f"{EMBEDDING}.npy", "w", force_zip64=True) as entry,
    ):
        entry.write(npy_with_header(header))
        for _ in range(64):
            entry.write(bytes(16 << 20))
    assert "would unpack to" in refused(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_can_unpack_without_a_measure_is_refused(tmp_path, method):
    save_npz(tmp_path / "a.npz", {name: tensor.numpy() for name, tensor in honest().items()}, method)
    assert "packed in a way" in refused(tmp_path / "a.npz")


HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
    f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**30},)}}",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
    "{'descr': ('<f4', (1000000, 1000000)), 'fortran_order': False, 'shape': ()}",
    "{'descr': ",
    "{'descr': (\n  '<f4'\n 1",
    "(" * 100,
    "__import__('os').mkdir('was-run')",
    "\\",
    "'\\d'",
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_of_an_array_that_is_none_is_refused(tmp_path, header):
    save_npz(tmp_path / "a.npz", {EMBEDDING: npy_with_header(header, b"\0" * 64)})
    refused(tmp_path / "a.npz")


# -- tensors that are not what they seem

TENSORS = {
    "meta": lambda: torch.empty(4, device="meta"),
    "sparse": torch.eye(4)[0].to_sparse,
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "float64": lambda: torch.ones(4, dtype=torch.float64),
    "float16": lambda: torch.ones(4, dtype=torch.float16),
    "whole": lambda: torch.ones(4, dtype=torch.int64),
    "complex": lambda: torch.ones(4, dtype=torch.complex64),
    "0-d": lambda: torch.tensor(1.0),
    "of many axes": lambda: torch.ones([1] * 60),
    "empty": lambda: torch.ones(0),
    "NaN": lambda: torch.tensor([1, 2, 3, float("nan")]),
}


@pytest.mark.filterwarnings("ignore:.*[qQ]uantiz.*")
@pytest.mark.parametrize("save", [torch.save, lambda value, path: save_legacy(path, value)], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", TENSORS)
def test_a_bias_that_is_no_plain_array_of_its_shape_is_refused(tmp_path, kind, save):
    save({**honest(), BIAS: TENSORS[kind]()}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth")


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.longdouble, np.complex128, np.int64, "M8[s]", "U3", "V4"])
def test_arrays_of_other_numbers_are_refused(tmp_path, dtype):
    arrays = {name: tensor.numpy() for name, tensor in honest().items()}
    save_npz(tmp_path / "a.npz", {**arrays, BIAS: np.zeros(4, dtype)})
    assert "'model.bias' is " in refused(tmp_path / "a.npz")


def test_numbers_of_the_other_byte_order_and_layout_mean_the_same(tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in honest().items()}
    turned = {name: np.asfortranarray(array.astype(array.dtype.newbyteorder(">"))) for name, array in arrays.items()}
    save_npz(tmp_path / "a.npz", arrays)
    save_npz(tmp_path / "b.npz", turned)
    assert convert(tmp_path / "a.npz").version == convert(tmp_path / "b.npz").version


def test_conjugated_and_negated_tensors_mean_what_they_show(tmp_path):
    plain = honest()
    marked = {
        **plain,
        INPUT_BIAS: plain[INPUT_BIAS].conj().resolve_conj().conj(),
        BIAS: torch._neg_view(-plain[BIAS]),
    }
    assert marked[INPUT_BIAS].is_conj()
    assert marked[BIAS].is_neg()
    for name, tensors in (("plain", plain), ("marked", marked)):
        torch.save(tensors, tmp_path / f"{name}.pth")
    assert convert(tmp_path / "marked.pth").version == convert(tmp_path / "plain.pth").version


def test_tensors_that_share_numbers_are_read_as_each_shows_them(tmp_path):
    tensors = honest()
    table = torch.randn(8, 2)
    shared = {**tensors, EMBEDDING: table[::2], BIAS: table[:4, 0]}
    torch.save(shared, tmp_path / "shared.pth")
    torch.save({name: tensor.clone() for name, tensor in shared.items()}, tmp_path / "apart.pth")
    assert convert(tmp_path / "shared.pth").version == convert(tmp_path / "apart.pth").version


# -- names


@pytest.mark.parametrize("name", [1, None, (1, 2), 1.5, b"model.bias"])
def test_names_that_are_no_text_are_refused(tmp_path, name):
    torch.save({**honest(), name: torch.ones(1)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["x" * 100_000, "\x1b[2J\n\r", "model.lru_blocks.9999.", "model.lru_blocks.٣.", ""])
def test_a_name_that_no_lrurec_has_is_refused_without_harm_to_a_terminal(tmp_path, name):
    torch.save({**honest(), name: torch.ones(1)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth")


def test_many_blocks_are_not_all_named(tmp_path):
    torch.save({**honest(), **{f"model.lru_blocks.{n}.": torch.ones(1) for n in range(1, 3000, 2)}}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth")


def test_a_name_that_stands_twice_is_refused(tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in honest().items()}
    torch.save({**honest(), f"module.{BIAS}": torch.ones(4)}, tmp_path / "a.pth")
    save_npz(tmp_path / "b.npz", arrays)
    with zipfile.ZipFile(tmp_path / "b.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(f"{BIAS}.npy", npy(np.ones(4, np.float32)))
    save_npz(tmp_path / "c.npz", arrays)
    with zipfile.ZipFile(tmp_path / "c.npz", "a") as archive:
        archive.writestr(BIAS, npy(np.ones(4, np.float32)))
    for name in ("a.pth", "b.npz", "c.npz"):
        assert "twice" in refused(tmp_path / name)


@pytest.mark.parametrize("value", [3, {BIAS: 3}, ["a"], {"state_dict": {"a": "b"}}, {}, {"state_dict": {}}, None])
def test_a_pth_without_a_state_dict_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "bad.pth")
    refused(tmp_path / "bad.pth")


# -- files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with an honest checkpoint of each kind."""
    folder, tensors = tmp_path_factory.mktemp("whole"), honest()
    save_npz(folder / "a.npz", {name: tensor.numpy() for name, tensor in tensors.items()}, zipfile.ZIP_DEFLATED)
    torch.save(tensors, folder / "a.pth")
    save_legacy(folder / "a.pt", tensors)
    return folder


@pytest.mark.parametrize("suffix", [".npz", ".pth", ".pt"])
def test_a_file_cut_off_anywhere_is_refused(whole, tmp_path, suffix):
    path, content = tmp_path / f"cut{suffix}", (whole / f"a{suffix}").read_bytes()
    places = {*range(0, len(content), 17), *range(200), *range(len(content) - 200, len(content))}
    for place in sorted(places):
        path.write_bytes(content[:place])
        with pytest.raises(CheckpointError) as error:
            convert(path)
        assert str(error.value).isprintable(), place


@pytest.mark.parametrize("suffix", [".npz", ".pth", ".pt"])
@given(damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_or_refused_and_nothing_else(whole, tmp_path, suffix, damage):
    content, path = bytearray((whole / f"a{suffix}").read_bytes()), tmp_path / f"damaged{suffix}"
    for place, cut, inserted in damage:
        start = int(place * len(content))
        content[start : start + cut] = inserted
    path.write_bytes(content)
    with bounded(), suppress(CheckpointError):
        convert(path)


@pytest.mark.parametrize(
    "name", ["none.npz", "text.txt", "empty.npz", "empty.pth", "folder.pth", "loop.pth", "zero.npz"]
)
def test_a_file_of_another_kind_is_refused(tmp_path, name):
    for text in ("text.txt", "empty.npz", "empty.pth"):
        (tmp_path / text).write_bytes(b"")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    refused(tmp_path / name)


def test_a_link_to_a_checkpoint_is_that_checkpoint(tmp_path):
    torch.save(honest(), tmp_path / "a.pth")
    (tmp_path / "link.pth").symlink_to("a.pth")
    assert convert(tmp_path / "link.pth").version == convert(tmp_path / "a.pth").version
