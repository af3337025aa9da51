"""`stream-app worker` that kills or freezes itself at a named point, or is wrong on purpose: the harness starts it."""

from __future__ import annotations

import os

from stream_app.cli import main
from tests.chaos.mutations import MUTATIONS
from tests.chaos.points import signal_at

if __name__ == "__main__":
    if mutation := os.environ.get("CHAOS_MUTATION"):
        MUTATIONS[mutation]()
    if point := os.environ.get("CHAOS_POINT"):
        exactly_once = os.environ.get("STREAM_APP_GUARANTEE") == "exactly_once"
        signal_at(point, int(os.environ["CHAOS_COUNT"]), int(os.environ["CHAOS_SIGNAL"]), exactly_once=exactly_once)
    main(["worker"])
