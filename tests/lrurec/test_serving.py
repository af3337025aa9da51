"""Serving: every engine gives the model's numbers, click by click, whatever else is in the micro-batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from lrurec.bundle import make_bundle
from lrurec.catalogue import Catalogue
from lrurec.config import LRURecConfig
from lrurec.errors import LRURecError
from lrurec.model import LRURec
from lrurec.serving import Clicks, CompiledEngine, DeviceError, TorchEngine, build_engine, state_layout

TOLERANCE = 3e-5
"""Of scores in float32, between the forms."""

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a CUDA device here")


@st.composite
def histories(draw, items=20):
    """(user, item) of each click in the order of the log; 5 users, up to 120 clicks."""
    size, rng = draw(st.integers(0, 120)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return list(zip(rng.integers(0, 5, size).tolist(), rng.integers(1, items + 1, size).tolist(), strict=True))


@pytest.fixture(autouse=True, scope="module")
def one_blas_thread():
    with threadpool_limits(1, user_api="blas"):  # as in a worker
        yield


@pytest.fixture(scope="module", params=[(8, 20), (64, 500), (128, 60)], ids=lambda size: f"d{size[0]}-v{size[1]}")
def sized_bundle(request):
    """Of 500 items at d = 64, a score product of 8 rows goes another route through OpenBLAS than one of 32."""
    d, items = request.param
    torch.manual_seed(1)
    model = LRURec(LRURecConfig(num_items=items, hidden_units=d, num_blocks=1))
    with torch.no_grad():
        model.item_embedding.weight.mul_(20)
    return make_bundle(model.config, model.state_dict(), Catalogue(str(row) for row in range(items)))


def compiled(bundle, precision="float32", *, k=10, exclude_seen=True, recent=100, max_batch=64):
    layout = state_layout(bundle, precision, recent)
    return CompiledEngine(bundle, layout, top_k=k, exclude_seen=exclude_seen, max_batch=max_batch)


def on_torch(bundle, precision="float32", *, k=10, exclude_seen=True, recent=100, device="cpu"):
    layout = state_layout(bundle, precision, recent)
    return TorchEngine(bundle, layout, top_k=k, exclude_seen=exclude_seen, device=torch.device(device))


def columns(clicks):
    """(user, item) pairs as columns, at offsets 0, 1, … and times 1000, 1001, …"""
    user, item = np.array(clicks, np.int32).reshape(-1, 2).T
    offset = np.arange(len(clicks))
    return Clicks(np.ascontiguousarray(user), np.ascontiguousarray(item), offset, 1000 + offset)


def part(clicks, start, stop):
    return Clicks(*(column[start:stop] for column in clicks))


def advance(engine, clicks, users=5):
    """All clicks in one batch, from new states, each ranked."""
    return engine.advance(engine.layout.unpack([None] * users), clicks, np.arange(len(clicks.user)))


def in_row_order(ranking):
    """Scores by item row, of a ranking of the whole catalogue."""
    return np.take_along_axis(ranking.scores, np.argsort(ranking.items, axis=1), axis=1)


def parallel_scores(model, clicks):
    """Scores after each click by the parallel form over each user's whole history, without row 0."""
    scores = np.zeros((len(clicks.user), model.config.num_items), np.float32)
    with torch.inference_mode():
        for user in set(clicks.user.tolist()):
            places = np.flatnonzero(clicks.user == user)
            items = torch.from_numpy(clicks.item[places].astype(np.int64))[None]
            scores[places] = model.scores(model.encode(items, torch.tensor([len(places)]))[0])[:, 1:].numpy()
    return scores


# -- the same numbers as the model's


@pytest.mark.parametrize("build", [compiled, on_torch])
def test_the_published_lists_and_scores_come_out_after_every_click(golden, build):
    order = [(user, place) for place in range(50) for user in range(12) if place < golden.lengths[user]]
    clicks = columns([(user, int(golden.items[user, place])) for user, place in order])
    engine = build(golden.bundle)
    states, ranking = advance(engine, clicks, users=12)
    for row, (user, place) in enumerate(order):
        assert ranking.items[row].tolist() == golden.prefix_top10[user, place].tolist()
        published = golden.prefix_logits[user, place][ranking.items[row]]
        np.testing.assert_allclose(ranking.scores[row], published, rtol=0, atol=golden.tolerance)
    hidden = states["hidden"][:, :, 0] + 1j * states["hidden"][:, :, 1]
    last = golden.prefix_states[np.arange(12), golden.lengths.numpy() - 1]
    np.testing.assert_allclose(hidden, last, rtol=0, atol=golden.tolerance)
    assert states["clicks"].tolist() == golden.lengths.tolist()


