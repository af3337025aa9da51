"""A first guess of the item embeddings: which items are clicked near each other.

An embedding table that starts as noise learns this first, and on a large catalogue it takes most of the training. The
truncated singular value decomposition of the pointwise mutual information gives it in seconds; word embeddings trained
with negative samples factorise the same matrix (Levy and Goldberg, 2014).
"""

import numpy as np
import scipy.sparse
from jaxtyping import Float32, Float64
from scipy.sparse.linalg import svds

from lrurec.interactions import Histories

WINDOW = 5
"""Clicks between two items that still count as near."""

SMOOTHING = 0.75
"""Power of an item's frequency: rare items would have the greatest mutual information by chance."""

STD = 0.05
"""Standard deviation of the entries that are returned."""

MAX_CLICKS = 20_000_000
"""That are looked at, of the first users: their pairs take up to 120 bytes a click."""


def cooccurrence_embeddings(histories: Histories, num_rows: int, width: int) -> Float32[np.ndarray, "v d"]:
    """A row per item row: U √S of M ≈ U S Vᵀ, turned at random, with standard deviation `STD`; 0 for unknown items.

        C_ij = Σ 1 / |s - t| over clicks s on i and t on j of one user, 1 ≤ |s - t| ≤ WINDOW
        M_ij = max(0, log(C_ij / (C_i q_j))),    C_i = Σ_j C_ij,    q_j = C_j^SMOOTHING / Σ_k C_k^SMOOTHING

    Equal arguments give equal bits on one machine.
    """
    information = _mutual_information(_counts(histories, num_rows))
    factors = _left_factors(information, width)
    # Turned, no column is more important than another, as in a table that was drawn.
    turn, _ = np.linalg.qr(np.random.default_rng(width).standard_normal((width, width)))
    embeddings = factors @ turn
    known = np.abs(embeddings).sum(1) > 0
    if known.any():
        embeddings *= STD / embeddings[known].std()
    result: Float32[np.ndarray, "v d"] = embeddings.astype(np.float32)
    return result


def _counts(histories: Histories, num_rows: int) -> scipy.sparse.csr_array:
    """C, symmetric."""
    clicks = min(len(histories.items), MAX_CLICKS)
    items = histories.items[:clicks]
    user = np.repeat(np.arange(len(histories), dtype=np.int32), histories.lengths)[:clicks]
    ahead = scipy.sparse.csr_array((num_rows, num_rows), dtype=np.float64)
    for distance in range(1, WINDOW + 1):
        same = user[distance:] == user[:-distance]
        pairs = items[:-distance][same], items[distance:][same]
        ahead += scipy.sparse.csr_array((np.full(len(pairs[0]), 1 / distance), pairs), shape=(num_rows, num_rows))
    return (ahead + ahead.T).tocsr()


def _mutual_information(counts: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """M, without its zeros."""
    frequency = np.asarray(counts.sum(1)).ravel()
    smoothed = frequency**SMOOTHING
    pairs = counts.tocoo()
    information = np.log(pairs.data * smoothed.sum() / (frequency[pairs.row] * smoothed[pairs.col]))
    kept = information > 0
    places = pairs.row[kept], pairs.col[kept]
    return scipy.sparse.csr_array((information[kept], places), shape=counts.shape)


def _left_factors(matrix: scipy.sparse.csr_array, width: int) -> Float64[np.ndarray, "v d"]:
    """U √S of the `width` greatest singular values, columns of zeros where there are fewer."""
    rows = matrix.shape[0]
    if rows <= 2 * width:
        left, values, _ = np.linalg.svd(matrix.toarray())
    elif matrix.nnz == 0:
        return np.zeros((rows, width))
    else:
        left, values, _ = svds(matrix, k=width, v0=np.ones(rows))
    factors = np.zeros((rows, width))
    count = min(rows, width)
    factors[:, :count] = (left * np.sqrt(values))[:, :count]
    return factors
