"""A trained model as a folder of arrays and text: written in one piece, checked in full when read.

Reading and checking one takes no torch, so a worker that steps on a CPU starts without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from lrurec.catalogue import Catalogue
from lrurec.config import LRURecConfig
from lrurec.errors import BundleError, CatalogueError, ConfigError
from lrurec.weights import first_fault, first_not_finite

if TYPE_CHECKING:
    from lrurec.model import LRURec

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
ITEMS_FILE = "items.txt"
FORMAT = 1

VERSION_DIGITS = 16
"""Hexadecimal digits of a version: 64 bits, so that a user state can carry it as one number."""


@dataclass(frozen=True)
class Bundle:
    """A model and all that is needed to use it."""

    config: LRURecConfig
    weights: Mapping[str, np.ndarray] = field(repr=False, compare=False)
    """By the names of `LRURec.state_dict`; float32."""

    catalogue: Catalogue
    version: str
    """16 hexadecimal digits of the SHA-256 over architecture, item ids and weights: equal means equal answers."""

    metadata: Mapping[str, Any]
    """Where the weights come from: data, arguments, versions, metrics. JSON values; not part of the version."""

    @cached_property
    def model(self) -> LRURec:
        """The model with these weights, not a copy of them: in evaluation mode, on the CPU."""
        from lrurec.model import with_weights

        return with_weights(self.config, self.weights)


def make_bundle(
    config: LRURecConfig,
    weights: Mapping[str, Any],
    catalogue: Catalogue,
    metadata: Mapping[str, Any] | None = None,
    *,
    source: str = "the model",
) -> Bundle:
    """A bundle of a model's `state_dict`, copied: tensors of any device, or arrays. `source` names it in errors.

    Raises `BundleError` for weights that do not fit the config or are not finite, and a catalogue of another length.
    """
    if len(catalogue) != config.num_items:
        raise BundleError(
            f"{source}: {len(catalogue)} item ids for a model of {config.num_items} items; give one id per item"
        )
    if fault := first_fault(config, weights):
        raise BundleError(f"{source}: {fault}")
    copied = {name: _copied(value) for name, value in weights.items()}
    if fault := first_not_finite(config, copied):
        raise BundleError(f"{source}: {fault}")
    return Bundle(config, copied, catalogue, _fingerprint(config, copied, catalogue), dict(metadata or {}))


def save_bundle(folder: Path | str, bundle: Bundle) -> None:
    """Write a bundle. One that stood there before is replaced; a folder of anything else is refused.

    A reader sees the old bundle, the new one, or for an instant none, but never half of one. Raises `BundleError`.
    """
    folder = Path(folder)
    require_writable_target(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write_files(temporary / "new", bundle)
            _swap(temporary / "new", folder, aside=temporary / "old")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise BundleError(f"{folder} cannot be written: {error.strerror}; name another --out") from error


def require_writable_target(folder: Path) -> None:
    """Raise `BundleError` unless a bundle may be written here: nothing, an empty folder, or an older bundle.

    To be asked before a training, not after it.
    """
    if Path.cwd().is_relative_to(folder.resolve()):
        raise BundleError(f"{folder} is where this command runs, and a bundle is put there whole; name another folder")
    parent = next((path for path in folder.absolute().parents if os.path.lexists(path)), folder)  # the root has none
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BundleError(f"{folder} cannot be written: {parent} is no folder that may be written to; name another")
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; name a new folder, or a bundle to replace")
    names = {entry.name for entry in folder.iterdir()}
    if not names <= {WEIGHTS_FILE, CONFIG_FILE, ITEMS_FILE}:
        raise BundleError(f"{folder} holds files that are no bundle's; name a new folder, or a bundle to replace")


def load_bundle(folder: Path | str) -> Bundle:
    """Read a bundle and check all of it: names, shapes, dtypes, finite values, catalogue length, hash.

    Raises `BundleError` with one line. Nothing is unpickled: the files are JSON, text and safetensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a bundle: no such folder; make one by `lrurec train` or `lrurec convert`")
    config, version, metadata = _read_config(folder / CONFIG_FILE)
    catalogue = _read_catalogue(folder / ITEMS_FILE)
    weights = _read_weights(folder / WEIGHTS_FILE)
    bundle = make_bundle(config, weights, catalogue, metadata, source=str(folder))
    if bundle.version != version:
        raise BundleError(
            f"{folder} is damaged: its files hash to {bundle.version}, its {CONFIG_FILE} says {version}; "
            "copy it again from where it was made"
        )
    return bundle


def _copied(value: Any) -> np.ndarray:
    return np.array(value.detach().cpu().numpy() if hasattr(value, "detach") else value, order="C")


def _fingerprint(config: LRURecConfig, weights: Mapping[str, np.ndarray], catalogue: Catalogue) -> str:
    digest = hashlib.sha256()
    digest.update(_json_line(config.to_json()))
    digest.update(_json_line(catalogue.item_ids))
    for name in sorted(weights):
        digest.update(_json_line([name, list(weights[name].shape)]))
        digest.update(weights[name].astype("<f4", copy=False).tobytes())
    return digest.hexdigest()[:VERSION_DIGITS]


def _json_line(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _write_files(folder: Path, bundle: Bundle) -> None:
    folder.mkdir()
    config = {
        "format": FORMAT,
        "version": bundle.version,
        "architecture": bundle.config.to_json(),
        "metadata": bundle.metadata,
    }
    _write(folder / WEIGHTS_FILE, safetensors.numpy.save(dict(bundle.weights)))
    _write(folder / ITEMS_FILE, bundle.catalogue.to_text().encode())
    _write(folder / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # the rename that follows must not overtake the bytes


def _swap(new: Path, folder: Path, *, aside: Path) -> None:
    replaced = folder.exists()
    if replaced:
        folder.rename(aside)
    try:
        new.rename(folder)
    except OSError:
        if replaced:
            aside.rename(folder)
        raise


def _read_config(path: Path) -> tuple[LRURecConfig, str, dict[str, Any]]:
    try:
        value = json.loads(_read(path).decode())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON ({error}); copy the bundle again from where it was made") from error
    match value:
        case {"format": 1, "version": str(version), "architecture": dict(architecture), "metadata": dict(metadata)}:
            try:
                return LRURecConfig.from_json(architecture), version, metadata
            except ConfigError as error:
                raise BundleError(f"{path}: {error}") from error
        case {"format": other} if other != FORMAT:
            raise BundleError(f"{path} has format {other!r}; this lrurec reads format {FORMAT}: convert or train again")
        case _:
            raise BundleError(f"{path} must hold format, version, architecture and metadata; is it a bundle's?")


def _read_catalogue(path: Path) -> Catalogue:
    try:
        return Catalogue.from_text(_read(path).decode())
    except (UnicodeDecodeError, CatalogueError) as error:
        raise BundleError(f"{path}: {error}") from error


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load(_read(path))
    except KeyError as error:  # a type that numpy doesn't have
        raise BundleError(f"{path} holds numbers of type {error}, the architecture needs float32") from error
    except (SafetensorError, ValueError, RuntimeError, TypeError) as error:
        raise BundleError(f"{path} is not a whole safetensors file ({error}); copy the bundle again") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}; is {path.parent} a bundle?") from error
