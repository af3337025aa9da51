import json

import pytest
import torch

from benchmarks import gpu


def run(monkeypatch, *options):
    monkeypatch.setattr("sys.argv", ["gpu", *options])
    gpu.main()


def test_it_runs_on_a_cpu_and_sets_each_part_beside_the_floor(monkeypatch, capsys):
    run(monkeypatch, "--device", "cpu", "--items", "50", "--clicks", "16", "--rounds", "1")
    printed = capsys.readouterr().out.splitlines()
    assert [" times the floor" in line for line in printed] == [False, False, True, True, False, False]
    [size] = json.loads(printed[-1])["sizes"]
    assert size["rank"]["bytes"] == 51 * 64 * 4 + 51 * 4 + 16 * (64 * 4 + 100 * 4 + 10 * 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a CUDA device here")
def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        run(monkeypatch)
    assert left.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "torch finds no CUDA device here; --device cpu runs tiny sizes, to see that the code runs"
    ]
