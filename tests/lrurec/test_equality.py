"""One model, every route to a user's scores: the same numbers.

Routes are the parallel form over whole sequences, the parallel form going on from a state, single steps, and the
serving engines on states that are stored as bytes between micro-batches. Each is held to the formula in float64, which
stands below in numpy and shares no code with them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from lrurec.bundle import make_bundle
from lrurec.catalogue import Catalogue
from lrurec.config import LRURecConfig
from lrurec.device.engine import TorchEngine
from lrurec.engine import Clicks
from lrurec.model import LRURec
from lrurec.recurrence import RING
from lrurec.serving import CompiledEngine, state_layout

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

SCORE_STD = 2.5
"""Of the scores of the models here, as of trained ones: tolerances are stated for this size."""

TOLERANCE = 3e-5
"""Of a score or a number of a state in float32: a hundred roundings of 2^-24 relative to 5. Hundreds of random
architectures stay within half of it. What a LayerNorm divides by a small deviation may err by as much more."""

HALF_RMS, HALF_MAX, HALF_SAME = 3e-3, 2e-2, 0.98
"""With states rounded to float16 after every click: the scores' root mean square and largest error, and the share of
clicks whose ten best items are the same ones. Seen at 1,000 clicks: 1.5e-3, 1.2e-2 and 0.988 (most models: 0.995)."""

TRAINED_RADIUS = (0.8, 0.98)
"""|λ| of trained models: .81 to .89 on average, .96 to .99 at most."""


class Result(NamedTuple):
    scores: Sequence[np.ndarray]
    """Of each user, (clicks, N): after every click, for items 1..N."""

    states: np.ndarray
    """(users, l, h) complex: after each user's last click."""


@pytest.fixture(autouse=True, scope="module")
def no_grad():
    with torch.inference_mode():
        yield


# -- the formula


def exact(bundle, histories):
    """What `LRURec`'s docstrings say, in float64 and complex128, click after click.

    With it, of each user, (clicks,): how much the LayerNorms have enlarged an error by then. A click enlarges it by the
    product of what they divide by where that is below 1, and the state carries it on.
    """
    weights = {name: value.numpy().astype(np.float64) for name, value in bundle.model.state_dict().items()}
    scores, states, enlarged = zip(*(_exact_history(bundle.config, weights, each) for each in histories), strict=True)
    return Result(scores, np.stack(states)), enlarged


def _exact_history(config, weights, items):
    enlarged, states = np.ones(len(items)), []

    def normed(x, layer):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + config.layer_norm_eps)
        np.divide(enlarged, np.minimum(1, deviation[:, 0]), out=enlarged)
        return centred / deviation * weights[f"{layer}.weight"] + weights[f"{layer}.bias"]

    x = normed(weights["item_embedding.weight"][items], "layer_norm")
    for name in (f"blocks.{index}" for index in range(config.num_blocks)):
        y, h = _exact_lru({key: weights[f"{name}.lru.{key}"] for key in LRU_WEIGHTS}, x)
        y = normed(y + x, f"{name}.layer_norm")
        inner = y @ weights[f"{name}.feed_forward.inner.weight"].T + weights[f"{name}.feed_forward.inner.bias"]
        gelu = inner * ndtr(inner)
        outer = gelu @ weights[f"{name}.feed_forward.outer.weight"].T + weights[f"{name}.feed_forward.outer.bias"]
        x = normed(outer + y, f"{name}.feed_forward.layer_norm")
        states.append(h)
    scores = x @ weights["item_embedding.weight"].T + weights["item_bias"]
    return scores[:, 1:], np.stack(states), np.maximum.accumulate(enlarged)


LRU_WEIGHTS = ("nu_log", "theta_log", "gamma_log", "input_weight", "input_bias", "output_weight", "output_bias")


def _exact_lru(lru, x):
    """h_t = λ h_{t-1} + γ (B x_t + b), y_t = Re(C h_t + c): every y, and the last h."""
    b, bias, c = (lru[name] @ (1, 1j) for name in ("input_weight", "input_bias", "output_weight"))
    decay = np.exp(-np.exp(lru["nu_log"]) + 1j * np.exp(lru["theta_log"]))
    h = np.exp(lru["gamma_log"]) * (x @ b.T + bias)
    for click in range(1, len(h)):
        h[click] += decay * h[click - 1]
    return (h @ c.T).real + lru["output_bias"], h[-1]


def assert_equal(found, bundle, histories, tolerance=TOLERANCE):
    """A route's scores and states against the formula's."""
    expected, enlarged = exact(bundle, histories)
    for ours, theirs, factor in zip(found.scores, expected.scores, enlarged, strict=True):
        assert (np.abs(ours - theirs) <= tolerance * factor[:, None]).all()
    for ours, theirs, factor in zip(found.states, expected.states, enlarged, strict=True):
        assert (np.abs(ours - theirs) <= tolerance * factor[-1]).all()


