"""Small logs as the tests of the evaluation write them: a list of item rows a user."""

import numpy as np
from hypothesis import strategies as st

from lrurec.catalogue import Catalogue
from lrurec.interactions import Histories, Interactions

NUM_ITEMS = 20
"""Of the bundle `small_bundle`."""


def histories(users):
    offsets = np.concatenate([[0], np.cumsum([len(user) for user in users])]).astype(np.int64)
    return Histories(np.array([row for user in users for row in user], np.int32), offsets)


def log(users, num_items=NUM_ITEMS, times=None):
    """`times`, where given, are lists beside those of `users`."""
    catalogue = Catalogue(f"item-{row}" for row in range(1, num_items + 1))
    user_ids = tuple(f"u{index}" for index in range(len(users)))
    flat = None if times is None else np.array([time for user in times for time in user], np.int64)
    return Interactions(user_ids, catalogue, histories(users), flat)


def random_users(count, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(1, NUM_ITEMS + 1, generator.integers(1, 12)).tolist() for _ in range(count)]


def lists(histories):
    return [histories[user].tolist() for user in range(len(histories))]


def some_users(*, least=0, most=NUM_ITEMS, min_size=0):
    """Histories of a few users, of items `least` to `most`."""
    return st.lists(st.lists(st.integers(least, most), min_size=min_size, max_size=8), min_size=1, max_size=8)
