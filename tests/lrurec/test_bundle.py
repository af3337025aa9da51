"""A bundle is read whole and unharmed, or not at all."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from lrurec.bundle import load_bundle, make_bundle, save_bundle
from lrurec.catalogue import Catalogue
from lrurec.errors import BundleError


@pytest.fixture
def folder(tmp_path, small_bundle):
    save_bundle(tmp_path / "shop.bundle", small_bundle)
    return tmp_path / "shop.bundle"


def weights_of(bundle):
    return {name: value.clone() for name, value in bundle.model.state_dict().items()}


def test_a_bundle_comes_back_as_it_was(folder, small_bundle):
    loaded = load_bundle(folder)
    assert loaded.version == small_bundle.version
    assert loaded.config == small_bundle.config
    assert loaded.catalogue == small_bundle.catalogue
    assert loaded.metadata == small_bundle.metadata
    assert not loaded.model.training
    for name, value in small_bundle.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


def test_a_bundle_shares_no_memory_with_the_model_it_was_made_of(small_bundle):
    weights = weights_of(small_bundle)
    bundle = make_bundle(small_bundle.config, weights, small_bundle.catalogue)
    weights["item_bias"].fill_(9)
    assert torch.equal(bundle.model.item_bias, small_bundle.model.item_bias)


def test_its_model_is_these_weights_and_not_a_copy_of_them(small_bundle):
    assert small_bundle.model is small_bundle.model
    for name, value in small_bundle.model.state_dict().items():
        assert np.shares_memory(value.numpy(), small_bundle.weights[name])
    assert not any(parameter.requires_grad for parameter in small_bundle.model.parameters())


def test_a_bundle_can_be_replaced_and_leaves_nothing_beside_it(folder, small_bundle):
    other = make_bundle(
        small_bundle.config, small_bundle.model.state_dict(), Catalogue(f"other-{row}" for row in range(20))
    )
    save_bundle(folder, other)
    assert load_bundle(folder).version == other.version
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_write_that_fails_leaves_the_old_bundle(folder, small_bundle, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lrurec.bundle.os.fsync", refuse)
    with pytest.raises(BundleError, match="No space left"):
        save_bundle(folder, small_bundle)
    monkeypatch.undo()
    assert load_bundle(folder).version == small_bundle.version
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_of_something_else_is_never_replaced(tmp_path, small_bundle):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="no bundle's"):
        save_bundle(tmp_path, small_bundle)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_root_of_all_folders_is_never_replaced(small_bundle):
    with pytest.raises(BundleError, match=r"^/ "):
        save_bundle(Path("/"), small_bundle)


def test_a_file_in_the_way_is_never_replaced(tmp_path, small_bundle):
    (tmp_path / "b").write_text("mine")
    with pytest.raises(BundleError, match="not a folder"):
        save_bundle(tmp_path / "b", small_bundle)


class TestVersion:
    def test_is_16_hexadecimal_digits(self, small_bundle):
        assert len(small_bundle.version) == 16
        assert int(small_bundle.version, 16) >= 0

    def test_changes_with_a_weight(self, small_bundle):
        weights = weights_of(small_bundle)
        weights["item_bias"][3] += 1e-6
        assert make_bundle(small_bundle.config, weights, small_bundle.catalogue).version != small_bundle.version

    def test_changes_with_an_item_id(self, small_bundle):
        ids = [*small_bundle.catalogue.item_ids[:-1], "new"]
        weights = weights_of(small_bundle)
        assert make_bundle(small_bundle.config, weights, Catalogue(ids)).version != small_bundle.version

    def test_changes_with_the_arithmetic(self, small_bundle):
        config = dataclasses.replace(small_bundle.config, layer_norm_eps=1e-6)
        assert make_bundle(config, weights_of(small_bundle), small_bundle.catalogue).version != small_bundle.version

    def test_is_the_same_whatever_the_metadata(self, small_bundle):
        weights = weights_of(small_bundle)
        assert make_bundle(small_bundle.config, weights, small_bundle.catalogue).version == small_bundle.version


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def append(path, text):
    path.write_text(path.read_text() + text)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    change(weights)
    path.write_bytes(safetensors.torch.save(weights))


def architecture(folder, **changes):
    return json.loads((folder / "config.json").read_text())["architecture"] | changes


FAULTS = {
    "weights missing": lambda folder: (folder / "model.safetensors").unlink(),
    "config missing": lambda folder: (folder / "config.json").unlink(),
    "items missing": lambda folder: (folder / "items.txt").unlink(),
    "weights truncated": lambda folder: truncate(folder / "model.safetensors", -100),
    "weights without a whole header": lambda folder: truncate(folder / "model.safetensors", 50),
    "weights empty": lambda folder: truncate(folder / "model.safetensors", 0),
    "config truncated": lambda folder: truncate(folder / "config.json", -20),
    "items truncated": lambda folder: truncate(folder / "items.txt", -20),
    "a weight's bit flipped": lambda folder: flip(folder / "model.safetensors", -5),
    "the header's bit flipped": lambda folder: flip(folder / "model.safetensors", 12),
    "an item's bit flipped": lambda folder: flip(folder / "items.txt", 3),
    "items not text": lambda folder: (folder / "items.txt").write_bytes(b"\xff\xfe\x00" * 20),
    "an item too many": lambda folder: append(folder / "items.txt", "one-more\n"),
    "an item twice": lambda folder: (folder / "items.txt").write_text("same\n" * 20),
    "config no object": lambda folder: (folder / "config.json").write_text("[1]"),
    "config nested without end": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "another format": lambda folder: edit_config(folder, format=2),
    "no version": lambda folder: edit_config(folder, version=None),
    "another version": lambda folder: edit_config(folder, version="0" * 16),
    "another width": lambda folder: edit_config(folder, architecture=architecture(folder, hidden_units=16)),
    "more blocks": lambda folder: edit_config(folder, architecture=architecture(folder, num_blocks=3)),
    "fewer blocks": lambda folder: edit_config(folder, architecture=architecture(folder, num_blocks=1)),
    "an impossible architecture": lambda folder: edit_config(folder, architecture=architecture(folder, num_items=-1)),
    "an architecture beyond time": lambda folder: edit_config(
        folder, architecture=architecture(folder, num_blocks=10**12)
    ),
    "an architecture beyond memory": lambda folder: edit_config(
        folder, architecture=architecture(folder, hidden_units=10**9)
    ),
    "a number beyond all": lambda folder: edit_config(folder, architecture=architecture(folder, dropout=10**400)),
    "NaN": lambda folder: edit_weights(folder, lambda weights: weights["item_bias"].fill_(torch.nan)),
    "infinity": lambda folder: edit_weights(folder, lambda weights: weights["item_bias"].fill_(torch.inf)),
    "a weight missing": lambda folder: edit_weights(folder, lambda weights: weights.pop("item_bias")),
    "a weight too many": lambda folder: edit_weights(folder, lambda weights: weights.update(extra=torch.ones(1))),
    "half precision": lambda folder: edit_weights(
        folder, lambda weights: weights.update(item_bias=weights["item_bias"].half())
    ),
    "brain floats": lambda folder: edit_weights(
        folder, lambda weights: weights.update(item_bias=weights["item_bias"].bfloat16())
    ),
    "another shape": lambda folder: edit_weights(folder, lambda weights: weights.update(item_bias=torch.ones(20))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_harmed_bundle_is_refused_in_one_line(folder, fault):
    FAULTS[fault](folder)
    with pytest.raises(BundleError) as refused:
        load_bundle(folder)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


def test_no_bundle_at_all_says_how_to_make_one(tmp_path):
    with pytest.raises(BundleError, match="lrurec train"):
        load_bundle(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["blocks.0.lru.theta_log", "blocks.1.lru.gamma_log", "layer_norm.weight"])
def test_finite_weights_that_give_no_finite_scores_are_refused(small_bundle, name):
    weights = {key: value.clone() for key, value in small_bundle.model.state_dict().items()}
    weights[name].fill_(3e38 if "norm" in name else 800)
    with pytest.raises(BundleError, match="no numbers"):
        make_bundle(small_bundle.config, weights, small_bundle.catalogue, {})
