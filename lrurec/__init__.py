"""LRURec: sequential recommendation with linear recurrent units (arXiv 2310.02367)."""

import os

# Torch's threads would spin for milliseconds after each of its operators, on the cores that the compiled loops want. It
# is read when torch is loaded: a program that loads it before this package keeps what it has.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
