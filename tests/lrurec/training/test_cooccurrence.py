import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec.interactions import Histories
from lrurec.training import cooccurrence
from lrurec.training.cooccurrence import STD, WINDOW, cooccurrence_embeddings


def histories(users):
    offsets = np.concatenate([[0], np.cumsum([len(user) for user in users])]).astype(np.int64)
    return Histories(np.array([row for user in users for row in user], np.int32), offsets)


def information_by_hand(users, num_rows):
    counts = np.zeros((num_rows, num_rows))
    for user in users:
        for s, one in enumerate(user):
            for t, other in enumerate(user):
                if 1 <= abs(s - t) <= WINDOW:
                    counts[one, other] += 1 / abs(s - t)
    frequency = counts.sum(1)
    smoothed = frequency**0.75 / (frequency**0.75).sum() if counts.any() else frequency
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.maximum(0, np.log(counts / (frequency[:, None] * smoothed))))


some_users = st.lists(st.lists(st.integers(1, 30), max_size=12), min_size=1, max_size=12)


@given(some_users, st.sampled_from([4, 40]))
@settings(deadline=None, max_examples=40)
def test_embeddings_are_the_best_factors_of_the_mutual_information(users, width):
    information = information_by_hand(users, 31)
    embeddings = cooccurrence_embeddings(histories(users), 31, width).astype(np.float64)
    left, values, _ = np.linalg.svd(information)
    kept = min(31, width)
    best = (left * values)[:, :kept] @ left[:, :kept].T  # U S Uᵀ does not depend on how its factors are turned
    scale = np.sqrt(np.trace(best) / max(np.trace(embeddings @ embeddings.T), 1e-30))
    # Where the last value kept equals the first that is not, either vector will do.
    if kept == 31 or values[kept - 1] - values[kept] > 1e-3:
        np.testing.assert_allclose(embeddings @ embeddings.T * scale**2, best, atol=1e-4 * max(1, values[0]))


def test_items_that_were_never_near_another_have_no_embedding():
    embeddings = cooccurrence_embeddings(histories([[1, 2, 3], [4], []]), 500, 8)
    assert embeddings[[1, 2, 3]].any(1).all()
    assert not embeddings[[0, 4, 5, 499]].any()
    assert embeddings[[1, 2, 3]].std() == pytest.approx(STD, rel=1e-5)


def test_items_of_one_circle_lie_closer_than_those_of_two():
    generator = np.random.default_rng(0)
    circles = np.arange(1, 301).reshape(3, 100)
    users = [generator.choice(circles[index % 3], 10).tolist() for index in range(900)]
    embeddings = cooccurrence_embeddings(histories(users), 301, 8)[1:]
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    same = np.kron(np.eye(3), np.ones((100, 100))).astype(bool)
    cosine = unit @ unit.T
    assert cosine[same].mean() > 0.5
    assert cosine[~same].mean() < 0.1


GENERATOR = np.random.default_rng(1)


@pytest.mark.parametrize(
    "users",
    [
        [GENERATOR.integers(1, 400, 9).tolist() for _ in range(500)],
        [[1, 2], [3, 4], [5, 6]],
        [[2 * pair + 1, 2 * pair + 2] for pair in range(100)],
    ],
    ids=["usual", "few values", "equal values"],
)
def test_equal_histories_give_equal_bits(users):
    one, other = (cooccurrence_embeddings(histories(users), 500, 64) for _ in range(2))
    assert np.isfinite(one).all()
    assert (one == other).all()


def test_rows_without_pairs_stay_as_they_were_drawn_whatever_rounding_leaves():
    users = [GENERATOR.integers(1, 20, 6).tolist() for _ in range(50)]
    embeddings = cooccurrence_embeddings(histories(users), 300, 64)
    assert not embeddings[20:].any()
    assert not embeddings[0].any()
    assert embeddings[1:20].std() == pytest.approx(STD, rel=1e-4)


def test_a_log_without_any_pair_gives_no_embedding():
    assert not cooccurrence_embeddings(histories([[1], [2]]), 500, 4).any()


def test_no_more_clicks_are_looked_at_than_memory_is_meant_for(monkeypatch):
    monkeypatch.setattr(cooccurrence, "MAX_CLICKS", 4)
    embeddings = cooccurrence_embeddings(histories([[1, 2], [3, 4], [5, 6]]), 500, 4)
    assert embeddings[1:5].any(1).all()
    assert not embeddings[5:].any()
