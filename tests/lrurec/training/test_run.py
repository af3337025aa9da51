import dataclasses

import numpy as np
import pytest
import torch

from lrurec.interactions import Histories, leave_one_out
from lrurec.training.presets import TrainingSettings
from lrurec.training.run import TrainingRun

SETTINGS = TrainingSettings(hidden_units=8, max_steps=20, batch_size=4, precision="float32")


@pytest.fixture
def new_run():
    split = leave_one_out(Histories(np.tile(np.arange(1, 9, dtype=np.int32), 6), np.arange(0, 49, 8)))

    def make(**changes):
        settings = dataclasses.replace(SETTINGS, **changes)
        return TrainingRun(
            settings, split.train, split.validation, num_items=8, device=torch.device("cpu"), run_id="run"
        )

    return make


def test_every_seed_and_step_draw_something_else(new_run):
    seen = set()
    for seed in (1, 2, 2**31 - 1):
        run = new_run(seed=seed)
        for _ in range(3):
            run.advance()
            seen.add(float(torch.rand(())))  # goes on from where the step's own draws ended
    assert len(seen) == 9


def test_gradients_are_cut_to_the_norm_that_is_allowed_and_shorter_ones_are_left(new_run):
    norms = []
    for clip_norm in (1e-3, 1e3):
        run = new_run(clip_norm=clip_norm)
        run.advance()
        gradients = [parameter.grad for parameter in run.model.parameters()]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    assert 1e-2 < norms[1] < 1e3
