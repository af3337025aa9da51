"""Weights as arrays: the names and shapes of the model's own, and steps that are the model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec.config import LRURecConfig
from lrurec.model import LRURec
from lrurec.weights import _cold_start_scores, first_fault, first_not_finite, fold, shapes_of


@given(num_items=st.integers(1, 9), hidden_units=st.integers(1, 9), num_blocks=st.integers(1, 3))
@settings(max_examples=20)
def test_names_and_shapes_are_the_models(num_items, hidden_units, num_blocks):
    config = LRURecConfig(num_items=num_items, hidden_units=hidden_units, num_blocks=num_blocks)
    weights = LRURec(config).state_dict()
    assert shapes_of(config) == {name: tuple(value.shape) for name, value in weights.items()}
    assert first_fault(config, weights) is None


def test_the_scores_that_are_looked_at_are_those_of_the_cold_start(small_bundle):
    scores = _cold_start_scores(fold(small_bundle.config, small_bundle.weights), small_bundle.weights)
    with torch.inference_mode():
        expected = small_bundle.model.scores(small_bundle.model.cold_start()[None])[0].numpy()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named(small_bundle, number):
    weights = {name: value.copy() for name, value in small_bundle.weights.items()}
    weights["blocks.1.lru.input_bias"][3, 1] = number
    assert "'blocks.1.lru.input_bias' holds NaN or infinite" in str(first_not_finite(small_bundle.config, weights))
