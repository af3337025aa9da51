"""Golden vectors of the published implementation, and small models of our own."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from lrurec.bundle import Bundle, make_bundle
from lrurec.catalogue import Catalogue
from lrurec.config import LRURecConfig
from lrurec.convert import convert
from lrurec.model import LRURec

# Without a GPU Triton's kernels run on the CPU, by its interpreter; Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Small products gain nothing by a second thread, and lose much where the second core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Golden:
    """What the published implementation gave, in evaluation mode, for the bundle's weights."""

    path: Path
    bundle: Bundle
    tolerance: float
    """Absolute, on logits and states."""

    items: torch.Tensor
    """(12, 50), on the left: oldest first from column 0; published with the padding on the left."""

    lengths: torch.Tensor
    prefix_logits: np.ndarray
    prefix_top10: np.ndarray
    prefix_states: np.ndarray
    """(12, 50, blocks, 2d)."""

    empty_logits: np.ndarray


@pytest.fixture(
    scope="session", params=[("public_small_d16_b1", 2e-6), ("public_large_d64_b2", 1e-4)], ids=["small", "large"]
)
def golden(request: pytest.FixtureRequest) -> Golden:
    name, tolerance = request.param
    path = GOLDEN / f"{name}.npz"
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    blocks = json.loads(str(arrays["config"]))["num_blocks"]
    items = np.zeros_like(arrays["seqs"])
    for row, (sequence, length) in enumerate(zip(arrays["seqs"], arrays["lengths"], strict=True)):
        items[row, :length] = sequence[len(sequence) - length :]
    return Golden(
        path=path,
        bundle=convert(path),
        tolerance=tolerance,
        items=torch.from_numpy(items),
        lengths=torch.from_numpy(arrays["lengths"]),
        prefix_logits=arrays["prefix_logits"],
        prefix_top10=arrays["prefix_top10_excl_seen"],
        prefix_states=np.stack([arrays[f"prefix_state_block{index}"] for index in range(blocks)], 2),
        empty_logits=arrays["empty_logits"],
    )


@pytest.fixture(scope="session")
def small_model() -> LRURec:
    """20 items, d = 8, 2 blocks, and weights large enough to matter."""
    torch.manual_seed(7)
    model = LRURec(LRURecConfig(num_items=20, hidden_units=8, num_blocks=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name and not name.endswith("_log"):
                parameter.mul_(15)
    return model.eval()


@pytest.fixture(scope="session")
def small_bundle(small_model: LRURec) -> Bundle:
    catalogue = Catalogue(f"item-{row}" for row in range(1, 21))
    return make_bundle(small_model.config, small_model.state_dict(), catalogue, {"made": "for tests"})
