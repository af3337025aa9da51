"""A micro-batch's layout: waves of one click a user, and arrays that travel together."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrurec.device.staging import Staging, waves_of

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@given(user=st.lists(st.integers(0, 12), min_size=1, max_size=60))
def test_every_wave_is_the_next_click_of_the_first_users(user):
    waves = waves_of(np.array(user, np.int32))
    assert sorted(waves.place) == list(range(len(user)))
    assert waves.users.tolist() == sorted(set(user), key=lambda each: (-user.count(each), each))
    log = np.empty(len(user), np.int64)
    log[waves.place] = np.arange(len(user))
    for wave, clicks in enumerate(np.split(log, waves.starts[1:-1])):
        theirs = [[click for click, owner in enumerate(user) if owner == each] for each in waves.users]
        assert clicks.tolist() == [clicks[wave] for clicks in theirs if len(clicks) > wave]
    assert (waves.users[waves.owner] == user).all()
    assert [user[:click].count(owner) for click, owner in enumerate(user)] == waves.number.tolist()
    assert waves.counts.tolist() == [user.count(each) for each in waves.users]


@pytest.mark.parametrize("device", DEVICES)
def test_what_goes_to_a_device_comes_back_and_stays_in_its_own_array(device):
    shapes = {"small": (torch.float16, (3, 5)), "none": (torch.int32, (4, 0)), "large": (torch.int64, (70,))}
    staging = Staging(shapes, torch.device(device))
    assert all(not array.any() for array in staging.host.values())
    staging.put("small", np.full((2, 5), 7.0))
    staging.put("large", np.arange(70))
    staging.upload()
    staging.device["small"] += 1
    staging.download()
    assert staging.host["small"].tolist() == [[8.0] * 5, [8.0] * 5, [1.0] * 5]
    assert staging.host["large"].tolist() == list(range(70))
    assert staging.host["none"].shape == staging.device["none"].shape == (4, 0)
