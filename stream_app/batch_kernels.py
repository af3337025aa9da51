"""Records as Kafka's record batches, compiled.

Keys and values are numpy bytes, many of them end to end with where each ends.
"""

import numpy as np

from lrurec.compiled import compiled

#: Bytes before the first record.
HEADER_BYTES = 61

#: Of a record beside its key and its value, at most: three lengths and a number of up to five bytes each, three zeros.
_RECORD_BYTES = 23


@compiled(nogil=True)
def write_batches(keys, key_ends, values, value_ends, destinations, partitions, most, timestamp_ms, attributes):
    """Record batches by partition, end to end, with no producer's number and no checksum yet.

    Each has the records of one partition in their order, as many as its size allows, and one at least. The format is
    https://kafka.apache.org/documentation/#messageformat (magic 2), without compression; records have one timestamp
    and no headers.

    Args:
        keys: uint8.
        key_ends: (n,) int64.
        values: uint8.
        value_ends: (n,) int64.
        destinations: (n,) int32, the partition of each record.
        partitions: more than any of them.
        most: bytes of a batch with more than one record.
        timestamp_ms: of all records.
        attributes: of all batches.

    Returns:
        The bytes; and of each batch its partition, where it ends, and how many records it has.

    """
    n = destinations.shape[0]
    order = _by_destination(destinations, partitions)
    out = np.empty(keys.shape[0] + values.shape[0] + n * (_RECORD_BYTES + HEADER_BYTES), np.uint8)
    batches = np.empty((n, 3), np.int64)  # partition, end, records
    made, begin, at, count = 0, 0, 0, 0
    for i in range(n):
        record = order[i]
        key_start = key_ends[record - 1] if record else 0
        value_start = value_ends[record - 1] if record else 0
        key_size, value_size = key_ends[record] - key_start, value_ends[record] - value_start
        size = _record_size(count, key_size, value_size)
        another = count > 0 and destinations[record] != destinations[order[i - 1]]
        if another or (count > 0 and at - begin + _signed_size(size) + size > most):
            _write_header(out, begin, at, count, timestamp_ms, attributes)
            batches[made, 0], batches[made, 1], batches[made, 2] = destinations[order[i - 1]], at, count
            made, begin, count = made + 1, at, 0
            size = _record_size(count, key_size, value_size)
        if count == 0:
            at = begin + HEADER_BYTES
        at = _write_signed(out, at, size)
        out[at] = 0  # attributes
        out[at + 1] = 0  # later than the batch
        at = _write_signed(out, at + 2, count)
        at = _write_text(out, at, keys, key_start, key_size)
        at = _write_text(out, at, values, value_start, value_size)
        out[at] = 0  # headers
        at += 1
        count += 1
    if count > 0:
        _write_header(out, begin, at, count, timestamp_ms, attributes)
        batches[made, 0], batches[made, 1], batches[made, 2] = destinations[order[n - 1]], at, count
        made += 1
    return out[:at], batches[:made]


@compiled(nogil=True)
def _by_destination(destinations, partitions):
    """The records' numbers by their partitions, and in their order for each."""
    next_place = np.zeros(partitions + 1, np.int64)
    for i in range(destinations.shape[0]):
        next_place[destinations[i] + 1] += 1
    for partition in range(partitions):
        next_place[partition + 1] += next_place[partition]
    order = np.empty(destinations.shape[0], np.int64)
    for i in range(destinations.shape[0]):
        order[next_place[destinations[i]]] = i
        next_place[destinations[i]] += 1
    return order


@compiled(nogil=True)
def _record_size(number, key_size, value_size):
    """Bytes of a record behind its length."""
    return 3 + _signed_size(number) + _signed_size(key_size) + key_size + _signed_size(value_size) + value_size


@compiled(nogil=True)
def _signed_size(value):
    """Bytes of a number that isn't negative, as `_write_signed` writes it."""
    size, rest = 1, value >> 6
    while rest:
        size, rest = size + 1, rest >> 7
    return size


@compiled(nogil=True)
def _write_text(out, at, texts, start, size):
    at = _write_signed(out, at, size)
    place, first = np.uint64(at), np.uint64(start)  # no negative index: eight bytes and more are copied at once
    for i in range(np.uint64(size)):
        out[place + i] = texts[first + i]
    return at + size


@compiled(nogil=True)
def _write_signed(out, at, value):
    """A number that isn't negative as a varint in zigzag: doubled, seven bits a byte, the lowest ones first."""
    rest = value << 1
    while rest > 127:
        out[at] = rest & 127 | 128
        at, rest = at + 1, rest >> 7
    out[at] = rest
    return at + 1


@compiled(nogil=True)
def _write_header(out, begin, end, count, timestamp_ms, attributes):
    """Fields in their order; what is not known yet is 0, or -1 for no producer."""
    for i in range(begin, begin + HEADER_BYTES):
        out[i] = 0
    _write_whole(out, begin + 8, 4, end - begin - 12)  # bytes from the next field on
    _write_whole(out, begin + 12, 4, -1)  # the leader's epoch, which brokers write
    out[begin + 16] = 2  # magic; four bytes for the checksum follow
    _write_whole(out, begin + 21, 2, attributes)
    _write_whole(out, begin + 23, 4, count - 1)  # the last record's number
    _write_whole(out, begin + 27, 8, timestamp_ms)  # of the first record
    _write_whole(out, begin + 35, 8, timestamp_ms)  # the latest one
    _write_whole(out, begin + 43, 8, -1)  # the producer's id, epoch and number
    _write_whole(out, begin + 51, 2, -1)
    _write_whole(out, begin + 53, 4, -1)
    _write_whole(out, begin + 57, 4, count)


@compiled(nogil=True)
def _write_whole(out, at, size, value):
    for i in range(size):
        out[at + i] = value >> (8 * (size - 1 - i)) & 255
