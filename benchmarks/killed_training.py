"""Whether a training that is killed again and again ends with the weights of one that was not.

    python -m benchmarks.killed_training                          the shop's log of the demo, ten kills
    python -m benchmarks.killed_training --kills 20 --seed 7

Both run the same command. One of them gets SIGKILL at moments drawn at random, and is started again. Prints every kill
and the versions of both bundles, which are hashes of their weights; exit code 1 if they differ, or if no kill left a
checkpoint to go on from.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lrurec.bundle import load_bundle
from lrurec.training.checkpoint import checkpoint_of
from lrurec.training.train import CHECKPOINT_SECONDS

SHOP = Path(__file__).parents[1] / "stream_app" / "dev" / "demo" / "eshop" / "clicks.csv.gz"
LRUREC = Path(sys.executable).with_name("lrurec")
TRAINING_SECONDS = 1_800.0


def main() -> None:
    """Train twice, once with kills, and compare."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.killed_training", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--interactions", type=Path, default=SHOP)
    parser.add_argument("--preset", default="eshop")
    parser.add_argument("--max-steps", type=int, default=900)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        unbroken, broken = Path(folder) / "unbroken.bundle", Path(folder) / "broken.bundle"
        arguments = ["--interactions", str(options.interactions), "--preset", options.preset]
        arguments += ["--max-steps", str(options.max_steps), "--out"]
        started = time.monotonic()
        finish([*arguments, str(unbroken)])
        seconds = time.monotonic() - started
        print(f"unbroken: {seconds:.1f} s, version {load_bundle(unbroken).version}")
        chance = random.Random(options.seed)  # noqa: S311 (a schedule, not a secret)
        went_on = kill_and_finish([*arguments, str(broken)], broken, options.kills, seconds, chance)
        versions = [load_bundle(out).version for out in (unbroken, broken)]
    verdict = "equal" if versions[0] == versions[1] else "OTHER"
    print(f"killed {options.kills} times, {went_on} with a checkpoint to go on from: version {versions[1]}, {verdict}")
    sys.exit(versions[0] != versions[1] or not went_on)


def finish(arguments: list[str]) -> None:
    """Run the command to its end."""
    subprocess.run([str(LRUREC), "train", *arguments], check=True, timeout=TRAINING_SECONDS, stdout=subprocess.DEVNULL)


def kill_and_finish(arguments: list[str], out: Path, kills: int, seconds: float, chance: random.Random) -> int:
    """Start the command, kill it after a while, and start it again, `kills` times; then let it finish.

    Gives how many kills left a checkpoint.

    A while counts from the first step that is told, and is long enough on average for a checkpoint. Where the training
    ends before its kill came, it starts over.
    """
    mean = max(seconds / kills, 1.2 * CHECKPOINT_SECONDS)
    killed = went_on = 0
    while killed < kills:
        if ended_before(delay := chance.uniform(0, 2 * mean), arguments):
            print(f"the training ended before kill {killed + 1}; it starts over")
            shutil.rmtree(out)
        else:
            killed += 1
            went_on += (there := checkpoint_of(out).exists())
            kept = "a checkpoint was there" if there else "there was no checkpoint yet"
            print(f"kill {killed} after {delay:.2f} s: {kept}", flush=True)
    finish(arguments)
    return went_on


def ended_before(delay: float, arguments: list[str]) -> bool:
    """Whether the training ended by itself within `delay` seconds of its first steps; if not, it is killed."""
    with subprocess.Popen([str(LRUREC), "train", *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        try:
            process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            process.kill()
    if process.returncode == -signal.SIGKILL:
        return False
    if process.returncode:
        sys.exit(f"the training ended with code {process.returncode}")
    return True


if __name__ == "__main__":
    main()
