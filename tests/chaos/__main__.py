"""Break everything, many times, and prove that nothing was lost and nothing applied twice.

    python -m tests.chaos                                     the long form of `make chaos`
    python -m tests.chaos --seed 7 --kills 20 --clicks 50000  a shorter one
    python -m tests.chaos --mutation apply-twice              a worker that is wrong on purpose: must be found out

    python -m tests.chaos --guarantee exactly_once            and no recommendation or dead letter is there twice

Prints its seed and its counts. Exit code 0 if `stream-app verify` is clean; with --mutation, if it is not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from stream_app.verify.report import FAULTS
from tests.chaos.harness import SESSION_SECONDS, ChaosError, Harness, is_once
from tests.chaos.mutations import MUTATIONS
from tests.chaos.points import POINTS
from tests.chaos.schedule import Amounts, draw


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--clicks", type=int, default=2_000_000, help="at least")
    parser.add_argument("--rate", type=float, default=4_000, help="clicks a second, at most")
    parser.add_argument("--kills", type=int, default=216, help=f"spread over {len(POINTS)} points")
    parser.add_argument("--leaves", type=int, default=50, help="workers that leave and join again")
    parser.add_argument("--lost-disks", type=int, default=30)
    parser.add_argument("--damaged-disks", type=int, default=20)
    parser.add_argument("--broker-restarts", type=int, default=10)
    parser.add_argument("--zombies", type=int, default=6)
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), default="")
    parser.add_argument("--guarantee", choices=("at_least_once", "exactly_once"), default="at_least_once")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep Kafka's data, states and logs here")
    options = parser.parse_args()
    amounts = Amounts(
        options.kills, options.leaves, options.lost_disks, options.damaged_disks, options.broker_restarts,
        options.zombies,
    )  # fmt: skip
    actions = draw(options.seed, amounts, session_seconds=SESSION_SECONDS)
    print(f"seed {options.seed}: {amounts}", flush=True)
    with tempfile.TemporaryDirectory(prefix="stream-app-chaos-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        harness = Harness(
            folder, seed=options.seed, rate=options.rate, mutation=options.mutation, guarantee=options.guarantee,
            report=_tell,
        )  # fmt: skip
        began = time.monotonic()
        try:
            found = asyncio.run(harness.run(actions, options.clicks))
        except ChaosError as error:
            print(f"seed {options.seed}: {error}")
            return 1
    counts, repeated, overtaken = harness.counts, found["repeated_recommendations"], found["overtaken_users"]
    print(f"kills by point: {json.dumps(dict(counts.kills), indent=1)}")
    print(f"{counts.kills_elsewhere} more elsewhere; disks: {dict(counts.disks)}")
    for reason, times in counts.ended_by_themselves.most_common():
        print(f"{times:4} workers ended by themselves: {reason}")
    print(
        f"{counts.clicks:,} clicks, {counts.poison:,} poison, {counts.all_kills} kills, {counts.leaves} left and joined"
        f" again, {counts.zombies} zombies, {counts.broker_restarts} broker restarts, {time.monotonic() - began:.0f} s"
    )
    faults = ", ".join(f"{found['faults'][name]:,} {name.replace('_', ' ')}" for name in FAULTS)
    print(f"{repeated:,} recommendations repeated, {overtaken:,} users overtaken; {faults}")
    for difference in found["differences"][:10]:
        print(f"  {difference}")
    clean = found["clean"] and (options.guarantee == "at_least_once" or is_once(found))
    print(f"seed {options.seed}: {'clean' if clean else 'NOT CLEAN'}")
    return int(clean == bool(options.mutation))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
