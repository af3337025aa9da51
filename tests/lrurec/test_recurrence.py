import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec.recurrence import gradient_by_doubling, linear_scan, scan_by_doubling
from lrurec.threads import limited_threads


def packed(lengths):
    return torch.cat([torch.arange(length) for length in lengths])


def one_by_one(driven, eigenvalues, position):
    states, h = [], torch.zeros_like(driven[0])
    for u, place in zip(driven, position.tolist(), strict=True):
        h = u if place == 0 else eigenvalues * h + u
        states.append(h)
    return torch.stack(states)


def drawn(lengths, seed, channels=3):
    generator = torch.manual_seed(seed)
    driven = torch.randn(sum(lengths), channels, dtype=torch.complex128, generator=generator)
    eigenvalues = torch.randn(channels, dtype=torch.complex128, generator=generator)
    return driven, eigenvalues / (1.05 * eigenvalues.abs().max()), packed(lengths)


lengths_of_sequences = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(lengths=lengths_of_sequences, seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_every_form_of_a_scan_equals_the_recurrence_one_by_one(lengths, seed):
    arguments = drawn(lengths, seed)
    expected = one_by_one(*arguments)
    torch.testing.assert_close(linear_scan(*arguments), expected)
    torch.testing.assert_close(scan_by_doubling(*arguments), expected)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_the_gradient_of_a_scan_is_right(lengths, seed):
    driven, eigenvalues, position = drawn(lengths, seed, channels=2)
    inputs = (driven.requires_grad_(), eigenvalues.requires_grad_())
    assert torch.autograd.gradcheck(lambda u, eigen: linear_scan(u, eigen, position), inputs)


@given(lengths=lengths_of_sequences, seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_both_forms_have_one_gradient(lengths, seed):
    driven, eigenvalues, position = drawn(lengths, seed)
    inputs = (driven.requires_grad_(), eigenvalues.requires_grad_())
    h = linear_scan(*inputs, position)
    grad = torch.randn_like(h)
    by_doubling = gradient_by_doubling(grad, h.detach(), eigenvalues.detach(), position)
    for ours, theirs in zip(torch.autograd.grad(h, inputs, grad), by_doubling, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("lengths", [[300] * 12, [2_500], [7, 2_000, 9, 1_000], [1] * 2_000])
def test_threads_share_out_whole_sequences(lengths, threads):
    driven, eigenvalues, position = drawn(lengths, seed=2)
    inputs = (driven.requires_grad_(), eigenvalues.requires_grad_())

    def states_and_gradients():
        h = linear_scan(*inputs, position)
        return h, *torch.autograd.grad(h, inputs, torch.ones_like(h))

    with limited_threads(1):
        alone = states_and_gradients()
    with limited_threads(threads):
        shared = states_and_gradients()
    assert torch.equal(shared[0], alone[0])
    assert torch.equal(shared[1], alone[1])
    torch.testing.assert_close(shared[2], alone[2])


def test_a_scan_takes_what_autograd_hands_it_in_any_layout():
    driven, eigenvalues, position = drawn([4, 3], seed=1)
    turned = driven.T.contiguous().T.requires_grad_()
    h = linear_scan(turned, eigenvalues, position)
    expected = one_by_one(turned, eigenvalues, position)
    torch.testing.assert_close(h, expected)
    ours, theirs = (torch.autograd.grad(form.conj().mT.imag.sum(), turned)[0] for form in (h, expected))
    torch.testing.assert_close(ours, theirs)
