"""The compiled part of `filtered_ranking`: what products of bytes rule out, and float32 for the rest.

Axes: m rows to rank, d width, q words of four bytes (VNNI) or two (AVX2), v items in g groups of `ITEMS`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from lrurec.compiled import compiled
from lrurec.products import COLUMNS as ITEMS
from lrurec.products import ROWS, multiply

#: What float32 may err by in a sum of d products, with room to spare: (d + SPARE) · 2⁻²² of |x| |E_v|.
SPARE = 16

#: Bytes of items that all rows are held against in turn: half of a core's first-level cache.
_CHUNK_BYTES = 1 << 14

#: Groups of items that a list begins with: 4,096 items, 98 KB for `ROWS` rows.
_FIRST_GROUPS = 64

#: Above -inf, which is the score of no candidate, and below all others.
_LOWEST = np.finfo(np.float32).min

_float32, _int32 = np.float32, np.int32


@njit(nogil=True, fastmath={"reassoc", "contract"})
def exact_score(x, item, bias):
    """x·E_v + bias in float32; the order of its sum depends on d alone."""
    total = _float32(0)
    for i in range(x.shape[0]):
        total += x[i] * item[i]
    return total + bias


@njit(nogil=True)
def _quantise_row(x, bytes_in_word, levels, longest, words):
    """x̂ + levels + 1 as bytes in `words`, |x̂| at most `longest`; (a, |a x̂|, |x - a x̂|)."""
    largest, squares = _float32(1e-30), 0.0
    for i in range(x.shape[0]):
        largest = max(largest, abs(x[i]))
        squares += np.float64(x[i]) * np.float64(x[i])
    scale = max(largest / _float32(levels), _float32(np.sqrt(squares) / longest))
    inside = outside = 0.0
    words[:] = 0
    for i in range(x.shape[0]):
        rounded = np.rint(x[i] / scale)
        inside += (np.float64(scale) * rounded) ** 2
        outside += (np.float64(x[i]) - np.float64(scale) * rounded) ** 2
        byte = _int32(_int32(rounded) + _int32(levels + 1))
        for place in range(i % bytes_in_word, 4, bytes_in_word):
            words[i // bytes_in_word] |= byte << _int32(8 * place)
    return scale, np.sqrt(inside), np.sqrt(outside)


@njit(nogil=True)
def _bounds(outside, norm, inside, residual, rounding, bound):
    """What s and s̃ of an item of a group may differ by, for `ROWS` rows."""
    for r in range(ROWS):
        bound[r] = outside[r] * norm + inside[r] * residual + rounding


@njit(nogil=True, error_model="numpy")
def _least_sums(worst, bound, factor, scale, bias, greatest, least):
    """The least Σ x̂ ê, or one less, with which an item of at most this bias is decided about, for `ROWS` rows."""
    for r in range(ROWS):
        sum_ = (np.float64(worst[r] - bound[r]) - bias) / (np.float64(factor[r]) * scale)
        least[r] = np.floor(min(sum_, greatest)) if sum_ > -greatest else -greatest  # no number: every item


@njit(nogil=True)
def _is_in(item, seen):
    found = _int32(0)
    for i in range(seen.shape[0]):
        found |= _int32(seen[i] == item)
    return found != 0


@njit(nogil=True, inline="always")
def _is_before(score, item, other_score, other_item):
    return score > other_score or (score == other_score and item < other_item)


@njit(nogil=True)
def _insert(score, item, best_scores, best_items):
    place = best_scores.shape[0] - 1
    while place > 0 and _is_before(score, item, best_scores[place - 1], best_items[place - 1]):
        best_scores[place] = best_scores[place - 1]
        best_items[place] = best_items[place - 1]
        place -= 1
    best_scores[place] = score
    best_items[place] = item


@njit(nogil=True, fastmath={"contract"})
def _decide(x, sums, factor, first, bound, table, numbers, bias, seen, best_scores, best_items):
    """Take what belongs into a row's list of a group of items, the first of which is the table's row `first`."""
    last = best_scores.shape[0] - 1
    for i in range(min(ITEMS, table.shape[0] - first)):
        if _float32(sums[i]) * factor + bias[i] >= best_scores[last] - bound:
            item = numbers[first + i]
            score = exact_score(x, table[first + i], bias[i])
            if _is_before(score, item, best_scores[last], best_items[last]) and not _is_in(item, seen):
                _insert(score, item, best_scores, best_items)


@njit(nogil=True, fastmath={"contract"})
def _bound_from_above(sums, factor, scale, bias, bound, uppers, start):
    """s̃ + bound, what each of a group of items scores at most, for `ROWS` rows."""
    for r in range(ROWS):
        sums_of_row, out = sums[r], uppers[r, start : start + ITEMS]
        a, more = _float32(factor[r] * scale), bound[r]
        for i in range(ITEMS):
            out[i] = _float32(sums_of_row[i]) * a + bias[i] + more


@njit(nogil=True)
def _kth_of_parts(values, wanted, spare, best):
    """The k-th largest of the maxima of parts, of which there are at least `wanted` if there are as many values."""
    count = values.shape[0]
    while count % 2 == 0 and count // 2 >= wanted:
        count //= 2
        left, right = values[:count], values[count:]
        out = spare[:count]  # another array than the one read: only so does the compiler take 16 at once
        for i in range(count):
            out[i] = max(left[i], right[i])
        values, spare = out, spare[count:]
    best[:] = -np.inf
    last = best.shape[0] - 1
    for i in range(count):
        value = values[i]
        if value > best[last]:
            place = last
            while place > 0 and value > best[place - 1]:
                best[place] = best[place - 1]
                place -= 1
            best[place] = value
    return best[last]


@njit(nogil=True)
def _reach(values, least, found):
    for i in range(values.shape[0]):
        found[i] = values[i] >= least


@njit(nogil=True)
def _begin(x, uppers, widest, table, numbers, places, bias, seen, scratch, found, candidates, best_scores, best_items):
    """The list of one row out of the first groups of items.

    k items score at least so much: the k-th of the largest s̃ + bound of disjoint parts, less twice the widest bound.
    Nothing below it is looked at. Without such a beginning most items that enter a list leave it again.
    """
    last = best_scores.shape[0] - 1
    for i in range(seen.shape[0]):
        if 0 < seen[i] < places.shape[0] and places[seen[i]] < uppers.shape[0]:
            uppers[places[seen[i]]] = -np.inf
    # Four parts for each that is wanted: hardly two of the best share one.
    kth = _kth_of_parts(uppers, 4 * best_scores.shape[0], scratch, best_scores)
    least = max(kth - _float32(2) * widest, _LOWEST)
    best_scores[:] = -np.inf
    _reach(uppers, least, found)
    words = found.view(np.uint64)
    count = 0
    for word in range(words.shape[0]):
        if words[word]:
            for place in range(8 * word, 8 * word + 8):
                candidates[count] = place
                count += found[place]
    for i in range(count):  # none waits for another, so that the CPU fetches their rows of the table side by side
        place = candidates[i]
        scratch[i] = exact_score(x, table[place], bias[place])
    for i in range(count):
        item = numbers[candidates[i]]
        if _is_before(scratch[i], item, best_scores[last], best_items[last]):
            _insert(scratch[i], item, best_scores, best_items)


@compiled(nogil=True)
def rank(encodings, wanted, items, seen, top_items, top_scores):
    """The k best items of each wanted row, exact; see `filtered_ranking`.

    Args:
        encodings: (p, d) float32.
        wanted: (m,) int64, the rows of `encodings` to rank.
        items: `filtered_ranking.Items`.
        seen: (p, r) int32 item numbers that each list leaves out, 0 for none; r may be 0.
        top_items: (m, k) int32, out: items counted from 1, best first, the lower one first among equals; 0 for none.
        top_scores: (m, k) float32, out; -inf for none.

    """
    table, numbers, places, words, start, scale, bias, highest_bias, norm, residual, rounding, levels, longest = items
    m, k = top_scores.shape
    width, steps, groups = table.shape[1], words.shape[2], words.shape[0]
    top_items[:] = 0
    top_scores[:] = -np.inf
    if k == 0:
        return
    tiles = -(-m // ROWS)
    x = np.zeros((tiles, ROWS, steps), np.int32)
    factor = np.ones((tiles, ROWS), np.float32)
    inside, outside = np.zeros((tiles, ROWS), np.float32), np.zeros((tiles, ROWS), np.float32)
    for row in range(m):
        tile, r = row // ROWS, row % ROWS
        factor[tile, r], inside[tile, r], outside[tile, r] = _quantise_row(
            encodings[wanted[row]], words.itemsize, levels, longest, x[tile, r]
        )
        # What float32 may err by, in s and in the s̃ that is compared: both are sums of about d products.
        outside[tile, r] += (inside[tile, r] + outside[tile, r]) * _float32((width + SPARE) * 2.0**-22)
    sums, least = np.empty((ROWS, ITEMS), words.dtype), np.zeros(ROWS, words.dtype)
    bound, worst = np.empty(ROWS, np.float32), np.full((tiles, ROWS), np.inf, np.float32)
    greatest = 2.0 ** (8 * words.itemsize - 1) - 1
    begun = min(groups, _FIRST_GROUPS)
    widest = np.empty(ROWS, np.float32)
    uppers, scratch = np.empty((ROWS, begun * ITEMS), np.float32), np.empty(begun * ITEMS, np.float32)
    found, candidates = np.empty(begun * ITEMS, np.bool_), np.empty(begun * ITEMS + 1, np.int32)
    for tile in range(tiles):
        rows = min(ROWS, m - tile * ROWS)
        widest[:] = 0
        for group in range(begun):
            multiply(x[tile], words[group], start[group], least, sums)
            _bounds(outside[tile], norm[group], inside[tile], residual[group], rounding[group], bound)
            _bound_from_above(sums, factor[tile], scale[group], bias[group], bound, uppers, group * ITEMS)
            for r in range(ROWS):
                widest[r] = max(widest[r], bound[r])
        for r in range(rows):
            row = tile * ROWS + r
            click = wanted[row]
            _begin(
                encodings[click], uppers[r], widest[r], table, numbers, places, bias.reshape(-1), seen[click], scratch,
                found, candidates, top_scores[row], top_items[row],
            )  # fmt: skip
            worst[tile, r] = top_scores[row, k - 1]
    per_chunk = max(1, _CHUNK_BYTES // (ITEMS * steps * words.itemsize))
    for chunk in range(begun, groups, per_chunk):
        for tile in range(tiles):
            rows = min(ROWS, m - tile * ROWS)
            for group in range(chunk, min(chunk + per_chunk, groups)):
                _bounds(outside[tile], norm[group], inside[tile], residual[group], rounding[group], bound)
                _least_sums(worst[tile], bound, factor[tile], scale[group], highest_bias[group], greatest, least)
                reached = multiply(x[tile], words[group], start[group], least, sums)
                for r in range(rows if reached else 0):
                    if reached >> r & 1:
                        row = tile * ROWS + r
                        click = wanted[row]
                        _decide(
                            encodings[click], sums[r], factor[tile, r] * scale[group], group * ITEMS, bound[r], table,
                            numbers, bias[group], seen[click], top_scores[row], top_items[row],
                        )  # fmt: skip
                        worst[tile, r] = top_scores[row, k - 1]