# -- the routes


def in_parallel(bundle, histories, device="cpu"):
    """`LRURec.encode_from` over all histories at once."""
    return in_parts(bundle, histories, [[] for _ in histories], device)


def in_parts(bundle, histories, cuts, device="cpu"):
    """`LRURec.encode_from`, each history cut at its places, going on from the state that each part leaves."""
    model = on_device(bundle, device)
    state, scores = model.initial_state(len(histories)), [[] for _ in histories]
    bounds = [[0, *places, len(history)] for places, history in zip(cuts, histories, strict=True)]
    for turn in range(max(map(len, bounds)) - 1):
        spans = [slice(*(bound[turn : turn + 2] if turn + 1 < len(bound) else (0, 0))) for bound in bounds]
        parts = [history[span] for history, span in zip(histories, spans, strict=True)]
        encodings, state = model.encode_from(state, *padded(parts, device))
        for found, encoding, part in zip(scores, encodings, parts, strict=True):
            found.append(model.scores(encoding[: len(part)])[:, 1:].cpu().numpy())
    return Result([np.concatenate(found) for found in scores], state.cpu().numpy())


def by_steps(bundle, histories, device="cpu"):
    """`LRURec.step`: click number n of all users who have one, then the next."""
    model = on_device(bundle, device)
    state = model.initial_state(len(histories))
    scores = [np.empty((len(history), bundle.config.num_items), np.float32) for history in histories]
    for place in range(max(map(len, histories))):
        going = [user for user, history in enumerate(histories) if len(history) > place]
        items = torch.tensor([histories[user][place] for user in going], device=device)
        encodings, state[going] = model.step(items, state[going])
        for user, row in zip(going, model.scores(encodings)[:, 1:].cpu().numpy(), strict=True):
            scores[user][place] = row
    return Result(scores, state.cpu().numpy())


def by_engine(engine, histories, order, cuts):
    """A serving engine: clicks of all users in the log's order, cut into batches, states as bytes in between."""
    log = log_of(histories, order)
    stored, rankings = [None] * len(histories), []
    for start, stop in zip([0, *cuts], [*cuts, len(order)], strict=True):
        batch = Clicks(*(column[start:stop] for column in log))
        states, ranking = engine.advance(engine.layout.unpack(stored), batch, np.arange(stop - start))
        stored = [state.tobytes() for state in states]
        rankings.append(in_row_order(ranking))
    scores = np.concatenate(rankings)
    hidden = engine.layout.unpack(stored)["hidden"].astype(np.float32)
    return Result([scores[order == user] for user in range(len(histories))], hidden[:, :, 0] + 1j * hidden[:, :, 1])


def compiled(bundle, precision="float32"):
    layout = state_layout(bundle, precision)
    return CompiledEngine(bundle, layout, top_k=bundle.config.num_items, exclude_seen=False)


def on_torch(bundle, precision="float32", device="cpu"):
    layout = state_layout(bundle, precision)
    every = bundle.config.num_items
    return TorchEngine(bundle, layout, top_k=every, exclude_seen=False, device=torch.device(device), max_batch=1)


def on_device(bundle, device):
    return bundle.model if device == "cpu" else copy.deepcopy(bundle.model).to(device)


def padded(sequences, device):
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    items = torch.zeros((len(sequences), max(1, int(lengths.max()))), dtype=torch.int64, device=device)
    for row, sequence in zip(items, sequences, strict=True):
        row[: len(sequence)] = torch.as_tensor(sequence, dtype=torch.int64)
    return items, lengths


def log_of(histories, order):
    """The clicks of all users, `order` naming whose is next, as columns."""
    queues = [iter(history) for history in histories]
    items = np.array([next(queues[user]) for user in order], np.int32)
    offset = np.arange(len(order))
    return Clicks(order.astype(np.int32), items, offset, offset)


def in_row_order(ranking):
    """Scores by item row, of a ranking of the whole catalogue."""
    return np.take_along_axis(ranking.scores, np.argsort(ranking.items, axis=1), axis=1)


# -- what is drawn


class Case(NamedTuple):
    """An architecture, and users by the lengths of their histories. All else is drawn from the seed."""

    d: int
    blocks: int
    items: int
    clicked: int
    """Only so many of the items are clicked: the fewer, the more often the same."""

    lengths: list[int]
    seed: int

    @property
    def bundle(self):
        return bundle_of(self.seed, d=self.d, blocks=self.blocks, items=self.items)

    def histories(self):
        rng = np.random.default_rng(self.seed)
        return [rng.integers(1, min(self.clicked, self.items) + 1, length).tolist() for length in self.lengths]

    def order(self):
        """Whose click is next in the log, users interleaved at random."""
        return np.random.default_rng(self.seed).permutation(np.repeat(np.arange(len(self.lengths)), self.lengths))

    def cuts(self, length):
        """Up to six places within a history or a log, empty parts among them."""
        rng = np.random.default_rng(self.seed)
        return np.sort(rng.integers(0, length + 1, rng.integers(0, 7))).tolist()


