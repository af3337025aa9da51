"""The compiled part of `filtered_ranking`: products of bytes by the CPU's own instruction, and what they rule out.

Axes: m rows to rank, d width, q = ⌈d / 4⌉ words of four bytes, v items in g groups of `ITEMS`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lrurec.compiled import compiled

#: Rows and items of one product: 24 sums of 16 items each, which with 4 vectors of items nearly fill the 32 registers.
ROWS, ITEMS = 6, 64

#: Items in a register, and registers of a group of items.
LANES = 16
VECTORS = ITEMS // LANES

#: What float32 may err by in a sum of d products, with room to spare: (d + SPARE) · 2⁻²² of |x| |E_v|.
SPARE = 16

#: Bytes of items that all rows are held against in turn: half of a core's first-level cache.
_CHUNK_BYTES = 1 << 14

#: Groups of items that a list begins with: 4,096 items, 98 KB for `ROWS` rows.
_FIRST_GROUPS = 64

#: Above -inf, which is the score of no candidate, and below all others.
_LOWEST = np.finfo(np.float32).min

_float32, _int32 = np.float32, np.int32


@intrinsic
def multiply(typing_context: Any, x: Any, words: Any, sums: Any) -> Any:
    """Σ x̂ ê of `ROWS` rows and `ITEMS` items: x (ROWS, q), words (vectors, q, lanes), sums (ROWS, items) out, int32."""
    signature = types.void(x, words, sums)

    def generate(context: Any, builder: Any, called: Any, arguments: Any) -> Any:
        word, index = ir.IntType(32), ir.IntType(64)
        vector, bytes_ = ir.VectorType(word, LANES), ir.VectorType(ir.IntType(8), 4 * LANES)
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(called.args, arguments, strict=True)
        ]
        x_data, words_data, sums_data = (builder.bitcast(array.data, word.as_pointer()) for array in arrays)
        steps = builder.extract_value(arrays[0].shape, 1)
        product = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector, bytes_, bytes_]), "llvm.x86.avx512.vpdpbusd.512"
        )
        undefined, zero = ir.Constant(vector, ir.Undefined), ir.Constant(vector, [0] * LANES)

        def at(base: Any, *terms: Any) -> Any:
            return builder.gep(base, [_sum(builder, index, terms)])

        before, body = builder.block, builder.append_basic_block("multiply")
        after = builder.append_basic_block("store")
        builder.branch(body)
        builder.position_at_end(body)
        step = builder.phi(index)
        step.add_incoming(index(0), before)
        totals = [[builder.phi(vector) for _ in range(VECTORS)] for _ in range(ROWS)]
        items = []
        for number in range(VECTORS):
            place = at(words_data, builder.mul(steps, index(number * LANES)), builder.mul(step, index(LANES)))
            loaded = builder.load(builder.bitcast(place, vector.as_pointer()))
            loaded.align = 4
            items.append(builder.bitcast(loaded, bytes_))
        next_step = builder.add(step, index(1))
        step.add_incoming(next_step, body)
        for row, sums_of_row in enumerate(totals):
            one = builder.load(at(x_data, builder.mul(steps, index(row)), step))
            first = builder.insert_element(undefined, one, word(0))
            spread = builder.bitcast(builder.shuffle_vector(first, undefined, zero), bytes_)
            for number, total in enumerate(sums_of_row):
                total.add_incoming(zero, before)
                total.add_incoming(builder.call(product, [total, spread, items[number]]), body)
        builder.cbranch(builder.icmp_unsigned("<", next_step, steps), body, after)
        builder.position_at_end(after)
        for row, sums_of_row in enumerate(totals):
            for number, total in enumerate(sums_of_row):
                place = at(sums_data, index((row * VECTORS + number) * LANES))
                stored = builder.store(total.incomings[1][0], builder.bitcast(place, vector.as_pointer()))
                stored.align = 4
        return context.get_dummy_value()

    return signature, generate


def _sum(builder: Any, index: Any, terms: Any) -> Any:
    total = index(0)
    for term in terms:
        total = builder.add(total, term)
    return total


@njit(nogil=True, fastmath={"reassoc", "contract"})
def exact_score(x, item, bias):
    """x·E_v + bias in float32; the order of its sum depends on d alone."""
    total = _float32(0)
    for i in range(x.shape[0]):
        total += x[i] * item[i]
    return total + bias


@njit(nogil=True)
def _quantise_row(x, words):
    """x̂ + 128 as bytes in `words`; (a, |a x̂|, |x - a x̂|)."""
    largest = _float32(1e-30)
    for i in range(x.shape[0]):
        largest = max(largest, abs(x[i]))
    scale = largest / _float32(127)
    inside = outside = 0.0
    words[:] = 0
    for i in range(x.shape[0]):
        rounded = np.rint(x[i] / scale)
        inside += (np.float64(scale) * rounded) ** 2
        outside += (np.float64(x[i]) - np.float64(scale) * rounded) ** 2
        words[i // 4] |= _int32(_int32(rounded) + _int32(128)) << _int32(8 * (i % 4))
    return scale, np.sqrt(inside), np.sqrt(outside)


@njit(nogil=True, fastmath={"reassoc", "contract"})
def _estimate(sums, offset, scale, bias, factor, limit, estimates, reached):
    """s̃ of a group of items for each of a few rows, and whether some item reaches the row's limit."""
    for r in range(factor.shape[0]):
        sums_of_row, out, a, least = sums[r], estimates[r], factor[r], limit[r]
        some = False
        for i in range(ITEMS):  # no branch in here: the compiler takes 16 scores at once
            out[i] = _float32(sums_of_row[i] - offset[i]) * scale[i] * a + bias[i]
            some |= out[i] >= least
        reached[r] = some


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


