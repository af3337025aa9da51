"""Serving: what an engine ranks, leaves out, remembers and leaves alone; its numbers are `test_equality`'s."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lrurec import filtered_ranking
from lrurec.bundle import make_bundle, save_bundle
from lrurec.device.engine import TorchEngine
from lrurec.engine import Clicks
from lrurec.errors import LRURecError
from lrurec.serving import CompiledEngine, DeviceError, FullRanker, build_engine, state_layout

TOLERANCE = 3e-5
"""Of scores in float32, between the forms."""

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a CUDA device here")


@st.composite
def histories(draw, items=20):
    """(user, item) of each click in the order of the log; 5 users, up to 120 clicks."""
    size, rng = draw(st.integers(0, 120)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return list(zip(rng.integers(0, 5, size).tolist(), rng.integers(1, items + 1, size).tolist(), strict=True))


def compiled(bundle, precision="float32", *, k=10, exclude_seen=True, recent=100, max_batch=64):
    layout = state_layout(bundle, precision, recent)
    return CompiledEngine(bundle, layout, top_k=k, exclude_seen=exclude_seen, max_batch=max_batch)


def on_torch(bundle, precision="float32", *, k=10, exclude_seen=True, recent=100):
    """On a GPU where there is one."""
    layout, device = (
        state_layout(bundle, precision, recent),
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    return TorchEngine(bundle, layout, top_k=k, exclude_seen=exclude_seen, device=device, max_batch=1)


def columns(clicks):
    """(user, item) pairs as columns, at offsets 0, 1, … and times 1000, 1001, …"""
    user, item = np.array(clicks, np.int32).reshape(-1, 2).T
    offset = np.arange(len(clicks))
    return Clicks(np.ascontiguousarray(user), np.ascontiguousarray(item), offset, 1000 + offset)


def advance(engine, clicks, users=5):
    """All clicks in one batch, from new states, each ranked."""
    return engine.advance(engine.layout.unpack([None] * users), clicks, np.arange(len(clicks.user)))


def parallel_scores(model, clicks):
    """Scores after each click by the parallel form over each user's whole history, without row 0."""
    scores = np.zeros((len(clicks.user), model.config.num_items), np.float32)
    with torch.inference_mode():
        for user in set(clicks.user.tolist()):
            places = np.flatnonzero(clicks.user == user)
            items = torch.from_numpy(clicks.item[places].astype(np.int64))[None]
            scores[places] = model.scores(model.encode(items, torch.tensor([len(places)]))[0])[:, 1:].numpy()
    return scores


@needs_no_gpu
def test_who_computes_on_a_cpu_never_loads_torch(tmp_path, small_bundle):
    save_bundle(tmp_path / "b", small_bundle)
    program = (
        "import sys; from lrurec.bundle import load_bundle; from lrurec.serving import build_engine, state_layout;"
        "bundle = load_bundle(sys.argv[1]); build_engine(bundle, state_layout(bundle)); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, tmp_path / "b"]
    assert subprocess.check_output(command, text=True, timeout=60) == "False\n"


# -- both engines alike


@pytest.mark.parametrize("build", [compiled, on_torch])
def test_the_published_lists_come_out_after_every_click(golden, build):
    order = [(user, place) for place in range(50) for user in range(12) if place < golden.lengths[user]]
    clicks = columns([(user, int(golden.items[user, place])) for user, place in order])
    states, ranking = advance(build(golden.bundle), clicks, users=12)
    for row, (user, place) in enumerate(order):
        assert ranking.items[row].tolist() == golden.prefix_top10[user, place].tolist()
        published = golden.prefix_logits[user, place][ranking.items[row]]
        np.testing.assert_allclose(ranking.scores[row], published, rtol=0, atol=golden.tolerance)
    assert states["clicks"].tolist() == golden.lengths.tolist()


@given(history=histories(), recent=st.integers(1, 30), k=st.integers(1, 25))
@settings(max_examples=40)
def test_both_engines_leave_out_the_same_items(small_bundle, history, recent, k):
    clicks = columns(history)
    _, ours = advance(compiled(small_bundle, k=k, recent=recent), clicks)
    _, theirs = advance(on_torch(small_bundle, k=k, recent=recent), clicks)
    # Two items may change places where they score alike to rounding; one that only one engine leaves out moves scores.
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=TOLERANCE)
    assert (ours.items[~np.isfinite(ours.scores)] == theirs.items[~np.isfinite(theirs.scores)]).all()


