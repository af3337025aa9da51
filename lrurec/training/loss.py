"""Full softmax cross entropy that never holds more scores than a tile a thread."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from lrurec.bfloat16 import memory_of
from lrurec.threads import in_threads, one_thread
from lrurec.training import loss_kernels
from lrurec.training.precision import dtype_of
from lrurec.training.presets import Precision

SCORES_PER_TILE = 1 << 26
"""Scores held at a time: 256 MiB in float32, 128 MiB in bfloat16. A batch of beauty (700 labels) has 40M."""

ROWS_PER_TILE = 2048
"""At most, however few the items."""

_ROWS_STEP = 64

_LABELS_PER_THREAD = 1024
"""At least, for every thread to have its own."""

_ITEMS_PER_LABEL = 4
"""At most, of a thread with its own labels: it keeps a gradient of the whole item table."""

ITEMS_PER_RANGE = 4096
"""About: 16 MiB of scores in bfloat16. The allocator takes blocks above 32 MiB from the system anew every time."""

_ITEMS_STEP = 512
"""At least so many items for a thread, and a boundary that suits its vectors."""

_LARGEST_TOTAL = 1e25
"""Of exponentials above a label's: an item 57 nats above it. Far from float32's limits in the sums and in 1 / total."""

_GREATEST_EXPONENT = np.float32(87.0)
"""e^87 is finite, and far above the largest total."""


def softmax_cross_entropy(
    encodings: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"],
    labels: Int64[Tensor, " n"],
    smoothing: float = 0.0,
    precision: Precision = "float32",
) -> Float[Tensor, ""]:
    """Mean over n of the cross entropy, in nats, of softmax(E x + bias) and the label.

        loss_i = log Σ_v exp s_iv - (1 - ε) s_i,label - ε mean_v s_iv        ε = smoothing

    The gradient, softmax minus the smoothed label, is computed tile by tile beside the loss: scores aren't kept.
    `precision` matters for float32 on a CPU; otherwise everything is computed as the arguments are. To autograd
    the gradient is a constant: there is no second derivative. Raises ValueError if n is 0.
    """
    if not len(labels):
        raise ValueError("there is no label: the mean over none is no number")
    result: Tensor = _SoftmaxCrossEntropy.apply(encodings, weight, bias, labels, smoothing, precision)
    return result


class _SoftmaxCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        encodings: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        smoothing: float,
        precision: Precision,
    ) -> Tensor:
        # Whether there is autograd is for every thread to say: without a graph before it, none comes of it.
        encodings, weight, bias = encodings.detach(), weight.detach(), bias.detach()
        loss, *gradients = _in_parts(encodings, weight, bias, labels, smoothing, precision)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        gradients = ctx.saved_tensors  # type: ignore[attr-defined]
        if grad.device.type != "cpu" or grad != 1:  # a pass over the item table for nothing
            gradients = [grad * each for each in gradients]
        return (*gradients, None, None, None)


def _in_parts(
    encodings: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, smoothing: float, precision: Precision
) -> list[Tensor]:
    """The loss and its gradients by encodings, weight and bias.

    Where there are labels for it, each thread has its own and meets the others at the end, with a gradient of all
    items. Where there are few, the threads share out the items of every tile.
    """
    n, num_rows = len(labels), len(weight)
    enough = max(_LABELS_PER_THREAD, num_rows // _ITEMS_PER_LABEL)
    with one_thread() as threads:
        parts = threads if weight.device.type == "cpu" and n >= threads * enough else 1
        tile_size = max(1, min(ROWS_PER_TILE, SCORES_PER_TILE // (num_rows * parts)))
        cuts = [n * part // parts for part in range(parts + 1)]
        results: list[list[Tensor]] = [[]] * parts

        def compute(part: int) -> None:
            rows = slice(cuts[part], cuts[part + 1])
            scores = _scores_of(weight, bias, precision, threads if parts == 1 else 1)
            loss, grad_encodings = _loss_and_gradients(encodings[rows], scores, labels[rows], smoothing, n, tile_size)
            results[part] = [loss, grad_encodings, scores.grad_weight, scores.grad_bias]

        in_threads(compute, parts)
    losses, grad_encodings, *grad_table = zip(*results, strict=True)
    loss, *by_table = (sum(each[1:], each[0]) for each in (losses, *grad_table))
    return [loss, torch.cat(grad_encodings), *by_table]


def _loss_and_gradients(
    encodings: Tensor, scores: "_Scores", labels: Tensor, smoothing: float, n: int, tile_size: int
) -> tuple[Tensor, Tensor]:
    """What some of the n rows contribute to the loss, and its gradient by them; those by the table are the scores'."""
    num_rows = len(scores.weight)
    weight, grad_weight, grad_bias = scores.weight, scores.grad_weight, scores.grad_bias
    own = (encodings * weight[labels]).sum(1) + scores.bias[labels]
    # The mean score, of which smoothing takes its share, is the score of the mean item: no pass over the scores.
    loss, grad_encodings = encodings.new_zeros(()), torch.zeros_like(encodings)
    mean_weight, mean_bias = scores.begin(encodings.sum(0) / n, len(encodings) / n, -smoothing / num_rows)
    if smoothing:
        loss += smoothing / n * (own - encodings @ mean_weight - mean_bias).sum()
        grad_encodings.sub_(mean_weight, alpha=smoothing / n)
    for tile in _tiles(encodings, labels, own, tile_size, n):
        found = scores.exponentials(tile)
        loss += ((found.totals.log() + found.shift - tile.own) * tile.share).sum()
        scale = (tile.share / found.totals)[:, None]
        count = tile.rows.stop - tile.rows.start
        grad_encodings[tile.rows] += (found.products * scale)[:count]
        # The column of scales beside the encodings gives the gradient of the bias by the same product.
        scores.add_gradient(found.values, torch.cat([tile.encodings * scale, scale], 1))
        # What the label's own score gets: its probability less what is asked for.
        from_own = (found.own * scale[:, 0])[:count, None] - (1 - smoothing) / n
        grad_encodings[tile.rows].addcmul_(weight[labels[tile.rows]], from_own)
        grad_weight.index_add_(0, labels[tile.rows], encodings[tile.rows] * from_own)
        grad_bias.index_add_(0, labels[tile.rows], from_own[:, 0])
    return loss, grad_encodings


