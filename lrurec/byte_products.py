"""Products of bytes by the CPU's own instructions, as LLVM's intermediate code: numba has no name for them.

Axes: q words of four bytes (VNNI) or two (AVX2).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

#: Rows and items of one product.
ROWS, ITEMS = 6, 64

#: Items in a register.
_LANES = 16

_INDEX, _FOUR_BYTES = ir.IntType(64), ir.IntType(32)


def items_of_a_pass(bytes_in_word: int) -> int:
    """Items whose sums with `ROWS` rows stay in registers: 6 · 4 of 32 where words are wide, 6 · 2 of 16 else."""
    return 4 * _LANES if bytes_in_word == 4 else 2 * _LANES


@intrinsic
def multiply(typing_context: Any, x: Any, words: Any, start: Any, least: Any, sums: Any) -> Any:
    """Start + Σ x̂ ê of `ROWS` rows and `ITEMS` items, in whole numbers as wide as the words are.

    x (q, ROWS) int32, words (passes, q, items of a pass), start (items,), least (ROWS,), sums (ROWS, items) out.
    Returns a bit for each row, set where some sum is `least` or more. Words of four bytes: VPDPBUSD. Words of two:
    VPMADDUBSW, and a sum modulo 2¹⁶; x̂'s two bytes are in x twice.
    """
    signature = types.int64(x, words, start, least, sums)

    def generate(context: Any, builder: Any, called: Any, arguments: Any) -> Any:
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(called.args, arguments, strict=True)
        ]
        steps = builder.extract_value(arrays[0].shape, 0)
        product = _Product(builder, words.dtype.bitwidth // 8)
        reached = _INDEX(0)
        for first in range(0, ITEMS, product.items):
            reached = builder.or_(reached, product.of_a_pass(first, steps, *(array.data for array in arrays)))
        return reached

    return signature, generate


class _Product:
    """Writes the code of one product."""

    def __init__(self, builder: Any, bytes_in_word: int) -> None:
        self._builder = builder
        self._align = bytes_in_word
        self.items = items_of_a_pass(bytes_in_word)
        self._sums = sums = ir.VectorType(ir.IntType(8 * bytes_in_word), _LANES)
        self._bytes = bytes_ = ir.VectorType(ir.IntType(8), bytes_in_word * _LANES)
        self._adds = bytes_in_word == 4
        if self._adds:
            kind, name = ir.FunctionType(sums, [sums, bytes_, bytes_]), "llvm.x86.avx512.vpdpbusd.512"
        else:
            kind, name = ir.FunctionType(sums, [bytes_, bytes_]), "llvm.x86.avx2.pmadd.ub.sw"
        self._instruction = cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]

    def of_a_pass(self, first: int, steps: Any, x: Any, words: Any, start: Any, least: Any, sums: Any) -> Any:
        """A loop over the words of the items from the `first` on, then their sums to memory, and the rows' bits."""
        builder, vectors = self._builder, range(0, self.items, _LANES)
        begun = [self._load(start, _INDEX(first + number)) for number in vectors]
        words = builder.gep(words, [builder.mul(steps, _INDEX(first))])
        before, loop, after = builder.block, *(builder.append_basic_block(name) for name in ("multiply", "store"))
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_INDEX)
        totals = [[builder.phi(self._sums) for _ in vectors] for _ in range(ROWS)]
        place = builder.mul(step, _INDEX(self.items))
        items = [
            builder.bitcast(self._load(words, builder.add(place, _INDEX(number))), self._bytes) for number in vectors
        ]
        x = builder.gep(x, [builder.mul(step, _INDEX(ROWS))])
        for row, of_row in enumerate(totals):
            spread = self._spread(builder.load(builder.gep(x, [_INDEX(row)])))
            for number, total in enumerate(of_row):
                total.add_incoming(begun[number], before)
                total.add_incoming(self._add_product(total, spread, items[number]), loop)
        following = builder.add(step, _INDEX(1))
        step.add_incoming(_INDEX(0), before)
        step.add_incoming(following, loop)
        builder.cbranch(builder.icmp_unsigned("<", following, steps), loop, after)
        builder.position_at_end(after)
        reached = _INDEX(0)
        for row, of_row in enumerate(totals):
            limit = self._broadcast(builder.load(builder.gep(least, [_INDEX(row)])), self._sums)
            some = ir.Constant(ir.VectorType(ir.IntType(1), _LANES), None)
            for number, total in zip(vectors, of_row, strict=True):
                sum_ = total.incomings[1][0]
                self._store(sum_, sums, _INDEX(row * ITEMS + first + number))
                some = builder.or_(some, builder.icmp_signed(">=", sum_, limit))
            lanes = builder.bitcast(some, ir.IntType(_LANES))
            bit = builder.zext(builder.icmp_unsigned("!=", lanes, lanes.type(0)), _INDEX)
            reached = builder.or_(reached, builder.shl(bit, _INDEX(row)))
        return reached

    def _add_product(self, total: Any, x: Any, items: Any) -> Any:
        if self._adds:
            return self._builder.call(self._instruction, [total, x, items])
        return self._builder.add(total, self._builder.call(self._instruction, [x, items]))

    def _spread(self, word: Any) -> Any:
        return self._builder.bitcast(
            self._broadcast(word, ir.VectorType(_FOUR_BYTES, self._bytes.count // 4)), self._bytes
        )

    def _broadcast(self, one: Any, kind: Any) -> Any:
        undefined = ir.Constant(kind, ir.Undefined)
        first = self._builder.insert_element(undefined, one, _FOUR_BYTES(0))
        return self._builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_FOUR_BYTES, kind.count), None))

    def _load(self, base: Any, place: Any) -> Any:
        loaded = self._builder.load(self._pointer(base, place))
        loaded.align = self._align
        return loaded

    def _store(self, vector: Any, base: Any, place: Any) -> None:
        self._builder.store(vector, self._pointer(base, place)).align = self._align

    def _pointer(self, base: Any, place: Any) -> Any:
        return self._builder.bitcast(self._builder.gep(base, [place]), self._sums.as_pointer())
