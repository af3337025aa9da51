"""Recommendations as JSON, compiled: nothing is done in Python for an item of a list.

Texts are UTF-8 as numpy bytes, many of them end to end with where each ends. Axes: m lists, k items a list.
"""

import math

import numpy as np

from lrurec.compiled import compiled

#: What a number takes at most: 19 digits and a sign, or five digits after the point of a score.
NUMBER_BYTES = 20

#: Scores below it have ten digits before the point, which `NUMBER_BYTES` has room for.
LARGEST_SCORE = 1e10


@compiled(nogil=True)
def write_lists(
    items, scores, clicks, partitions, offsets, times,
    users, user_ends, events, event_ends, starts, start_ends, texts, text_ends,
):  # fmt: skip
    """The JSON of m lists, end to end, and where each ends.

        {"user_id":USER,"items":[{"item_id":ID,"score":SCORE},…],"model_version":…,"clicks":CLICKS,"source":{"topic":…,
        "partition":PARTITION,"offset":OFFSET,EVENT"timestamp_ms":TIME},"generated_at_ms":…}

    Args:
        items: (m, k) int32 item rows; 0 ends a list early.
        scores: (m, k) float32, below `LARGEST_SCORE`; printed with up to five decimals.
        clicks: (m,) int64.
        partitions: (m,) int64.
        offsets: (m,) int64.
        times: (m,) int64.
        users: user ids as JSON.
        user_ends: (m,) int64.
        events: `"event_id":…,` of each list, or nothing.
        event_ends: (m,) int64.
        starts: what comes before the score of each item row, 0 included.
        start_ends: (v + 1,) int64.
        texts: what stands between the other fields, six of them, and at the end.
        text_ends: (7,) int64.

    """
    lists, k = items.shape
    fixed = text_ends[6] + 4 * NUMBER_BYTES + 1 + k * (NUMBER_BYTES + 2)
    size = users.shape[0] + events.shape[0] + lists * fixed
    for i in range(lists):
        for j in range(k):
            size += start_ends[items[i, j]] - start_ends[items[i, j] - 1] if items[i, j] else 0
    out = np.empty(size, np.uint8)
    ends = np.empty(lists, np.int64)
    at = 0
    for i in range(lists):
        at = _text(out, at, texts, text_ends, 0)
        at = _text(out, at, users, user_ends, i)
        at = _text(out, at, texts, text_ends, 1)
        for j in range(k):
            if items[i, j] == 0:
                break
            if j:
                out[at] = 44  # ,
                at += 1
            at = _text(out, at, starts, start_ends, items[i, j])
            at = _score(out, at, scores[i, j])
            out[at] = 125  # }
            at += 1
        at = _text(out, at, texts, text_ends, 2)
        at = _whole(out, at, clicks[i])
        at = _text(out, at, texts, text_ends, 3)
        at = _whole(out, at, partitions[i])
        at = _text(out, at, texts, text_ends, 4)
        at = _whole(out, at, offsets[i])
        out[at] = 44
        at += 1
        at = _text(out, at, events, event_ends, i)
        at = _text(out, at, texts, text_ends, 5)
        at = _whole(out, at, times[i])
        at = _text(out, at, texts, text_ends, 6)
        ends[i] = at
    return out[:at], ends


@compiled(nogil=True)
def _text(out, at, texts, ends, number):
    start = ends[number - 1] if number else 0
    size = ends[number] - start
    place, first = np.uint64(at), np.uint64(start)  # no negative index: eight bytes and more are copied at once
    for i in range(np.uint64(size)):
        out[place + i] = texts[first + i]
    return at + size


@compiled(nogil=True)
def _whole(out, at, value):
    magnitude = np.uint64(value)
    if value < 0:
        out[at] = 45  # -
        at += 1
        magnitude = np.uint64(0) - magnitude
    digits = 1
    above = magnitude // np.uint64(10)
    while above > 0:
        digits += 1
        above //= np.uint64(10)
    for place in range(at + digits - 1, at - 1, -1):
        above = magnitude // np.uint64(10)
        out[place] = np.uint8(48) + np.uint8(magnitude - above * np.uint64(10))
        magnitude = above
    return at + digits


@compiled(nogil=True)
def _score(out, at, score):
    """As numpy rounds to five decimals; at least one of them is printed."""
    value = np.float64(score)
    if math.copysign(1.0, value) < 0:
        out[at] = 45
        at += 1
    parts = np.int64(np.rint(abs(value) * 1e5))
    whole = parts // 100_000
    at = _whole(out, at, whole)
    out[at] = 46  # .
    rest = parts - whole * 100_000
    last = 1
    for place in range(5, 0, -1):
        digit = rest % 10
        rest //= 10
        out[at + place] = 48 + digit
        if digit and last == 1:
            last = place
    return at + 1 + last
