"""How good the recommendations are: every figure of the paper's Table 3, over several seeds.

    python -m benchmarks.quality video beauty ml-1m --data FOLDER --seeds 1 2 3     FOLDER/video/interactions.csv.gz, …
    python -m benchmarks.quality video --data FOLDER --set embeddings_from_cooccurrence=false

Trains the preset of each name with each seed, on all cores unless --threads says otherwise, and prints the test metrics
(leave-one-out, over all items) beside the paper's and the seconds that each took, validations and test included.
--set changes a setting of the preset, so that the same command shows what the setting is worth. Without names it is the
shop's log of the demo, which the paper doesn't have.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.machine import processor
from lrurec.interactions import read_interactions
from lrurec.training.presets import TrainingSettings, changed, preset
from lrurec.training.train import train

SHOP = Path(__file__).parents[1] / "stream_app" / "dev" / "demo" / "eshop" / "clicks.csv.gz"

METRICS = ("recall@10", "ndcg@10", "recall@20", "ndcg@20")

#: arXiv 2310.02367, Table 3, in the order of METRICS.
PAPER = {
    "ml-1m": {"LRURec": (0.32636, 0.19298, 0.43313, 0.21990), "SASRec": (0.31810, 0.19021, 0.43050, 0.21860)},
    "beauty": {"LRURec": (0.05284, 0.03088, 0.07161, 0.03560), "SASRec": (0.05043, 0.02917, 0.06965, 0.03403)},
    "video": {"LRURec": (0.11337, 0.06198, 0.16705, 0.07547), "SASRec": (0.10910, 0.05829, 0.15989, 0.07111)},
}


def main() -> None:
    """Print a line a training, a table a data set, and one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("presets", nargs="*", default=["eshop"])
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="SETTING=VALUE")
    options = parser.parse_args()
    print(f"{processor()}, {options.threads} threads, Python {platform.python_version()}, torch {version('torch')}")
    for name in options.presets:
        path = options.data / name / "interactions.csv.gz" if options.data else SHOP
        settings = changed(dataclasses.replace(preset(name), threads=options.threads), options.changes)
        measure(name, path, settings, options.seeds, options.changes)


def measure(name: str, path: Path, settings: TrainingSettings, seeds: list[int], changes: list[str]) -> None:
    """Train with every seed and compare."""
    log = read_interactions(path)
    rows, seconds = [], []
    for seed in seeds:
        started = time.perf_counter()
        bundle = train(log, dataclasses.replace(settings, seed=seed), device="cpu")
        seconds.append(time.perf_counter() - started)
        rows.append([bundle.metadata["metrics"]["test"][metric] for metric in METRICS])
        print(
            f"{name} seed {seed}:", line(rows[-1]), f"{bundle.metadata['steps']} steps, {seconds[-1]:.0f} s", flush=True
        )
    means = [statistics.mean(column) for column in zip(*rows, strict=True)]
    print(f"{name:>8}{'':>10}", " ".join(metric.rjust(9) for metric in METRICS))
    print(f"{name:>8}{'mean':>10}", line(means), *changes)
    print(f"{name:>8}{'spread':>10}", line([max(column) - min(column) for column in zip(*rows, strict=True)]))
    for model, figures in PAPER.get(name, {}).items():
        print(f"{name:>8}{model:>10}", line(list(figures)), "in the paper; ours is", end=" ")
        print(" ".join(f"{ours / theirs - 1:+.1%}" for ours, theirs in zip(means, figures, strict=True)))
    print(
        json.dumps(
            {"benchmark": "quality", "data": name, "changes": changes, "seeds": seeds, "test": rows, "seconds": seconds}
        )
    )


def line(values: list[float]) -> str:
    """Figures under the names of METRICS."""
    return " ".join(f"{value:9.5f}" for value in values)


if __name__ == "__main__":
    main()
