import copy

import numpy as np
import torch
from torch.nn import functional

from lrurec.interactions import Histories
from lrurec.training.gradients import loss_with_gradients
from lrurec.training.windows import Windows


def test_all_parameters_get_the_gradient_of_the_loss_also_through_an_item_clicked_often(small_model):
    items = np.array([3, 4, 3, 3, 9, 11, 3, 7], np.int32)
    batch = Windows.cut(Histories(items, np.array([0, 5, 8])), 50).batch(np.arange(2))
    model = copy.deepcopy(small_model).eval()
    encodings = model.encode_packed(batch.items, batch.position)[: len(batch.labels)]
    expected = functional.cross_entropy(model.scores(encodings), batch.labels, label_smoothing=0.1)
    by_name = dict(model.named_parameters())
    gradients = torch.autograd.grad(expected, list(by_name.values()))
    loss = loss_with_gradients(model, batch, 0.1, "float32")
    torch.testing.assert_close(loss, expected.detach())
    for (name, parameter), gradient in zip(by_name.items(), gradients, strict=True):
        assert gradient.any(), name
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=lambda text, at=name: at + text)
