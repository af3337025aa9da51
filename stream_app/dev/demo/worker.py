"""The real `stream-app worker`, as the demo runs it: a process of its own, its output in a file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from stream_app.dev.deadline import Deadline
from stream_app.dev.guarded_process import GuardedProcess
from stream_app.errors import WorkerError
from stream_app.settings import PREFIX, Settings

STOP_SECONDS = 5.0
_PASSED_ON = ("broker", "model", "app_id", "state_dir", "web_port", "shutdown_seconds")
_KEPT_VARIABLES = {PREFIX + "DEVICE", PREFIX + "LOG_LEVEL"}
"""What the user may have set for other workers and means something here as well."""


class DemoWorker:
    """Starts when it is made; the `with` block ends it by SIGTERM, and SIGKILL after `STOP_SECONDS`."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = GuardedProcess(
                [sys.executable, "-c", "from stream_app.cli import main; main()", "worker"],
                output=output,
                environ=_environment(settings),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stop(Deadline.after(STOP_SECONDS))

    def require_alive(self) -> None:
        """Do nothing while it runs.

        Raises:
            WorkerError: it has ended; names its last line.
        """
        code = self._process.exit_code()
        if code is not None:
            raise WorkerError(f"the worker ended by itself (exit code {code}): {self.last_words()}")

    def last_words(self) -> str:
        """The last line of its log, and where the log is."""
        lines = [line.strip() for line in self._log.read_text("utf-8", "replace").splitlines() if line.strip()]
        return f"{lines[-1][:500] if lines else 'it said nothing'}; see {self._log}"


def _environment(settings: Settings) -> dict[str, str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(PREFIX) or name in _KEPT_VARIABLES
    }
    for name in _PASSED_ON:
        environment[PREFIX + name.upper()] = str(getattr(settings, name))
    return environment
