"""Kafka's default partitioner for many keys at once: murmur2 of the key, as the Java client and aiokafka compute it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from lrurec.compiled import compiled


def partitions_of(keys: Sequence[bytes], partitions: int) -> Int32[np.ndarray, " n"]:
    """The partition that the default partitioner gives each key: (murmur2(key) & 0x7fffffff) mod partitions."""
    lengths = np.fromiter(map(len, keys), np.int64, len(keys))
    hashes = np.empty(len(keys), np.uint32)
    _murmur2(np.frombuffer(b"".join(keys), np.uint8), np.cumsum(lengths), hashes)
    return ((hashes & np.uint32(0x7FFFFFFF)) % np.uint32(partitions)).astype(np.int32)


@compiled(nogil=True)
def _murmur2(data, ends, hashes):
    """MurmurHash2, 32 bits, with Kafka's seed; arithmetic modulo 2^32."""
    mask = np.uint64(0xFFFFFFFF)
    m = np.uint64(0x5BD1E995)
    start = 0
    for key in range(ends.shape[0]):
        length = ends[key] - start
        h = np.uint64(0x9747B28C) ^ np.uint64(length)
        whole = start + length // 4 * 4
        for i in range(start, whole, 4):
            k = np.uint64(data[i]) | np.uint64(data[i + 1]) << np.uint64(8)
            k |= np.uint64(data[i + 2]) << np.uint64(16) | np.uint64(data[i + 3]) << np.uint64(24)
            k = (k * m) & mask
            k ^= k >> np.uint64(24)
            k = (k * m) & mask
            h = ((h * m) & mask) ^ k
        rest = ends[key] - whole
        if rest > 2:
            h ^= np.uint64(data[whole + 2]) << np.uint64(16)
        if rest > 1:
            h ^= np.uint64(data[whole + 1]) << np.uint64(8)
        if rest > 0:
            h = ((h ^ np.uint64(data[whole])) * m) & mask
        h ^= h >> np.uint64(13)
        h = (h * m) & mask
        hashes[key] = h ^ (h >> np.uint64(15))
        start = ends[key]
