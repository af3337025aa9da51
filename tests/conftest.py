"""Shapes and types of array code are checked at run time, in tests alone: at no cost to users."""

from jaxtyping import install_import_hook

#: The modules whose functions take arrays; the compiled loops in kernels.py have types of their own.
_CHECKED = ["evaluation", "model", "recurrence", "serving", "training"]

install_import_hook([f"lrurec.{module}" for module in _CHECKED], "beartype.beartype")
