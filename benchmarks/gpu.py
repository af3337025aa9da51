"""The device engine on one GPU: its step and its ranking beside torch's, and beside what memory allows at best.

    python -m benchmarks.gpu                                     an H100's sizes: up to 1,000,000 items, 8,192 clicks
    python -m benchmarks.gpu --items 3416 --clicks 1024 --rounds 20
    python -m benchmarks.gpu --device cpu                        tiny sizes, to see that the code runs

Of each number of items and clicks, with d = 64, two blocks, float16 states and 100 seen items a click:

    step   encodings and states after one click of each user, on the device: beside `LRURec.step`, torch's modules
    rank   the exact ten best, seen items left out: beside addmm over all items and topk, which leaves out nothing
    whole  `Engine.advance`, from numpy to numpy: both, and the copies

The floor is the time in which the device copies as many bytes as must be read or written even if all else stayed in
registers: states, encodings, weights, the item table once, lists. How fast it copies is measured first. Sides take
turns; a ratio is of one round; before, lists are held against torch's.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch

from benchmarks.machine import processor
from lrurec.bundle import Bundle, make_bundle
from lrurec.catalogue import Catalogue
from lrurec.config import LRURecConfig
from lrurec.device.engine import Bucket, TorchEngine, float32_products, weights_on
from lrurec.device.operators import Operators, operators_on
from lrurec.device.staging import waves_of
from lrurec.engine import Clicks
from lrurec.model import LRURec
from lrurec.serving import state_layout
from lrurec.weights import fold

TOP_K, SEEN = 10, 100

ITEMS, CLICKS = [3_416, 100_000, 1_000_000], [256, 512, 1_024, 2_048, 4_096, 8_192]
TINY_ITEMS, TINY_CLICKS = [300, 2_000], [16, 64]

#: Scores of one product of torch's, about: 2 GB.
_SCORES = 1 << 29

Ways = dict[str, Callable[[], object]]


def main() -> None:
    """Print a line for each size and part, then one JSON line for history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--items", type=int, nargs="+")
    parser.add_argument("--clicks", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.exit(1, "torch finds no CUDA device here; --device cpu runs tiny sizes, to see that the code runs\n")
    name = torch.cuda.get_device_name() if on_gpu else processor()
    versions = {"torch": version("torch"), "cuda": torch.version.cuda, "triton": version("triton") if on_gpu else None}
    print(f"{name}, Python {platform.python_version()}, {versions}")
    with torch.inference_mode(), float32_products():
        speed = bytes_per_second(device, options.rounds)
        print(f"copies {speed / 1e9:,.0f} GB/s, read and written")
        figures = [
            measure(device, items, clicks, options.rounds, speed)
            for items in options.items or (ITEMS if on_gpu else TINY_ITEMS)
            for clicks in options.clicks or (CLICKS if on_gpu else TINY_CLICKS)
        ]
    print(json.dumps({"benchmark": "gpu", "device": name, **versions, "bytes_per_second": speed, "sizes": figures}))


def bytes_per_second(device: torch.device, rounds: int) -> float:
    """Of one large copy within the device's memory, both directions counted."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    [each] = take_turns({"copy": lambda: target.copy_(source)}, device, rounds).values()
    return 2 * size / statistics.median(each)


def measure(device: torch.device, items: int, clicks: int, rounds: int, speed: float) -> dict[str, object]:
    """Equality, then every part of one size."""
    bundle = bundle_of(items)
    operators = operators_on(device)
    stepping, step_bytes = step_ways(bundle, clicks, device, operators)
    ranking, rank_bytes = rank_ways(bundle, clicks, device, operators)
    parts = {"step": (stepping, step_bytes), "rank": (ranking, rank_bytes), "whole": (whole(bundle, clicks, device), 0)}
    figures: dict[str, object] = {"items": items, "clicks": clicks}
    for part, (ways, needed) in parts.items():
        taken = take_turns(ways, device, rounds)
        figures[part] = {"microseconds": {way: [each * 1e6 for each in taken[way]] for way in ways}, "bytes": needed}
        line = f"{items:>9,} items {clicks:>5,} clicks {part:>5}: {spread([each * 1e6 for each in taken['lrurec']])} µs"
        if needed:
            line += f", {spread([each * speed / needed for each in taken['lrurec']])} times the floor, "
            ratios = [theirs / ours for theirs, ours in zip(taken["torch"], taken["lrurec"], strict=True)]
            line += f"{spread(ratios)} times as fast as torch"
        print(line, flush=True)
    return figures


def bundle_of(items: int) -> Bundle:
    """Random weights, with scores that spread as a trained model's do."""
    torch.manual_seed(0)
    model = LRURec(LRURecConfig(num_items=items))
    model.item_embedding.weight.normal_(0, 0.3)
    return make_bundle(model.config, model.state_dict(), Catalogue(map(str, range(items))))


# -- the parts


def step_ways(bundle: Bundle, clicks: int, device: torch.device, operators: Operators) -> tuple[Ways, int]:
    """One click of each of as many users; and the bytes that a step must move."""
    layout = state_layout(bundle, recent_capacity=SEEN)
    weights = weights_on(device, fold(bundle.config, bundle.weights))
    bucket = Bucket(clicks, weights, layout, TOP_K, device, operators)
    column = one_click_each(bundle, clicks)
    bucket.fill(layout.unpack([None] * clicks), column.item, waves_of(column.user), np.arange(clicks))
    bucket.inputs.upload()
    model = copy.deepcopy(bundle.model).to(device)
    items, state = torch.from_numpy(column.item).long().to(device), model.initial_state(clicks)
    states = 2 * bucket.outputs.device["hidden"].nbytes
    parameters = sum(tensor.nbytes for block in weights.blocks for tensor in block)
    ways: Ways = {"lrurec": lambda: bucket.step([clicks]), "torch": lambda: model.step(items, state)}
    return ways, states + parameters + 2 * bucket.encodings.nbytes  # as wide: the clicked items' rows


def rank_ways(bundle: Bundle, clicks: int, device: torch.device, operators: Operators) -> tuple[Ways, int]:
    """The ten best of as many encodings; and the bytes that ranking them must move."""
    model = copy.deepcopy(bundle.model).to(device)
    table, bias = model.item_embedding.weight.detach(), model.item_bias.detach().clone()
    bias[0] = -torch.inf
    encodings = torch.nn.functional.layer_norm(torch.randn(clicks, table.shape[1], device=device), table.shape[1:])
    seen = torch.randint(1, len(table), (clicks, SEEN), dtype=torch.int32, device=device)
    run = max(1, _SCORES // len(table))

    def by_torch() -> list[torch.Tensor]:
        return [torch.addmm(bias, part, table.T).topk(TOP_K).values for part in encodings.split(run)]

    scores = torch.addmm(bias, encodings[:64], table.T).scatter_(1, seen[:64].long(), -torch.inf)
    found, _ = operators.rank(encodings[:64], table, bias, seen[:64], TOP_K)
    torch.testing.assert_close(found, scores.topk(TOP_K).values, rtol=1e-5, atol=1e-4)
    lists = clicks * TOP_K * 8
    ways: Ways = {"lrurec": lambda: operators.rank(encodings, table, bias, seen, TOP_K), "torch": by_torch}
    return ways, table.nbytes + bias.nbytes + encodings.nbytes + seen.nbytes + lists


def whole(bundle: Bundle, clicks: int, device: torch.device) -> Ways:
    """A micro-batch as the worker has it."""
    layout = state_layout(bundle, recent_capacity=SEEN)
    engine = TorchEngine(bundle, layout, top_k=TOP_K, exclude_seen=True, device=device, max_batch=1)
    states, column, everyone = layout.unpack([None] * clicks), one_click_each(bundle, clicks), np.arange(clicks)
    return {"lrurec": lambda: engine.advance(states, column, everyone)}


def one_click_each(bundle: Bundle, users: int) -> Clicks:
    item = np.random.default_rng(0).integers(1, bundle.config.num_items + 1, users)
    return Clicks(np.arange(users, dtype=np.int32), item.astype(np.int32), np.arange(users), np.arange(users))


# -- timing


def take_turns(ways: Ways, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each way, round by round, each the mean of as many calls as take a fiftieth of a second."""
    calls = {}
    for name, way in ways.items():
        seconds(way, device, 1)  # what is compiled, captured or allocated once
        calls[name] = max(1, int(0.02 / seconds(way, device, 1)))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(seconds(way, device, calls[name]))
    return taken


def seconds(way: Callable[[], object], device: torch.device, calls: int) -> float:
    """Of a call, by the host's clock, until the device is done with the last."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(calls):
        way()
    wait()
    return (time.perf_counter() - began) / calls


def spread(figures: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(figures):,.1f} ({min(figures):,.1f} to {max(figures):,.1f})"


if __name__ == "__main__":
    main()
