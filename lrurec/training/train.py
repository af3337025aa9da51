"""Training a model on a log of clicks: from interactions to a bundle."""

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from lrurec.bundle import Bundle, make_bundle
from lrurec.catalogue import Catalogue
from lrurec.errors import DeviceError, TrainingError
from lrurec.evaluation import Metrics
from lrurec.interactions import MIN_CLICKS_TO_EVALUATE, HeldOut, Interactions, Split, leave_one_out
from lrurec.threads import limited_threads
from lrurec.training.precision import dtype_of
from lrurec.training.presets import Precision, TrainingSettings
from lrurec.training.run import TrainingRun

_COMPUTATION = 5
"""Raised whenever what a step computes changes: a checkpoint from before belongs to another training."""

CHECKPOINT_SECONDS = 10.0
"""Between two checkpoints, besides one at every validation."""

REPORT_SECONDS = 0.25
"""Between two reports, besides one at every validation."""


class TrainingReport(NamedTuple):
    """How a training is doing."""

    step: int
    steps: int
    """Of the whole training, early stopping aside."""

    loss: float
    """Mean cross entropy of a label, in nats: a running average over about 50 steps."""

    validation: Metrics | None
    """Of this step, where a validation was due."""

    best_recall_at_10: float | None
    examples_per_second: float
    """Windows of histories."""

    seconds_left: float
    """Until the last step, validations included; early stopping may end it before."""


def ignore(report: TrainingReport) -> None:
    """Nobody listens."""


def train(
    interactions: Interactions,
    settings: TrainingSettings,
    *,
    catalogue: Catalogue | None = None,
    device: str = "auto",
    checkpoint: Path | None = None,
    on_report: Callable[[TrainingReport], None] = ignore,
) -> Bundle:
    """The bundle of a model trained on a log: the best weights by validation Recall@10, then NDCG@10.

    Every user's last click is held out for the test metrics in the bundle's metadata, the one before it for
    validation. `catalogue` gives the model's items; by default those of the log.

    Equal arguments give equal weights, to the bit on one CPU with one number of threads, also by way of a kill: what
    stands in `checkpoint` is gone on from. The file is the caller's to remove once the bundle is saved. Torch's random
    state and threads are left as they were.

    Raises `TrainingError` if there is nothing to learn or the checkpoint is of another training, `DeviceError` if the
    device (auto, cpu, cuda) isn't there.
    """
    catalogue = catalogue or interactions.catalogue
    split = _split(interactions, catalogue)
    target, settings = _device(device), resolve(settings)
    with limited_threads(settings.threads), torch.random.fork_rng(devices=[target] if target.type == "cuda" else []):
        run = TrainingRun(
            settings,
            split.train,
            split.validation,
            num_items=len(catalogue),
            device=target,
            run_id=run_id(interactions, settings, catalogue, device),
        )
        if checkpoint is not None:
            run.resume(checkpoint)
        _run_to_the_end(run, checkpoint, on_report)
        test = run.measure(run.best, split.test)
    metadata = _metadata(interactions, settings, run, test)
    return make_bundle(run.best.config, run.best.state_dict(), catalogue, metadata)


def resolve(settings: TrainingSettings) -> TrainingSettings:
    """The settings with what they leave to the machine: the number of threads, and the precision of products."""
    precision: Precision = "bfloat16" if dtype_of(settings.precision) == torch.bfloat16 else "float32"
    return dataclasses.replace(settings, threads=settings.threads or torch.get_num_threads(), precision=precision)


def run_id(interactions: Interactions, settings: TrainingSettings, catalogue: Catalogue, device: str) -> str:
    """16 hexadecimal digits over all that decides the trained weights: a checkpoint fits a run of the same id.

    Data, settings as resolved, catalogue, kind of device, versions of what computes, and what a step here computes.
    """
    how = [_COMPUTATION, resolve(settings).to_json(), _device(device).type, _versions()]
    digest = hashlib.sha256(interactions.fingerprint.encode())
    digest.update(json.dumps(how, sort_keys=True).encode())
    digest.update(catalogue.to_text().encode())
    return digest.hexdigest()[:16]


