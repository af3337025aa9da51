"""Published weights become a bundle; anything else becomes one line, and no code in a file is ever run."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from lrurec.bundle import load_bundle, save_bundle
from lrurec.convert import convert
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


@pytest.mark.parametrize("text", ["a\nb\n", "", "a\n\nb\n", "a\n" * 50])
def test_item_ids_that_do_not_fit_are_refused(golden, tmp_path, text):
    (tmp_path / "items.txt").write_text(text)
    with pytest.raises(CheckpointError):
        convert(golden.path, tmp_path / "items.txt")


def test_a_missing_file_of_items_is_refused(golden, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(golden.path, tmp_path / "none.txt")


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def save_malicious_pth(folder, marker):
    path = folder / "evil.pth"
    torch.save({"model.bias": Payload(marker)}, path)
    return path


def save_malicious_pickle(folder, marker):
    path = folder / "evil.pth"
    path.write_bytes(pickle.dumps(Payload(marker)))
    return path


def save_malicious_npz(folder, marker):
    path = folder / "evil.npz"
    np.savez(path, **{"model.bias": np.array([Payload(marker)], dtype=object)})
    return path


def save_malicious_npz_as_pickle(folder, marker):
    path = folder / "evil.npz"
    path.write_bytes(pickle.dumps(Payload(marker)))
    return path


def save_malicious_npz_member(folder, marker):
    path = folder / "evil.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.bias.npy", pickle.dumps(Payload(marker)))
    return path


@pytest.mark.parametrize(
    "save",
    [
        save_malicious_pth,
        save_malicious_pickle,
        save_malicious_npz,
        save_malicious_npz_as_pickle,
        save_malicious_npz_member,
    ],
)
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, save):
    marker = tmp_path / "was-run"
    path = save(tmp_path, marker)
    with pytest.raises(CheckpointError) as refused:
        convert(path)
    assert "\n" not in str(refused.value)
    assert not marker.exists()
    assert_advises_nothing_unsafe(str(refused.value))


def assert_advises_nothing_unsafe(message):
    for advice in ("weights_only", "safe_globals", "allow_pickle", "pickle.load", "torch.load", "trust"):
        assert advice not in message


class Innocent:
    """What an honest program might save beside its tensors."""


def save_object(folder):
    torch.save({"model.bias": torch.ones(3), "options": Innocent()}, folder / "foreign.pth")


def save_code(folder):
    torch.save({"model.bias": Payload(folder / "was-run")}, folder / "foreign.pth")


def save_code_in_the_old_format(folder):
    torch.save({"b": Payload(folder / "was-run")}, folder / "foreign.pth", _use_new_zipfile_serialization=False)


def save_number_of_numpy(folder):
    torch.save({"model.bias": torch.ones(3), "best": np.float64(0.5)}, folder / "foreign.pth")


@pytest.mark.parametrize(
    ("save", "named"),
    [
        (save_object, f"{Innocent.__module__}.Innocent"),
        (save_code, "posix.mkdir"),
        (save_code_in_the_old_format, "posix.mkdir"),
        (save_number_of_numpy, "numpy._core.multiarray.scalar"),
    ],
)
def test_what_is_no_tensor_in_a_pth_is_named(tmp_path, save, named):
    save(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        convert(tmp_path / "foreign.pth")
    assert f"foreign.pth holds something other than tensors: the global {named}; nothing in it was run" in str(
        refused.value
    )
    assert_advises_nothing_unsafe(str(refused.value))


def test_a_program_in_a_pth_is_refused_without_advice_to_run_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "program.pth", "w") as archive:  # as torch.jit.save lays it out
        for name in ("version", "constants.pkl", "data.pkl"):
            archive.writestr(f"program/{name}", "3\n")
    with pytest.raises(CheckpointError) as refused:
        convert(tmp_path / "program.pth")
    assert "holds something other than tensors; nothing in it was run" in str(refused.value)
    assert_advises_nothing_unsafe(str(refused.value))


def test_a_name_made_to_mislead_is_not_repeated(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"\x80\x02cos\x1b[31m set weights_only=False\nsystem\n.")
    with pytest.raises(CheckpointError) as refused:
        convert(tmp_path / "a.pth")
    assert "\x1b" not in str(refused.value)
    assert_advises_nothing_unsafe(str(refused.value))


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


@pytest.mark.parametrize("value", [3, {"model.bias": 3}, ["a"], {"state_dict": {"a": "b"}}])
def test_a_pth_without_a_state_dict_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError):
        convert(tmp_path / "bad.pth")


@pytest.mark.parametrize("name", ["cut.npz", "cut.pth"])
def test_a_truncated_file_is_refused(golden, tensors, tmp_path, name):
    whole = tmp_path / "whole.pth"
    torch.save(tensors, whole)
    content = (golden.path if name.endswith("npz") else whole).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError):
        convert(tmp_path / name)


@pytest.mark.parametrize("name", ["none.npz", "text.txt", "empty.npz", "empty.pth"])
def test_a_file_of_another_kind_is_refused(tmp_path, name):
    if not name.startswith("none"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError):
        convert(tmp_path / name)
