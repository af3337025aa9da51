"""Logging: one JSON object a line on stderr, or text for people; Faust's and aiokafka's lines go the same way."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable

import structlog
from aiokafka.errors import ConsumerStoppedError

from lrurec.errors import LRURecError
from stream_app.errors import StreamAppError
from stream_app.settings import Settings

#: Loggers that warn of what is usual, such as each heartbeat during a rebalance; at level debug they say everything.
_CHATTY = (
    "aiokafka",
    "faust",
    "mode",
    "aiohttp",
    "stream_app.record_batches",
    "stream_app.recovery",
    "stream_app.state_table",
)

#: Seconds for which a library's message is not repeated: aiokafka alone says 75 times a second that Kafka is away.
_QUIET_SECONDS = 10.0

#: Kafka's number of the request that carries a password, or what one could be guessed from.
_SASL_AUTHENTICATE = 36

#: Messages that are remembered for it.
_MESSAGES = 1_000


class OnceInAWhile(logging.Filter):
    """Lets a library's message through once in `seconds`, the next time with how often it was `repeated` meanwhile."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._seconds = seconds
        self._clock = clock
        self._seen: dict[tuple[str, int, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log this one. The text before its arguments are filled in tells messages apart."""
        message = (record.name, record.levelno, str(record.msg))
        now = self._clock()
        last, held_back = self._seen.get(message, (-math.inf, 0))
        if now - last < self._seconds:
            self._seen[message] = last, held_back + 1
            return False
        if len(self._seen) >= _MESSAGES:
            self._seen.clear()
        self._seen[message] = now, 0
        if held_back:
            record.repeated = held_back
        return True


def hide_credentials(record: logging.LogRecord) -> bool:
    """Lets every message through; of requests and answers that carry credentials it leaves no more than the name.

    At level debug aiokafka logs whole requests.
    """
    if isinstance(record.args, tuple):
        record.args = tuple(
            type(arg).__name__ if getattr(arg, "API_KEY", None) == _SASL_AUTHENTICATE else arg for arg in record.args
        )
    return True


def without_what_is_explained(record: logging.LogRecord) -> bool:
    """Lets every message through; of an error that the worker ends with, in words, it leaves out the traceback.

    Faust logs the crash of each of its services.
    """
    if record.exc_info and isinstance(record.exc_info[1], (StreamAppError, LRURecError, ConsumerStoppedError)):
        record.exc_info = None
    return True


def configure_logging(settings: Settings) -> None:
    """Route structlog and the standard library's loggers to stderr in the chosen format."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_renderers(settings.log_format))
    )
    level = settings.log_level.upper()
    handler.addFilter(hide_credentials)
    if level != "DEBUG":
        handler.addFilter(without_what_is_explained)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    seldom = OnceInAWhile(_QUIET_SECONDS)
    if level != "DEBUG":
        handler.addFilter(lambda record: not record.name.startswith(_CHATTY) or seldom.filter(record))
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "DEBUG" else logging.ERROR)
    # What the interpreter would print itself, such as of a coroutine that nobody awaited, is a log line as well.
    logging.captureWarnings(capture=True)
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_end_of_thread


def warn_of_deleted_clicks(partition: int, offsets: range) -> None:
    """Log that clicks, or ends of transactions, have gone with the beginning of their log."""
    structlog.get_logger(__name__).warning(
        "clicks were deleted before they were read",
        partition=partition,
        from_offset=offsets.start,
        to_offset=offsets.stop,
    )


def _log_unraisable(found: sys.UnraisableHookArgs) -> None:
    where = f"{found.err_msg or 'exception ignored in'} {found.object!r}"
    logging.getLogger("python").error("%s: %r", where, found.exc_value)


def _log_end_of_thread(found: threading.ExceptHookArgs) -> None:
    logging.getLogger("python").error("%s ended: %r", found.thread and found.thread.name, found.exc_value)


def _renderers(log_format: str) -> list[structlog.typing.Processor]:
    start = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if log_format == "console":
        return [
            start,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    # Without the frames' variables: a client's hold the password.
    traceback = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    return [start, structlog.processors.ExceptionRenderer(traceback), structlog.processors.JSONRenderer()]
