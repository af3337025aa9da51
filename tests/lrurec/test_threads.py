import os
import subprocess
import sys

import pytest
import torch

from lrurec.threads import in_threads, limited_threads, one_thread


def test_torch_has_one_thread_inside_and_as_many_as_before_afterwards():
    with limited_threads(3):
        with one_thread() as before:
            assert (before, torch.get_num_threads()) == (3, 1)
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), one_thread():
            1 / 0  # noqa: B018
        assert torch.get_num_threads() == 3


def test_parts_run_with_one_thread_each_and_an_error_in_one_is_raised_after_all_have_ended():
    seen = {}

    def task(part):
        seen[part] = torch.get_num_threads()
        if part == 1:
            raise ZeroDivisionError

    with limited_threads(3):
        with pytest.raises(ZeroDivisionError):
            in_threads(task, 3)
        assert torch.get_num_threads() == 3
    assert seen == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize(("given", "then"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_torchs_idle_threads_sleep_unless_the_user_has_said_otherwise(given, then):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    code = "import sys, lrurec, os; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert told.stdout.strip() == then