def _run_to_the_end(run: TrainingRun, checkpoint: Path | None, on_report: Callable[[TrainingReport], None]) -> None:
    clock = _Clock(run)
    while run.wants_more():
        run.advance()
        clock.has_stepped()
        validation = run.validate() if run.validation_is_due() else None
        if checkpoint is not None and (validation or clock.checkpoint_is_due()):
            run.save(checkpoint)
            clock.has_saved()
        if validation or clock.report_is_due():
            on_report(clock.report(validation))


class _Clock:
    """When the next checkpoint and report are due, and how fast the steps go. Nothing that is trained depends on it.

    Speed is that of this process, all but its first step: that one compiles and fills caches, and after a resume with
    few steps left it would be most of what was measured.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run, self._before = run, run.step
        self._started = self._saved = self._reported = time.monotonic()

    def has_stepped(self) -> None:
        if self._run.step == self._before + 1:
            self._first_ended = time.monotonic()

    def checkpoint_is_due(self) -> bool:
        return time.monotonic() - self._saved >= CHECKPOINT_SECONDS

    def has_saved(self) -> None:
        self._saved = time.monotonic()

    def report_is_due(self) -> bool:
        return time.monotonic() - self._reported >= REPORT_SECONDS

    def report(self, validation: Metrics | None) -> TrainingReport:
        run, settings = self._run, self._run.settings
        self._reported = time.monotonic()
        steps_per_second = self._steps_per_second()
        return TrainingReport(
            step=run.step,
            steps=run.steps,
            loss=float(run.loss),
            validation=validation,
            best_recall_at_10=run.best_recall if run.best_recall >= 0 else None,
            examples_per_second=steps_per_second * min(settings.batch_size, len(run.windows)),
            seconds_left=(run.steps - run.step) / steps_per_second,
        )

    def _steps_per_second(self) -> float:
        steps = self._run.step - self._before
        if steps == 1:
            return 1 / (self._reported - self._started)
        return (steps - 1) / (self._reported - self._first_ended)


def _split(interactions: Interactions, catalogue: Catalogue) -> Split:
    """Leave-one-out in rows of the catalogue, without the clicks on items that it doesn't hold."""
    train, *held_out = leave_one_out(interactions.histories_in(catalogue))
    validation, test = (HeldOut(asked.histories.known(), asked.answers) for asked in held_out)
    if not len(test.answers):
        raise TrainingError(f"no user has {MIN_CLICKS_TO_EVALUATE} clicks; give a log with longer histories")
    if not (known := train.known()).items.size:
        raise TrainingError(
            "no click that is left to learn from is on an item of the catalogue; give another catalogue"
        )
    return Split(known, validation, test)


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"device is {name!r}; allowed are auto, cpu and cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DeviceError("device cuda was asked for, but torch finds no CUDA device here; choose auto or cpu")
    return torch.device("cuda:0" if available and name != "cpu" else "cpu")


def _metadata(
    interactions: Interactions, settings: TrainingSettings, run: TrainingRun, test: Metrics
) -> dict[str, Any]:
    best = next(point for point in run.curve if point["step"] == run.best_step)
    return {
        "data": {
            "fingerprint": interactions.fingerprint,
            "users": len(interactions.user_ids),
            "items": len(interactions.catalogue),
            "clicks": len(interactions.histories.items),
        },
        "settings": settings.to_json(),
        "run": run.run_id,
        "device": run.loss.device.type,
        "steps": run.step,
        "best_step": run.best_step,
        "metrics": {"validation": best["validation"], "test": test.to_json()},
        "curve": run.curve,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {
        "lrurec": version("stream-app"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "numba": numba.__version__,
    }
