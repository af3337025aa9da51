"""One line that an operator reads, instead of a thousand equal ones."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
from aiokafka.protocol.admin import SaslAuthenticateRequest_v0, SaslHandShakeRequest_v1

from stream_app.logs import _CHATTY, OnceInAWhile, hide_credentials
from stream_app.record_batches import RecordBatchConsumer
from stream_app.recovery import OutspokenRecovery
from stream_app.state_table import UserStateStore

LOGGING = """
import logging, os
from stream_app.logs import configure_logging
from stream_app.settings import Settings
configure_logging(Settings.from_environment(os.environ))
for number in range(3):
    logging.getLogger("aiokafka.consumer").error("node %d is away", number)
    logging.getLogger("aiokafka").error("no metadata")
    logging.getLogger("stream_app.worker").info("progress")
"""


@pytest.mark.parametrize("service", [RecordBatchConsumer, OutspokenRecovery, UserStateStore])
def test_services_of_faust_that_are_ours_are_as_quiet_as_its_own(service):
    assert service.logger.name in _CHATTY


def logged(**environment):
    command = [sys.executable, "-c", LOGGING]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line)["event"] for line in done.stderr.splitlines()]


def test_a_librarys_message_is_not_repeated_at_once_and_our_own_lines_always_come():
    assert logged() == ["node 0 is away", "no metadata", "progress", "progress", "progress"]


def test_at_level_debug_everything_is_said():
    assert len(logged(STREAM_APP_LOG_LEVEL="debug")) == 9


def test_a_message_comes_again_after_a_while_and_says_how_often_it_was_held_back():
    times = [0, 2, 4, 10, 12, 19, 20, 40]
    seldom = OnceInAWhile(10, iter(times).__next__)
    records = [made() for _ in times]
    passed = [seldom.filter(record) for record in records]
    assert [at for at, let_through in zip(times, passed, strict=True) if let_through] == [0, 10, 20, 40]
    assert [getattr(record, "repeated", 0) for record in records] == [0, 0, 0, 2, 0, 0, 2, 0]


def test_other_messages_are_not_held_back_and_do_not_fill_the_memory():
    seldom = OnceInAWhile(10)
    assert all(seldom.filter(made(f"node {number}")) for number in range(5_000))
    assert len(seldom._seen) <= 1_000


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_does_not_show_what_variables_held(log_format):
    program = """
import logging, os
from stream_app.logs import configure_logging
from stream_app.settings import Settings
configure_logging(Settings.from_environment(os.environ))
def connect(sasl_plain_password):
    raise OSError("refused")
try:
    connect("hunter" + "2")
except OSError:
    logging.getLogger("aiokafka").exception("no connection")
"""
    command = [sys.executable, "-c", program]
    environment = {"STREAM_APP_LOG_FORMAT": log_format}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "refused" in done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize(("error", "traceback"), [("WorkerError", False), ("ValueError", True)])
def test_what_the_worker_ends_with_in_words_has_no_traceback_from_a_library(error, traceback):
    program = f"""
import logging, os
from stream_app.errors import WorkerError
from stream_app.logs import configure_logging
from stream_app.settings import Settings
configure_logging(Settings.from_environment(os.environ))
try:
    raise {error}("the disk is full")
except {error}:
    logging.getLogger("mode.services").exception("crashed")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={}, capture_output=True, text=True, timeout=60, check=True)
    assert ("exception" in json.loads(done.stderr)) == traceback


def test_requests_that_carry_credentials_are_logged_by_name_alone():
    record = made("Request to %s:%d %d: %s")
    record.args = ("kafka", 9092, 3, SaslAuthenticateRequest_v0(b"\0me\0hunter2"))
    assert hide_credentials(record)
    assert record.getMessage() == "Request to kafka:9092 3: SaslAuthenticateRequest_v0"
    record.args = ("kafka", 9092, 3, SaslHandShakeRequest_v1("PLAIN"))
    assert hide_credentials(record)
    assert "PLAIN" in record.getMessage()


def test_what_the_interpreter_says_itself_is_a_log_line_too():
    program = """
import os, threading, warnings
from stream_app.logs import configure_logging
from stream_app.settings import Settings
configure_logging(Settings.from_environment(os.environ))
class Broken:
    def __del__(self):
        raise OSError("of a finalizer")
async def nobody_awaits():
    pass
def fails():
    raise OSError("of a thread")
nobody_awaits()
Broken()
thread = threading.Thread(target=fails)
thread.start()
thread.join()
warnings.warn("of a library", RuntimeWarning)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={}, capture_output=True, text=True, timeout=60, check=True
    )
    events = [json.loads(line)["event"] for line in done.stderr.splitlines()]
    said = ["never awaited", "of a finalizer", "of a thread", "of a library"]
    assert [words for words, event in zip(said, events, strict=True) if words in event] == said


def made(text="away"):
    return logging.makeLogRecord({"name": "aiokafka", "levelno": logging.ERROR, "msg": text})
