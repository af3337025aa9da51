import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec.recurrence import from_planes, gradient_by_doubling, linear_scan, planes, scan_by_doubling
from lrurec.threads import limited_threads


def packed(lengths):
    return torch.cat([torch.arange(length) for length in lengths])


def one_by_one(driven, eigenvalues, position):
    states, h = [], torch.zeros_like(driven[0])
    for u, place in zip(driven, position.tolist(), strict=True):
        h = u if place == 0 else eigenvalues * h + u
        states.append(h)
    return torch.stack(states)


def scan(driven, eigenvalues, position):
    return from_planes(linear_scan(planes(driven), eigenvalues, position))


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
    torch.testing.assert_close(scan(*arguments), expected)
    driven, *others = arguments
    torch.testing.assert_close(scan_by_doubling(planes(driven), *others), planes(expected))


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_the_gradient_of_a_scan_is_right(lengths, seed):
    driven, eigenvalues, position = drawn(lengths, seed, channels=2)
    inputs = (driven.requires_grad_(), eigenvalues.requires_grad_())
    assert torch.autograd.gradcheck(lambda u, eigen: scan(u, eigen, position), inputs)


@given(lengths=lengths_of_sequences, seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_both_forms_have_one_gradient(lengths, seed):
    driven, eigenvalues, position = drawn(lengths, seed)
    inputs = (planes(driven).requires_grad_(), eigenvalues.requires_grad_())
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
        h = scan(*inputs, position)
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
    turned = planes(driven).movedim(0, 2).contiguous().movedim(2, 0).requires_grad_()
    h = linear_scan(turned, eigenvalues, position)
    expected = planes(one_by_one(from_planes(turned), eigenvalues, position))
    torch.testing.assert_close(h, expected)
    weight = torch.arange(h.numel(), dtype=h.dtype).view(h.movedim(0, 2).shape)
    ours, theirs = (torch.autograd.grad((form.movedim(0, 2) * weight).sum(), turned)[0] for form in (h, expected))
    torch.testing.assert_close(ours, theirs)


@given(lengths=lengths_of_sequences, seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_bfloat16_is_rounded_to_once_a_token_and_carried_on_unrounded(lengths, seed):
    driven, eigenvalues, position = drawn(lengths, seed, channels=5)
    driven, eigenvalues = planes(driven).bfloat16(), eigenvalues.to(torch.complex64)
    rounded = (driven.clone().requires_grad_(), eigenvalues.clone().requires_grad_())
    exact = driven.float().requires_grad_()
    h, exact_h = linear_scan(*rounded, position), linear_scan(exact, eigenvalues, position)
    assert torch.equal(h, exact_h.bfloat16())
    grad = torch.randn_like(exact_h).bfloat16()
    by_driven, by_eigenvalues = torch.autograd.grad(h, rounded, grad)
    (exact_by_driven,) = torch.autograd.grad(exact_h, exact, grad.float())
    assert torch.equal(by_driven, exact_by_driven.bfloat16())
    g, before = from_planes(by_driven.double())[1:], from_planes(h.double())[:-1]
    expected = (g * before.conj() * (position[1:] > 0)[:, None]).sum(0)
    torch.testing.assert_close(by_eigenvalues.to(expected.dtype), expected, rtol=1e-5, atol=1e-4)
