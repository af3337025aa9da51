"""One model, three ways to run it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec.config import LRURecConfig
from lrurec.errors import ConfigError
from lrurec.model import LRURec

TOLERANCE = 3e-5
"""Of scores in float32, between the forms."""

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


def stepped(model, sequence):
    """Encodings after every click, and the last state, one step at a time."""
    state, encodings = model.initial_state(1), []
    for row in sequence:
        encoding, state = model.step(torch.tensor([row]), state)
        encodings.append(encoding[0])
    return encodings, state[0]


@given(sequences=histories)
@settings(deadline=None, max_examples=40)
def test_the_parallel_form_equals_single_steps(small_model, sequences):
    encodings, after = small_model.encode_from(small_model.initial_state(len(sequences)), *padded(sequences))
    for row, sequence in enumerate(sequences):
        steps, state = stepped(small_model, sequence)
        torch.testing.assert_close(after[row], state, rtol=0, atol=TOLERANCE)
        if steps:
            ours = small_model.scores(encodings[row, : len(sequence)])
            torch.testing.assert_close(ours, small_model.scores(torch.stack(steps)), rtol=0, atol=TOLERANCE)


@given(sequences=histories, data=st.data())
@settings(deadline=None, max_examples=40)
def test_going_on_from_a_state_equals_never_having_stopped(small_model, sequences, data):
    cuts = [data.draw(st.integers(0, len(sequence))) for sequence in sequences]
    heads, tails = zip(*((s[:cut], s[cut:]) for s, cut in zip(sequences, cuts, strict=True)), strict=True)
    start = small_model.initial_state(len(sequences))
    whole, after_whole = small_model.encode_from(start, *padded(sequences))
    _, between = small_model.encode_from(start, *padded(heads))
    resumed, after = small_model.encode_from(between, *padded(tails))
    torch.testing.assert_close(after, after_whole, rtol=0, atol=TOLERANCE)
    for row, (cut, tail) in enumerate(zip(cuts, tails, strict=True)):
        torch.testing.assert_close(
            small_model.scores(resumed[row, : len(tail)]),
            small_model.scores(whole[row, cut : cut + len(tail)]),
            rtol=0,
            atol=TOLERANCE,
        )


@given(sequences=histories, filler=st.integers(-5, 30))
@settings(deadline=None, max_examples=20)
def test_padding_never_leaks(small_model, sequences, filler):
    clean, dirty = small_model.encode(*padded(sequences)), small_model.encode(*padded(sequences, filler))
    assert torch.equal(clean, dirty)


def test_encodings_beyond_a_length_are_zeros(small_model):
    items, lengths = padded([[1, 2, 3], [4]])
    assert not small_model.encode(items, lengths)[1, 1:].any()


def test_neighbours_in_a_batch_do_not_matter(small_model):
    alone = small_model.encode(*padded([[5, 6, 7, 8]]))
    together = small_model.encode(*padded([[1, 2], [5, 6, 7, 8], [9] * 30]))
    torch.testing.assert_close(together[1, :4], alone[0], rtol=0, atol=1e-6)


def test_a_long_history_drifts_no_further_than_a_short_one(golden):
    model = golden.bundle.model
    sequence = torch.randint(1, model.config.num_items + 1, (2048,), generator=torch.manual_seed(3)).tolist()
    parallel = model.scores(model.encode(*padded([sequence]))[0])
    steps, _ = stepped(model, sequence)
    torch.testing.assert_close(parallel, model.scores(torch.stack(steps)), rtol=0, atol=golden.tolerance)


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
