"""The published implementation's lists; its logits and states, by every route, are `test_equality`'s."""

import numpy as np
import pytest
import torch

from lrurec.recommendation import recommend


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def prefixes(golden):
    """(user, number of clicks) of every prefix."""
    return [(user, clicks) for user, length in enumerate(golden.lengths.tolist()) for clicks in range(1, length + 1)]


def test_the_ten_best_unseen_items_are_the_published_ones(golden):
    for user, clicks in prefixes(golden):
        seen = [str(row) for row in golden.items[user, :clicks].tolist()]
        ours = [int(item.item_id) for item in recommend(golden.bundle, seen, 10).items]
        assert ours == golden.prefix_top10[user, clicks - 1].tolist(), (user, clicks)


def test_no_history_gives_the_published_cold_start(golden):
    model = golden.bundle.model
    logits = model.scores(model.cold_start()[None])[0].numpy()
    np.testing.assert_allclose(logits, golden.empty_logits, rtol=0, atol=golden.tolerance)
