"""A guarded process ends when it should, and only then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from stream_app.dev.deadline import Deadline
from stream_app.dev.guarded_process import GuardedProcess

SLEEP = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
)


@pytest.fixture
def start():
    """Starts guarded commands and waits for their first line; all are ended after the test."""
    started = []

    def run(*command, **options):
        process = GuardedProcess(command, output=subprocess.PIPE, **options)
        started.append(process)
        if command in (SLEEP, STUBBORN):
            assert process.stdout.readline() == b"up\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.stdout.close()


def group_is_gone(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_it_ends_with_the_exit_code_of_its_command(start):
    assert start(sys.executable, "-c", "raise SystemExit(7)").wait(10) == 7


def test_a_command_that_does_not_exist_is_exit_code_127(start):
    assert start("/nonexistent/command").wait(10) == 127


def test_stopping_is_a_sigterm_that_the_command_may_answer(start):
    answer = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); print('up', flush=True)"
    process = start(sys.executable, "-c", answer + "; signal.pause()")
    assert process.stdout.readline() == b"up\n"
    process.stop(Deadline.after(10))
    assert process.exit_code() == 5
    assert group_is_gone(process.pid)


def test_what_ignores_sigterm_is_killed_at_the_deadline(start):
    process = start(*STUBBORN)
    process.stop(Deadline.after(0.2))
    assert process.exit_code() == 128 + signal.SIGKILL
    assert group_is_gone(process.pid)


def test_killing_leaves_nobody(start):
    process = start(*STUBBORN)
    process.kill()
    assert group_is_gone(process.pid)


def test_stopping_twice_does_nothing(start):
    process = start(*SLEEP)
    process.stop(Deadline.after(10))
    process.stop(Deadline.after(10))
    assert process.exit_code() == 128 + signal.SIGTERM


def test_it_outlives_the_thread_that_started_it(start):
    """PR_SET_PDEATHSIG from the starting thread would kill it here."""
    processes = []
    thread = threading.Thread(target=lambda: processes.append(start(*SLEEP)))
    thread.start()
    thread.join()
    with pytest.raises(subprocess.TimeoutExpired):
        processes[0].wait(0.3)


@pytest.mark.parametrize("command", [SLEEP, STUBBORN])
def test_a_sigkilled_parent_leaves_nobody(command, eventually):
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys; from stream_app.dev.guarded_process import GuardedProcess\n"
            "guarded = GuardedProcess(sys.argv[1:], output=subprocess.PIPE)\n"
            "guarded.stdout.readline(); print(guarded.pid, flush=True); guarded.wait()",
            *command,
        ],
        stdout=subprocess.PIPE,
    )
    with parent.stdout as output:
        group = int(output.readline())
    assert not group_is_gone(group)
    parent.kill()
    parent.wait()
    eventually(lambda: group_is_gone(group), 10)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_sigkilled_guard_takes_its_command_along(start, eventually):
    process = start(*STUBBORN)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    eventually(lambda: group_is_gone(process.pid), 10)


def test_ctrl_c_in_the_terminal_does_not_reach_it(start):
    process = start(*SLEEP)
    assert os.getsid(process.pid) != os.getsid(0)
    os.kill(process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
