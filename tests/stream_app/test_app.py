"""What the composition root decides by itself. That the parts work together is for test_worker.py."""

from __future__ import annotations

import pytest

from stream_app.app import assigned_partitions, build_app
from stream_app.settings import Settings


@pytest.mark.parametrize(
    ("distribution", "partitions"),
    [
        ({}, 0),
        ({"a": {}}, 0),
        ({"a": {"changelog": [0, 1, 2]}, "b": {}}, 3),
        ({"a": {"changelog": [0, 2]}, "b": {"changelog": [1, 3]}}, 4),
        ({"a": {"changelog": [0, 1]}, "b": {"changelog": [1]}}, 2),  # a standby copy is not another partition
    ],
)
def test_every_partition_of_the_group_counts_once(distribution, partitions):
    assert assigned_partitions(distribution) == partitions


async def test_only_this_user_can_read_the_states(tmp_path):
    build_app(Settings(state_dir=tmp_path / "state", app_id="shop"), "note")
    assert oct((tmp_path / "state" / "shop").stat().st_mode & 0o777) == oct(0o700)
