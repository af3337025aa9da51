"""The fence that makes a replay harmless: which clicks are not in their users' states yet."""

import numpy as np

from lrurec.compiled import compiled


@compiled(nogil=True)
def not_applied_yet(user, offset, applied):
    """Indices of the clicks beyond their user's last applied offset, ascending.

    Offsets may also repeat within a micro-batch, where records were delivered again: each has to exceed all before it.

    Args:
        user: (n,) int32, of each click.
        offset: (n,) int64, of each click.
        applied: (u,) int64, last applied offset of each user; overwritten.

    """
    fresh = np.empty(len(user), np.int64)
    count = 0
    for click in range(len(user)):
        if offset[click] > applied[user[click]]:
            applied[user[click]] = offset[click]
            fresh[count] = click
            count += 1
    return fresh[:count]
