"""The linear recurrence and its gradient, one token after the other, compiled: the fastest form on a CPU.

A token costs one complex multiplication and addition a channel, whatever its place in its sequence; the doubling form
of a GPU (`recurrence`) costs ⌈log2(longest sequence)⌉ of them and as many passes over memory.

Complex numbers are planes, the real parts and then the imaginary parts: n tokens, 2, h channels. Tokens may be bfloat16
(their bits as int16), which halves the memory to go through; a state is carried on in the type of the eigenvalues.

Every loop over channels computes one thing: LLVM vectorises none that touches many arrays, as it would have to prove
for each pair that they don't overlap. So they take a quarter of the time of one loop.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lrurec.bfloat16 import narrowed, widened
from lrurec.compiled import compiled

_CACHE_LINE = 64

_TOKENS_AHEAD = 8


@intrinsic
def _prefetch(typing_context: Any, values: Any, offset: Any) -> Any:
    """Ask for the cache line at an offset in bytes from the start of an array."""
    integer, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    for_reading, keep_near, data = (ir.Constant(integer, value) for value in (0, 3, 1))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.gep(builder.bitcast(array.data, pointer), [arguments[1]])
        kind = ir.FunctionType(ir.VoidType(), [pointer, integer, integer, integer])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        builder.call(function, [address, for_reading, keep_near, data])
        return context.get_dummy_value()

    return types.void(values, types.intp), generate


@compiled(nogil=True, fastmath={"contract"})
def scan(driven, eigenvalues, position, h):
    """h_t = λ h_{t-1} + u_t, and h_t = u_t where the position is 0.

    Args:
        driven: (n, 2, h) u.
        eigenvalues: (2, h) λ.
        position: (n,) int64, 0 where a sequence starts; the first one does.
        h: (n, 2, h), out; rounded as it is stored, not as it is carried on.

    """
    state, before = np.zeros_like(eigenvalues), np.zeros_like(eigenvalues)
    for t in range(driven.shape[0]):
        if position[t] == 0:
            before[:] = 0
        _advance(eigenvalues, before, driven[t], state)
        _store(state, h[t])
        state, before = before, state


@compiled(nogil=True, fastmath={"contract"})
def scan_gradient(grad, h, eigenvalues, position, grad_driven, grad_eigenvalues):
    """g_t = ∂L/∂h_t + conj(λ) g_{t+1} within each sequence, from its end, and ∂L/∂λ = Σ_t g_t conj(h_{t-1}).

    Args:
        grad: (n, 2, h) ∂L/∂h.
        h: (n, 2, h) what `scan` gave.
        eigenvalues: (2, h) λ.
        position: (n,) int64, as of `scan`: the first is 0.
        grad_driven: (n, 2, h), out: g, which is ∂L/∂u.
        grad_eigenvalues: (2, h) float64, out: sums of sequences in double precision, as there may be many.

    """
    # Two passes: LLVM gives up on one with all of these loops in it, and on a copy of them in here.
    conjugates = eigenvalues.copy()
    conjugates[1] *= -1
    g, after = np.zeros_like(eigenvalues), np.zeros_like(eigenvalues)
    size = grad.shape[1] * grad.shape[2] * grad.itemsize
    for s in range(grad.shape[0]):  # counts up: a loop that counts down has an index that might be negative
        t = grad.shape[0] - 1 - s
        # A processor fetches ahead what is read forwards: backwards, all would wait for memory.
        if t >= _TOKENS_AHEAD:
            for offset in range((t - _TOKENS_AHEAD) * size, (t - _TOKENS_AHEAD + 1) * size, _CACHE_LINE):
                _prefetch(grad, offset)
                _prefetch(grad_driven, offset)
        _advance(conjugates, after, grad[t], g)
        _store(g, grad_driven[t])
        if position[t] == 0:
            g[:] = 0
        g, after = after, g
    of_sequence = np.zeros_like(eigenvalues)
    grad_eigenvalues[:] = 0.0
    for t in range(grad.shape[0]):
        if position[t] == 0:
            grad_eigenvalues += of_sequence
            of_sequence[:] = 0
        else:
            _add_product(grad_driven[t], h[t - 1], of_sequence)
    grad_eigenvalues += of_sequence


@compiled(nogil=True, fastmath={"contract"})
def _advance(factor, state, added, out):
    """Out ← factor ∘ state + added."""
    a, b = factor[0], factor[1]
    re, im = state[0], state[1]
    added_re, added_im, out_re, out_im = added[0], added[1], out[0], out[1]
    for c in range(a.shape[0]):
        out_re[c] = a[c] * re[c] - b[c] * im[c] + widened(added_re[c])
    for c in range(a.shape[0]):
        out_im[c] = a[c] * im[c] + b[c] * re[c] + widened(added_im[c])


@compiled(nogil=True, fastmath={"contract"})
def _store(state, out):
    re, im, out_re, out_im = state[0], state[1], out[0], out[1]
    for c in range(re.shape[0]):
        out_re[c] = narrowed(re[c], out_re)
    for c in range(re.shape[0]):
        out_im[c] = narrowed(im[c], out_im)


@compiled(nogil=True, fastmath={"contract"})
def _add_product(g, h, total):
    """Total ← total + g ∘ conj(h)."""
    re, im = g[0], g[1]
    h_re, h_im, total_re, total_im = h[0], h[1], total[0], total[1]
    for c in range(re.shape[0]):
        total_re[c] += widened(re[c]) * widened(h_re[c]) + widened(im[c]) * widened(h_im[c])
    for c in range(re.shape[0]):
        total_im[c] += widened(im[c]) * widened(h_re[c]) - widened(re[c]) * widened(h_im[c])
