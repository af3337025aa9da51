import copy
import dataclasses

import numpy as np
import pytest
import torch

from lrurec.interactions import Histories, leave_one_out
from lrurec.training.presets import TrainingSettings
from lrurec.training.run import TrainingRun, encode
from lrurec.training.windows import Windows

SETTINGS = TrainingSettings(hidden_units=8, max_steps=20, batch_size=4, precision="float32")


@pytest.fixture
def batch():
    return Windows.cut(Histories(np.array([3, 4, 5, 6, 9, 11], np.int32), np.array([0, 4, 6])), 50).batch(np.arange(2))


def test_tokens_with_a_label_are_encoded_in_float32_exactly_where_that_is_asked_for(small_model, batch):
    model = copy.deepcopy(small_model).eval()
    exact = model.encode_packed(batch.items, batch.position)[: len(batch.labels)]
    assert torch.equal(encode(model, batch, "float32"), exact)


def test_bfloat16_rounds_what_the_blocks_multiply(small_model, batch):
    model = copy.deepcopy(small_model).eval()
    exact, rounded = (encode(model, batch, precision).detach() for precision in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert 1e-5 < float((rounded - exact).norm() / exact.norm()) < 2e-2


def test_every_seed_and_step_draw_something_else():
    split = leave_one_out(Histories(np.tile(np.arange(1, 9, dtype=np.int32), 6), np.arange(0, 49, 8)))
    seen = set()
    for seed in (1, 2, 2**31 - 1):
        settings = dataclasses.replace(SETTINGS, seed=seed)
        run = TrainingRun(
            settings, split.train, split.validation, num_items=8, device=torch.device("cpu"), run_id="run"
        )
        for _ in range(3):
            run.advance()
            seen.add(float(torch.rand(())))  # goes on from where the step's own draws ended
    assert len(seen) == 9
