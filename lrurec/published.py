"""The tensors of a published checkpoint, out of a file that nobody vouches for.

No code in a file is run, no pickle may call for anything but tensors, and what is unpacked stays within a few times the
size of the file: weights are all but incompressible, so an honest file never comes near that. Whatever else is wrong
with a file becomes a `CheckpointError` of one line.
"""

import pickle
import pickletools
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from lrurec.errors import CheckpointError

PREFIX = "param/"
"""Of the parameters' names in a `.npz` that holds other arrays too."""

WRAPPERS = ("model_state_dict", "state_dict")
"""Keys under which training programs keep the state_dict beside the optimizer's."""

UNPACKED_RATIO, UNPACKED_FLOOR = 4, 64 << 20
"""A file may unpack to four times its size; a small one to 64 MiB. Compressed float32 weights shrink by a tenth."""

CALLS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch [A-Z]\w+Storage")
"""What the pickle of a state_dict may call, `module name`. Torch's own list is longer: its `bytearray` fills memory."""

UNTYPED_STORAGE = "torch UntypedStorage"
"""The one storage that a pickle could make of any size, without a record in the file."""

PICKLE_BYTES = 4 << 20
"""A state_dict's pickle has 200 bytes a tensor; reading one of this length takes ten seconds."""

LEGACY_PICKLES = 5
"""Before torch 1.6: magic number, protocol, system, the value, the keys of its storages; then the numbers."""

ZIP = b"PK\x03\x04"
"""How torch tells its archives from the legacy format, so how we do."""

UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, pickle.UnpicklingError, struct.error, tokenize.TokenError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What Python's, numpy's and torch's readers raise over files made to mislead them."""

SAFEGUARDS = ("weights_only", "allow_pickle")
"""The arguments that keep torch and numpy from running what a file holds; both name them when they refuse it."""


def read_published(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, `.pt` or `.npz` by published name, on the CPU, as they lie in the file.

    Raises `CheckpointError`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; name a .pth or .npz of the published implementation")
    readers = {".npz": _read_npz, ".pth": _read_pth, ".pt": _read_pth}
    if (reader := readers.get(path.suffix.lower())) is None:
        raise CheckpointError(f"{path} ends in {path.suffix!r}; allowed are .pth, .pt and .npz")
    return reader(path)


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        # Opened here: numpy forgets to close a file that turns out not to be an archive.
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):  # of headers by Python 2
            _check_archive(path, file, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
            with np.load(file, allow_pickle=False) as archive:
                prefixed = any(name.startswith(PREFIX) for name in archive.files)
                names = [name for name in archive.files if name.startswith(PREFIX) or not prefixed]
                _check_unique(path, (name.removeprefix(PREFIX) for name in names))
                arrays = {name.removeprefix(PREFIX): archive[name] for name in names}
    except UNREADABLE as error:
        raise _refusal(path, ".npz of plain arrays", error) from error
    return {name: _tensor_of(name, array, path) for name, array in arrays.items()}


def _tensor_of(name: str, array: object, path: Path) -> Tensor:
    if not isinstance(array, np.ndarray) or array.dtype.newbyteorder("=") not in (np.float32, np.complex64):
        given = str(array.dtype) if isinstance(array, np.ndarray) else "no array"
        raise CheckpointError(f"{path}: {named(name)} is {given[:50]}; it must be float32 or complex64")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=False))


def _read_pth(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle's protocols and escapes: they say nothing to a user
            zipped = _is_zipped(path)
            _check_zipped_pickle(path) if zipped else _check_legacy_pickles(path)
            # Mapped, no tensor can be longer than the file; and what nobody asks for is never read.
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UNREADABLE as error:
        raise _refusal(path, ".pth of tensors only", error) from error
    for wrapper in WRAPPERS:
        if isinstance(value, Mapping) and isinstance(value.get(wrapper), Mapping):
            value = value[wrapper]
    if not isinstance(value, Mapping) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise CheckpointError(f"{path} holds no state_dict (a mapping of names to tensors); save model.state_dict()")
    return _plain_tensors(path, value)


def _is_zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(ZIP)) == ZIP