@njit(nogil=True)
def _decide(x, estimates, first, bound, table, numbers, bias, seen, best_scores, best_items):
    """Take what belongs into a row's list of a group of items, the first of which is the table's row `first`."""
    last = best_scores.shape[0] - 1
    for i in range(min(ITEMS, table.shape[0] - first)):
        if estimates[i] >= best_scores[last] - bound:
            item = numbers[first + i]
            score = exact_score(x, table[first + i], bias[i])
            if _is_before(score, item, best_scores[last], best_items[last]) and not _is_in(item, seen):
                _insert(score, item, best_scores, best_items)


@njit(nogil=True, fastmath={"contract"})
def _bound_from_above(sums, offset, scale, bias, factor, bound, uppers, start):
    """s̃ + bound, what each of a group of items scores at most, for each of a few rows."""
    # `_estimate` once more: one function for both makes a ranking of 100,000 items take a fifth longer.
    for r in range(factor.shape[0]):
        sums_of_row, out, a, more = sums[r], uppers[r, start : start + ITEMS], factor[r], bound[r]
        for i in range(ITEMS):
            out[i] = _float32(sums_of_row[i] - offset[i]) * scale[i] * a + bias[i] + more


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
def _begin(x, uppers, widest, table, numbers, places, bias, seen, scratch, found, best_scores, best_items):
    """The list of one row out of the first groups of items.

    k items score at least so much: the k-th of the largest s̃ + bound of disjoint parts, less twice the widest bound.
    Nothing below it is looked at. Without such a beginning most items that enter a list leave it again.
    """
    last = best_scores.shape[0] - 1
    for i in range(seen.shape[0]):
        place = places[seen[i]]
        if 0 <= place < uppers.shape[0]:
            uppers[place] = -np.inf
    # Four parts for each that is wanted: hardly two of the best share one.
    kth = _kth_of_parts(uppers, 4 * best_scores.shape[0], scratch, best_scores)
    least = max(kth - _float32(2) * widest, _LOWEST)
    best_scores[:] = -np.inf
    _reach(uppers, least, found)
    words = found.view(np.uint64)
    for word in range(words.shape[0]):
        if words[word]:
            for place in range(8 * word, 8 * word + 8):
                if uppers[place] >= max(least, best_scores[last]):
                    score = exact_score(x, table[place], bias[place])
                    if _is_before(score, numbers[place], best_scores[last], best_items[last]):
                        _insert(score, numbers[place], best_scores, best_items)


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
    table, numbers, places, words, offset, scale, bias, norm, residual, rounding = items
    m, k = top_scores.shape
    width, steps, groups = table.shape[1], words.shape[2], words.shape[0]
    top_items[:] = 0
    top_scores[:] = -np.inf
    padded = -(-m // ROWS) * ROWS
    x = np.zeros((padded, steps), np.int32)
    factor, inside, outside = np.zeros(m, np.float32), np.zeros(m, np.float32), np.zeros(m, np.float32)
    for row in range(m):
        factor[row], inside[row], outside[row] = _quantise_row(encodings[wanted[row]], x[row])
        # What float32 may err by, in s and in the s̃ that is compared: both are sums of about d products.
        outside[row] += inside[row] * _float32((width + SPARE) * 2.0**-22)
    sums, estimates = np.empty((ROWS, ITEMS), np.int32), np.empty((ROWS, ITEMS), np.float32)
    bound, limit, reached = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32), np.empty(ROWS, np.bool_)
    begun = min(groups, _FIRST_GROUPS)
    widest = norm[:begun].max(), residual[:begun].max(), rounding[:begun].max()
    uppers, scratch = np.empty((ROWS, begun * ITEMS), np.float32), np.empty(begun * ITEMS, np.float32)
    found = np.empty(begun * ITEMS, np.bool_)
    for first in range(0, m, ROWS):
        rows = min(ROWS, m - first)
        tile, factors = x[first : first + ROWS], factor[first : first + rows]
        for group in range(begun):
            multiply(tile, words[group], sums)
            for r in range(rows):
                row = first + r
                bound[r] = outside[row] * norm[group] + inside[row] * residual[group] + rounding[group]
            _bound_from_above(
                sums, offset[group], scale[group], bias[group], factors, bound, uppers, group * ITEMS
            )  # fmt: skip
        for r in range(rows):
            row = first + r
            click = wanted[row]
            _begin(
                encodings[click], uppers[r], outside[row] * widest[0] + inside[row] * widest[1] + widest[2], table,
                numbers, places, bias.reshape(-1), seen[click], scratch, found, top_scores[row], top_items[row],
            )  # fmt: skip
    per_chunk = max(1, _CHUNK_BYTES // (ITEMS * steps * 4))
    for chunk in range(begun, groups, per_chunk):
        for first in range(0, m, ROWS):
            rows = min(ROWS, m - first)
            tile, factors = x[first : first + ROWS], factor[first : first + rows]
            for group in range(chunk, min(chunk + per_chunk, groups)):
                multiply(tile, words[group], sums)
                for r in range(rows):
                    row = first + r
                    bound[r] = outside[row] * norm[group] + inside[row] * residual[group] + rounding[group]
                    limit[r] = top_scores[row, k - 1] - bound[r]
                _estimate(sums, offset[group], scale[group], bias[group], factors, limit, estimates, reached)
                for r in range(rows):
                    if reached[r]:
                        row = first + r
                        click = wanted[row]
                        _decide(
                            encodings[click], estimates[r], group * ITEMS, bound[r], table, numbers, bias[group],
                            seen[click], top_scores[row], top_items[row],
                        )  # fmt: skip
