"""How exactly the published model is reproduced.

    python -m benchmarks.golden

Converts both golden files, made by the published implementation, and prints the largest difference in any logit: of the
parallel form, of single steps on a carried state, of the serving engine, and of the empty history.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lrurec.bundle import Bundle
from lrurec.convert import convert
from lrurec.engine import Clicks
from lrurec.serving import build_engine, state_layout

GOLDEN = Path(__file__).parents[1] / "tests" / "lrurec" / "golden"
FILES = {"public_small_d16_b1.npz": 2e-6, "public_large_d64_b2.npz": 1e-4}


def main() -> None:
    """Print one line a file."""
    for name, tolerance in FILES.items():
        with np.load(GOLDEN / name, allow_pickle=False) as arrays:
            golden = dict(arrays)
        bundle = convert(GOLDEN / name)
        errors = {
            "parallel": parallel_error(bundle, golden),
            "steps": step_error(bundle, golden),
            "engine, top 10": engine_error(bundle, golden),
            "empty history": cold_start_error(bundle, golden),
        }
        print(f"{name} (tolerance {tolerance:g}):", ", ".join(f"{form} {error:.1e}" for form, error in errors.items()))


def sequences(golden: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(items, logits after each of them) of every user; the file pads on the left, and its logits on the right."""
    lengths = golden["lengths"].tolist()
    return [
        (golden["seqs"][user, -length:], golden["prefix_logits"][user, :length]) for user, length in enumerate(lengths)
    ]


@torch.inference_mode()
def parallel_error(bundle: Bundle, golden: dict[str, np.ndarray]) -> float:
    """Whole sequences at once."""
    worst = 0.0
    for items, expected in sequences(golden):
        encodings = bundle.model.encode(torch.from_numpy(items)[None], torch.tensor([len(items)]))[0]
        worst = max(worst, float(np.abs(bundle.model.scores(encodings).numpy() - expected).max()))
    return worst


@torch.inference_mode()
def step_error(bundle: Bundle, golden: dict[str, np.ndarray]) -> float:
    """Click by click on a carried state."""
    worst = 0.0
    for items, expected in sequences(golden):
        state = bundle.model.initial_state(1)
        for item, logits in zip(torch.from_numpy(items), expected, strict=True):
            encoding, state = bundle.model.step(item[None], state)
            worst = max(worst, float(np.abs(bundle.model.scores(encoding)[0].numpy() - logits).max()))
    return worst


def engine_error(bundle: Bundle, golden: dict[str, np.ndarray]) -> float:
    """The worker's engine with float32 states: scores of the ten best, nothing left out but the padding item."""
    layout = state_layout(bundle, "float32")
    engine = build_engine(bundle, layout, exclude_seen=False, device="cpu")
    worst = 0.0
    for items, expected in sequences(golden):
        every = np.arange(len(items))
        clicks = Clicks(np.zeros(len(items), np.int32), items.astype(np.int32), every, every)
        _, ranking = engine.advance(layout.unpack([None]), clicks, every)
        worst = max(worst, float(np.abs(np.take_along_axis(expected, ranking.items, 1) - ranking.scores).max()))
    return worst


@torch.inference_mode()
def cold_start_error(bundle: Bundle, golden: dict[str, np.ndarray]) -> float:
    """No click yet."""
    scores = bundle.model.scores(bundle.model.cold_start()[None])[0].numpy()
    return float(np.abs(scores - golden["empty_logits"]).max())


if __name__ == "__main__":
    main()
