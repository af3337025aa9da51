"""The kernels of `TritonOperators`.

Where TRITON_INTERPRET=1 is set before Triton's import they run on the CPU, slowly: so they are tested without a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def recur(
    driven, before, after, decay, counts, starts, channels, before_stride, after_stride, limit, block: tl.constexpr
):
    """h ← λh + u of one user's clicks, 128 channels of it, in float32; see `Operators.recur`."""
    user = tl.program_id(0)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    real = channel < channels
    decay_re = tl.load(decay + channel, mask=real, other=0.0)
    decay_im = tl.load(decay + channels + channel, mask=real, other=0.0)
    wide = user.to(tl.int64)  # times a stride
    state = before + wide * before_stride + channel
    re = tl.load(state, mask=real, other=0.0).to(tl.float32)
    im = tl.load(state + channels, mask=real, other=0.0).to(tl.float32)
    stored = after.dtype.element_ty
    for number in range(tl.load(counts + user)):
        click = tl.load(starts + number) + user
        u = driven + click.to(tl.int64) * (2 * channels) + channel
        next_re = decay_re * re - decay_im * im + tl.load(u, mask=real, other=0.0)
        next_im = decay_re * im + decay_im * re + tl.load(u + channels, mask=real, other=0.0)
        re = tl.minimum(tl.maximum(next_re, -limit), limit).to(stored).to(tl.float32)
        im = tl.minimum(tl.maximum(next_im, -limit), limit).to(stored).to(tl.float32)
        tl.store(u, re, mask=real)
        tl.store(u + channels, im, mask=real)
    state = after + wide * after_stride + channel
    tl.store(state, re.to(stored), mask=real)
    tl.store(state + channels, im.to(stored), mask=real)


@triton.jit(do_not_specialize=["rows", "runs"])  # they change from batch to batch: one compilation for all
def best_of_run(
    encodings, table, bias, seen, seen_from, top_scores, top_items, rows, items, width, seen_width, run, runs, k,
    tile_rows: tl.constexpr, tile_items: tl.constexpr, tile_width: tl.constexpr, places: tl.constexpr,
):  # fmt: skip
    """The k best of one run of items for tile_rows rows, in no order; see `Operators.rank`.

    A tile of scores is computed, cleared of what was seen, and compared with the worst score in each row's list. Only
    where one is better is the tile looked at again: its best takes the worst's place, until none is better.
    """
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    number = tl.program_id(1)
    live = row < rows
    first, last = number * run, tl.minimum(number * run + run, items)
    column = tl.arange(0, tile_width)
    # No item is -1 - place, so that empty places differ; places beyond k hold +inf and are never the worst.
    place = tl.arange(0, places)[None, :] + tl.zeros((tile_rows, 1), tl.int32)
    kept = tl.where(place < k, float("-inf"), float("inf"))
    kept_items = -1 - place
    worst = tl.min(kept, axis=1)
    next_seen = tl.load(seen_from + row * runs + number, mask=live, other=seen_width)
    seen_item = tl.load(seen + row * seen_width + next_seen, mask=next_seen < seen_width, other=items)
    for start in range(first, last, tile_items):
        item = start + tl.arange(0, tile_items)
        there = item < last
        x = encodings + row[:, None] * width + column[None, :]
        e = table + item[:, None].to(tl.int64) * width + column[None, :]
        scores = tl.zeros((tile_rows, tile_items), tl.float32)
        for done in range(0, width, tile_width):
            inner = (done + column < width)[None, :]
            x_part = tl.load(x + done, mask=live[:, None] & inner, other=0.0)
            e_part = tl.load(e + done, mask=there[:, None] & inner, other=0.0)
            # Float32 factors, not TF32, and float32 sums.
            scores = tl.dot(x_part, tl.trans(e_part), scores, input_precision="ieee")
        scores += tl.load(bias + item, mask=there, other=float("-inf"))[None, :]
        scores = tl.where(scores > float("-inf"), scores, float("-inf"))  # of NaN, argmax may make the best
        end = tl.minimum(start + tile_items, last)
        while tl.min(seen_item, axis=0) < end:
            scores = tl.where(item[None, :] == seen_item[:, None], float("-inf"), scores)
            next_seen += (seen_item < end).to(tl.int32)
            seen_item = tl.load(seen + row * seen_width + next_seen, mask=next_seen < seen_width, other=items)
        best = tl.max(scores, axis=1)
        while tl.max((best > worst).to(tl.int32), axis=0) > 0:
            # The first of equals comes in first, and the last of equals goes out first: the lower item row stays.
            better = (best > worst)[:, None]
            incoming = (start + tl.argmax(scores, axis=1))[:, None]
            outgoing = tl.max(tl.where(kept == worst[:, None], kept_items, -1 - places), axis=1)
            replaced = better & (kept_items == outgoing[:, None]) & (place < k)
            kept = tl.where(replaced, best[:, None], kept)
            kept_items = tl.where(replaced, incoming, kept_items)
            scores = tl.where(better & (item[None, :] == incoming), float("-inf"), scores)
            worst = tl.min(kept, axis=1)
            best = tl.max(scores, axis=1)
    out = (row[:, None].to(tl.int64) * runs + number) * k + place
    tl.store(top_scores + out, kept, mask=live[:, None] & (place < k))
    tl.store(top_items + out, tl.maximum(kept_items, 0), mask=live[:, None] & (place < k))
