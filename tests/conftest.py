"""Shapes and types of array code are checked at run time, in tests alone: at no cost to users."""

from jaxtyping import install_import_hook

#: Everything in lrurec but the compiled loops, whose types numba infers.
_CHECKED = ["array_types", "bundle", "catalogue", "config", "convert", "evaluation", "interactions", "model", "recurrence", "serving", "training", "user_state"]  # fmt: skip

install_import_hook([f"lrurec.{module}" for module in _CHECKED], "beartype.beartype")
