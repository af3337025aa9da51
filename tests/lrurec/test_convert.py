"""Published weights become a bundle; weights and item ids that are none become one line."""

import numpy as np
import pytest
import torch

from lrurec.bundle import load_bundle, save_bundle
from lrurec.convert import ITEM_ID_BYTES, convert
from lrurec.errors import CheckpointError


@pytest.fixture
def arrays(golden):
    with np.load(golden.path, allow_pickle=False) as file:
        return {name.removeprefix("param/"): file[name] for name in file.files if name.startswith("param/")}


@pytest.fixture
def tensors(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_sizes_are_read_from_the_shapes(golden):
    config = golden.bundle.config
    assert (config.num_items, config.hidden_units, config.num_blocks) in [(50, 16, 1), (200, 64, 2)]
    assert golden.bundle.catalogue.item_ids == tuple(str(row) for row in range(1, config.num_items + 1))


def test_a_converted_bundle_survives_its_folder(golden, tmp_path):
    save_bundle(tmp_path / "b", golden.bundle)
    assert load_bundle(tmp_path / "b").version == golden.bundle.version


def test_names_may_lack_the_prefix(golden, arrays, tmp_path):
    np.savez(tmp_path / "plain.npz", **arrays)
    assert convert(tmp_path / "plain.npz").version == golden.bundle.version


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"model_state_dict": tensors, "epoch": 3},
        lambda tensors: {"state_dict": tensors},
        lambda tensors: {f"module.{name}": value for name, value in tensors.items()},
    ],
    ids=["bare", "model_state_dict", "state_dict", "DataParallel"],
)
def test_a_pth_gives_the_same_bundle(golden, tensors, tmp_path, wrap):
    torch.save(wrap(tensors), tmp_path / "model.pth")
    assert convert(tmp_path / "model.pth").version == golden.bundle.version


def test_item_ids_are_read_from_a_file(golden, tmp_path):
    ids = [f"film {row}" for row in range(golden.bundle.config.num_items)]
    (tmp_path / "items.txt").write_text("\n".join(ids) + "\n")
    assert convert(golden.path, tmp_path / "items.txt").catalogue.item_ids == tuple(ids)


IDS = [f"film {row}" for row in range(1, 1000)]

UNFIT = {
    "too few": lambda count: "\n".join(IDS[: count - 1]).encode(),
    "too many": lambda count: "\n".join(IDS[: count + 1]).encode(),
    "none": lambda count: b"",
    "an empty line": lambda count: b"a\n\nb\n",
    "all the same": lambda count: b"a\n" * count,
    "one twice": lambda count: "\n".join([*IDS[: count - 1], IDS[3]]).encode(),
    "not UTF-8": lambda count: "\n".join(["f\xfcr", *IDS[: count - 1]]).encode("latin-1"),
    "UTF-16": lambda count: "\n".join(IDS[:count]).encode("utf-16"),
    "a carriage return": lambda count: "\n".join(["a\rb", *IDS[: count - 1]]).encode(),
    "without end": lambda count: b"x" * (count * ITEM_ID_BYTES + 1),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_item_ids_that_do_not_fit_are_refused(golden, tmp_path, fault):
    (tmp_path / "items.txt").write_bytes(UNFIT[fault](golden.bundle.config.num_items))
    with pytest.raises(CheckpointError) as refused:
        convert(golden.path, tmp_path / "items.txt")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("name", ["none.txt", ".", "/dev/zero"])
def test_item_ids_that_are_no_file_are_refused(golden, tmp_path, name):
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(golden.path, tmp_path / name)


EMBEDDING, BIAS = "embedding.token.weight", "model.bias"
PARAMS = "model.lru_blocks.0.lru_layer.params_log"

FAULTS = {
    "a parameter missing": lambda arrays: arrays.pop(PARAMS),
    "the embedding missing": lambda arrays: arrays.pop(EMBEDDING),
    "a parameter too many": lambda arrays: arrays.update(stray=np.ones(3, np.float32)),
    "a block beyond a gap": lambda arrays: arrays.update(
        {"model.lru_blocks.5.lru_layer.params_log": np.ones((3, 2), np.float32)}
    ),
    "a wrong shape": lambda arrays: arrays.update({BIAS: arrays[BIAS][:-1]}),
    "a scalar embedding": lambda arrays: arrays.update({EMBEDDING: np.float32(1)}),
    "an empty embedding": lambda arrays: arrays.update({EMBEDDING: arrays[EMBEDDING][:1]}),
    "real where complex is needed": lambda arrays: arrays.update(
        {"model.lru_blocks.0.lru_layer.in_proj.bias": arrays["model.lru_blocks.0.lru_layer.in_proj.bias"].real}
    ),
    "whole numbers": lambda arrays: arrays.update({BIAS: arrays[BIAS].astype(np.int64)}),
    "NaN": lambda arrays: arrays[PARAMS].fill(np.nan),
    "infinity": lambda arrays: arrays[BIAS].fill(np.inf),
}


@pytest.mark.parametrize("prefix", ["", "param/"])
@pytest.mark.parametrize("fault", FAULTS)
def test_arrays_that_are_no_lrurec_are_refused_in_one_line(arrays, tmp_path, fault, prefix):
    FAULTS[fault](arrays)
    np.savez(tmp_path / "bad.npz", **{prefix + name: array for name, array in arrays.items()})
    with pytest.raises(CheckpointError) as refused:
        convert(tmp_path / "bad.npz")
    assert "\n" not in str(refused.value)
    assert "bad.npz" in str(refused.value)
