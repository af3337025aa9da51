"""What one click costs, against re-encoding the user's latest clicks, and whatever the length of the history.

    python -m benchmarks.step                  windows of 50 and 200, one user and 1,024 at once, five rounds
    python -m benchmarks.step --rounds 20

One core, and the CPU time of its one thread: what else runs on the machine doesn't show. Sides take turns, and a ratio
is of one round. Four comparisons, none of which ranks but the last:

    torch      LRURec.step              against LRURec.encode of the window: the same modules
    engine     the worker's CPU engine  against LRURec.encode of the window: what is served against what it replaces
    itself     the worker's CPU engine  against itself on the window, from an empty state: the fastest re-encoding here
    ten best   the engine with its list against LRURec.encode, the scores of the last click and torch's top-10
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch

from benchmarks.machine import processor
from lrurec.bundle import Bundle, make_bundle
from lrurec.catalogue import Catalogue
from lrurec.config import LRURecConfig
from lrurec.engine import Clicks, Engine
from lrurec.model import LRURec
from lrurec.serving import build_engine, state_layout
from lrurec.threads import limited_threads
from lrurec.user_state import UserStates

ITEMS = 3_416
WINDOWS = (50, 200)
USERS = (1, 1024)
HISTORIES = (10, 1_000, 100_000)

#: (side of one click, side of a window) of each comparison.
PAIRS = {
    "torch": ("step", "encode"),
    "engine": ("engine", "encode"),
    "itself": ("engine", "engine anew"),
    "ten best": ("engine, ranked", "encode, ranked"),
}

Sides = dict[str, Callable[[], object]]


def main() -> None:
    """Print both tables, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{processor()}, 1 thread, Python {platform.python_version()}, torch {version('torch')}, ", end="")
    print(f"numba {version('numba')}; {ITEMS:,} items, d = 64, 2 blocks, float16 states")
    bundle = paper_sized()
    with limited_threads(1), torch.inference_mode():
        against_windows = {users: compare(bundle, users, rounds) for users in USERS}
        by_history = compare_histories(bundle, rounds)
    print(json.dumps({"benchmark": "step", "windows": against_windows, "histories": by_history}))


def paper_sized() -> Bundle:
    """Random weights; speed does not depend on their values."""
    torch.manual_seed(0)
    config = LRURecConfig(num_items=ITEMS)
    return make_bundle(config, LRURec(config).state_dict(), Catalogue(str(row) for row in range(ITEMS)))


# -- against a window


def compare(bundle: Bundle, users: int, rounds: int) -> dict[str, dict[int, float]]:
    """The median ratio of every comparison by window, of so many users at once."""
    sides = sides_of(bundle, users)
    microseconds = take_turns(sides, rounds, calls=50 if users == 1 else 1)
    print(f"\n{users:,} {'user' if users == 1 else 'users'} at once, CPU microseconds a user's click")
    for name, each in microseconds.items():
        print(f"{name:>20}: {spread([one / users for one in each])}")
    ratios: dict[str, dict[int, float]] = {}
    for name, (click, window) in PAIRS.items():
        for length in WINDOWS:
            each = [old / new for old, new in zip(microseconds[f"{window} {length}"], microseconds[click], strict=True)]
            ratios.setdefault(name, {})[length] = statistics.median(each)
            print(f"{name:>9}, window {length:>3}: {spread(each)} times")
    return ratios


def sides_of(bundle: Bundle, users: int) -> Sides:
    """Every side's one call: one click of each user, or each user's window."""
    model, engine = bundle.model, build_engine(bundle, state_layout(bundle), device="cpu")
    rng = np.random.default_rng(0)
    items = torch.from_numpy(rng.integers(1, ITEMS + 1, users))
    state, states = model.initial_state(users), engine.layout.unpack([None] * users)
    click, nothing, everyone = columns(rng, users, 1), np.arange(0), np.arange(users)
    sides: Sides = {
        "step": lambda: model.step(items, state),
        "engine": lambda: engine.advance(states, click, nothing),
        "engine, ranked": lambda: engine.advance(states, click, everyone),
    }
    for length in WINDOWS:
        sides |= window_sides(model, engine, states, rng, length)
    return sides


def window_sides(model: LRURec, engine: Engine, states: UserStates, rng: np.random.Generator, length: int) -> Sides:
    """The sides that begin anew at every click."""
    users = len(states)
    items = torch.from_numpy(rng.integers(1, ITEMS + 1, (users, length)))
    lengths, window = torch.full((users,), length), columns(rng, users, length)
    return {
        f"encode {length}": lambda: model.encode(items, lengths),
        f"encode, ranked {length}": lambda: model.scores(model.encode(items, lengths)[:, -1]).topk(10),
        f"engine anew {length}": lambda: engine.advance(states, window, np.arange(0)),
    }


def columns(rng: np.random.Generator, users: int, length: int) -> Clicks:
    """`length` clicks of each user, users taking turns."""
    place = np.arange(users * length)
    items = rng.integers(1, ITEMS + 1, users * length)
    return Clicks((place % users).astype(np.int32), items.astype(np.int32), place, place)


# -- by the length of the history


def compare_histories(bundle: Bundle, rounds: int) -> dict[int, dict[str, float]]:
    """Time and memory of the next click after histories of each length."""
    engine = build_engine(bundle, state_layout(bundle), device="cpu")
    lived = {length: live(engine, length) for length in HISTORIES}
    click, ranked = columns(np.random.default_rng(1), 1, 1), np.arange(1)
    microseconds = take_turns(
        {str(length): lambda states=states: engine.advance(states, click, ranked) for length, states in lived.items()},
        rounds,
        calls=300,
    )
    print("\nthe next click of one user, with its ten best, after a history of")
    figures: dict[int, dict[str, float]] = {}
    for length, states in lived.items():
        peak = peak_bytes(lambda states=states: engine.advance(states, click, ranked))
        ratios = [own / ten for own, ten in zip(microseconds[str(length)], microseconds["10"], strict=True)]
        figures[length] = {"ratio": statistics.median(ratios), "state_bytes": states.nbytes, "peak_bytes": peak}
        print(
            f"{length:>9,} clicks: {spread(microseconds[str(length)])} µs, ratio {spread(ratios, 2)}; "
            f"state {states.nbytes:,} bytes, {peak:,} more while it is advanced"
        )
    return figures


def live(engine: Engine, clicks: int) -> UserStates:
    """The state of one user after so many clicks."""
    states, _ = engine.advance(engine.layout.unpack([None]), columns(np.random.default_rng(0), 1, clicks), np.arange(0))
    return states


def peak_bytes(call: Callable[[], object]) -> int:
    """Memory that a call allocates at most, of what Python and numpy allocate."""
    tracemalloc.start()
    call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


# -- timing


def take_turns(sides: Sides, rounds: int, calls: int) -> dict[str, list[float]]:
    """CPU microseconds of each side's call, one median of `calls` a round."""
    for call in sides.values():
        call()  # what is compiled or allocated once
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            found[name].append(statistics.median(cpu_microseconds(call) for _ in range(calls)))
    return found


def cpu_microseconds(call: Callable[[], object]) -> float:
    began = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - began) / 1000


def spread(figures: list[float], decimals: int = 1) -> str:
    """Median, least and most."""
    median, least, most = (
        f"{figure:,.{decimals}f}" for figure in (statistics.median(figures), min(figures), max(figures))
    )
    return f"{median:>9} ({least} to {most})"


if __name__ == "__main__":
    main()
