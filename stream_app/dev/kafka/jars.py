"""The pinned jars of Apache Kafka: fetched once, verified by SHA-256 on every start.

`jars.txt` lists each jar as `group:artifact:version sha256`. Fetching asks for exactly these coordinates;
nothing is resolved at run time. After a change of `_WANTED`, write the list again with

    python -m stream_app.dev.kafka.jars
"""

from __future__ import annotations

import hashlib
import queue
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from stream_app.dev.cache import unusable_cache
from stream_app.dev.deadline import Deadline
from stream_app.errors import BrokerUnavailable, StreamAppError

KAFKA_VERSION = "4.3.1"
_WANTED = (f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}", "org.slf4j:slf4j-simple:2.0.17")
_HEADER = "# Apache Kafka and what it needs at run time. Written by: python -m stream_app.dev.kafka.jars"
_LIST = Path(__file__).with_name("jars.txt")
_PARALLEL_FETCHES = 8
_TRIES_PER_JAR = 3
_LONGEST_REASON = 120
_HTTP_TIMEOUT_SECONDS = 20


@dataclass(frozen=True, slots=True, order=True)
class Jar:
    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def coordinate(self) -> str:
        return f"{self.group}:{self.artifact}:{self.version}"

    @property
    def filename(self) -> str:
        return f"{self.artifact}-{self.version}.jar"

    def is_intact(self, path: Path) -> bool:
        """Whether the file at `path` is this jar, byte for byte."""
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        except OSError:
            return False


def pinned_jars(lines: Iterable[str] | None = None) -> tuple[Jar, ...]:
    """The jars of `jars.txt`, or of the lines given."""
    if lines is None:
        lines = _LIST.read_text("utf-8").splitlines()
    entries = (line.split() for line in lines if line.strip() and not line.startswith("#"))
    return tuple(_jar(coordinate, sha256) for coordinate, sha256 in entries)


def _jar(coordinate: str, sha256: str) -> Jar:
    group, artifact, version = coordinate.split(":")
    return Jar(group, artifact, version, sha256)


Fetch = Callable[[Jar, Path], Path]


def fetch_by_jgo(jar: Jar, folder: Path) -> Path:
    """Download one jar by its exact coordinate into `folder`. Mirrors named in jgo's own configuration come first."""
    context = _maven_context(folder)
    path: Path = context.project(jar.group, jar.artifact).at_version(jar.version).artifact().resolve()
    return path


