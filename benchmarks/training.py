"""How fast a step of training is, against the form that LRURec is usually written in.

    python -m benchmarks.training                                             the shop's log of the demo
    python -m benchmarks.training video beauty ml-1m --data FOLDER            FOLDER/video/interactions.csv.gz, …
    python -m benchmarks.training beauty --data FOLDER --set hidden_units=64  in the paper's width

Both forms have the same weights, batches, dropout rates and optimizer, and take turns; the other form in a process of
its own, in which torch's threads wait for work as they do where nobody says how. First the loss and the gradients of
one batch without dropout are held against each other.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks import plain_form
from benchmarks.machine import processor
from lrurec.interactions import leave_one_out, read_interactions
from lrurec.model import LRURec
from lrurec.threads import limited_threads
from lrurec.training.gradients import loss_with_gradients
from lrurec.training.presets import Precision, TrainingSettings, changed, preset
from lrurec.training.run import TrainingRun
from lrurec.training.windows import Batch, Windows

_SPINS_WHERE_NOBODY_SAYS = "300000"
"""Of torch's waiting threads: what libgomp has of itself, and `lrurec` changes. It goes before OMP_WAIT_POLICY."""

_STEP_SECONDS = 600

SHOP = Path(__file__).parents[1] / "stream_app" / "dev" / "demo" / "eshop" / "clicks.csv.gz"


def main() -> None:
    """Print a line a data set, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("presets", nargs="*", default=["eshop"])
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=5, help="a step of the plain form and three of ours each")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="SETTING=VALUE")
    options = parser.parse_args()
    print(
        f"{processor()}, {options.threads} threads, Python {platform.python_version()}, torch {version('torch')}, "
        f"numba {version('numba')}"
    )
    for name in options.presets:
        path = options.data / name / "interactions.csv.gz" if options.data else SHOP
        settings = changed(dataclasses.replace(preset(name), threads=options.threads), options.changes)
        with limited_threads(options.threads):
            measure(name, path, settings, options.rounds)


def measure(name: str, path: Path, settings: TrainingSettings, rounds: int) -> None:
    """Equality, then speed, of one data set."""
    run = training_run(name, path, settings)
    for precision in ("float32", "bfloat16"):
        difference = compare(run.model, run.windows, settings, precision)
        print(
            f"{name}, {precision}: loss differs by {difference.loss:.1e} of itself, "
            f"gradients by {difference.gradients:.1e} of their norm at most ({difference.worst})"
        )
    with plain_form_of(name, path, settings) as plain_step:
        plain, ours = seconds_per_step(run, plain_step, rounds)
    ratios = [theirs / own for theirs, own in zip(plain, ours, strict=True)]
    for form, each in (("plain form", plain), ("lrurec", ours)):
        print(f"{name:>8} {form:>10}: {statistics.median(each):7.3f} s a step ({min(each):.3f} to {max(each):.3f})")
    print(f"{name:>8} {'ratio':>10}: {statistics.median(ratios):7.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
    print(json.dumps({"benchmark": "training", "data": name, "plain": plain, "lrurec": ours}), flush=True)


def training_run(name: str, path: Path, settings: TrainingSettings) -> TrainingRun:
    log = read_interactions(path)
    split = leave_one_out(log.histories)
    return TrainingRun(
        settings, split.train, split.validation, num_items=len(log.catalogue), device=torch.device("cpu"), run_id=name
    )


class Difference(NamedTuple):
    loss: float
    gradients: float
    worst: str
    """The parameter whose gradient differs most."""


def compare(model: LRURec, windows: Windows, settings: TrainingSettings, precision: Precision) -> Difference:
    """Relative differences on the first batch, without dropout."""
    chosen = np.arange(min(settings.batch_size, len(windows)))
    model = copy.deepcopy(model).eval()
    packed, smoothing = windows.batch(chosen), settings.label_smoothing
    ours = loss_with_gradients(model, packed, smoothing, precision)
    theirs = plain_form.loss(model, *padded(packed), 0.0, smoothing)
    names, parameters = zip(*model.named_parameters(), strict=True)
    pairs = zip([each.grad for each in parameters], torch.autograd.grad(theirs, parameters), strict=True)
    differences = [float((one - other).norm() / other.norm()) for one, other in pairs]
    worst = int(np.argmax(differences))
    return Difference(abs(float((ours / theirs).detach()) - 1), differences[worst], names[worst])


def padded(batch: Batch) -> tuple[Tensor, Tensor]:
    """The same windows, padded on the left to a power of two: items and labels, (b, t)."""
    count = len(batch.labels)
    starts = np.flatnonzero(batch.items[:count].numpy() == 0)
    lengths = np.diff([*starts, count])
    tokens = 1 << (int(lengths.max()) - 1).bit_length()
    column = tokens - np.repeat(lengths, lengths) + np.arange(count) - np.repeat(starts, lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    items, labels = torch.zeros(2, len(lengths), tokens, dtype=torch.int64)
    items[row, column], labels[row, column] = batch.items[:count], batch.labels
    return items, labels


def seconds_per_step(run: TrainingRun, plain_step: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """(plain form, ours) of every round; ours is the mean of three steps."""
    plain_step(), run.advance()  # what is compiled or allocated once
    plain, ours = [], []
    for _ in range(rounds):
        plain.append(plain_step())
        started = time.perf_counter()
        for _ in range(3):
            run.advance()
        ours.append((time.perf_counter() - started) / 3)
    return plain, ours


@contextmanager
def plain_form_of(name: str, path: Path, settings: TrainingSettings) -> Iterator[Callable[[], float]]:
    """The plain form in a process of its own: each call is a step, and gives its seconds."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=plain_steps, args=(theirs, name, path, settings), daemon=True
    )
    with patch.dict(os.environ, GOMP_SPINCOUNT=_SPINS_WHERE_NOBODY_SAYS):
        process.start()

    def step() -> float:
        ours.send(None)
        if not ours.poll(_STEP_SECONDS):
            raise TimeoutError(f"the plain form gave no answer within {_STEP_SECONDS} s")
        return float(ours.recv())

    try:
        yield step
    finally:
        process.kill()
        process.join()
        ours.close()


def plain_steps(connection: Connection, name: str, path: Path, settings: TrainingSettings) -> None:
    """A step of the plain form for whatever is received, on windows drawn at random; sends its seconds."""
    with limited_threads(settings.threads):
        run = training_run(name, path, settings)
        model, windows = run.model.train(), run.windows
        optimizer = plain_form.optimizer(model)
        generator = np.random.default_rng(0)
        while True:
            connection.recv()
            started = time.perf_counter()
            chosen = generator.choice(len(windows), min(settings.batch_size, len(windows)), replace=False)
            loss = plain_form.loss(model, *padded(windows.batch(chosen)), settings.dropout, settings.label_smoothing)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            connection.send(time.perf_counter() - started)


if __name__ == "__main__":
    main()