# -- whatever else is in the micro-batch


@given(history=histories(), data=st.data())
@settings(max_examples=30)
def test_ranking_only_some_clicks_changes_neither_their_lists_nor_the_states(small_bundle, history, data):
    clicks = columns(history)
    chosen = np.array(sorted(data.draw(st.sets(st.sampled_from(range(len(history) or 1))))), np.int64)
    chosen = chosen[chosen < len(history)]
    for engine in (compiled(small_bundle), on_torch(small_bundle)):
        states, everything = advance(engine, clicks)
        same, ranking = engine.advance(engine.layout.unpack([None] * 5), clicks, chosen)
        assert same.tobytes() == states.tobytes()
        assert (ranking.items == everything.items[chosen]).all()
        assert (ranking.clicks == everything.clicks[chosen]).all()


@pytest.mark.parametrize("max_batch", [1, 32, 33, 2048])
def test_batches_larger_than_the_engine_takes_are_cut_without_a_trace(small_bundle, max_batch):
    rng = np.random.default_rng(2)
    clicks = columns([(int(user), int(item)) for user, item in rng.integers((0, 1), (5, 21), (200, 2))])
    ranked = np.array([0, 31, 32, 33, 64, 150, 199])
    engine, reference = compiled(small_bundle, max_batch=max_batch), compiled(small_bundle, max_batch=256)
    states, ranking = engine.advance(engine.layout.unpack([None] * 5), clicks, ranked)
    expected, everything = advance(reference, clicks)
    assert states.tobytes() == expected.tobytes()
    assert ranking.items.tobytes() == everything.items[ranked].tobytes()
    assert ranking.scores.tobytes() == everything.scores[ranked].tobytes()
    assert ranking.clicks.tolist() == everything.clicks[ranked].tolist()


# -- the state


@given(history=histories(), recent=st.integers(1, 12))
@example(history=[], recent=1)
@settings(max_examples=60)
def test_a_state_counts_its_clicks_and_remembers_the_latest_items(small_bundle, history, recent):
    clicks = columns(history)
    for engine in (compiled(small_bundle, recent=recent), on_torch(small_bundle, recent=recent)):
        states, ranking = advance(engine, clicks)
        so_far = [0] * 5
        for place, (user, _) in enumerate(history):
            so_far[user] += 1
            assert ranking.clicks[place] == so_far[user]
        for user, state in enumerate(states):
            items = [item for clicker, item in history if clicker == user]
            ring = [0] * recent
            for number, item in enumerate(items):
                ring[number % recent] = item
            last = max((place for place, (clicker, _) in enumerate(history) if clicker == user), default=None)
            assert state["clicks"] == len(items)
            assert state["recent_items"].tolist() == ring
            assert state["source_offset"] == (-1 if last is None else last)
            assert state["timestamp_ms"] == (0 if last is None else 1000 + last)


@pytest.mark.parametrize("build", [compiled, on_torch])
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_the_given_states_are_left_as_they_were(small_bundle, build, precision):
    engine = build(small_bundle, precision)
    states, _ = advance(engine, columns([(0, 3), (1, 4), (0, 5)]))
    before = states.tobytes()
    after, _ = engine.advance(states, columns([(0, 6), (1, 7)]), np.arange(2))
    assert states.tobytes() == before
    assert after.tobytes() != before


@pytest.mark.parametrize("build", [compiled, on_torch])
def test_users_without_a_click_keep_their_state_to_the_bit(small_bundle, build):
    engine = build(small_bundle, "float16")
    states, _ = advance(engine, columns([(user, 3 + user) for user in range(5)]))
    after, _ = engine.advance(states, columns([(2, 9)]), np.arange(1))
    for user in (0, 1, 3, 4):
        assert after[user].tobytes() == states[user].tobytes()


@pytest.mark.parametrize("build", [compiled, on_torch])
def test_a_state_beyond_float16_stays_at_its_largest_number(small_bundle, build):
    weights = {name: value.clone() for name, value in small_bundle.model.state_dict().items()}
    weights["blocks.0.lru.input_bias"] = torch.full_like(weights["blocks.0.lru.input_bias"], 1e6)
    loud = make_bundle(small_bundle.config, weights, small_bundle.catalogue)
    states, ranking = advance(build(loud, "float16"), columns([(0, 1), (0, 2), (0, 3)]), users=1)
    assert np.abs(states["hidden"]).max() == 65504
    assert np.isfinite(ranking.scores).all()


