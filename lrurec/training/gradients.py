"""What a step of training descends: the loss of a batch and its gradients."""

from typing import cast

import torch
from torch import Tensor

from lrurec.model import LRURec
from lrurec.training.encoding import encode
from lrurec.training.loss import softmax_cross_entropy
from lrurec.training.presets import Precision
from lrurec.training.windows import Batch


def loss_with_gradients(model: LRURec, batch: Batch, smoothing: float, precision: Precision) -> Tensor:
    """The mean cross entropy of a batch's labels, in nats; the gradients are left in the parameters' `.grad`.

    Those must be None before, and the item table one that learns. See `softmax_cross_entropy`, also for its errors.
    """
    table = model.item_embedding.weight
    embedded = table.detach()[batch.items].requires_grad_()
    encodings = encode(model, embedded, batch.position, precision)[: len(batch.labels)]
    loss = softmax_cross_entropy(encodings, table, model.item_bias, batch.labels, smoothing, precision)
    torch.autograd.backward(loss)
    # The table's gradient is there, from the scores of all items. Autograd would fill one more of that size for the few
    # items that the batch embeds, and add the two up.
    cast("Tensor", table.grad).index_add_(0, batch.items, cast("Tensor", embedded.grad))
    return loss.detach()
