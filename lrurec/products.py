"""Products of matrices by the CPU's own instructions, as LLVM's intermediate code: numba has no name for them.

Rows by columns, each sum over the width in one order, whatever stands beside it: what comes of a row has the same bits
in any company. BLAS promises no such thing; OpenBLAS's kernels for AVX2 sum a row's products otherwise in other places.

Axes: d width, q words of a float32, of four bytes (VNNI) or of two (AVX2), n columns in g groups of `COLUMNS`, each
computed in passes.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Shaped
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

#: Rows and columns of one product.
ROWS, COLUMNS = 6, 64

#: Columns in a register, or in two half as wide.
_LANES = 16

_INDEX, _FOUR_BYTES = ir.IntType(64), ir.IntType(32)


@cache
def cpu_features() -> frozenset[str]:
    """What numba compiles for: of this CPU, unless its settings (NUMBA_CPU_NAME and others) say otherwise.

    By the text that its cache on disk goes by too: `pack` never fits other columns than the code that was kept.
    """
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(each[1:] for each in features.split(",") if each.startswith("+"))


def _columns_of_a_pass(word: np.dtype[Any]) -> int:
    """Columns whose sums with `ROWS` rows stay in registers: 24 of 32 with AVX-512, 12 of 16 with AVX2."""
    if word == np.int16:
        return 2 * _LANES
    return 4 * _LANES if word == np.int32 or "avx512f" in cpu_features() else _LANES


def pack(columns: Shaped[np.ndarray, "n d"], word: np.dtype[Any]) -> Shaped[np.ndarray, "g passes q at_once"]:
    """Columns as `multiply` takes them, the words of all columns of a pass side by side; zeros where there are none.

    Args:
        columns: float32, or int8 for words of whole numbers.
        word: float32, int32 (four bytes) or int16 (two).

    """
    number, width = columns.shape
    in_word, at_once = word.itemsize // columns.itemsize, _columns_of_a_pass(word)
    groups, words = -(-number // COLUMNS), -(-width // in_word)
    padded = np.zeros((groups * COLUMNS, words * in_word), columns.dtype)
    padded[:number, :width] = columns
    lanes = np.ascontiguousarray(padded.reshape(groups, -1, at_once, words, in_word).transpose(0, 1, 3, 2, 4))
    return lanes.view(word).reshape(groups, -1, words, at_once)


@intrinsic
def multiply(typing_context: Any, x: Any, words: Any, start: Any, least: Any, sums: Any) -> Any:
    """Start + Σ x w of `ROWS` rows and a group of columns.

    x (ROWS, q), its rows anywhere; words (passes, q, at_once); start (COLUMNS,); least (ROWS,); sums (ROWS, COLUMNS)
    out, its rows anywhere. Returns a bit for each row, set where some sum is `least` or more.

    Words of float32: one fused product and sum after the other (without FMA, two operations), x float32. Words of four
    bytes: VPDPBUSD; x int32, of unsigned bytes. Words of two: VPMADDUBSW and a sum modulo 2¹⁶; x int32, both bytes
    twice. Start, least and sums are of the words' type.
    """
    signature = types.int64(x, words, start, least, sums)

    def generate(context: Any, builder: Any, called: Any, arguments: Any) -> Any:
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(called.args, arguments, strict=True)
        ]
        product = _Product(builder, words.dtype, arrays[0], arrays[4])
        reached = _INDEX(0)
        for first in range(0, COLUMNS, product.at_once):
            reached = builder.or_(reached, product.of_a_pass(first, *(each.data for each in arrays[1:4])))
        return reached

    return signature, generate


class _Product:
    """Writes the code of one product."""

    def __init__(self, builder: Any, word: Any, x: Any, sums: Any) -> None:
        self._builder = builder
        self._is_float = word == types.float32
        self._word = ir.FloatType() if self._is_float else ir.IntType(word.bitwidth)
        self._align = word.bitwidth // 8
        self.at_once = _columns_of_a_pass(np.dtype(str(word)))
        self._sums = ir.VectorType(self._word, _LANES)
        self._bytes = ir.VectorType(ir.IntType(8), _LANES * self._align)
        self._words = builder.extract_value(x.shape, 1)
        self._x_rows = self._rows_of(x, 4)
        self._sum_rows = self._rows_of(sums, self._align)

    def _rows_of(self, array: Any, size: int) -> list[Any]:
        stride = self._builder.sdiv(self._builder.extract_value(array.strides, 0), _INDEX(size))
        return [self._builder.gep(array.data, [self._builder.mul(stride, _INDEX(row))]) for row in range(ROWS)]

    def of_a_pass(self, first: int, words: Any, start: Any, least: Any) -> Any:
        """A loop over the words of the columns from the `first` on, then their sums to memory, and the rows' bits."""
        builder, vectors = self._builder, range(0, self.at_once, _LANES)
        begun = [self._load(start, _INDEX(first + number)) for number in vectors]
        words = builder.gep(words, [builder.mul(self._words, _INDEX(first))])
        before, loop, after = builder.block, *(builder.append_basic_block(name) for name in ("multiply", "store"))
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_INDEX)
        totals = [[builder.phi(self._sums) for _ in vectors] for _ in range(ROWS)]
        place = builder.mul(step, _INDEX(self.at_once))
        columns = [self._load(words, builder.add(place, _INDEX(number))) for number in vectors]
        for x, of_row in zip(self._x_rows, totals, strict=True):
            one = builder.load(builder.gep(x, [step]))
            for total, initial, column in zip(of_row, begun, columns, strict=True):
                total.add_incoming(initial, before)
                total.add_incoming(self._add_product(total, one, column), loop)
        following = builder.add(step, _INDEX(1))
        step.add_incoming(_INDEX(0), before)
        step.add_incoming(following, loop)
        builder.cbranch(builder.icmp_unsigned("<", following, self._words), loop, after)
        builder.position_at_end(after)
        reached = _INDEX(0)
        for row, of_row in enumerate(totals):
            limit = self._broadcast(builder.load(builder.gep(least, [_INDEX(row)])), self._sums)
            some = ir.Constant(ir.VectorType(ir.IntType(1), _LANES), None)
            for number, total in zip(vectors, of_row, strict=True):
                sum_ = total.incomings[1][0]
                self._store(sum_, self._sum_rows[row], _INDEX(first + number))
                some = builder.or_(some, self._reaches(sum_, limit))
            lanes = builder.bitcast(some, ir.IntType(_LANES))
            bit = builder.zext(builder.icmp_unsigned("!=", lanes, lanes.type(0)), _INDEX)
            reached = builder.or_(reached, builder.shl(bit, _INDEX(row)))
        return reached

    def _add_product(self, total: Any, one: Any, column: Any) -> Any:
        builder, sums, bytes_ = self._builder, self._sums, self._bytes
        if self._is_float:
            spread = self._broadcast(one, sums)
            if "fma" in cpu_features() or platform.machine() in ("aarch64", "arm64"):
                return self._call("fma.v16f32", [spread, column, total], sums)
            return builder.fadd(total, builder.fmul(spread, column))
        spread = self._broadcast(one, ir.VectorType(_FOUR_BYTES, bytes_.count // 4))
        operands = [builder.bitcast(each, bytes_) for each in (spread, column)]
        if self._word.width == 32:
            return self._call("x86.avx512.vpdpbusd.512", [total, *operands], sums)
        return builder.add(total, self._call("x86.avx2.pmadd.ub.sw", operands, sums))

    def _call(self, name: str, operands: list[Any], result: Any) -> Any:
        kind = ir.FunctionType(result, [each.type for each in operands])
        return self._builder.call(cgutils.get_or_insert_function(self._builder.module, kind, f"llvm.{name}"), operands)  # type: ignore[no-untyped-call]

    def _reaches(self, sums: Any, limit: Any) -> Any:
        compare = self._builder.fcmp_ordered if self._is_float else self._builder.icmp_signed
        return compare(">=", sums, limit)

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
