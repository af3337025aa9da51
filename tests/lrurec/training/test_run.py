import dataclasses

import numpy as np
import torch

from lrurec.interactions import Histories, leave_one_out
from lrurec.training.presets import TrainingSettings
from lrurec.training.run import TrainingRun

SETTINGS = TrainingSettings(hidden_units=8, max_steps=20, batch_size=4, precision="float32")


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
