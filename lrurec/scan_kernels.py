"""The linear recurrence and its gradient, one token after the other, compiled: the fastest form on a CPU.

A token costs one complex multiplication and addition a channel, whatever its place in its sequence; the doubling form
of a GPU (`recurrence`) costs ⌈log2(longest sequence)⌉ of them and as many passes over memory.

Complex numbers are pairs (re, im) on the last axis: n tokens, h channels.
"""

from numba import njit


@njit(nogil=True, cache=True, fastmath={"contract"})
def scan(driven, eigenvalues, position, h):
    """h_t = λ h_{t-1} + u_t, and h_t = u_t where the position is 0.

    Args:
        driven: (n, h, 2) u.
        eigenvalues: (h, 2) λ.
        position: (n,) int64, 0 where a sequence starts.
        h: (n, h, 2), out.

    """
    for t in range(driven.shape[0]):
        if position[t] == 0:
            h[t] = driven[t]
        else:
            for c in range(driven.shape[1]):
                re, im = h[t - 1, c, 0], h[t - 1, c, 1]
                a, b = eigenvalues[c, 0], eigenvalues[c, 1]
                h[t, c, 0] = a * re - b * im + driven[t, c, 0]
                h[t, c, 1] = a * im + b * re + driven[t, c, 1]


@njit(nogil=True, cache=True, fastmath={"contract"})
def scan_gradient(grad, h, eigenvalues, position, grad_driven, grad_eigenvalues):
    """g_t = ∂L/∂h_t + conj(λ) g_{t+1} within each sequence, from its end, and ∂L/∂λ = Σ_t g_t conj(h_{t-1}).

    Args:
        grad: (n, h, 2) ∂L/∂h.
        h: (n, h, 2) what `scan` gave.
        eigenvalues: (h, 2) λ.
        position: (n,) int64.
        grad_driven: (n, h, 2), out: g, which is ∂L/∂u.
        grad_eigenvalues: (h, 2) float64, out: summed in double precision, as there may be many tokens.

    """
    # Two passes, and indices that count up: one loop over both sums is not vectorised, and takes 2.5 times as long.
    tokens, channels = grad.shape[0], grad.shape[1]
    for s in range(tokens):
        t = tokens - 1 - s
        if s == 0 or position[t + 1] == 0:
            grad_driven[t] = grad[t]
        else:
            for c in range(channels):
                re, im = grad_driven[t + 1, c, 0], grad_driven[t + 1, c, 1]
                a, b = eigenvalues[c, 0], eigenvalues[c, 1]
                grad_driven[t, c, 0] = a * re + b * im + grad[t, c, 0]
                grad_driven[t, c, 1] = a * im - b * re + grad[t, c, 1]
    grad_eigenvalues[:] = 0.0
    for t in range(1, tokens):
        if position[t] > 0:
            for c in range(channels):
                re, im = grad_driven[t, c, 0], grad_driven[t, c, 1]
                before_re, before_im = h[t - 1, c, 0], h[t - 1, c, 1]
                grad_eigenvalues[c, 0] += re * before_re + im * before_im
                grad_eigenvalues[c, 1] += im * before_re - re * before_im