@given(history=histories())
@settings(max_examples=40)
def test_both_engines_and_the_parallel_form_give_the_same_scores(small_bundle, history):
    clicks = columns(history)
    wanted = parallel_scores(small_bundle.model, clicks)
    (ours, ranking), (theirs, torch_ranking) = (
        advance(build(small_bundle, k=20, exclude_seen=False), clicks) for build in (compiled, on_torch)
    )
    for found in (ranking, torch_ranking):
        np.testing.assert_allclose(in_row_order(found), wanted, rtol=0, atol=TOLERANCE)
        assert (np.diff(found.scores) <= 0).all()
    np.testing.assert_allclose(ours["hidden"], theirs["hidden"], rtol=0, atol=TOLERANCE)
    for field in ("recent_items", "clicks", "source_offset", "timestamp_ms"):
        assert (ours[field] == theirs[field]).all(), field
    assert (ranking.clicks == torch_ranking.clicks).all()


@given(history=histories(), recent=st.integers(1, 30), k=st.integers(1, 25))
@settings(max_examples=40)
def test_both_engines_leave_out_the_same_items(small_bundle, history, recent, k):
    clicks = columns(history)
    _, ours = advance(compiled(small_bundle, k=k, recent=recent), clicks)
    _, theirs = advance(on_torch(small_bundle, k=k, recent=recent), clicks)
    assert (np.isneginf(ours.scores) == np.isneginf(theirs.scores)).all()
    assert (ours.items == theirs.items).all()


def test_float16_states_blur_the_scores_by_some_thousandths_and_no_more_after_a_thousand_clicks(golden):
    every = golden.bundle.config.num_items
    items = np.random.default_rng(5).integers(1, every + 1, 1000)
    exact, rounded = (
        in_row_order(
            advance(compiled(golden.bundle, precision, k=every, exclude_seen=False), columns([(0, i) for i in items]))[
                1
            ]
        )
        for precision in ("float32", "float16")
    )
    error = np.abs(rounded - exact) * (2.5 / exact.std())  # as for scores with a standard deviation of 2.5
    assert np.sqrt((error**2).mean()) <= 5e-3
    assert error.max() <= 2e-2
    assert error[750:].mean() <= 1.3 * error[:250].mean()


# -- whatever else is in the micro-batch


@pytest.mark.parametrize("precision", ["float16", "float32"])
@given(data=st.data())
@settings(max_examples=25)
def test_a_click_gives_the_same_bits_however_clicks_are_cut_into_batches(sized_bundle, precision, data):
    history = data.draw(histories(sized_bundle.config.num_items))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(history)), max_size=6)))
    engine = compiled(sized_bundle, precision, k=sized_bundle.config.num_items)
    clicks = columns(history)
    whole, ranking = advance(engine, clicks)
    states, parts = engine.layout.unpack([None] * 5), []
    for start, stop in zip([0, *cuts], [*cuts, len(history)], strict=True):
        stored = [state.tobytes() for state in states]
        states, found = engine.advance(engine.layout.unpack(stored), part(clicks, start, stop), np.arange(stop - start))
        parts.append(found)
    assert states.tobytes() == whole.tobytes()
    for field in ("items", "scores", "clicks"):
        assert np.concatenate([getattr(each, field) for each in parts]).tobytes() == getattr(ranking, field).tobytes()


@given(data=st.data())
@settings(max_examples=25)
def test_a_click_gives_the_same_bits_however_users_are_interleaved(sized_bundle, data):
    history = data.draw(histories(sized_bundle.config.num_items))
    users = data.draw(st.permutations([user for user, _ in history]))
    queues = {user: iter([place for place, click in enumerate(history) if click[0] == user]) for user in range(5)}
    order = np.array([next(queues[user]) for user in users], np.int64)
    engine = compiled(sized_bundle, "float16", k=sized_bundle.config.num_items)
    whole, ranking = advance(engine, columns(history))
    shuffled, found = advance(engine, columns([history[place] for place in order]))
    for field in ("items", "scores", "clicks"):
        assert getattr(found, field).tobytes() == getattr(ranking, field)[order].tobytes()
    assert shuffled["hidden"].tobytes() == whole["hidden"].tobytes()
    assert shuffled["recent_items"].tobytes() == whole["recent_items"].tobytes()


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
def test_a_gpu_gives_the_scores_of_the_cpu(golden):
    rng = np.random.default_rng(4)
    clicks = columns([(int(u), int(i)) for u, i in rng.integers((0, 1), (5, golden.bundle.config.num_items), (300, 2))])
    every = golden.bundle.config.num_items
    _, ours = advance(compiled(golden.bundle, k=every, exclude_seen=False), clicks)
    _, theirs = advance(on_torch(golden.bundle, k=every, exclude_seen=False, device="cuda"), clicks)
    np.testing.assert_allclose(in_row_order(theirs), in_row_order(ours), rtol=0, atol=golden.tolerance)
