import copy

import numpy as np
import pytest
import torch

from lrurec.interactions import Histories
from lrurec.training.run import encode
from lrurec.training.windows import Windows


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
