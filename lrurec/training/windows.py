"""Training examples: windows of histories, laid end to end without padding."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from lrurec.array_types import PackedItems, Positions
from lrurec.interactions import Histories
from lrurec.model import PADDING


class Batch(NamedTuple):
    """Windows as packed tokens. The model is asked for `labels[i]` after `items[i]`.

    Tokens beyond the labels are padding items, so that batches come in few sizes: oneDNN makes code for every size it
    meets, in milliseconds, and keeps megabytes of it.
    """

    items: PackedItems
    position: Positions
    labels: PackedItems

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of at most `max_len` clicks, cut backwards from the end of each history in steps of max_len.

    What is left at a history's start gives a shorter window (`whole`), or none, as in the published code; there a
    history shorter than max_len is its own window.
    """

    windows: Histories

    @classmethod
    def cut(cls, histories: Histories, max_len: int, *, whole: bool = False) -> "Windows":
        lengths = histories.lengths
        counts = -(-lengths // max_len) if whole else np.maximum(lengths // max_len, np.minimum(lengths, 1))
        users = np.repeat(np.arange(len(histories)), counts)
        nth_from_end = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = histories.offsets[1:][users] - nth_from_end * max_len
        starts = np.maximum(ends - max_len, histories.offsets[:-1][users])
        return cls(histories.slices(starts, ends - starts))

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, chosen: Int64[np.ndarray, " b"]) -> Batch:
        """Some windows. Every click is a label: the first of a window is asked after the padding item.

        So a window of m clicks is a sequence of one padding item and a sequence of its first m - 1 clicks, which starts
        from an empty state: both have position 0 in front.
        """
        part = self.windows.take(chosen)
        labels = part.items.astype(np.int64)
        place = np.arange(len(labels)) - np.repeat(part.offsets[:-1], part.lengths)
        items = np.where(place > 0, np.roll(labels, 1), PADDING)
        padding = padded_size(len(labels)) - len(labels)
        items, position = (np.pad(each, (0, padding)) for each in (items, np.maximum(place - 1, 0)))
        return Batch(*map(torch.from_numpy, (items, position, labels)))


def padded_size(tokens: int) -> int:
    """The next of at most 16 sizes between a power of two and the next, all multiples of 64."""
    step = max(64, 1 << max(0, tokens.bit_length() - 5))
    return -(-tokens // step) * step


def epoch_order(num_windows: int, seed: int, epoch: int) -> Int64[np.ndarray, " windows"]:
    """A permutation by its arguments alone, so that a training goes on after a kill as if unbroken."""
    return np.random.default_rng((seed, epoch)).permutation(num_windows)
