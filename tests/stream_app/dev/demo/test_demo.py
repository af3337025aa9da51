"""The demo runs by itself from nothing to a summary, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from stream_app.dev.kafka.broker import DEFAULT_PORT

# The first demo on a machine trains the model; every one starts a broker and a worker.
START_SECONDS = 240
END_SECONDS = 10

pytestmark = pytest.mark.timeout(2 * START_SECONDS)


class Demo:
    """A running `stream-app demo`, whose scratch folder is inside `folder`."""

    def __init__(self, folder, *arguments):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from stream_app.cli import main; main()", "demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"},
        )
        os.set_blocking(self.process.stdout.fileno(), True)

    def read_until(self, pattern):
        """The first line of its output that has the pattern."""
        for line in self.process.stdout:
            if re.search(pattern, line):
                return line
        pytest.fail(f"the demo ended before {pattern!r}: {self.process.stderr.read()}")

    def end(self, seconds):
        """Exit code, output and errors."""
        output, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, output, errors


@pytest.fixture
def start_demo(tmp_path):
    demos = []

    def start(*arguments):
        demos.append(Demo(tmp_path, *arguments))
        return demos[-1]

    yield start
    for demo in demos:
        demo.process.kill()
        demo.process.communicate()


def processes():
    """(pid, parent's pid, command line) of every process."""
    listed = subprocess.run(
        ["/bin/ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    lines = (line.split(None, 2) for line in listed.stdout.splitlines())
    return [(int(pid), int(parent), command) for pid, parent, command in (line for line in lines if len(line) == 3)]


def descendants(pid):
    children = [child for child, parent, _ in processes() if parent == pid]
    return children + [below for child in children for below in descendants(child)]


def alive(pids):
    return [pid for pid, _, command in processes() if pid in pids and "<defunct>" not in command]


def left_in(folder):
    return list(folder.glob("stream-app-demo-*"))  # a training leaves torch's own folder beside it


def recall_of(summary):
    model, popular = re.search(r"just recommended in ([\d.]+)% of .*most popular in ([\d.]+)%", summary).groups()
    return float(model), float(popular)


def test_it_ends_by_itself_with_a_summary_while_another_holds_the_default_port(start_demo, tmp_path):
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # somebody else holds it already
            held.enter_context(socket.create_server(("127.0.0.1", DEFAULT_PORT)))
        code, output, errors = start_demo("--clicks", "300").end(START_SECONDS)

    assert code == 0, errors
    assert f"port {DEFAULT_PORT} is taken" in output
    assert "300 clicks of" in output
    assert "300 recommendations in" in output
    assert "dead letters: 0" in output
    model, popular = recall_of(output)
    assert model > 1.5 * popular > 0
    assert not left_in(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_within_ten_seconds_and_leaves_nobody(start_demo, tmp_path, eventually, number):
    demo = start_demo()
    demo.read_until(r"clicks/s|latency p50")
    started = descendants(demo.process.pid)
    assert len(started) == 4  # broker and worker, each with its guard

    asked = time.monotonic()
    demo.process.send_signal(number)
    code, output, errors = demo.end(END_SECONDS)
    assert time.monotonic() - asked < END_SECONDS
    assert (code, errors) == (0, "")
    assert "latency, click sent to recommendation read" in output
    eventually(lambda: not alive(started), 5)
    assert not left_in(tmp_path)


def test_a_signal_during_the_start_ends_it_as_well(start_demo, tmp_path, eventually):
    demo = start_demo()
    demo.read_until("starting Apache Kafka")
    started = descendants(demo.process.pid)
    demo.process.send_signal(signal.SIGINT)
    code, _, errors = demo.end(END_SECONDS)
    assert (code, errors) == (130, "")
    eventually(lambda: not alive(started), 5)
    assert not left_in(tmp_path)


def test_a_worker_that_dies_is_an_error_with_its_last_line(start_demo, tmp_path, eventually):
    demo = start_demo()
    demo.read_until(r"latency p50")
    started = descendants(demo.process.pid)
    [worker] = [
        pid for pid, _, command in processes() if pid in started and "guard" not in command and "kafka" not in command
    ]
    os.kill(worker, signal.SIGKILL)
    code, _, errors = demo.end(30)
    assert code == 1
    assert "the worker ended by itself (exit code 137): " in errors
    assert "Traceback" not in errors
    eventually(lambda: not alive(started), 5)
    [folder] = left_in(tmp_path)
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"worker.log", "broker.log"}
