"""What ends a run before its proof."""

from __future__ import annotations


class ChaosError(Exception):
    """Something happened that may not: a worker that doesn't come up, doesn't end, or ends without a reason."""
