"""Measurements: each module is one question, a command, and ratios against a named alternative in the same run."""
