"""How fast the exact ten best items are found, on one core, against the product and topk of torch.

    python -m benchmarks.ranking                              catalogues of 3,416, 100,000 and 1,000,000 items
    python -m benchmarks.ranking --items 3416 --rounds 9

`torch` is addmm over all items and topk, a run of clicks at a time (the fastest of a few run lengths); `float32` is our
ranking on CPUs without products of bytes (VNNI, AVX2), `lrurec` the one of this CPU. Ours leave out 100 seen items a
click, torch's does not. They take turns on the same encodings; first the scores of 64 clicks' lists are held against
torch's full sort.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch

from benchmarks.machine import processor
from lrurec.config import LRURecConfig
from lrurec.model import LRURec
from lrurec.serving import FullRanker, Ranker, ranker_of
from lrurec.threads import limited_threads

TOP_K, SEEN = 10, 100

#: Scores of one round of torch's way, about: so that a round takes a second or so whatever the catalogue.
SCORES_PER_ROUND = 1 << 27

#: Clicks in one product of torch's; the fastest is taken.
RUNS = (16, 64, 256)


def main() -> None:
    """Print a line a catalogue and a way, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranking", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[3_416, 100_000, 1_000_000])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    versions = {name: version(name) for name in ("torch", "numpy", "scipy", "numba")}
    print(f"{processor()}, 1 thread, Python {platform.python_version()}, {versions}")
    with limited_threads(1):
        for items in options.items:
            measure(items, options.width, options.rounds)


def measure(items: int, width: int, rounds: int) -> None:
    """Equality, then microseconds a click, of one catalogue."""
    torch.manual_seed(0)
    model = _model(items, width)
    clicks = max(96, min(2_048, SCORES_PER_ROUND // items))
    encodings = torch.nn.functional.layer_norm(torch.randn(clicks, width), [width])
    seen = np.random.default_rng(0).integers(1, items + 1, (clicks, SEEN)).astype(np.int32)
    table, bias = (each.detach().numpy() for each in (model.item_embedding.weight, model.item_bias))
    rankers = {"float32": FullRanker(table, bias), "lrurec": ranker_of(table, bias)}
    check(model, encodings, seen, rankers)
    run = min(RUNS, key=lambda length: _seconds(lambda: by_torch(model, encodings, length)))
    ways: dict[str, Callable[[], object]] = {"torch": lambda: by_torch(model, encodings, run)}
    ways |= {name: lambda each=each: rank(each, encodings, seen) for name, each in rankers.items()}  # type: ignore[misc]
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(_seconds(way) / clicks * 1e6)
    for name, each in taken.items():
        ratios = [theirs / own for theirs, own in zip(taken["torch"], each, strict=True)]
        print(
            f"{items:>9,} items {name:>8}: {statistics.median(each):8.1f} µs a click ({min(each):.1f} to "
            f"{max(each):.1f}), {statistics.median(ratios):5.1f} times torch ({min(ratios):.1f} to {max(ratios):.1f})"
        )
    print(json.dumps({"benchmark": "ranking", "items": items, "width": width, "run": run, "microseconds": taken}))


def _model(items: int, width: int) -> LRURec:
    """Weights whose scores spread as a trained model's do: a standard deviation of about 2.5, biases of log counts."""
    model = LRURec(LRURecConfig(num_items=items, hidden_units=width))
    with torch.no_grad():
        model.item_embedding.weight.normal_(std=2.5 / width**0.5)
        model.item_bias.copy_(-torch.rand(items + 1) * 4)
    return model.requires_grad_(requires_grad=False)


def by_torch(model: LRURec, encodings: torch.Tensor, run: int) -> torch.Tensor:
    """The scores of all items, and the best of them."""
    table, bias = model.item_embedding.weight.T, model.item_bias
    return torch.cat([torch.addmm(bias, part, table).topk(TOP_K).values for part in encodings.split(run)])


def rank(ranker: Ranker, encodings: torch.Tensor, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Items and scores of the best."""
    clicks = len(encodings)
    items, scores = np.empty((clicks, TOP_K), np.int32), np.empty((clicks, TOP_K), np.float32)
    ranker.rank(encodings.numpy(), np.arange(clicks), seen, items, scores)
    return items, scores


def check(model: LRURec, encodings: torch.Tensor, seen: np.ndarray, rankers: dict[str, Ranker]) -> None:
    """Raises AssertionError unless every ranker gives the scores of the best by a sort of all."""
    scores = model.scores(encodings[:64])
    scores.scatter_(1, torch.from_numpy(seen[:64].astype(np.int64)), -torch.inf)
    scores[:, 0] = -torch.inf
    expected = scores.sort(dim=1, descending=True).values[:, :TOP_K].numpy()
    for ranker in rankers.values():
        np.testing.assert_allclose(rank(ranker, encodings[:64], seen[:64])[1], expected, rtol=1e-5, atol=1e-5)


def _seconds(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
