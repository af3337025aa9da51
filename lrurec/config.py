"""The architecture of a model, as one frozen, validated object."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lrurec.errors import ConfigError

_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LRURecConfig:
    """Everything that fixes the shapes and the arithmetic of an `LRURec`.

    Raises `ConfigError` for a value out of its range.
    """

    num_items: int
    """N, items of the catalogue. The item table has N + 1 rows; row 0 is the padding item."""

    hidden_units: int = 64
    """d, width of an encoding. Each block's state has 2d complex channels."""

    num_blocks: int = 2

    max_len: int = 50
    """Longest sequence seen in training. A state goes on for ever: nothing at inference depends on this."""

    dropout: float = 0.2
    """Probability in [0, 1) of dropping a unit; in training only."""

    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("num_items", "hidden_units", "num_blocks", "max_len"):
            require_count(name, getattr(self, name))
        require_number("dropout", self.dropout, below=1.0, zero_allowed=True)
        require_number("layer_norm_eps", self.layer_norm_eps, below=1.0, zero_allowed=False)

    @property
    def state_channels(self) -> int:
        """2d, complex channels of one block's state."""
        return 2 * self.hidden_units

    def to_json(self) -> dict[str, int | float]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "LRURecConfig":
        """The config whose `to_json` this is. Unknown and missing names are refused."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(value) - names):
            raise ConfigError(f"architecture has unknown entries {unknown}; allowed are {sorted(names)}")
        if missing := sorted(names - set(value)):
            raise ConfigError(f"architecture lacks {missing}; all of {sorted(names)} are needed")
        return cls(**value)


def require_count(name: str, value: object, least: int = 1) -> None:
    """Raise `ConfigError` unless this is a whole number from `least` to 2³¹ - 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least} and at most {_MOST:,}")


def require_number(name: str, value: object, *, below: float, zero_allowed: bool) -> None:
    """Raise `ConfigError` unless this is a number above 0, or 0 where that is allowed, and below a limit."""
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    # NaN is neither above nor below anything.
    if not (0 < number < below or (number == 0 and zero_allowed)):
        allowed = f"{'0 or more' if zero_allowed else 'above 0'} and below {below:g}"
        raise ConfigError(f"{name} is {value!r}; it must be a number {allowed}")
