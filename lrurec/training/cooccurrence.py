"""A first guess of the item embeddings: which items are clicked near each other.

An embedding table that starts as noise learns this first, and on a large catalogue it takes most of the training. The
truncated singular value decomposition of the pointwise mutual information gives it in seconds; word embeddings trained
with negative samples factorise the same matrix (Levy and Goldberg, 2014).
"""

import numpy as np
import scipy.sparse
from jaxtyping import Float32

from lrurec.interactions import Histories

WINDOW = 5
"""Clicks between two items that still count as near."""

SMOOTHING = 0.75
"""Power of an item's frequency: rare items would have the greatest mutual information by chance."""

STD = 0.05
"""Standard deviation of the entries that are returned."""

ITERATIONS = 4
OVERSAMPLING = 32
"""Directions beyond the width that are iterated: the last ones that are kept converge faster."""

MAX_CLICKS = 4_000_000
"""That are looked at, of the first users: at most 1.3 GB, where no pair of items comes twice.

On top of that the factors take about 40 bytes an item and dimension.
"""


def cooccurrence_embeddings(histories: Histories, num_rows: int, width: int) -> Float32[np.ndarray, "v d"]:
    """A row per item row: U √S of M ≈ U S Vᵀ, turned, with standard deviation `STD`; 0 for items without pairs.

        C_ij = Σ 1 / |s - t| over clicks s on i and t on j of one user, 1 ≤ |s - t| ≤ WINDOW
        M_ij = max(0, log(C_ij / (C_i q_j))),    C_i = Σ_j C_ij,    q_j = C_j^SMOOTHING / Σ_k C_k^SMOOTHING

    Equal arguments give equal bits on one machine.
    """
    information = _mutual_information(_counts(histories, num_rows))
    known = np.diff(information.indptr) > 0
    embeddings = np.zeros((num_rows, width), np.float32)
    if known.any():
        # Turned, no column is more important than another, as in a table that was drawn.
        turn, _ = np.linalg.qr(np.random.default_rng(width).standard_normal((width, width)))
        turned = (_left_factors(information, width) @ turn.astype(np.float32))[known]
        embeddings[known] = turned * (STD / turned.std())
    return embeddings


def _counts(histories: Histories, num_rows: int) -> scipy.sparse.csr_array:
    """C, symmetric."""
    clicks = min(len(histories.items), MAX_CLICKS)
    items = histories.items[:clicks]
    user = np.repeat(np.arange(len(histories), dtype=np.int32), histories.lengths)[:clicks]
    ahead = scipy.sparse.csr_array((num_rows, num_rows), dtype=np.float32)
    for distance in range(1, WINDOW + 1):
        same = user[distance:] == user[:-distance]
        pairs = items[:-distance][same], items[distance:][same]
        ahead += scipy.sparse.csr_array(
            (np.full(len(pairs[0]), 1 / distance, np.float32), pairs), shape=(num_rows, num_rows)
        )
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


def _left_factors(matrix: scipy.sparse.csr_array, width: int) -> Float32[np.ndarray, "v d"]:
    """U √S of about the `width` greatest singular values, by randomised subspace iteration (Halko et al., 2011).

    Its only chance is a seed: an iteration that starts anew where values repeat would not be the same twice.
    """
    rows = matrix.shape[0]
    kept, tried = min(rows, width), min(rows, width + OVERSAMPLING)
    basis = np.random.default_rng(width).standard_normal((rows, tried)).astype(np.float32)
    for _ in range(ITERATIONS):
        basis, _ = np.linalg.qr(matrix @ basis)
        basis, _ = np.linalg.qr(matrix.T @ basis)
    left, values, _ = np.linalg.svd(matrix @ basis, full_matrices=False)
    values[values <= values.max() * rows * np.finfo(np.float32).eps] = 0.0  # what is left of rounding is no direction
    factors = np.zeros((rows, width), np.float32)
    factors[:, :kept] = (left * np.sqrt(values))[:, :kept]
    return factors
