import pytest
import torch
from torch.nn import functional

from lrurec import loss
from lrurec.loss import softmax_cross_entropy


def leaves(dtype):
    generator = torch.manual_seed(1)
    shapes = ((7, 4), (11, 4), (11,))
    return [torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scores_per_tile", [1, 30, 1000])
def test_tiles_give_the_loss_and_gradients_of_the_whole(monkeypatch, smoothing, scores_per_tile):
    monkeypatch.setattr(loss, "SCORES_PER_TILE", scores_per_tile)
    labels = torch.tensor([0, 3, 3, 10, 5, 1, 2])
    ours, theirs = leaves(torch.float64), leaves(torch.float64)
    loss_of_ours = softmax_cross_entropy(*ours, labels, smoothing)
    loss_of_theirs = functional.cross_entropy(functional.linear(*theirs), labels, label_smoothing=smoothing)
    torch.autograd.backward([3 * loss_of_ours, 3 * loss_of_theirs])
    torch.testing.assert_close(loss_of_ours, loss_of_theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_scores_beyond_the_range_of_exp_are_no_trouble():
    encodings, weight, bias = (leaf.detach() * 1e3 for leaf in leaves(torch.float32))
    assert softmax_cross_entropy(encodings, weight, bias, torch.zeros(7, dtype=torch.int64)).isfinite()