def _plain_tensors(path: Path, state: Mapping[object, Tensor]) -> dict[str, Tensor]:
    """A state_dict by published name, without the marks of tensors that are to be read conjugated or negated."""
    names = [name for name in state if isinstance(name, str)]
    if len(names) < len(state):
        raise CheckpointError(f"{path} has tensors whose names are no text; is it an LRURec state_dict?")
    _check_unique(path, (name.removeprefix("module.") for name in names))
    # A view may repeat one number at will: (10⁶, 10⁶) out of four bytes.
    _check_unpacked(path, sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    return {name.removeprefix("module."): state[name].detach().resolve_conj().resolve_neg() for name in names}


def _check_archive(path: Path, file: BinaryIO, methods: Iterable[int]) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(file)
    if any(entry.compress_type not in methods for entry in archive.infolist()):
        raise CheckpointError(f"{path} is packed in a way that neither torch nor numpy packs; save the weights again")
    _check_unpacked(path, sum(entry.file_size for entry in archive.infolist()))
    _check_unique(path, archive.namelist())
    return archive


def _check_unpacked(path: Path, size: int) -> None:
    allowed = max(UNPACKED_FLOOR, UNPACKED_RATIO * path.stat().st_size)
    if size > allowed:
        raise CheckpointError(
            f"{path} would unpack to {size:,} bytes, {allowed:,} are allowed for its size; save the weights again"
        )


def _check_unique(path: Path, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CheckpointError(f"{path} holds {named(name)} twice; save the weights again")
        seen.add(name)


def _check_zipped_pickle(path: Path) -> None:
    with path.open("rb") as file:
        archive = _check_archive(path, file, (zipfile.ZIP_STORED,))
        for entry in archive.namelist():
            name = entry.rpartition("/")[2]
            if name == "constants.pkl":  # of a program, as torch.jit.save lays it out
                raise _foreign(path)
            if name == "data.pkl":
                with archive.open(entry) as pickled:
                    _check_calls(path, pickled)


def _check_legacy_pickles(path: Path) -> None:
    with path.open("rb") as file:
        for _ in range(LEGACY_PICKLES):
            _check_calls(path, file)


def _check_calls(path: Path, pickled: object) -> None:
    """Refuse a pickle that names anything but tensors, without running it; the name is repeated if it is harmless."""
    for opcode, argument, place in pickletools.genops(pickled):  # type: ignore[arg-type]
        if (place or 0) > PICKLE_BYTES:
            raise CheckpointError(f"{path} holds far more than a state_dict's tensors; save model.state_dict() alone")
        if opcode.name == "GLOBAL" and (not CALLS.fullmatch(str(argument)) or argument == UNTYPED_STORAGE):
            raise _foreign(path, str(argument).replace(" ", ".", 1))
        if opcode.name in ("STACK_GLOBAL", "INST"):
            raise _foreign(path)


def _foreign(path: Path, name: str = "") -> CheckpointError:
    found = f": the global {name}" if re.fullmatch(r"[\w.]{1,200}", name) else ""
    return CheckpointError(
        f"{path} holds something other than tensors{found}; nothing in it was run; save model.state_dict() alone"
    )


def _refusal(path: Path, wanted: str, error: Exception) -> CheckpointError:
    """What is wrong with a file. Torch and numpy answer code in it by telling how to have it run: we never do."""
    if any(name in str(error) for name in SAFEGUARDS):
        return _foreign(path)
    return CheckpointError(f"{path} is not a {wanted} ({one_line(error)}); nothing in it was run")


def named(name: str) -> str:
    """A name out of a file, quoted, no control characters, no longer than a line may be."""
    return repr(name if len(name) <= 100 else name[:100] + "…")


def one_line(error: Exception) -> str:
    """The first line of another library's message: theirs run over pages, and repeat what a file says."""
    lines = str(error).splitlines()
    text = lines[0][:200] if lines else type(error).__name__
    return "".join(letter if letter.isprintable() else "�" for letter in text)
