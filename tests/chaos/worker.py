"""`stream-app worker` that kills itself at a named point, or is wrong on purpose: what the harness starts."""

from __future__ import annotations

import os

from stream_app.cli import main
from tests.chaos.mutations import MUTATIONS
from tests.chaos.points import kill_at

if __name__ == "__main__":
    if mutation := os.environ.get("CHAOS_MUTATION"):
        MUTATIONS[mutation]()
    if point := os.environ.get("CHAOS_POINT"):
        kill_at(point, int(os.environ["CHAOS_COUNT"]))
    main(["worker"])
