"""A child process that ends with its parent, whatever ends the parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from stream_app.dev.deadline import Deadline

_GUARD = Path(__file__).with_name("guard.py")
_GUARD_SECONDS = 5


class GuardedProcess:
    """A command under `guard.py`, in a session of its own: a Ctrl-C in the terminal does not reach it.

    Ended by its own process id: SIGTERM first, SIGKILL to its process group at the deadline.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        output: IO[bytes] | int,
        environ: Mapping[str, str] | None = None,
        keep_open: Sequence[int] = (),
    ) -> None:
        """Start it. Its standard output and error go to `output`; it inherits the descriptors in `keep_open`."""
        self._process = subprocess.Popen(  # noqa: S603 - our own command lines, no shell
            [sys.executable, "-I", "-S", _GUARD, *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environ,
            pass_fds=keep_open,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Process id of the guard, which is also the id of the process group of the two."""
        return self._process.pid

    @property
    def stdout(self) -> IO[bytes] | None:
        """The read end of its output, when `output` was `subprocess.PIPE`."""
        return self._process.stdout

    def exit_code(self) -> int | None:
        """None while it runs; 128 + n when signal n ended it."""
        return self._process.poll()

    def wait(self, seconds: float | None = None) -> int:
        """The exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it still runs after that many seconds.
        """
        code = self._process.wait(seconds)
        self._close_pipe()
        return code

    def stop(self, deadline: Deadline) -> None:
        """SIGTERM; SIGKILL when it has not ended by the deadline. Does nothing once it has ended."""
        if self.exit_code() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(deadline.remaining)
        self.kill()

    def kill(self) -> None:
        """SIGKILL, and wait until both are gone. Does nothing once they have ended."""
        self._close_pipe()  # the guard kills the command, waits for it, and ends
        try:
            self._process.wait(_GUARD_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _close_pipe(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()