def cases(longest):
    """Up to 5 users with up to `longest` clicks, of models with up to 4 blocks and d = 64."""
    return st.builds(
        Case,
        d=st.integers(1, 64),
        blocks=st.integers(1, 4),
        items=st.integers(1, 60),
        clicked=st.integers(1, 60),
        lengths=st.lists(st.integers(1, longest), min_size=1, max_size=5),
        seed=st.integers(0, 2**32 - 1),
    )


LONG = Case(d=64, blocks=2, items=200, clicked=200, lengths=[2000, 1, 700], seed=1)
REPEATED = Case(d=16, blocks=3, items=40, clicked=1, lengths=[2000], seed=2)


def bundle_of(seed, *, d, blocks, items, radius=RING):
    """A model with weights that matter: a layer keeps its input's variance, and scores vary by `SCORE_STD`.

    |λ| is uniform by area within `radius`, its angle uniform, γ = √(1 - |λ|²).
    """
    rng = np.random.default_rng(seed)
    model = LRURec(LRURecConfig(num_items=items, hidden_units=d, num_blocks=blocks))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_weight_of(name, tuple(parameter.shape), rng, radius)))
        for index in range(blocks):
            lru = model.get_submodule(f"blocks.{index}.lru")
            lru.gamma_log.copy_((1 - lru.eigenvalues().abs() ** 2).log() / 2)
    return make_bundle(model.config, model.state_dict(), Catalogue(str(row) for row in range(items)))


def _weight_of(name, shape, rng, radius):
    if name.endswith("nu_log"):
        return np.log(-0.5 * np.log(rng.uniform(radius[0] ** 2, radius[1] ** 2, shape)))
    if name.endswith("theta_log"):
        return np.log(rng.uniform(1e-3, 2 * np.pi, shape))
    if "layer_norm" in name or name.endswith(("bias", "_log")):
        return rng.normal(float(name.endswith("layer_norm.weight")), 0.2, shape)
    inputs = np.prod(shape[1:])
    return rng.normal(0, (SCORE_STD if name == "item_embedding.weight" else 1) / np.sqrt(inputs), shape)


# -- the properties


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases(2000))
@example(case=LONG)
@example(case=REPEATED)
@settings(max_examples=15)
def test_the_parallel_form_is_the_formula(device, case):
    assert_equal(in_parallel(case.bundle, case.histories(), device), case.bundle, case.histories())


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases(2000))
@example(case=LONG)
@settings(max_examples=15)
def test_the_parallel_form_going_on_from_a_state_is_the_formula(device, case):
    cuts = [case.cuts(length) for length in case.lengths]
    assert_equal(in_parts(case.bundle, case.histories(), cuts, device), case.bundle, case.histories())


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases(60))
@example(case=LONG)
@settings(max_examples=12)
def test_single_steps_are_the_formula(device, case):
    assert_equal(by_steps(case.bundle, case.histories(), device), case.bundle, case.histories())


@given(case=cases(2000))
@example(case=LONG)
@example(case=REPEATED)
@settings(max_examples=15)
def test_the_cpu_engine_on_stored_states_is_the_formula(case):
    found = by_engine(compiled(case.bundle), case.histories(), case.order(), case.cuts(sum(case.lengths)))
    assert_equal(found, case.bundle, case.histories())


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases(60))
@example(case=LONG)
@settings(max_examples=12)
def test_the_torch_engine_on_stored_states_is_the_formula(device, case):
    engine = on_torch(case.bundle, device=device)
    found = by_engine(engine, case.histories(), case.order(), case.cuts(sum(case.lengths)))
    assert_equal(found, case.bundle, case.histories())


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize(("d", "items"), [(8, 20), (17, 40), (64, 500), (100, 60), (128, 60)])
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_the_cpu_engine_gives_the_same_bits_in_whatever_batches_and_company(precision, d, items, lengths, seed):
    case = Case(d, 2, items, items, lengths, seed)
    engine = compiled(bundle_of(1, d=d, blocks=2, items=items), precision)
    alone = by_engine(engine, case.histories(), np.repeat(np.arange(len(lengths)), lengths), [])
    found = by_engine(engine, case.histories(), case.order(), case.cuts(sum(lengths)))
    for ours, theirs in zip(found.scores, alone.scores, strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert found.states.tobytes() == alone.states.tobytes()


ROUTES = {
    "parallel": lambda bundle, histories, order, device: in_parallel(bundle, histories, device),
    "in two parts": lambda bundle, histories, order, device: in_parts(
        bundle, histories, [[1]] * len(histories), device
    ),
    "single steps": lambda bundle, histories, order, device: by_steps(bundle, histories, device),
    "cpu engine": lambda bundle, histories, order, device: by_engine(compiled(bundle), histories, order, [7, 100]),
    "torch engine": lambda bundle, histories, order, device: by_engine(
        on_torch(bundle, device=device), histories, order, [7, 100]
    ),
}


def published_histories(golden):
    return [row[:length].tolist() for row, length in zip(golden.items, golden.lengths.tolist(), strict=True)]


def assert_published(found, golden):
    for user, length in enumerate(golden.lengths.tolist()):
        logits, states = golden.prefix_logits[user, :length, 1:], golden.prefix_states[user, length - 1]
        np.testing.assert_allclose(found.scores[user], logits, rtol=0, atol=golden.tolerance)
        np.testing.assert_allclose(found.states[user], states, rtol=0, atol=golden.tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_the_published_logits_and_states(golden, route, device):
    histories = published_histories(golden)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(histories)), golden.lengths))
    assert_published(ROUTES[route](golden.bundle, histories, order, device), golden)


