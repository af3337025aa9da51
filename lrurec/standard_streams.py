"""Standard streams that are full or closed, as the console scripts of both packages want them."""

import io
import os
import sys
from typing import Any

from lrurec.errors import OutputError

_STDOUT, _STDERR = 1, 2


def guard_standard_streams() -> None:
    """From now on, what is printed raises `OutputError` when it goes to a full disk or nowhere.

    A reader that has gone remains a BrokenPipeError, which is no fault of anybody's. Does nothing to a `sys.stdout`
    that another program, such as a test, has put in place.

    Streams that were closed before we started are opened on the null device, standard output so that it can't be
    written: else prints would vanish without a word, and the first files and sockets would get the numbers of these
    streams, which ends the process in uvloop.
    """
    while (null := os.open(os.devnull, os.O_RDONLY)) <= _STDERR:  # always the lowest number that is free
        pass
    os.close(null)
    given = sys.stdout
    if given is not sys.__stdout__:
        return
    guarded = io.TextIOWrapper(io.BufferedWriter(_Stdout(_STDOUT, "w", closefd=False)), encoding="utf-8")
    if given is not None:
        guarded.reconfigure(
            encoding=given.encoding,
            errors="backslashreplace" if given.errors == "strict" else given.errors,  # Latin-1 has no dash
            line_buffering=given.line_buffering,
            write_through=given.write_through,
        )
    sys.stdout = guarded


class _Stdout(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            _discard_the_rest()
            raise OutputError(
                f"standard output cannot be written: {error.strerror}; it must be open and have room"
            ) from error


def _discard_the_rest() -> None:
    """What is in the buffers still: Python's own flush at exit must not fail once more."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, _STDOUT)
    os.close(null)