class _Tile(NamedTuple):
    """A run of rows with zeros below them, so that tiles come in few sizes: oneDNN keeps code for every size it met."""

    rows: slice
    """Without the zeros."""

    encodings: Tensor
    labels: Tensor
    own: Tensor
    """Each row's score of its label."""

    share: Tensor
    """Of each row in the mean: 1/n, or 0 for a row of zeros."""


def _tiles(encodings: Tensor, labels: Tensor, own: Tensor, size: int, n: int) -> Iterator[_Tile]:
    for start in range(0, len(encodings), size):
        rows = slice(start, min(start + size, len(encodings)))
        zeros = min(size, _ROWS_STEP * -(-(rows.stop - start) // _ROWS_STEP)) - (rows.stop - start)
        share = torch.full_like(own[rows], 1 / n)
        yield _Tile(
            rows,
            functional.pad(encodings[rows], (0, 0, 0, zeros)),
            functional.pad(labels[rows], (0, zeros)),
            functional.pad(own[rows], (0, zeros)),
            functional.pad(share, (0, zeros)),
        )


class _Exponentials(NamedTuple):
    """exp(s_iv - shift_i) of a tile of r rows.

    The label's own stands apart, in float32: where it is nearly all there is, loss and gradient are what little it
    lacks, and roundings of products would be more than that.
    """

    values: Sequence[Tensor]
    """(r, items of the range) a range of items, as the products of the gradient take them, 0 at the label; good until
    the next tile."""

    products: Tensor
    """(r, d) Σ_v exp(s_iv - shift_i) E_v, without the label's"""

    own: Tensor
    """(r,) exp(s_i,label - shift_i)"""

    totals: Tensor
    """(r,) Σ_v exp(s_iv - shift_i)"""

    shift: Tensor


class _Scores:
    """E x + bias by torch's operators, all items at once; and the gradients by E and bias."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.grad_weight, self.grad_bias = torch.empty_like(weight), torch.empty_like(bias)

    def begin(self, encoding: Tensor, one: float, share: float) -> tuple[Tensor, Tensor]:
        """Let every item's gradient begin at a share of this encoding and of `one`; the mean item's weight and bias."""
        self.grad_weight.copy_(_share_of(encoding, share))
        self.grad_bias.fill_(one * share)
        return self.weight.mean(0), self.bias.mean()

    def exponentials(self, tile: _Tile) -> _Exponentials:
        """Of a tile. The shift is the greatest score."""
        scores = torch.addmm(self.bias, tile.encodings, self.weight.T)
        scores.scatter_(1, tile.labels[:, None], -torch.inf)
        shift = torch.maximum(scores.amax(1), tile.own)
        values = scores.sub_(shift[:, None]).exp_()
        own = (tile.own - shift).exp()
        return _Exponentials([values], values @ self.weight, own, own + values.sum(1), shift)

    def add_gradient(self, values: Sequence[Tensor], scaled: Tensor) -> None:
        """Add a tile's terms of the gradient; `scaled` is (r, d + 1), the encodings and a column of ones, scaled."""
        by_item = values[0].T @ scaled
        self.grad_weight += by_item[:, :-1]
        self.grad_bias += by_item[:, -1]


class _CompiledScores(_Scores):
    """E x + bias of float32 arguments, by torch's products and a compiled loop. The threads share out the items."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, threads: int) -> None:
        super().__init__(weight, bias)
        self._dtype = dtype
        self._threads = threads
        self._ranges = _item_ranges(len(weight), self._threads)
        self._factors = [
            weight.new_empty(items.stop - items.start, weight.shape[1], dtype=dtype) for items in self._ranges
        ]
        self._biases = [bias[items].numpy() for items in self._ranges]
        self._memory = [factor.new_empty(0, len(factor)) for factor in self._factors]
        self._begun = [False] * len(self._ranges)

    def begin(self, encoding: Tensor, one: float, share: float) -> tuple[Tensor, Tensor]:
        self.grad_bias.fill_(one * share)
        self._start = _share_of(encoding, share)
        sums = self.weight.new_empty(len(self._ranges), len(encoding))

        def load(part: int) -> None:
            items = self._ranges[part]
            self._factors[part].copy_(self.weight[items])
            torch.sum(self.weight[items], 0, out=sums[part])

        self._share_out(load)
        return sums.sum(0) / len(self.weight), self.bias.mean()

    def exponentials(self, tile: _Tile) -> _Exponentials:
        """As of `_Scores`. The shift is the label's score, which needs no search; no total is below 1."""
        count = len(tile.encodings)
        if len(self._memory[0]) < count:
            self._memory = [memory.new_empty(count, memory.shape[1]) for memory in self._memory]
        values = [memory[:count] for memory in self._memory]
        sums = np.empty((len(self._ranges), count), np.float32)
        products = tile.encodings.new_empty(len(self._ranges), *tile.encodings.shape)
        factor = tile.encodings.to(self._dtype)

        def fill(part: int) -> None:
            items = self._ranges[part]
            torch.mm(factor, self._factors[part].T, out=values[part])
            (rows,) = torch.where((tile.labels >= items.start) & (tile.labels < items.stop))
            values[part][rows, tile.labels[rows] - items.start] = -torch.inf
            scores, own = memory_of(values[part]), tile.own.numpy()
            loss_kernels.exponentiate(scores, self._biases[part], own, _GREATEST_EXPONENT, sums[part])
            products[part] = values[part] @ self._factors[part]

        self._share_out(fill)
        with np.errstate(over="ignore"):
            totals = torch.from_numpy(1 + sums.sum(0))
        if not bool((totals < _LARGEST_TOTAL).all()):  # NaN is not below it either
            # Some score stands far above its label's: only now is the greatest score of every row worth its search.
            exact = super().exponentials(tile)
            return exact._replace(values=[exact.values[0][:, items].to(self._dtype) for items in self._ranges])
        return _Exponentials(values, products.sum(0), torch.ones_like(totals), totals, tile.own)

    def add_gradient(self, values: Sequence[Tensor], scaled: Tensor) -> None:
        factor = scaled.to(self._dtype)

        def add(part: int) -> None:
            by_item = (
                factor.T @ values[part]
            )  # faster than its transpose, and so is an addition of what is copied first
            items, terms = self._ranges[part], by_item[:-1].T.contiguous()
            rows = self.grad_weight[items]
            torch.add(rows if self._begun[part] else self._start, terms, out=rows)  # a pass less for the first tile
            self.grad_bias[items] += by_item[-1]
            self._begun[part] = True

        self._share_out(add)

    def _share_out(self, task: Callable[[int], None]) -> None:
        """Run a task for every range of items."""
        parts, threads = len(self._ranges), min(self._threads, len(self._ranges))

        def every_nth(thread: int) -> None:
            for part in range(thread, parts, threads):
                task(part)

        in_threads(every_nth, threads)


def _share_of(vector: Tensor, share: float) -> Tensor:
    return vector * share if share else torch.zeros_like(vector)  # what is not finite has no share in a gradient either


def _scores_of(weight: Tensor, bias: Tensor, precision: Precision, threads: int) -> _Scores:
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return _Scores(weight, bias)
    return _CompiledScores(weight.contiguous(), bias.contiguous(), dtype_of(precision), threads)


def _item_ranges(num_rows: int, threads: int) -> list[slice]:
    """Runs of whole steps of items that make up all rows of the item table, equally many for every thread."""
    steps = -(-num_rows // _ITEMS_STEP)
    count = threads * -(-num_rows // (threads * ITEMS_PER_RANGE))
    cuts = [min(num_rows, steps * part // count * _ITEMS_STEP) for part in range(count + 1)]
    return [slice(first, last) for first, last in pairwise(cuts) if first < last]
