"""The loops of serving, compiled: one recurrent step per click, and an exact top-K that never writes the score matrix.

Each public function runs without the GIL, so that the event loop beside it goes on (an eager torch step takes the GIL
back at every operator). Matrix products are BLAS calls on tiles of a fixed number of rows: a click's result has the
same bits whatever else is in its micro-batch, so a click that is computed again after a crash gives the same answer.

Axes: n clicks, p clicks padded up to whole tiles, u users, l blocks, d width, h complex channels, v items.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  (numba's np.dot calls it; loaded here so that its threads can be limited)
from numba import njit

from lrurec.compiled import compiled

#: Rows of one matrix product. OpenBLAS takes another route, with other rounding, for products under a million
#: multiplications: 32 rows keep every layer of a usual model above that, or below it, for every batch.
TILE = 32

#: Multiplications up to which OpenBLAS takes that other route.
_SMALL_PRODUCT = 1_000_000

_HALF_MAX = np.float32(65504.0)
_HALF_SMALLEST_NORMAL = np.float32(2.0**-14)
_HALF_SPLIT = np.float32(2.0**13 + 1.0)
_HALF_QUANTUM = np.float32(0.75)

_int32 = np.int32


@njit(inline="always")
def _to_half(x):
    """Float32 rounded to what float16 can hold, still as float32; beyond ±65504 it stays there.

    Normal numbers: Veltkamp's split keeps 24 - 13 = 11 significant bits. Below 2^-14 float16 has a fixed step of 2^-24,
    the last bit of a float32 near 0.75. Branch-free, so the loop around it stays vectorised; no fast-math here.
    """
    x = min(max(x, -_HALF_MAX), _HALF_MAX)
    scaled = x * _HALF_SPLIT
    normal = scaled - (scaled - x)
    small = (x + _HALF_QUANTUM) - _HALF_QUANTUM
    return small if abs(x) < _HALF_SMALLEST_NORMAL else normal


@compiled(nogil=True)
def widen(rows, first, out):
    """Float16 → float32, exactly; numpy converts number by number, which takes as long as a third of a step.

    Args:
        rows: (n, s) int16, the bits of float16 in columns `first` to `first + m`.
        first: the first of them.
        out: (n, m) float32.

    """
    for row in range(out.shape[0]):
        _widen(rows[row, first : first + out.shape[1]], out[row])


@njit(nogil=True)
def _widen(half, out):
    for i in range(half.shape[0]):
        bits = _int32(_int32(half[i]) & _int32(0x7FFF))
        wide = _int32(bits << _int32(13))
        # Below 2^-14 there is no leading 1: it is put there, and taken away as a number.
        small = _int32(wide + _int32(113 << 23)).view(np.float32) - _HALF_SMALLEST_NORMAL
        more = _int32(112 << 23) if bits < _int32(0x7C00) else _int32(224 << 23)  # infinity and NaN stay what they are
        normal = _int32(wide + more).view(np.float32)
        magnitude = small if bits < _int32(0x400) else normal
        out[i] = -magnitude if half[i] < 0 else magnitude


@compiled(nogil=True)
def narrow(x, first, rows):
    """Float32 that float16 can hold (`_to_half`) → its bits.

    Args:
        x: (n, m) float32.
        first: the first of m columns.
        rows: (n, s) int16, out, in these columns.

    """
    for row in range(x.shape[0]):
        _narrow(x[row], rows[row, first : first + x.shape[1]])


@njit(nogil=True)
def _narrow(x, half):
    for i in range(x.shape[0]):
        bits = np.float32(x[i]).view(np.int32)
        magnitude = _int32(bits & _int32(0x7FFFFFFF))
        moved = magnitude.view(np.float32) + _HALF_SMALLEST_NORMAL
        small = _int32(np.float32(moved).view(np.int32) - _int32(113 << 23))
        less = _int32(112 << 23) if magnitude < _int32(0x7F800000) else _int32(224 << 23)
        wide = small if magnitude < _int32(113 << 23) else _int32(magnitude - less)
        sign = _int32(_int32(bits >> _int32(16)) & _int32(0x8000))
        half[i] = np.int16(_int32(wide >> _int32(13)) | sign)


@njit(inline="always")
def _erf(x):
    """The error function in float32, by the rational minimax approximation that Eigen and XLA use (|error| < 5e-7)."""
    x = min(max(x, np.float32(-3.832506856900711)), np.float32(3.832506856900711))
    z = x * x
    top = np.float32(-2.72614225801306e-10)
    top = top * z + np.float32(2.77068142495902e-08)
    top = top * z + np.float32(-2.10102402082508e-06)
    top = top * z + np.float32(-5.69250639462346e-05)
    top = top * z + np.float32(-7.34990630326855e-04)
    top = top * z + np.float32(-2.95459980854025e-03)
    top = top * z + np.float32(-1.60960333262415e-02)
    bottom = np.float32(-1.45660718464996e-05)
    bottom = bottom * z + np.float32(-2.13374055278905e-04)
    bottom = bottom * z + np.float32(-1.68282697438203e-03)
    bottom = bottom * z + np.float32(-7.37332916720468e-03)
    bottom = bottom * z + np.float32(-1.42647390514189e-02)
    return x * top / bottom


@njit(fastmath={"reassoc"}, nogil=True)
def _layer_norm(x, weight, bias, epsilon):
    """Each row of x to mean 0 and variance 1, then scaled and shifted, in place."""
    rows, width = x.shape
    for row in range(rows):
        mean = np.float32(0)
        for i in range(width):
            mean += x[row, i]
        mean /= np.float32(width)
        variance = np.float32(0)
        for i in range(width):
            variance += (x[row, i] - mean) * (x[row, i] - mean)
        scale = np.float32(1) / np.sqrt(variance / np.float32(width) + epsilon)
        for i in range(width):
            x[row, i] = (x[row, i] - mean) * scale * weight[i] + bias[i]


@njit(nogil=True, error_model="numpy")  # Python's would ask before each division, and the loop wouldn't be vectorised
def _add_bias_and_gelu(x, bias):
    """x ← GELU(x + bias), the exact form with erf, in place."""
    rows, width = x.shape
    for row in range(rows):
        for i in range(width):
            y = x[row, i] + bias[i]
            x[row, i] = np.float32(0.5) * y * (np.float32(1) + _erf(y * np.float32(0.7071067811865476)))


@njit(nogil=True)
def _add_residual(x, bias, residual):
    """x ← x + bias + residual, in place."""
    rows, width = x.shape
    for row in range(rows):
        for i in range(width):
            x[row, i] += bias[i] + residual[row, i]


@njit(nogil=True)
def _product(x, weight, out):
    """out ← x·weight, tile by tile; x has whole tiles."""
    for start in range(0, x.shape[0], TILE):
        np.dot(x[start : start + TILE], weight, out[start : start + TILE])


@njit(nogil=True)
def _recur(users, bu, bias, decay, hidden, block, half):
    """h ← λh + γ(Bx + b), click after click; bu holds γBx of each click going in and h after it coming out.

    Rounded to float16 after every click where the state is stored so: what a click gives then never depends on which
    clicks shared its micro-batch.
    """
    channels = decay.shape[1]
    for click in range(users.shape[0]):
        state = hidden[users[click], block]
        drive = bu[click]
        for c in range(channels):
            re, im = state[0, c], state[1, c]
            new_re = decay[0, c] * re - decay[1, c] * im + drive[c] + bias[c]
            new_im = decay[0, c] * im + decay[1, c] * re + drive[channels + c] + bias[channels + c]
            if half:
                new_re, new_im = _to_half(new_re), _to_half(new_im)
            state[0, c], state[1, c] = new_re, new_im
            drive[c], drive[channels + c] = new_re, new_im


@compiled(nogil=True)
def advance(users, items, weights, hidden, half, rows, first, clicks, encodings, wide, seen, counts):
    """One recurrent step per click, and what each click's user has seen after it.

    Args:
        users: (n,) row of each click's user; clicks of one user in their order.
        items: (n,) item row of each click, 1..v.
        weights: `FoldedWeights`.
        hidden: (u, l, 2, h) float32, real and imaginary parts of every user's state; advanced in place.
        half: round the hidden state to float16 after every click.
        rows: (u, s) int32 with a ring of R item rows in columns `first` to `first + R`, advanced in place.
        first: the first of them.
        clicks: (u,) int64 clicks so far, advanced in place.
        encodings: (p, d) float32, out: what the item scores are computed from.
        wide: (p, 4d) float32 scratch.
        seen: (n, R) int32, out: the ring after each click, 0 where it is not full yet.
        counts: (n,) int64, out: clicks of the user after each click.

    """
    embedded, in_weight, in_bias, decay, out_weight, out_bias, norm_1, up, up_bias, down, down_bias, norm_2, eps = (
        weights
    )
    n = users.shape[0]
    x = encodings
    for click in range(n):
        x[click] = embedded[items[click]]
    x[n:] = np.float32(0)
    y = np.empty_like(x)
    for block in range(in_weight.shape[0]):
        _product(x, in_weight[block], wide)
        _recur(users, wide, in_bias[block], decay[block], hidden, block, half)
        _product(wide, out_weight[block], y)
        _add_residual(y, out_bias[block], x)
        _layer_norm(y, norm_1[block, 0], norm_1[block, 1], eps)
        _product(y, up[block], wide)
        _add_bias_and_gelu(wide, up_bias[block])
        _product(wide, down[block], x)
        _add_residual(x, down_bias[block], y)
        _layer_norm(x, norm_2[block, 0], norm_2[block, 1], eps)
    capacity = seen.shape[1]
    for click in range(n):
        user = users[click]
        rows[user, first + clicks[user] % capacity] = items[click]
        clicks[user] += 1
        for place in range(capacity):
            seen[click, place] = rows[user, first + place]
        counts[click] = clicks[user]


@njit(nogil=True, inline="always")
def _keep_best(scores, first_item, best_scores, best_items):
    """Merges a run of scores into the best so far: highest first, the lower item row first among equals."""
    k = best_scores.shape[0]
    width = scores.shape[0]
    for start in range(0, width, 16):
        stop = min(start + 16, width)
        least = best_scores[k - 1]
        some_better = False
        for i in range(start, stop):  # no branch in here: the compiler compares 16 scores at once
            some_better |= scores[i] > least
        if not some_better:
            continue
        for i in range(start, stop):
            score = scores[i]
            if score > best_scores[k - 1]:
                place = k - 1
                while place > 0 and score > best_scores[place - 1]:
                    best_scores[place] = best_scores[place - 1]
                    best_items[place] = best_items[place - 1]
                    place -= 1
                best_scores[place] = score
                best_items[place] = first_item + i


@compiled(nogil=True)
def rank(encodings, wanted, item_chunks, seen, top_items, top_scores):
    """The k best items of each wanted click: scores x·Eᵀ + bias in float32, exact, without what was seen.

    Args:
        encodings: (p, d) float32.
        wanted: (m,) int64, the rows of `encodings` to rank.
        item_chunks: (chunks, d + 1, w) float32, Eᵀ with the bias as its last row, for items 1..v in runs of w; places
            beyond the catalogue have the bias -inf.
        seen: (n, R) int32 item rows that each click's list leaves out, 0 for none; R is 0 to leave out nothing.
        top_items: (m, k) int32, out: item rows, best first; 0 where there are fewer than k.
        top_scores: (m, k) float32, out.

    """
    d = encodings.shape[1]
    chunks, _, width = item_chunks.shape
    top_items[:] = 0
    top_scores[:] = -np.inf
    tile = np.empty((TILE, d + 1), np.float32)
    scores = np.empty((TILE, width), np.float32)
    # A few clicks need no whole tile where 8 rows and 32 go the same route through OpenBLAS.
    row_product = (d + 1) * width
    step = 8 if TILE * row_product <= _SMALL_PRODUCT or 8 * row_product > _SMALL_PRODUCT else TILE
    for start in range(0, wanted.shape[0], TILE):
        rows = min(TILE, wanted.shape[0] - start)
        padded = (rows + step - 1) // step * step
        tile[:] = 0
        for row in range(rows):
            tile[row, :d] = encodings[wanted[start + row]]
            tile[row, d] = 1
        for chunk in range(chunks):
            np.dot(tile[:padded], item_chunks[chunk], scores[:padded])
            first = chunk * width + 1
            for row in range(rows):
                click = wanted[start + row]
                for item in seen[click]:
                    if first <= item < first + width:
                        scores[row, item - first] = -np.inf
                _keep_best(scores[row], first, top_scores[start + row], top_items[start + row])


@compiled(nogil=True)
def best_of(scores, top_items):
    """The k columns with the highest scores of every row, best first; the lower column first among equals.

    For whoever has made the scores already, as evaluation has.

    Args:
        scores: (b, v) float32; what may not be chosen is -inf or NaN.
        top_items: (b, k) int32, out: columns; 0 where there are fewer than k to choose from.

    """
    top_items[:] = 0
    best = np.empty(top_items.shape[1], np.float32)
    for row in range(scores.shape[0]):
        best[:] = -np.inf
        _keep_best(scores[row], 0, best, top_items[row])
