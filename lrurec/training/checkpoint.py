"""A training that was broken off, as one file of tensors: written in one piece, read without unpickling."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrurec.errors import TrainingError

SUFFIX = ".checkpoint.safetensors"
_HEADER = "training"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training has come; with the tensors, all that it needs to go on."""

    run: str
    """What is trained on what: the hash of data, settings and catalogue. Another run's checkpoint is refused."""

    step: int
    best_step: int
    best_recall: float
    """Validation Recall@10 of the best weights so far; -1 before the first validation."""

    curve: list[dict[str, Any]]
    """A JSON object for each validation so far, as the bundle's metadata will have them."""


def checkpoint_of(bundle_folder: Path) -> Path:
    """Where the training of a bundle keeps its checkpoint: beside the folder."""
    return bundle_folder.with_name(bundle_folder.name + SUFFIX)


def write_checkpoint(path: Path, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
    """Replace the checkpoint at once: a kill leaves the old one or the new one. Raises `TrainingError`."""
    content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    temporary = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(safetensors.torch.save(content, {_HEADER: json.dumps(asdict(progress))}))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()  # a full disk has better uses for half a checkpoint
        raise TrainingError(f"{path} cannot be written: {error.strerror}; name another --out") from error


def is_checkpoint_of(path: Path, run: str) -> bool:
    """Whether there is a checkpoint here that says it is of this run; it may still turn out to be damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool(json.loads((file.metadata() or {})[_HEADER])["run"] == run)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return False


def _checked(progress: Progress) -> Progress:
    """Raises ValueError or TypeError for a progress that no training makes."""
    validated = [int(point["step"]) for point in progress.curve]
    counts = (progress.step, progress.best_step)
    if any(type(count) is not int for count in counts) or not 0 <= progress.best_step <= progress.step:
        raise ValueError("steps that cannot be")
    if not -1 <= progress.best_recall <= 1 or (progress.best_step > 0 and progress.best_step not in validated):
        raise ValueError("a best step without a validation")
    return progress


def read_checkpoint(path: Path, run: str, expected: Mapping[str, Tensor]) -> tuple[Progress, dict[str, Tensor]] | None:
    """The checkpoint of this run, its tensors shaped as `expected`; None if there is no file.

    Raises `TrainingError` for a checkpoint of another run, or a damaged one.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            progress = _checked(Progress(**header))
            tensors = {name: file.get_tensor(name) for name in expected} if progress.run == run else {}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise TrainingError(f"{path} cannot be read as a checkpoint; delete it to start the training over") from error
    if progress.run != run:
        raise TrainingError(
            f"{path} is of a training with other data, arguments, threads, precision, device or versions; "
            "give the same to go on, or delete it"
        )
    if any(tensors[name].shape != value.shape for name, value in expected.items()):
        raise TrainingError(f"{path} is of a model of other sizes; delete it to start the training over")
    return progress, tensors
