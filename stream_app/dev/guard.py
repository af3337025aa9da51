"""Runs a command that must not outlive whoever started it: `python guard.py COMMAND...`, standard input a pipe.

The starter holds the pipe's other end and never writes. However the starter dies, SIGKILL included, the pipe
closes, and the guard kills the command. Linux's PR_SET_PDEATHSIG alone would not do: it fires when the *thread* that
forked ends, and macOS has nothing like it. Here it only covers the guard's own death, and the guard has one thread.

SIGTERM is passed on to the command. The guard exits as the command did.
Run as a script with nothing imported but the standard library, so that it is up in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    terminations: list[int] = []
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda number, _: terminations.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    guard = os.getpid()
    child = os.fork()
    if child == 0:
        _become(command, guard)
    while True:
        readable, _, _ = select.select([sys.stdin.fileno(), wake_read], [], [])
        if wake_read in readable:
            os.read(wake_read, 512)
        while terminations:
            os.kill(child, terminations.pop())
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return _exit_code(status)
        if sys.stdin.fileno() in readable and not os.read(sys.stdin.fileno(), 512):
            os.kill(child, signal.SIGKILL)
            return _exit_code(os.waitpid(child, 0)[1])


def _become(command: list[str], guard: int) -> None:
    """In the child: die with the guard, read nothing, and turn into the command."""
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:  # it died before the line above
            os._exit(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with contextlib.suppress(OSError):
        os.execvp(command[0], command)  # noqa: S606 - the guard's purpose
    sys.stderr.write(f"cannot run {command[0]}\n")
    os._exit(127)


def _exit_code(status: int) -> int:
    """A shell's convention: 128 + n for a command that signal n ended."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
