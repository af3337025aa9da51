import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec.recurrence import linear_scan


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
def test_a_scan_equals_the_recurrence_one_by_one(lengths, seed):
    driven, eigenvalues, position = drawn(lengths, seed)
    torch.testing.assert_close(linear_scan(driven, eigenvalues, position), one_by_one(driven, eigenvalues, position))


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_the_gradient_of_a_scan_is_right(lengths, seed):
    driven, eigenvalues, position = drawn(lengths, seed, channels=2)
    inputs = (driven.requires_grad_(), eigenvalues.requires_grad_())
    assert torch.autograd.gradcheck(lambda u, eigen: linear_scan(u, eigen, position), inputs)
