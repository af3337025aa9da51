"""How to train: the paper's recipe, and what is known to work better on each of its data sets."""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from lrurec.config import LRURecConfig, require_count, require_number
from lrurec.errors import ConfigError, TrainingError

Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]
"""Of the factors of a training step's products on a CPU: those of the blocks, the scores, and their gradients.

bfloat16 rounds factors and products to 8 significant bits and sums in float32: two to three times as fast on a CPU that
multiplies bfloat16. States are carried on in float32 and kept in bfloat16; weights, sums, the softmax and the optimizer
stay float32. `auto` is bfloat16 on such a
CPU, float32 elsewhere.
"""

Schedule: TypeAlias = Literal["constant", "linear"]

PresetName: TypeAlias = Literal["default", "published", "ml-1m", "beauty", "video", "eshop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """Everything that decides the trained weights, besides the data.

    The defaults are the published code's: AdamW at a constant rate, full softmax cross entropy over all N + 1 rows,
    early stopping on validation Recall@10. Raises `TrainingError` for values that cannot be.
    """

    hidden_units: int = 64
    num_blocks: int = 2
    max_len: int = 50
    dropout: float = 0.2

    whole_histories: bool = False
    """Learn also from the clicks at a history's start that fill no window of max_len; the published code doesn't."""

    batch_size: int = 128
    """Windows of a user's history in one step."""

    max_steps: int = 40_000
    epochs: int | None = None
    """Passes over the windows, where `max_steps` doesn't end the training before; None leaves it to early stopping."""

    min_steps: int = 1
    """Steps that `epochs` may not fall below: a small log is passed over more often."""

    learning_rate: float = 1e-3
    schedule: Schedule = "constant"
    """`linear` falls from the learning rate to 0 at the last step: as good in a fraction of the steps."""

    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""

    weight_decay: float = 0.01
    """On all but biases and LayerNorm."""

    clip_norm: float = 5.0
    label_smoothing: float = 0.0
    precision: Precision = "auto"
    bias_from_frequency: bool = False
    """Start the item biases at log frequency instead of near 0: the model need not learn what is popular."""

    embeddings_from_cooccurrence: bool = False
    """Start the item embeddings at what is clicked near each other (`cooccurrence`) instead of at noise."""

    average_decay: float = 0.0
    """Of the running average of the weights that is validated and shipped; 0 ships the last weights."""

    validate_every: int = 500
    """Steps between two validations."""

    patience: int = 10
    """Validations without a better Recall@10 before training ends."""

    seed: int = 42
    """0 or more, below 2³¹. With the step, or the epoch, it decides all that is drawn there."""

    threads: int | None = None
    """Of torch, on the CPU; None leaves torch's choice. Small models are faster by one than by two that wait."""

    def __post_init__(self) -> None:
        try:
            counts = ["hidden_units", "num_blocks", "max_len", "batch_size", "max_steps", "min_steps", "validate_every"]
            counts += ["patience", *(name for name in ("epochs", "threads") if getattr(self, name) is not None)]
            for name in counts:
                require_count(name, getattr(self, name))
            for name in ("warmup_steps", "seed"):
                require_count(name, getattr(self, name), least=0)
            for name in ("dropout", "label_smoothing", "average_decay"):
                require_number(name, getattr(self, name), below=1, zero_allowed=True)
            for name in ("learning_rate", "clip_norm"):
                require_number(name, getattr(self, name), below=math.inf, zero_allowed=False)
            require_number("weight_decay", self.weight_decay, below=math.inf, zero_allowed=True)
        except ConfigError as error:
            raise TrainingError(str(error)) from None
        for name, allowed in (("schedule", Schedule), ("precision", Precision)):
            if getattr(self, name) not in get_args(allowed):
                raise TrainingError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(get_args(allowed))}")
        for name in ("whole_histories", "bias_from_frequency", "embeddings_from_cooccurrence"):
            if not isinstance(getattr(self, name), bool):
                raise TrainingError(f"{name} is {getattr(self, name)!r}; it must be true or false")

    def architecture(self, num_items: int) -> LRURecConfig:
        return LRURecConfig(
            num_items=num_items,
            hidden_units=self.hidden_units,
            num_blocks=self.num_blocks,
            max_len=self.max_len,
            dropout=self.dropout,
        )

    def steps_over(self, num_windows: int) -> int:
        """Steps of a whole training, early stopping aside."""
        batches = -(-num_windows // self.batch_size)
        return (
            self.max_steps if self.epochs is None else min(self.max_steps, max(self.min_steps, self.epochs * batches))
        )

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0, of `steps` in all."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        left = 1 - step / steps if self.schedule == "linear" else 1.0
        return self.learning_rate * warm * left

    def to_json(self) -> dict[str, int | float | str | bool | None]:
        return dataclasses.asdict(self)


RECIPE = TrainingSettings(
    learning_rate=2e-3,
    schedule="linear",
    warmup_steps=100,
    epochs=15,
    min_steps=2_000,
    label_smoothing=0.1,
    bias_from_frequency=True,
    embeddings_from_cooccurrence=True,
    average_decay=0.998,
    dropout=0.4,
)
"""A short training with a planned end; docs/quality.md has its figures beside the paper's."""

PRESETS: dict[PresetName, TrainingSettings] = {
    "default": RECIPE,
    "published": TrainingSettings(precision="float32"),
    # Long histories of few items: nothing is rare enough to be smoothed, and little is learnt by heart.
    # Where histories are longer than windows, all of them is more to learn from.
    "ml-1m": dataclasses.replace(
        RECIPE, max_len=200, whole_histories=True, dropout=0.2, learning_rate=3e-3, label_smoothing=0.0, epochs=47
    ),
    # 57,000 items don't fit 64 dimensions.
    "beauty": dataclasses.replace(RECIPE, hidden_units=128, dropout=0.6, learning_rate=3e-3, epochs=8),
    "video": dataclasses.replace(RECIPE, epochs=8),
    # 217 items and sessions of 7 clicks: a small model, a high rate that falls to 0, and the whole is done in seconds.
    "eshop": TrainingSettings(
        hidden_units=32,
        dropout=0.1,
        batch_size=256,
        max_steps=900,
        learning_rate=1e-2,
        schedule="linear",
        warmup_steps=50,
        bias_from_frequency=True,
        validate_every=225,
        threads=1,
    ),
}


def changed(settings: TrainingSettings, changes: Iterable[str]) -> TrainingSettings:
    """The settings with changes written as `NAME=VALUE`; a value is JSON, or plain text.

    Raises `TrainingError` for a name or a value that is not allowed.
    """
    found: dict[str, Any] = {}
    for change in changes:
        name, given, value = change.partition("=")
        if not given or name not in TrainingSettings.__dataclass_fields__:
            allowed = ", ".join(TrainingSettings.__dataclass_fields__)
            raise TrainingError(f"{change!r} is no change of a setting; allowed is NAME=VALUE, where NAME is {allowed}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return dataclasses.replace(settings, **found)


def preset(name: str) -> TrainingSettings:
    """The settings of a name. Raises `TrainingError` for one that is none of `PRESETS`."""
    for known in get_args(PresetName):
        if name == known:
            return PRESETS[known]
    raise TrainingError(f"preset is {name!r}; allowed are {', '.join(PRESETS)}")
