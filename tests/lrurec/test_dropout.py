import pytest
import torch

from lrurec.dropout import ByteDropout


@pytest.mark.parametrize("probability", [0.2, 0.6])
def test_the_asked_share_is_dropped_and_the_mean_kept(probability):
    torch.manual_seed(5)
    dropped = ByteDropout(probability)(torch.ones(1000, 400))
    assert (dropped == 0).float().mean() == pytest.approx(probability, abs=0.004)
    assert dropped.mean() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("probability", [0.1, 0.2, 0.4, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_keeps_the_mean_whatever_the_precision(probability, dtype):
    torch.manual_seed(5)
    x = torch.linspace(1, 2, 200, dtype=dtype).expand(500, 200)
    dropout = ByteDropout(probability)
    scaled = (x.float() * (256 / (256 - dropout.dropped_levels))).to(dtype)
    dropped = dropout(x)
    assert torch.equal(dropped[dropped != 0], scaled[dropped != 0])


def test_each_element_is_drawn_on_its_own():
    torch.manual_seed(5)
    kept = (ByteDropout(0.5)(torch.ones(4000, 8)) > 0).float()
    correlation = torch.corrcoef(kept.T).fill_diagonal_(0)
    assert correlation.abs().max() < 0.07


@pytest.mark.parametrize("dropout", [ByteDropout(0.5).eval(), ByteDropout(0.0)])
def test_nothing_is_dropped_in_evaluation_or_at_probability_zero(dropout):
    x = torch.randn(5, 3)
    assert dropout(x) is x


def test_the_same_seed_drops_the_same():
    x = torch.ones(9, 5)
    first, second = ((torch.manual_seed(2), ByteDropout(0.3)(x))[1] for _ in range(2))
    assert torch.equal(first, second)


def test_a_probability_just_below_one_still_keeps_something():
    torch.manual_seed(0)
    assert ByteDropout(0.9999)(torch.ones(100, 100)).any()
