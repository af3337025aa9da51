"""Weights as arrays: the names and shapes of the model's own, and steps that are the model's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec import weights as weights_module
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


@pytest.mark.parametrize("name", ["blocks.0.lru.gamma_log", "blocks.1.lru.theta_log"])
def test_an_exponential_beyond_float32_is_refused_though_nothing_comes_of_it(small_bundle, name):
    weights = {each: value.copy() for each, value in small_bundle.weights.items()}
    weights[name][:] = 100
    for part in ("input_weight", "input_bias"):
        weights[f"blocks.0.lru.{part}"][:] = 0
    assert "no numbers" in str(first_not_finite(small_bundle.config, weights))


@pytest.mark.parametrize("rows", [1, 4, 20, 21])
def test_the_table_is_folded_alike_in_runs_of_any_length(small_bundle, monkeypatch, rows):
    whole = fold(small_bundle.config, small_bundle.weights)
    monkeypatch.setattr(weights_module, "_ROWS_AT_ONCE", rows)
    assert fold(small_bundle.config, small_bundle.weights).embedded.tobytes() == whole.embedded.tobytes()


def test_an_epsilon_that_is_zero_in_float32_is_refused(small_bundle):
    config = dataclasses.replace(small_bundle.config, layer_norm_eps=1e-50)
    assert "no numbers" in str(first_not_finite(config, small_bundle.weights))


def test_blocks_in_name_only_are_refused_before_all_they_lack_is_listed():
    blocks = 10**5
    weights = {f"blocks.{block}.": np.zeros(0, np.float32) for block in range(blocks)}
    weights["item_embedding.weight"] = np.zeros((2, 1), np.float32)
    config = LRURecConfig(num_items=1, hidden_units=1, num_blocks=blocks)
    assert "100001 weights have an item table" in str(first_fault(config, weights))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named(small_bundle, number):
    weights = {name: value.copy() for name, value in small_bundle.weights.items()}
    weights["blocks.1.lru.input_bias"][3, 1] = number
    assert "'blocks.1.lru.input_bias' holds NaN or infinite" in str(first_not_finite(small_bundle.config, weights))
