import threading
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lrurec.bfloat16 import to_bits
from lrurec.threads import limited_threads
from lrurec.training import loss, loss_kernels
from lrurec.training.loss import softmax_cross_entropy

LABELS = torch.tensor([0, 3, 3, 10, 5, 1, 2])


def leaves(dtype, rows=7, items=11, scale=1.0):
    generator = torch.manual_seed(1)
    shapes = ((rows, 4), (items, 4), (items,))
    return [(scale * torch.randn(*shape, dtype=dtype, generator=generator)).requires_grad_() for shape in shapes]


def in_one_go(encodings, weight, bias, labels, smoothing=0.0):
    return functional.cross_entropy(functional.linear(encodings, weight, bias), labels, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scores_per_tile", [1, 30, 1000])
@pytest.mark.parametrize("labels_per_thread", [2, 1000])
def test_tiles_give_the_loss_and_gradients_of_the_whole(monkeypatch, smoothing, scores_per_tile, labels_per_thread):
    monkeypatch.setattr(loss, "SCORES_PER_TILE", scores_per_tile)
    monkeypatch.setattr(loss, "_LABELS_PER_THREAD", labels_per_thread)
    inputs = leaves(torch.float64)
    with limited_threads(2):
        ours = 3 * softmax_cross_entropy(*inputs, LABELS, smoothing)
    theirs = 3 * in_one_go(*inputs, LABELS, smoothing)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("labels", "own_tables"), [(30, 3), (29, 1)])
def test_every_thread_has_its_own_labels_where_there_are_enough(monkeypatch, labels, own_tables):
    made, begin = [], loss._CompiledScores.begin
    monkeypatch.setattr(loss, "_LABELS_PER_THREAD", 10)
    monkeypatch.setattr(
        loss._CompiledScores, "begin", lambda self, *args: (made.append(threading.get_ident()), begin(self, *args))[1]
    )
    with limited_threads(3):
        softmax_cross_entropy(*leaves(torch.float32, rows=labels), torch.arange(labels) % 11)
    assert len(made) == len(set(made)) == own_tables


@pytest.mark.parametrize(("items", "own_tables"), [(48, 3), (52, 1)])
def test_a_table_that_is_large_beside_the_labels_is_no_threads_own(monkeypatch, items, own_tables):
    made, begin = [], loss._CompiledScores.begin
    monkeypatch.setattr(loss, "_LABELS_PER_THREAD", 1)
    monkeypatch.setattr(loss._CompiledScores, "begin", lambda self, *args: (made.append(self), begin(self, *args))[1])
    with limited_threads(3):
        softmax_cross_entropy(*leaves(torch.float32, rows=36, items=items), torch.arange(36))
    assert len(made) == own_tables


