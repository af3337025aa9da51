import copy
import threading

import numpy as np
import pytest
import torch

from lrurec.config import LRURecConfig
from lrurec.dropout import Dropout
from lrurec.interactions import Histories
from lrurec.model import LRURec
from lrurec.threads import limited_threads
from lrurec.training import encoding
from lrurec.training.encoding import encode
from lrurec.training.windows import Batch, Windows


@pytest.fixture
def batch():
    return Windows.cut(Histories(np.array([3, 4, 5, 6, 9, 11], np.int32), np.array([0, 4, 6])), 50).batch(np.arange(2))


def encoded(model, batch, precision="float32"):
    return encode(model, model.item_embedding(batch.items), batch.position, precision)


def test_tokens_are_encoded_in_float32_exactly_where_that_is_asked_for(small_model, batch):
    model = copy.deepcopy(small_model).eval()
    assert torch.equal(encoded(model, batch), model.encode_packed(batch.items, batch.position))


def test_bfloat16_rounds_what_the_blocks_multiply(small_model, batch):
    model = copy.deepcopy(small_model).eval()
    exact, rounded = (encoded(model, batch, precision).detach() for precision in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert 1e-5 < float((rounded - exact).norm() / exact.norm()) < 2e-2


@pytest.fixture
def large_batch():
    generator = np.random.default_rng(4)
    lengths = generator.integers(1, 40, 60)
    items = generator.integers(1, 12, lengths.sum(), dtype=np.int32)
    return Windows.cut(Histories(items, np.concatenate([[0], lengths.cumsum()])), 50).batch(np.arange(60))


@pytest.fixture
def shared_out(monkeypatch):
    """Few tokens are enough for a thread, and more than one had some."""
    monkeypatch.setattr(encoding, "_TOKENS_PER_THREAD", 16)
    threads, encode_embedded = set(), LRURec.encode_embedded

    def noted(self, *args):
        threads.add(threading.get_ident())
        return encode_embedded(self, *args)

    monkeypatch.setattr(LRURec, "encode_embedded", noted)
    yield
    assert len(threads) > 1


def encodings_and_gradients(model, batch, precision="float32", threads=3, seed=6):
    with limited_threads(threads):
        torch.manual_seed(seed)
        encodings = encoded(model, batch, precision)[: len(batch.labels)]
        seen = torch.randn(encodings.shape, generator=torch.Generator().manual_seed(2))
        parameters = [value for name, value in model.named_parameters() if name != "item_bias"]
        return encodings.detach(), torch.autograd.grad((encodings * seen).sum(), parameters)


@pytest.mark.usefixtures("shared_out")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_threads_encode_and_go_back_as_one_does(small_model, large_batch, precision, tolerance):
    model = copy.deepcopy(small_model).eval()
    several, one = (encodings_and_gradients(model, large_batch, precision, threads) for threads in (3, 1))
    torch.testing.assert_close(several[0], one[0], rtol=tolerance, atol=tolerance)
    for gradient, expected in zip(several[1], one[1], strict=True):
        assert (gradient - expected).norm() <= tolerance * expected.norm()


@pytest.mark.usefixtures("shared_out")
def test_the_same_seed_drops_the_same_in_every_thread(large_batch):
    torch.manual_seed(1)
    model = LRURec(LRURecConfig(num_items=12, hidden_units=8, dropout=0.4)).train()
    first, again = (encodings_and_gradients(model, large_batch) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert all(map(torch.equal, first[1], again[1]))
    assert not torch.equal(encodings_and_gradients(model, large_batch, seed=7)[0], first[0])


@pytest.mark.usefixtures("shared_out")
def test_threads_drop_differently():
    torch.manual_seed(1)
    model = LRURec(LRURecConfig(num_items=12, hidden_units=8, dropout=0.4)).train()
    lengths = np.full(4, 20)
    alike = Histories(np.tile(np.arange(1, 11, dtype=np.int32), 8), np.concatenate([[0], lengths.cumsum()]))
    batch = Windows.cut(alike, 50).batch(np.arange(4))
    encodings = encodings_and_gradients(model, batch, threads=4)[0].view(4, 20, -1)
    assert len({tuple(each.flatten().tolist()) for each in encodings}) == 4


@pytest.mark.usefixtures("shared_out")
def test_weights_that_do_not_learn_stand_in_no_threads_way(small_model, large_batch):
    model = copy.deepcopy(small_model).eval()
    frozen, learned = model.blocks[0], model.blocks[1].lru.nu_log
    frozen.requires_grad_(False)
    with limited_threads(3):
        encoded(model, large_batch).sum().backward()
    assert learned.grad is not None
    assert all(parameter.grad is None for parameter in frozen.parameters())


@pytest.mark.parametrize(("threads", "tokens", "shared"), [(2, 4096, True), (2, 4095, False), (3, 6000, False)])
def test_threads_share_out_tokens_only_where_all_have_enough(small_model, monkeypatch, threads, tokens, shared):
    called = []
    monkeypatch.setattr(encoding._SharedOut, "apply", lambda *args: called.append(args) or args[2])
    batch = Batch(*torch.zeros(3, tokens, dtype=torch.int64))
    with limited_threads(threads):
        encoded(copy.deepcopy(small_model).eval(), batch)
    assert bool(called) == shared


@pytest.mark.usefixtures("shared_out")
def test_an_error_in_a_thread_is_raised(small_model, large_batch, monkeypatch):
    def fail(self, x):
        raise MemoryError("no more")

    monkeypatch.setattr(Dropout, "forward", fail)
    with pytest.raises(MemoryError, match="no more"):
        encodings_and_gradients(copy.deepcopy(small_model), large_batch)