@pytest.mark.parametrize("build", [compiled, on_torch])
def test_no_clicks_change_nothing(small_bundle, build):
    engine = build(small_bundle)
    states, ranking = advance(engine, columns([]))
    assert states.tobytes() == engine.layout.initial_row * 5
    assert ranking.items.shape == (0, 10)


def test_the_layout_is_the_bundles(small_bundle):
    layout = state_layout(small_bundle)
    assert (layout.model, layout.blocks, layout.channels) == (small_bundle.version, 2, 16)
    assert (layout.precision, layout.recent_capacity) == ("float16", 100)


# -- the list


@pytest.mark.parametrize("build", [compiled, on_torch])
@given(history=histories(), recent=st.integers(1, 25))
@settings(max_examples=25)
def test_a_list_holds_the_best_of_what_is_not_among_the_latest_items(small_bundle, build, history, recent):
    clicks = columns(history)
    _, ranking = advance(build(small_bundle, recent=recent), clicks)
    scores = parallel_scores(small_bundle.model, clicks)
    for place, (user, _) in enumerate(history):
        seen = [item for clicker, item in history[: place + 1] if clicker == user][-recent:]
        items = [item for item in ranking.items[place].tolist() if item]
        assert len(items) == min(10, 20 - len(set(seen)))
        assert len(set(items)) == len(items)
        assert not set(items) & set(seen)
        left_out = set(range(1, 21)) - set(items) - set(seen)
        best_left_out = max((scores[place, item - 1] for item in left_out), default=-np.inf)
        assert ranking.scores[place, len(items) - 1] >= best_left_out - TOLERANCE
        assert not ranking.items[place, len(items) :].any()
        assert np.isneginf(ranking.scores[place, len(items) :]).all()


@pytest.mark.parametrize("build", [compiled, on_torch])
def test_lists_longer_than_the_catalogue_end_in_zeros(small_bundle, build):
    _, ranking = advance(build(small_bundle, k=30, exclude_seen=False), columns([(0, 1)]))
    assert sorted(ranking.items[0, :20].tolist()) == list(range(1, 21))
    assert not ranking.items[0, 20:].any()
    assert np.isneginf(ranking.scores[0, 20:]).all()


@pytest.mark.parametrize("build", [compiled, on_torch])
def test_equal_scores_come_in_catalogue_order(small_bundle, build):
    weights = {name: value.clone() for name, value in small_bundle.model.state_dict().items()}
    weights["item_embedding.weight"][1:] = weights["item_embedding.weight"][1]
    weights["item_bias"] = torch.zeros_like(weights["item_bias"])
    flat = make_bundle(small_bundle.config, weights, small_bundle.catalogue)
    _, ranking = advance(build(flat), columns([(0, 4), (0, 2)]))
    assert ranking.items.tolist() == [[1, 2, 3, 5, 6, 7, 8, 9, 10, 11], [1, 3, 5, 6, 7, 8, 9, 10, 11, 12]]


# -- the device


@needs_no_gpu
def test_a_gpu_that_is_not_there_is_refused_with_what_to_choose(small_bundle):
    with pytest.raises(DeviceError, match="no CUDA device here; choose auto or cpu") as error:
        build_engine(small_bundle, state_layout(small_bundle), device="cuda")
    assert isinstance(error.value, LRURecError)


@needs_no_gpu
def test_without_a_gpu_auto_is_the_cpu(small_bundle):
    layout = state_layout(small_bundle)
    assert isinstance(build_engine(small_bundle, layout), CompiledEngine)
    assert isinstance(build_engine(small_bundle, layout, device="cpu"), CompiledEngine)


@given(clicks=histories())
@settings(deadline=None, max_examples=20)
def test_cpus_with_and_without_products_of_bytes_rank_alike(small_bundle, clicks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filtered_ranking, "supported", list)
        plain = compiled(small_bundle)
    ours = compiled(small_bundle)
    assert isinstance(plain._ranker, FullRanker)
    (_, one), (_, other) = advance(plain, columns(clicks)), advance(ours, columns(clicks))
    np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=TOLERANCE)
