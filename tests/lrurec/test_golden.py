"""The published implementation's numbers, by every way that we compute them."""

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


def test_the_parallel_form_gives_the_published_logits_after_every_prefix(golden):
    model = golden.bundle.model
    encodings = model.encode(golden.items, golden.lengths)
    logits = model.scores(encodings.flatten(0, 1)).view(*golden.items.shape, -1).numpy()
    for user, clicks in prefixes(golden):
        np.testing.assert_allclose(
            logits[user, clicks - 1], golden.prefix_logits[user, clicks - 1], rtol=0, atol=golden.tolerance
        )


def test_single_steps_give_the_published_logits_and_states(golden):
    model = golden.bundle.model
    state = model.initial_state(len(golden.items))
    for place in range(golden.items.shape[1]):
        going = golden.lengths > place
        encodings, after = model.step(golden.items[going, place], state[going])
        state = state.index_put((going,), after)
        expected = (golden.prefix_logits[going.numpy(), place], golden.prefix_states[going.numpy(), place])
        for ours, theirs in zip((model.scores(encodings), after), expected, strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=golden.tolerance)


def test_the_state_after_a_sequence_is_the_published_one(golden):
    state = golden.bundle.model.initial_state(len(golden.items))
    _, after = golden.bundle.model.encode_from(state, golden.items, golden.lengths)
    expected = golden.prefix_states[np.arange(len(golden.items)), golden.lengths.numpy() - 1]
    np.testing.assert_allclose(after.numpy(), expected, rtol=0, atol=golden.tolerance)


def test_the_ten_best_unseen_items_are_the_published_ones(golden):
    for user, clicks in prefixes(golden):
        seen = [str(row) for row in golden.items[user, :clicks].tolist()]
        ours = [int(item.item_id) for item in recommend(golden.bundle, seen, 10).items]
        assert ours == golden.prefix_top10[user, clicks - 1].tolist(), (user, clicks)


def test_no_history_gives_the_published_cold_start(golden):
    model = golden.bundle.model
    logits = model.scores(model.cold_start()[None])[0].numpy()
    np.testing.assert_allclose(logits, golden.empty_logits, rtol=0, atol=golden.tolerance)