@given(
    rows=st.integers(1, 600),
    items=st.integers(1, 1_100) | st.integers(1_100, 4_000),
    smoothing=st.sampled_from([0.0, 0.2]),
    threads=st.integers(1, 3),
    rows_per_tile=st.sampled_from([64, 200, 2048]),
    labels_per_thread=st.sampled_from([50, 1000]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_the_compiled_loss_and_its_gradients_are_those_of_the_whole(
    rows, items, smoothing, threads, rows_per_tile, labels_per_thread, seed
):
    inputs = leaves(torch.float32, rows, items)
    labels = torch.randint(items, (rows,), generator=torch.manual_seed(seed))
    theirs = in_one_go(*inputs, labels, smoothing)
    expected = torch.autograd.grad(theirs, inputs)
    # A gradient is a difference of sums: it is their terms that are rounded, so their magnitude is the measure.
    magnitudes = [leaf.detach().abs().requires_grad_() for leaf in inputs]
    encodings, weight, bias = magnitudes
    parts = torch.autograd.grad(((encodings * weight[labels]).sum(1) + bias[labels]).mean(), magnitudes)
    # More ranges than threads, and more tiles than one.
    sizes = {"ITEMS_PER_RANGE": 512, "ROWS_PER_TILE": rows_per_tile, "_LABELS_PER_THREAD": labels_per_thread}
    with limited_threads(threads), patch.multiple(loss, **sizes):
        for precision, loss_tolerance, tolerance in (("float32", 1e-6, 5e-5), ("bfloat16", 5e-3, 1e-2)):
            ours = softmax_cross_entropy(*inputs, labels, smoothing, precision)
            torch.testing.assert_close(ours, theirs, rtol=loss_tolerance, atol=loss_tolerance)
            for one, other, part in zip(torch.autograd.grad(ours, inputs), expected, parts, strict=True):
                assert (one - other).norm() <= tolerance * (other.norm() + part.norm())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_no_number_makes_the_loss_none(precision, which):
    inputs = [leaf.detach() for leaf in leaves(torch.float32)]
    inputs[which][6] = torch.nan
    assert softmax_cross_entropy(*inputs, LABELS, 0.0, precision).isnan()


def test_exponentials_are_those_of_float64_within_what_is_said():
    x = np.linspace(-86.9, 87, 200_001, dtype=np.float32)
    error = np.abs(exponentials(x) / np.exp(x.astype(np.float64)) - 1)
    assert (error <= 3e-7 + 7e-8 * np.abs(x)).all()


def test_exponents_are_cut_to_where_exponentials_are_finite_and_above_zero():
    least, most = exponentials([-86.9, 87.0])
    assert 0 < least < most < np.inf
    assert exponentials([-np.inf, -1e30, -88, 88, 1e30, np.inf, np.nan]).tolist() == [least] * 3 + [most] * 4


def exponentials(x):
    values, sums = np.array([x], np.float32), np.empty(1, np.float32)
    loss_kernels.exponentiate(values, np.zeros_like(values[0]), np.zeros(1, np.float32), np.float32(87), sums)
    return values[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [30.0, 1e3])
def test_scores_beyond_the_range_of_exp_are_no_trouble(precision, scale):
    inputs = leaves(torch.float32, scale=scale)
    assert_exact(softmax_cross_entropy(*inputs, LABELS, 0.0, precision), in_one_go(*inputs, LABELS), inputs)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("above", [20, 50, 60, 75, 80, 84, 90, 1000])
def test_one_item_far_above_the_label_is_no_trouble(precision, above):
    encodings, weight, bias = (leaf.detach() for leaf in leaves(torch.float32))
    bias[6] = above
    inputs = [encodings.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    tolerance = 1e-5 if precision == "float32" else 1e-3
    assert_exact(softmax_cross_entropy(*inputs, LABELS, 0.0, precision), in_one_go(*inputs, LABELS), inputs, tolerance)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("ahead", [1, 10, 30, 300, 3000])
def test_where_the_label_is_nearly_certain_loss_and_gradient_are_what_little_it_lacks(precision, ahead):
    encodings, weight, bias = (leaf.detach() for leaf in leaves(torch.float32, items=50))
    weight[LABELS] *= 1.0017  # no multiple of what bfloat16 has
    bias -= 2.0 * ahead
    with torch.no_grad():
        own = (encodings * weight[LABELS[0]]).sum(1)
    bias[LABELS[0]] = 0.0
    encodings += (ahead - own)[:, None] * weight[LABELS[0]] / weight[LABELS[0]].square().sum()
    inputs = [leaf.requires_grad_() for leaf in (encodings, weight, bias)]
    labels = LABELS[:1].expand(len(encodings))
    ours, theirs = softmax_cross_entropy(*inputs, labels, 0.0, precision), in_one_go(*inputs, labels)
    assert ours >= 0
    torch.testing.assert_close(ours, theirs, rtol=0.5, atol=1e-6)
    gradients = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True)
    for one, other in gradients:
        assert (one - other).norm() <= 0.5 * other.norm() + 1e-6


@given(st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=50))
def test_exponentials_are_rounded_as_torch_rounds(values):
    ours = np.array([to_bits(np.float32(value)) for value in values])
    torch.testing.assert_close(
        torch.from_numpy(ours.astype(np.int16)), torch.tensor(values, dtype=torch.float32).bfloat16().view(torch.int16)
    )


def assert_exact(ours, theirs, inputs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    gradients = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True)
    for one, other in gradients:
        assert (one - other).norm() <= 1e-2 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_item_that_is_ruled_out_by_its_bias_is_no_trouble_without_smoothing(dtype):
    encodings, weight, bias = (leaf.detach() for leaf in leaves(dtype))
    bias[6] = -torch.inf
    inputs = [leaf.requires_grad_() for leaf in (encodings, weight, bias)]
    ours, theirs = softmax_cross_entropy(*inputs, LABELS), in_one_go(*inputs, LABELS)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_a_label_there_is_no_loss(smoothing):
    encodings, weight, bias = leaves(torch.float32, rows=0)
    with pytest.raises(ValueError, match="no label"):
        softmax_cross_entropy(encodings, weight, bias, LABELS[:0], smoothing)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_torchs_default_dtype_changes_nothing(precision):
    inputs = leaves(torch.float32)
    expected = softmax_cross_entropy(*inputs, LABELS, 0.1, precision)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(softmax_cross_entropy(*inputs, LABELS, 0.1, precision), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_equal_arguments_give_equal_bits():
    def once():
        inputs = leaves(torch.float32, 300, 2_000)
        labels = torch.arange(300)
        value = softmax_cross_entropy(*inputs, labels, 0.1, "auto")
        return [value, *torch.autograd.grad(value, inputs)]

    for one, other in zip(once(), once(), strict=True):
        assert torch.equal(one, other)
