import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrurec.interactions import Histories
from lrurec.training.windows import Windows, epoch_order, padded_size


def cut(users, max_len, *, whole=False):
    offsets = np.concatenate([[0], np.cumsum([len(user) for user in users])]).astype(np.int64)
    return Windows.cut(
        Histories(np.array([row for user in users for row in user], np.int32), offsets), max_len, whole=whole
    )


def published_windows(user, max_len):
    if len(user) < 2 * max_len:
        return [user[-max_len:]] if user else []
    return [user[start : start + max_len] for start in range(len(user) - max_len, -1, -max_len)]


@given(users=st.lists(st.lists(st.integers(1, 9), max_size=30), min_size=1, max_size=5), max_len=st.integers(1, 8))
def test_histories_are_cut_as_published(users, max_len):
    windows = cut(users, max_len)
    ours = [windows.windows[index].tolist() for index in range(len(windows))]
    assert ours == [window for user in users for window in published_windows(user, max_len)]


@given(users=st.lists(st.lists(st.integers(1, 9), max_size=30), min_size=1, max_size=5), max_len=st.integers(1, 8))
def test_whole_histories_lose_no_click(users, max_len):
    windows = cut(users, max_len, whole=True)
    ours = [windows.windows[index].tolist() for index in range(len(windows))]
    assert all(0 < len(window) <= max_len for window in ours)
    expected = [user[max(0, end - max_len) : end] for user in users for end in range(len(user), 0, -max_len)]
    assert ours == expected


def test_every_click_is_asked_for_after_the_clicks_before_it_in_its_window():
    batch = cut([[7, 8, 9], [5], [1, 2]], 50).batch(np.array([2, 0, 1]))
    assert batch.labels.tolist() == [1, 2, 7, 8, 9, 5]
    assert batch.items[:6].tolist() == [0, 1, 0, 7, 8, 0]
    # The padding item and the first click both start anew: nothing of the cold start enters a state.
    assert batch.position[:6].tolist() == [0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(("clicks", "tokens"), [(1, 64), (64, 64), (65, 128), (1_150, 1_152), (14_719, 14_848)])
def test_a_batch_is_filled_up_with_cold_starts_to_one_of_few_sizes(clicks, tokens):
    batch = cut([[1] * clicks], clicks).batch(np.array([0]))
    assert len(batch.items) == len(batch.position) == tokens
    assert len(batch.labels) == clicks
    assert not batch.items[clicks:].any()
    assert not batch.position[clicks:].any()


@given(clicks=st.integers(1, 200_000))
def test_filling_up_costs_little(clicks):
    size = padded_size(clicks)
    assert clicks <= size < clicks + max(64, clicks / 16)
    assert padded_size(size) == size


def test_encoding_a_batch_equals_encoding_each_window(small_model):
    users = [[3, 4, 5, 6], [9], [11, 12]]
    batch = cut(users, 50).batch(np.arange(3))
    with torch.inference_mode():
        packed = small_model.encode_packed(batch.items, batch.position)
        expected = []
        for user in users:
            expected.append(small_model.cold_start()[None])
            expected.append(small_model.encode(torch.tensor([user]), torch.tensor([len(user)]))[0, :-1])
    torch.testing.assert_close(packed[: len(batch.labels)], torch.cat(expected), rtol=0, atol=1e-5)


def test_each_epoch_and_seed_has_an_order_of_its_own():
    orders = [epoch_order(100, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_an_order_can_be_drawn_again(seed):
    assert np.array_equal(epoch_order(50, seed, 3), epoch_order(50, seed, 3))
