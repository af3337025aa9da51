"""Measurements: each module is one question, a command, and ratios against a named alternative in the same run."""

import lrurec  # noqa: F401  (before torch: it settles how torch's threads wait, as in `lrurec train`)
