"""Break everything, many times, and prove that nothing was lost and nothing applied twice.

    python -m tests.chaos                                     the long form of `make chaos`
    python -m tests.chaos --seed 7 --kills 20 --clicks 50000  a shorter one
    python -m tests.chaos --mutation apply-twice              a worker that is wrong on purpose: must be found out
    python -m tests.chaos --set GUARANTEE=exactly_once        and no recommendation or dead letter is there twice
    python -m tests.chaos --set GROUP_INSTANCE_ID=number-{slot}
                                                              workers with names of their own

Prints its seed and its counts; the last line is all of them as JSON. Exit code 0 if everything happened as often as
asked for and `stream-app verify` is clean; with --mutation, if it is not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stream_app.verify.report import FAULTS
from tests.chaos.errors import ChaosError
from tests.chaos.harness import Harness, is_once
from tests.chaos.mutations import MUTATIONS
from tests.chaos.points import POINTS
from tests.chaos.schedule import Amounts, draw
from tests.chaos.stage import REQUEST_SECONDS, SESSION_SECONDS

_LONG = Amounts(
    kills=12 * len(POINTS),
    leaves=20,
    lost_disks=30,
    damaged_disks=20,
    broker_restarts=10,
    zombies=6,
    slow_networks=5,
    stalled_networks=5,
    cut_networks=5,
    full_disks=6,
    clock_jumps=5,
    rolling_restarts=3,
)

_PROOF_SECONDS = 120
_PROOF_RATE = 8_000
"""Clicks a second that `stream-app verify` reads, at least."""


def main() -> int:
    options = _options()
    settings = dict(options.set)
    amounts = Amounts(**{name: getattr(options, name) for name in vars(_LONG)})
    actions = draw(options.seed, amounts, session_seconds=SESSION_SECONDS, request_seconds=REQUEST_SECONDS)
    print(f"seed {options.seed}: {amounts}", flush=True)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # that Kafka is away is no news here
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stream-app-chaos-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        harness = Harness(
            folder, seed=options.seed, rate=options.rate, mutation=options.mutation, settings=settings, report=_tell,
        )  # fmt: skip
        # The rest of the time is for what is not worked off then, and for the proof.
        seconds = options.minutes * 60 - _PROOF_SECONDS - options.clicks / _PROOF_RATE
        try:
            found = asyncio.run(harness.run(actions, options.clicks, seconds))
        except ChaosError as error:
            print(f"seed {options.seed}: {error}\n{harness.counts}")
            return 1
    short = harness.counts.short_of(amounts, clicks=options.clicks, rebalances=options.rebalances)
    _report(harness, found, short)
    seconds = round(time.monotonic() - began)
    clean = found["clean"] and (found["every_click"] or settings.get("PUBLISH") == "latest")
    # Nothing that happens here explains this one.
    clean = clean and not any("was read from offset" in reason for reason in harness.counts.ended_by_themselves)
    clean = clean and (settings.get("GUARANTEE") != "exactly_once" or is_once(found))
    print(f"seed {options.seed}: {'clean' if clean else 'NOT CLEAN'}, {seconds} s")
    told = {
        "seed": options.seed,
        "settings": settings,
        "seconds": seconds,
        "short_of": short,
        **harness.counts.as_json(),
    }
    print(json.dumps({**told, "verify": {name: found[name] for name in found.keys() - {"differences"}}}))
    if options.mutation:
        return int(clean)
    return int(not clean or bool(short))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--minutes", type=float, default=40, help="accidents that there is no time for are left out")
    parser.add_argument("--clicks", type=int, default=2_000_000, help="at least")
    parser.add_argument("--rate", type=float, default=20_000, help="clicks a second, at most")
    parser.add_argument("--rebalances", type=int, default=50, help="that must have happened")
    for name, default in vars(_LONG).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), default="")
    parser.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="STREAM_APP_NAME of the workers"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep Kafka's data and the workers' logs here")
    return parser.parse_args()


def _setting(text: str) -> tuple[str, str]:
    name, given, value = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _report(harness: Harness, found: dict[str, Any], short: list[str]) -> None:
    counts = harness.counts
    print(f"kills by point: {json.dumps(dict(counts.kills), indent=1)}")
    print(f"{counts.kills_elsewhere} more elsewhere; disks: {dict(counts.disks)}")
    for reason, times in counts.ended_by_themselves.most_common():
        print(f"{times:4} workers ended by themselves: {reason}")
    print(counts)
    repeated, overtaken = found["repeated_recommendations"], found["overtaken_users"]
    faults = ", ".join(f"{found['faults'][name]:,} {name.replace('_', ' ')}" for name in FAULTS)
    print(f"{repeated:,} recommendations repeated, {overtaken:,} users overtaken; {faults}")
    for difference in found["differences"][:10]:
        print(f"  {difference}")
    for line in short:
        print(f"not enough: {line}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
