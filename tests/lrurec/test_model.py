"""What the model takes, refuses and leaves alone; that its forms give the same numbers is `test_equality`'s."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec.config import LRURecConfig
from lrurec.errors import ConfigError
from lrurec.model import LRURec

histories = st.lists(st.lists(st.integers(1, 20), max_size=40), min_size=1, max_size=6)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def padded(sequences, filler=0):
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    items = torch.full((len(sequences), max(1, int(lengths.max()))), filler)
    for row, sequence in zip(items, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return items, lengths


@given(sequences=histories, filler=st.integers(-5, 30))
@settings(deadline=None, max_examples=20)
def test_padding_never_leaks(small_model, sequences, filler):
    clean, dirty = small_model.encode(*padded(sequences)), small_model.encode(*padded(sequences, filler))
    assert torch.equal(clean, dirty)


def test_encodings_beyond_a_length_are_zeros(small_model):
    items, lengths = padded([[1, 2, 3], [4]])
    assert not small_model.encode(items, lengths)[1, 1:].any()


def test_a_step_leaves_the_state_as_it_was(small_model):
    _, state = small_model.step(torch.tensor([3, 4]), small_model.initial_state(2))
    before = state.clone()
    small_model.step(torch.tensor([5, 6]), state)
    small_model.encode_from(state, *padded([[1], []]))
    assert torch.equal(state, before)


def test_an_empty_batch_is_no_special_case(small_model):
    nobody, lengths = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    encodings, after = small_model.encode_from(small_model.initial_state(0), nobody, lengths)
    assert encodings.shape == (0, 3, 8)
    assert after.shape == (0, 2, 16)


@pytest.mark.parametrize("row", [0, -1, 21])
def test_an_item_row_that_is_no_item_is_refused(small_model, row):
    with pytest.raises(ValueError, match=r"within 1\.\.20"):
        small_model.encode(*padded([[1, row, 2]]))


@pytest.mark.parametrize("length", [-1, 3])
def test_a_length_beyond_the_row_is_refused(small_model, length):
    with pytest.raises(ValueError, match=r"within 0\.\.2"):
        small_model.encode(torch.tensor([[1, 2]]), torch.tensor([length]))


def test_fresh_weights_are_drawn_as_published():
    torch.manual_seed(0)
    model = LRURec(LRURecConfig(num_items=300, hidden_units=32))
    for name, weight in model.named_parameters():
        if "layer_norm" in name:
            assert torch.equal(weight, torch.full_like(weight, float(name.endswith("weight"))))
        elif not name.endswith("_log"):
            assert weight.abs().max() <= 0.04
            assert weight.numel() < 500 or weight.std() == pytest.approx(0.0176, rel=0.05)  # of a normal cut at 2 σ
    lru = model.get_submodule("blocks.0.lru")
    radius = lru.eigenvalues().abs()
    assert radius.min() >= 0.8
    assert radius.max() <= 0.99
    torch.testing.assert_close(lru.gamma_log.exp(), (1 - radius**2).sqrt())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_items", 0),
        ("num_items", True),
        ("hidden_units", 1.5),
        ("max_len", 2**70),
        ("dropout", 1),
        ("dropout", float("nan")),
        ("layer_norm_eps", 0),
    ],
)
def test_a_config_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        LRURecConfig(**{"num_items": 5, name: value})


def test_a_config_survives_json():
    config = LRURecConfig(num_items=5, hidden_units=12, dropout=0.5)
    assert LRURecConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("change", [{"colour": 1}, {"num_items": None}])
def test_a_json_config_with_other_names_is_refused(change):
    value = {
        name: entry for name, entry in {**LRURecConfig(num_items=5).to_json(), **change}.items() if entry is not None
    }
    with pytest.raises(ConfigError):
        LRURecConfig.from_json(value)
