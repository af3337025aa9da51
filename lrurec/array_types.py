"""One legend for the axes of every array in lrurec, and names for the arrays that cross module borders.

| letter | axis |
|---|---|
| `b` | batch: users, or sequences |
| `t` | tokens of a sequence, oldest first |
| `n` | tokens of several sequences laid end to end (packed), no padding between them |
| `s` | sequences of a packed array |
| `d` | width of an encoding, `LRURecConfig.hidden_units` |
| `h` | complex channels of one block's recurrent state, 2d |
| `l` | blocks (layers), `LRURecConfig.num_blocks` |
| `v` | rows of the item table, N + 1: row 0 is the padding item, rows 1..N are the catalogue |
| `k` | length of a list of recommendations |

Numbers are float32 and complex64: a recurrent state that is carried on with fewer digits drifts. Training may round
what is computed from one to bfloat16 (`training.presets.Precision`).
Shapes are checked at run time under pytest only.
"""

from typing import TypeAlias

from jaxtyping import Bool, Complex64, Float32, Int64
from torch import Tensor

Items: TypeAlias = Int64[Tensor, " b"]
"""One item row per user."""

ItemSequences: TypeAlias = Int64[Tensor, "b t"]
"""Item rows, oldest first; what lies beyond a sequence's length is ignored."""

PackedItems: TypeAlias = Int64[Tensor, " n"]
"""Item rows of several sequences laid end to end."""

Positions: TypeAlias = Int64[Tensor, " n"]
"""Place of every packed token within its own sequence: 0 starts a new sequence, with an empty state."""

Lengths: TypeAlias = Int64[Tensor, " b"]

Encodings: TypeAlias = Float32[Tensor, "b d"]
EncodingSequences: TypeAlias = Float32[Tensor, "b t d"]
PackedEncodings: TypeAlias = Float32[Tensor, "n d"]

UserStates: TypeAlias = Complex64[Tensor, "b l h"]
"""The recurrent state of every user: all that the model remembers."""

ItemScores: TypeAlias = Float32[Tensor, "b v"]
"""A score per row of the item table; column 0 belongs to the padding item and is never recommended."""

Mask: TypeAlias = Bool[Tensor, " n"]
