import numpy as np
import pytest
import torch

from lrurec import dropout, dropout_kernels
from lrurec.dropout import Dropout
from lrurec.threads import limited_threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("probability", [0.1, 0.2, 0.6])
def test_the_asked_share_is_dropped_and_the_rest_scaled_once(probability, dtype):
    torch.manual_seed(5)
    x = torch.linspace(1, 2, 200, dtype=dtype).expand(2000, 200)
    dropped = Dropout(probability)(x)
    kept = dropped != 0
    assert kept.float().mean() == pytest.approx(1 - probability, abs=0.004)
    scaled = (x.double() / (1 - probability)).to(dtype)
    torch.testing.assert_close(dropped[kept], scaled[kept], rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert dropped.double().mean() == pytest.approx(1.5, abs=0.01)


def test_each_element_is_drawn_on_its_own_and_anew_each_time():
    torch.manual_seed(5)
    module, ones = Dropout(0.5), torch.ones(4000, 8)
    kept = torch.cat([module(ones), module(ones)], 1).sign()
    beside_the_row_below = torch.cat([kept[:-1], kept[1:]], 1)
    assert torch.corrcoef(beside_the_row_below.T).fill_diagonal_(0).abs().max() < 0.07


@pytest.mark.parametrize("probability", [0.1, 0.3])
def test_the_share_is_no_multiple_of_some_256th(probability):
    torch.manual_seed(5)
    kept = Dropout(probability)(torch.ones(4000, 1000)) != 0
    assert float(kept.double().mean()) == pytest.approx(1 - probability, abs=6e-4)  # three times the standard error


KEYS = np.array([5, 70], np.uint32)


def kept_by(first_key, second_key, count=1 << 16):
    out = np.empty(count, np.float32)
    dropout_kernels.drop(np.ones_like(out), 0, first_key, second_key, np.uint32(2**31), np.float32(1), out)
    return out


@pytest.mark.parametrize("key", [0, 1])
def test_either_key_alone_makes_another_mask(key):
    one, others = kept_by(*KEYS), KEYS.copy()
    for value in np.random.default_rng(1).integers(2**32, size=20, dtype=np.uint32):
        others[key] = value
        other = kept_by(*others)
        assert np.mean(one != other) == pytest.approx(0.5, abs=0.05)
        if key == 1:  # nor is it the same mask in another order, as the first key alone would give
            assert np.mean(one[np.arange(len(one)) ^ (value ^ KEYS[1]) % len(one)] != other) > 0.4


def test_both_keys_are_drawn_and_differ(monkeypatch):
    seen = []
    drop = dropout_kernels.drop
    monkeypatch.setitem(dropout._KERNELS, torch.float32, lambda *args: (seen.append(args[2:4]), drop(*args)))
    Dropout(0.5)(torch.ones(3, 3)), Dropout(0.5)(torch.ones(3, 3))
    assert len({int(key) for keys in seen for key in keys}) == 4


def test_the_gradient_has_a_gradient():
    x = torch.ones(30, 7, requires_grad=True)
    torch.manual_seed(5)
    (gradient,) = torch.autograd.grad((Dropout(0.4)(x) ** 2).sum(), x, create_graph=True)
    torch.manual_seed(5)
    kept = Dropout(0.4)(torch.ones(30, 7))
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, 2 * kept**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_where_the_element_was_kept(dtype):
    torch.manual_seed(5)
    x = torch.ones(300, 7, dtype=dtype, requires_grad=True)
    dropped = Dropout(0.4)(x)
    (gradient,) = torch.autograd.grad(dropped, x, torch.full_like(dropped, 3.0))
    torch.testing.assert_close(gradient, 3 * dropped.detach(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(dtype):
    x = torch.randn(5001, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for count in (1, 2, 3):
        with limited_threads(count):
            torch.manual_seed(3)
            results.append(Dropout(0.3)(x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_view_is_dropped_as_its_copy_is():
    x = torch.randn(40, 30)
    view, copy = ((torch.manual_seed(2), Dropout(0.3)(values))[1] for values in (x.T, x.T.contiguous()))
    assert torch.equal(view, copy)


@pytest.mark.parametrize("module", [Dropout(0.5).eval(), Dropout(0.0)])
def test_nothing_is_dropped_in_evaluation_or_at_probability_zero(module):
    x = torch.randn(5, 3)
    assert module(x) is x


def test_the_same_seed_drops_the_same():
    x = torch.ones(9, 5)
    first, second = ((torch.manual_seed(2), Dropout(0.3)(x))[1] for _ in range(2))
    assert torch.equal(first, second)


def test_a_probability_just_below_one_still_keeps_something():
    torch.manual_seed(0)
    assert Dropout(0.999)(torch.ones(100, 100)).any()
