"""The command line: help with an example, one line for an error, exit code 0 for success alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner

from stream_app.cli import main
from stream_app.settings import Settings, variable

COMMANDS = sorted(main.commands)


@pytest.fixture
def run(monkeypatch):
    """Runs a command in this process with a clean environment of settings."""
    for each in fields(Settings):
        monkeypatch.delenv(variable(each), raising=False)
    return lambda *arguments, **options: CliRunner().invoke(main, arguments, **options)


def one_line(text):
    assert len(text.splitlines()) == 1, text
    return text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Example:\n  stream-app {command}", result.output)


def test_the_commands_of_the_contract_are_there(run):
    assert {"worker", "broker", "topics", "replay", "demo"} <= set(COMMANDS)
    listed = run("--help").output
    assert all(command in listed for command in COMMANDS)


def test_help_waits_for_no_heavy_library():
    script = (
        "import sys; from stream_app.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print({'torch', 'faust', 'aiokafka', 'polars'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("set()\n")


def test_every_setting_is_an_option_of_the_worker_with_its_variable(run):
    text = " ".join(run("worker", "--help").output.split())
    for each in fields(Settings):
        assert f"--{each.name.replace('_', '-')} " in text
        assert f"[{variable(each)};" in text


def test_an_option_overrules_its_variable(run):
    result = run("topics", "--broker", "nonsense", env={"STREAM_APP_BROKER": "127.0.0.1:1"})
    assert "'nonsense'" in result.stderr


@pytest.mark.parametrize("command", ["worker", "topics", "replay"])
def test_a_bad_setting_is_one_line_naming_it(run, command, tmp_path):
    arguments = [str(tmp_path / "log.csv")] if command == "replay" else []
    result = run(command, *arguments, env={"STREAM_APP_BROKER": "no port"})
    assert result.exit_code == 1
    assert "STREAM_APP_BROKER='no port' is not allowed" in one_line(result.stderr)
    assert result.stdout == ""


MISSPELT = {
    "STREAM_APP_BROKR": "kafka:9092",
    "STREAM_APP_CLICK_TOPIC": "c",
    "STREAM_APP_SERVICE_HOST": "Kubernetes' own",
}


@pytest.mark.parametrize("command", ["topics", "replay"])
def test_a_misspelt_variable_is_one_line_on_stderr_with_what_was_meant(run, command, tmp_path, unused_tcp_port):
    arguments = [str(tmp_path / "none.csv")] if command == "replay" else []
    result = run(command, *arguments, "--broker", f"127.0.0.1:{unused_tcp_port}", env=MISSPELT)
    *warnings, error = result.stderr.splitlines()
    assert warnings == [
        "Warning: STREAM_APP_BROKR is no setting and changes nothing; did you mean STREAM_APP_BROKER?",
        "Warning: STREAM_APP_CLICK_TOPIC is no setting and changes nothing; did you mean STREAM_APP_CLICKS_TOPIC?",
    ]
    assert error.startswith("Error: ")
    assert (result.exit_code, result.stdout) == (1, "")


def test_the_worker_tells_of_a_misspelt_variable_in_its_log(unused_tcp_port):
    environment = {**os.environ, **MISSPELT, "STREAM_APP_BROKER": f"127.0.0.1:{unused_tcp_port}"}
    result = run_with_stdout("", "worker", env=environment)
    *lines, error = result.stderr.splitlines()
    told = [line for line in map(json.loads, lines) if line["event"] == "variable is no setting"]
    assert [(line["variable"], line["did_you_mean"]) for line in told] == [
        ("STREAM_APP_BROKR", "STREAM_APP_BROKER"),
        ("STREAM_APP_CLICK_TOPIC", "STREAM_APP_CLICKS_TOPIC"),
    ]
    assert error.startswith("Error: ")


def test_an_unknown_option_is_a_usage_error(run):
    assert run("topics", "--colour", "red").exit_code == 2


@pytest.mark.parametrize("rate", ["nan", "NaN", "inf", "-inf", "1e999", "0", "-1", "fast"])
@pytest.mark.parametrize("command", [["replay", "log.csv"], ["demo"]])
def test_a_rate_that_cannot_be_kept_is_a_usage_error(run, command, rate):
    result = run(*command, "--rate", rate)
    assert result.exit_code == 2
    assert f"Invalid value for '--rate': {rate}" in result.stderr.replace("'fast'", "fast")


@pytest.mark.parametrize("clicks", ["0", "nan", "inf", "9" * 30, "9" * 400])
def test_a_number_of_clicks_that_nobody_lives_to_see_is_a_usage_error(run, clicks):
    assert run("demo", "--clicks", clicks).exit_code == 2


def test_a_file_that_is_not_there_is_one_line(run, tmp_path):
    result = run("replay", str(tmp_path / "none.csv"))
    assert result.exit_code == 1
    assert "none.csv" in one_line(result.stderr)


def test_no_broker_is_one_line(run, unused_tcp_port):
    result = run("topics", "--broker", f"127.0.0.1:{unused_tcp_port}")
    assert result.exit_code == 1
    assert "stream-app broker" in one_line(result.stderr)


def test_topics_are_created_then_as_wanted(run, bootstrap, unique_name):
    arguments = ["topics", "--broker", bootstrap, "--app-id", unique_name("app"), "--partitions", "2"]
    for name in ("clicks", "recommendations", "dead-letter"):
        arguments += [f"--{name}-topic", unique_name(name)]
    first, second = run(*arguments), run(*arguments)
    assert first.exit_code == second.exit_code == 0
    assert [line.split(":")[0] for line in first.stdout.splitlines()] == ["created"] * 4
    assert [line.split(":")[0] for line in second.stdout.splitlines()] == ["as wanted"] * 4


def test_a_mismatch_is_exit_code_1(run, bootstrap, unique_name):
    arguments = ["topics", "--broker", bootstrap, "--app-id", unique_name("app"), "--clicks-topic", unique_name("c")]
    arguments += ["--recommendations-topic", unique_name("r"), "--dead-letter-topic", unique_name("d")]
    assert run(*arguments, "--partitions", "2").exit_code == 0
    result = run(*arguments, "--partitions", "3")
    assert result.exit_code == 1
    assert "has 2 partitions, wanted 3" in one_line(result.stderr)


def run_with_stdout(redirection, *arguments, **options):
    """A command in a process of its own, whose standard output the shell redirects."""
    shell = ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh"]
    command = [sys.executable, "-c", "from stream_app.cli import main; main()", *arguments]
    return subprocess.run([*shell, *command], stderr=subprocess.PIPE, text=True, check=False, timeout=60, **options)


CANNOT_BE_WRITTEN = [
    pytest.param(">/dev/full", marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is none")),
    ">&-",
    "<&- >&-",
]


@pytest.mark.parametrize("redirection", CANNOT_BE_WRITTEN)
@pytest.mark.parametrize("arguments", [["--version"], ["worker", "--help"]])
def test_help_that_cannot_be_written_is_one_line(arguments, redirection):
    result = run_with_stdout(redirection, *arguments)
    assert result.returncode == 1
    assert "standard output cannot be written" in one_line(result.stderr)


@pytest.mark.parametrize("redirection", CANNOT_BE_WRITTEN[:2])
def test_a_result_that_cannot_be_written_is_one_line(bootstrap, unique_name, tmp_path, redirection):
    topics = ["--clicks-topic", unique_name("c"), "--recommendations-topic", unique_name("r")]
    topics += ["--dead-letter-topic", unique_name("d"), "--app-id", unique_name("app")]
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id,position\nu,i,1\n")
    told = run_with_stdout(redirection, "topics", "--broker", bootstrap, *topics)
    replayed = run_with_stdout(redirection, "replay", str(log), "--broker", bootstrap, *topics[:2])
    assert "standard output cannot be written" in one_line(told.stderr)
    assert "standard output cannot be written" in replayed.stderr.splitlines()[-1]
    assert "Traceback" not in replayed.stderr
    assert told.returncode == replayed.returncode == 1


def test_a_reader_that_goes_away_gets_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    result = run_with_stdout("", "--help", stdout=writing)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_a_worker_needs_no_standard_streams(unused_tcp_port, closed):
    result = run_with_stdout(closed, "worker", "--broker", f"127.0.0.1:{unused_tcp_port}")
    assert result.returncode == 1  # and not -6: uvloop aborts where a socket gets the number of a standard stream
    assert "cannot be reached" in result.stderr or "2>&-" in closed


def test_ctrl_c_is_quiet(bootstrap, unique_name, tmp_path, run):
    arguments = ["--broker", bootstrap, "--clicks-topic", unique_name("clicks")]
    others = ["--recommendations-topic", unique_name("r"), "--dead-letter-topic", unique_name("d")]
    assert run("topics", *arguments, *others, "--app-id", unique_name("app")).exit_code == 0
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id,position\n" + "".join(f"u,i,{place}\n" for place in range(1000)))

    command = [sys.executable, "-c", "from stream_app.cli import main; main()", "replay", str(log), "--rate", "5"]
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert "clicks" in process.stderr.readline()  # under way
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "Error" not in errors