def test_the_formula_gives_the_published_logits_and_states(golden):
    found, _ = exact(golden.bundle, published_histories(golden))
    assert_published(found, golden)


# -- states rounded to float16 after every click


def assert_blurred_within_the_figure(found, expected, enlarged):
    error = np.abs(found - expected) * (SCORE_STD / expected.std())
    assert np.sqrt((error**2).mean()) <= HALF_RMS
    assert (error / enlarged[:, None]).max() <= HALF_MAX
    assert (ten_best(found) == ten_best(expected)).all(1).mean() >= HALF_SAME
    assert error[len(error) // 2 :].mean() <= 1.3 * error[: len(error) // 2].mean()  # it does not add up


def ten_best(scores):
    return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :10], axis=1)


@given(d=st.integers(16, 64), blocks=st.integers(1, 3), items=st.integers(20, 300), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8)
def test_a_thousand_roundings_to_float16_stay_within_the_figure(d, blocks, items, seed):
    bundle = bundle_of(seed, d=d, blocks=blocks, items=items, radius=TRAINED_RADIUS)
    history = [np.random.default_rng(seed).integers(1, items + 1, 1000).tolist()]
    expected, [enlarged] = exact(bundle, history)
    found = by_engine(compiled(bundle, "float16"), history, np.zeros(1000, int), [10, 500])
    assert_blurred_within_the_figure(found.scores[0], expected.scores[0], enlarged)


@pytest.mark.parametrize("device", DEVICES)
def test_a_thousand_roundings_to_float16_stay_within_the_figure_on_torch(device):
    bundle = bundle_of(3, d=64, blocks=2, items=300, radius=TRAINED_RADIUS)
    histories = np.random.default_rng(3).integers(1, 301, (5, 1000)).tolist()
    expected, enlarged = exact(bundle, histories)
    order = np.tile(np.arange(5), 1000)
    found = by_engine(on_torch(bundle, "float16", device), histories, order, [10, 500])
    for ours, theirs, factor in zip(found.scores, expected.scores, enlarged, strict=True):
        assert_blurred_within_the_figure(ours, theirs, factor)


# -- a long life


@pytest.mark.parametrize("route", ["parallel", "in two parts", "cpu engine"])
def test_what_a_state_keeps_for_thousands_of_clicks_is_in_the_scores(route):
    """Near |λ| = 1 the rounding of λ shows: an angle that is off by 2^-22 is off by 5e-4 in the 2,000th power of λ."""
    bundle = bundle_of(5, d=32, blocks=2, items=50, radius=(0.999, 0.9999))
    histories = [np.random.default_rng(5).integers(1, 51, 2000).tolist()]
    assert_equal(ROUTES[route](bundle, histories, np.zeros(2000, int), "cpu"), bundle, histories, 50 * TOLERANCE)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_hundred_thousand_clicks_leave_no_more_error_than_the_last_few_thousand(precision):
    bundle = bundle_of(4, d=16, blocks=2, items=30)
    history = np.random.default_rng(4).integers(1, 31, 100_000).tolist()
    found = by_engine(compiled(bundle, precision), [history], np.zeros(len(history), int), [50_000])
    expected, [enlarged] = exact(bundle, [history[-4000:]])  # .99^2000 is 2e-9: what came before is forgotten
    error = np.abs(found.scores[0][-2000:] - expected.scores[0][-2000:])
    allowed = TOLERANCE * enlarged[-2000:, None] if precision == "float32" else HALF_MAX
    assert (error <= allowed).all()