def ensure_jars(
    folder: Path,
    *,
    jars: tuple[Jar, ...] | None = None,
    fetch: Fetch = fetch_by_jgo,
    deadline: Deadline | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Every pinned jar as a verified file of `folder`, fetching the missing and the damaged ones.

    Two processes may do this at once: a jar appears under its name by an atomic rename of a verified file.

    Raises:
        BrokerUnavailable: a jar could not be fetched, or what came was not the pinned one.
        SettingsError: the folder can't be written.
    """
    jars = pinned_jars() if jars is None else jars
    deadline = deadline or Deadline.after(300)
    missing = [jar for jar in jars if not jar.is_intact(folder / jar.filename)]
    if missing:
        _fetch_all(missing, folder, fetch, deadline, report)
    return [folder / jar.filename for jar in jars]


def _fetch_all(jars: list[Jar], folder: Path, fetch: Fetch, deadline: Deadline, report: Callable[[str], None]) -> None:
    """Fetch in parallel. The threads are daemons, so that Ctrl-C need not wait for a hanging connection."""
    staging = _make_staging(folder)
    report(f"fetching Apache Kafka {KAFKA_VERSION}: {len(jars)} jars, once")
    waiting: queue.SimpleQueue[Jar] = queue.SimpleQueue()
    outcomes: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    for jar in jars:
        waiting.put(jar)
    with staging:
        work = (waiting, outcomes, Path(staging.name), folder, fetch)
        for _ in range(min(_PARALLEL_FETCHES, len(jars))):
            threading.Thread(target=_fetch_waiting, args=work, daemon=True).start()
        for done in range(1, len(jars) + 1):
            _next_outcome(outcomes, deadline, folder)
            if done % 10 == 0 or done == len(jars):
                report(f"fetched {done} of {len(jars)} jars")


def _make_staging(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """Where downloads lie until they are verified: beside the jars, so that a rename is enough."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise unusable_cache(folder, error) from error


def _next_outcome(outcomes: queue.SimpleQueue[Exception | None], deadline: Deadline, folder: Path) -> None:
    try:
        outcome = outcomes.get(timeout=deadline.remaining)
    except queue.Empty:
        outcome = TimeoutError("no answer within the time allowed")
    if outcome is not None:
        raise _unavailable(outcome, folder) from outcome


def _fetch_waiting(
    waiting: queue.SimpleQueue[Jar],
    outcomes: queue.SimpleQueue[Exception | None],
    staging: Path,
    folder: Path,
    fetch: Fetch,
) -> None:
    while True:
        try:
            jar = waiting.get_nowait()
        except queue.Empty:
            return
        outcome: Exception | None = RuntimeError(f"fetching {jar.coordinate} failed")
        try:
            _fetch_one(jar, staging, folder, fetch)
            outcome = None
        except (OSError, RuntimeError, StreamAppError) as error:  # requests raises OSErrors, jgo RuntimeErrors
            outcome = error
        finally:
            outcomes.put(outcome)  # whatever happened: the start waits for one outcome per jar


def _fetch_one(jar: Jar, staging: Path, folder: Path, fetch: Fetch) -> None:
    for attempt in range(1, _TRIES_PER_JAR + 1):
        try:
            fetched = fetch(jar, staging / f"{jar.filename}-{attempt}")
            if not jar.is_intact(fetched):
                raise _DamagedDownloadError(jar.coordinate)
        except (OSError, RuntimeError):
            if attempt == _TRIES_PER_JAR:
                raise
        else:
            fetched.replace(folder / jar.filename)
            return


class _DamagedDownloadError(RuntimeError):
    def __str__(self) -> str:
        return f"what came for {self.args[0]} has another SHA-256 than the pinned one"


def _unavailable(cause: Exception, folder: Path) -> BrokerUnavailable:
    text = " ".join(str(cause).split())
    reason = text if 0 < len(text) <= _LONGEST_REASON else type(cause).__name__  # requests tells whole stories
    return BrokerUnavailable(
        f"cannot fetch Apache Kafka {KAFKA_VERSION} from Maven Central ({reason}). The first start needs the"
        " network: try again with it, or name a mirror under [repositories] in jgo's configuration, or copy"
        f" {folder} from a machine that has it, or use your own Kafka by STREAM_APP_BROKER"
    )


def _maven_context(folder: Path) -> Any:
    """jgo's entry point. jgo is an optional dependency, and only a first start needs it."""
    try:
        configuration, maven = import_module("jgo.config"), import_module("jgo.maven")
    except ImportError as error:
        raise BrokerUnavailable(
            "the local broker needs the package jgo to fetch Apache Kafka: pip install 'stream-app[broker]'"
        ) from error
    central = maven.MavenContext(repo_cache=folder).remote_repos
    mirrors = configuration.GlobalSettings.load().repositories
    return maven.MavenContext(repo_cache=folder, remote_repos={**mirrors, **central}, timeout=_HTTP_TIMEOUT_SECONDS)


def resolve_pins() -> list[str]:
    """The lines of `jars.txt`: `_WANTED` and all that it needs at run time, each fetched to take its hash."""
    with tempfile.TemporaryDirectory() as folder:
        context = _maven_context(Path(folder))
        wanted, needed = context.resolver.resolve([context.create_dependency(name) for name in _WANTED])
        return sorted(_pin(dependency.artifact) for dependency in [*wanted, *needed])


def _pin(artifact: Any) -> str:
    sha256 = hashlib.sha256(artifact.resolve().read_bytes()).hexdigest()
    return f"{artifact.groupId}:{artifact.artifactId}:{artifact.version} {sha256}"


if __name__ == "__main__":
    _HEADER = f"# Apache Kafka {KAFKA_VERSION} and what it needs. Written by: python -m stream_app.dev.kafka.jars\n"
    _LIST.write_text(_HEADER + "".join(f"{line}\n" for line in resolve_pins()), "utf-8")
