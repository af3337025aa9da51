"""The loops of serving, compiled: one recurrent step per click, and an exact top-K that never writes the score matrix.

Each public function runs without the GIL, so that the event loop beside it goes on (an eager torch step takes the GIL
back at every operator). A click's result has the same bits whatever else is in its micro-batch (`products.multiply`),
so a click that is computed again after a crash gives the same answer.

Axes: n clicks, u users, l blocks, d width, w = 4d, h complex channels, v items in g groups of `COLUMNS`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from lrurec.compiled import compiled
from lrurec.products import COLUMNS, ROWS, multiply

#: Clicks that go through a layer together: with one layer's weights they fit in a core's second-level cache.
_STRIP = 16 * ROWS

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
    """As many numbers of each row of x as there are weights, to mean 0 and variance 1, scaled and shifted, in place."""
    rows, width = x.shape[0], weight.shape[0]
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
def _gelu(x):
    """x ← GELU(x), the exact form with erf, in place."""
    rows, width = x.shape
    for row in range(rows):
        for i in range(width):
            y = x[row, i]
            x[row, i] = np.float32(0.5) * y * (np.float32(1) + _erf(y * np.float32(0.7071067811865476)))


@njit(nogil=True)
def _copy(source, target, count):
    for i in range(count):  # numba compiles an assignment of slices for ten seconds, for its errors' text
        target[i] = source[i]


@njit(nogil=True)
def _add(x, y):
    """x ← x + y."""
    rows, width = x.shape
    for row in range(rows):
        for i in range(width):
            x[row, i] += y[row, i]


@njit(nogil=True)
def _product(x, weight, start, out):
    """out ← x·weight + start, for whole tiles of `ROWS` rows."""
    least = np.zeros(ROWS, np.float32)
    words = weight.shape[2]
    for group in range(weight.shape[0]):
        columns = slice(group * COLUMNS, (group + 1) * COLUMNS)
        for first in range(0, x.shape[0], ROWS):
            rows = slice(first, first + ROWS)
            multiply(x[rows, :words], weight[group], start[group], least, out[rows, columns])


@njit(nogil=True)
def _turn(decay, x, other_decay, y, drive, half, out):
    """One part of λh + drive."""
    # The compiler takes a register of channels at once only if it has few arrays to tell apart: no loop has both parts.
    if half:
        for c in range(out.shape[0]):
            out[c] = _to_half(decay[c] * x[c] + other_decay[c] * y[c] + drive[c])
    else:
        for c in range(out.shape[0]):
            out[c] = decay[c] * x[c] + other_decay[c] * y[c] + drive[c]


@njit(nogil=True)
def _recur(users, bu, decay, hidden, block, half):
    """h ← λh + γ(Bx + b), click after click; bu holds γ(Bx + b) of each click going in and h after it coming out.

    Rounded to float16 after every click where the state is stored so: what a click gives then never depends on which
    clicks shared its micro-batch.
    """
    channels = decay.shape[1]
    re_decay, im_decay, minus_im_decay = decay[0], decay[1], -decay[1]
    re, im = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for click in range(users.shape[0]):
        state = hidden[users[click], block]
        _turn(re_decay, state[0], minus_im_decay, state[1], bu[click, :channels], half, re)
        _turn(re_decay, state[1], im_decay, state[0], bu[click, channels : 2 * channels], half, im)
        for c in range(channels):
            state[0, c] = bu[click, c] = re[c]
        for c in range(channels):
            state[1, c] = bu[click, channels + c] = im[c]


@compiled(nogil=True)
def advance(users, items, weights, hidden, half, rows, first, clicks, encodings, seen, counts):
    """One recurrent step per click, and what each click's user has seen after it.

    Args:
        users: (n,) row of each click's user; clicks of one user in their order.
        items: (n,) item row of each click, 1..v.
        weights: `FoldedWeights`, packed (`serving.packed`).
        hidden: (u, l, 2, h) float32, real and imaginary parts of every user's state; advanced in place.
        half: round the hidden state to float16 after every click.
        rows: (u, s) int32 with a ring of R item rows in columns `first` to `first + R`, advanced in place.
        first: the first of them.
        clicks: (u,) int64 clicks so far, advanced in place.
        encodings: (n, d) float32, out: what the item scores are computed from.
        seen: (n, R) int32, out: the ring after each click, 0 where it is not full yet.
        counts: (n,) int64, out: clicks of the user after each click.

    """
    embedded, in_weight, in_bias, decay, out_weight, out_bias, norm_1, up, up_bias, down, down_bias, norm_2, eps = (
        weights
    )
    n, d = users.shape[0], embedded.shape[1]
    strip = min(_STRIP, max(1, (n + ROWS - 1) // ROWS) * ROWS)
    # Whole groups of columns. What is beyond d of them, and beyond n of the rows, is computed and never looked at.
    x = np.zeros((strip, out_bias.shape[1] * COLUMNS), np.float32)
    y, wide = np.empty_like(x), np.zeros((strip, in_bias.shape[1] * COLUMNS), np.float32)
    for begin in range(0, n, strip):
        count = min(strip, n - begin)
        for row in range(count):
            _copy(embedded[items[begin + row]], x[row], d)
        tiles = slice(0, (count + ROWS - 1) // ROWS * ROWS)
        for block in range(in_weight.shape[0]):
            _product(x[tiles], in_weight[block], in_bias[block], wide[tiles])
            _recur(users[begin : begin + count], wide, decay[block], hidden, block, half)
            _product(wide[tiles], out_weight[block], out_bias[block], y[tiles])
            _add(y[tiles], x)
            _layer_norm(y[tiles], norm_1[block, 0], norm_1[block, 1], eps)
            _product(y[tiles], up[block], up_bias[block], wide[tiles])
            _gelu(wide[tiles])
            _product(wide[tiles], down[block], down_bias[block], x[tiles])
            _add(x[tiles], y)
            _layer_norm(x[tiles], norm_2[block, 0], norm_2[block, 1], eps)
        for row in range(count):
            _copy(x[row], encodings[begin + row], d)
    capacity = seen.shape[1]
    for click in range(n):
        user = users[click]
        rows[user, first + clicks[user] % capacity] = items[click]
        clicks[user] += 1
        for place in range(capacity):
            seen[click, place] = rows[user, first + place]
        counts[click] = clicks[user]


@njit(nogil=True, inline="always")
def _insert(score, item, best_scores, best_items):
    """Into a list that it belongs in, after its equals."""
    place = best_scores.shape[0] - 1
    while place > 0 and score > best_scores[place - 1]:
        best_scores[place] = best_scores[place - 1]
        best_items[place] = best_items[place - 1]
        place -= 1
    best_scores[place] = score
    best_items[place] = item


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
                _insert(score, first_item + i, best_scores, best_items)


@njit(nogil=True)
def _insert_each(scores, first_item, seen, best_scores, best_items):
    """Merges a group of scores, but for seen items, into the best so far; the lower item row first among equals."""
    last = best_scores.shape[0] - 1
    for i in range(scores.shape[0]):
        score = scores[i]
        if score > best_scores[last]:
            item = first_item + i
            is_seen = False
            for other in seen:
                is_seen |= other == item
            if not is_seen:
                _insert(score, item, best_scores, best_items)


@compiled(nogil=True)
def rank(encodings, wanted, table, bias, seen, top_items, top_scores):
    """The k best items of each wanted click: scores x·Eᵀ + bias in float32, exact, without what was seen.

    Args:
        encodings: (p, d) float32.
        wanted: (m,) int64, the rows of `encodings` to rank.
        table: E of items 1..v, as `products.pack` makes it.
        bias: (g, COLUMNS) float32; -inf beyond the catalogue.
        seen: (n, R) int32 item rows that each click's list leaves out, 0 for none; R is 0 to leave out nothing.
        top_items: (m, k) int32, out: item rows, best first; 0 where there are fewer than k.
        top_scores: (m, k) float32, out.

    """
    m, k = top_scores.shape
    tiles = (m + ROWS - 1) // ROWS
    top_items[:] = 0
    top_scores[:] = -np.inf
    if k == 0:
        return
    x = np.zeros((tiles * ROWS, encodings.shape[1]), np.float32)
    for row in range(m):
        _copy(encodings[wanted[row]], x[row], x.shape[1])
    worst = np.full((tiles, ROWS), -np.inf, np.float32)
    scores = np.empty((ROWS, COLUMNS), np.float32)
    for group in range(table.shape[0]):
        for tile in range(tiles):
            first = tile * ROWS
            reached = multiply(x[first : first + ROWS], table[group], bias[group], worst[tile], scores)
            for r in range(min(ROWS, m - first) if reached else 0):
                if reached >> r & 1:
                    row = first + r
                    of_row = top_scores[row]
                    _insert_each(scores[r], group * COLUMNS + 1, seen[wanted[row]], of_row, top_items[row])
                    worst[tile, r] = of_row[k - 1]


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
