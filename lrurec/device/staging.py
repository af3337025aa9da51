"""A micro-batch on its way to a device and back: clicks laid out by wave, and arrays that travel as one copy.

Axes besides `array_types`: n clicks, a users with a click, r places of the ring of recent items.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

_ALIGNMENT = 256
"""Bytes; where an array of its own would begin on a GPU, so that loads of 16 bytes are possible."""


class Waves(NamedTuple):
    """The order in which clicks are computed: every user's first click, then every user's second, and so on.

    Users stand by how many clicks they have, most first, so wave w is clicks `starts[w]` to `starts[w + 1]` of the
    users 0, 1, 2, …: their states are always the first ones, and nothing needs to be gathered.
    """

    users: Int64[np.ndarray, " a"]
    """Rows of the states."""
    counts: Int64[np.ndarray, " a"]
    """Clicks of each user, descending."""
    starts: Int64[np.ndarray, " waves_plus_1"]
    owner: Int64[np.ndarray, " n"]
    """Whose click each is: a place in `users`."""
    number: Int64[np.ndarray, " n"]
    """Clicks of the same user before it."""

    @property
    def place(self) -> Int64[np.ndarray, " n"]:
        """Where each click of the log stands in the order of waves."""
        places: np.ndarray = self.starts[self.number] + self.owner
        return places


def waves_of(user: Int32[np.ndarray, " n"]) -> Waves:
    """The waves of clicks whose users these are, one click or more."""
    clicks = np.bincount(user)
    users = np.argsort(-clicks, kind="stable")[: np.count_nonzero(clicks)]
    owners = np.empty(len(clicks), np.int64)
    owners[users] = np.arange(len(users))
    order = np.argsort(user, kind="stable")
    number = np.empty(len(user), np.int64)
    number[order] = np.arange(len(user)) - (np.cumsum(clicks) - clicks)[user[order]]
    starts = np.concatenate([[0], np.cumsum(np.bincount(number))])
    return Waves(users, clicks[users], starts, owners[user], number)


class Staging:
    """Named arrays in one block of memory on the host, pinned for a GPU, and the same in one block on the device.

    On the CPU both are the same memory. All is zero at first.
    """

    host: dict[str, np.ndarray]
    device: dict[str, Tensor]

    def __init__(self, arrays: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], device: torch.device) -> None:
        sizes = [dtype.itemsize * prod(shape) for dtype, shape in arrays.values()]
        starts = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]).tolist()
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(starts[-1], dtype=torch.uint8, pin_memory=on_gpu)
        self._device = self._host.to(device) if on_gpu else self._host
        self.host, self.device = {}, {}
        for (name, (dtype, shape)), start, size in zip(arrays.items(), starts, sizes, strict=False):
            self.host[name] = self._host[start : start + size].view(dtype).view(shape).numpy()
            self.device[name] = self._device[start : start + size].view(dtype).view(shape)

    def put(self, name: str, values: np.ndarray) -> None:
        """Into the first rows of a host array; the rows behind keep what they had."""
        self.host[name][: len(values)] = values

    def upload(self) -> None:
        """One copy, which the device's later work waits for."""
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)

    def download(self) -> None:
        """One copy, after the device's work so far; the host's arrays are whole when this returns."""
        if self._device is not self._host:
            self._host.copy_(self._device)
