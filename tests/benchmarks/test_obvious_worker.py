import torch

from benchmarks.obvious_worker import FoldedStep
from lrurec.config import LRURecConfig
from lrurec.model import LRURec


@torch.inference_mode()
def test_the_peer_computes_the_same_model():
    torch.manual_seed(1)
    model = LRURec(LRURecConfig(num_items=30, hidden_units=8)).eval()
    step, stored, state = FoldedStep(model), None, model.initial_state(1)
    for item in (3, 3, 30, 1, 17):
        scores, stored = step(item, stored)
        x, state = model.step(torch.tensor([item]), state)
        torch.testing.assert_close(scores, model.scores(x)[0])
    torch.testing.assert_close(torch.frombuffer(bytearray(stored), dtype=torch.complex64), state[0].flatten())
