"""The local broker is a real Kafka that starts, survives and ends as promised."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from stream_app.dev.kafka.broker import LocalBroker, PortTaken
from stream_app.errors import BrokerUnavailable

STREAM_APP = (sys.executable, "-c", "from stream_app.cli import main; main()")


async def produce(bootstrap, topic, value):
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all")
    await producer.start()
    try:
        return await producer.send_and_wait(topic, value, key=b"key")
    finally:
        await producer.stop()


async def first_record(bootstrap, topic, partition=0):
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
    await consumer.start()
    try:
        at = TopicPartition(topic, partition)
        consumer.assign([at])
        await consumer.seek_to_beginning(at)
        async with asyncio.timeout(20):
            return await consumer.getone()
    finally:
        await consumer.stop()


async def create(bootstrap, topic):
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, 1, 1)])
    finally:
        await admin.close()


def nobody_holds(data_dir):
    """Whether guard, JVM and starter are all gone: each holds the folder's lock."""
    with (data_dir / "broker.lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def run_command():
    """Starts `stream-app` commands; what is left of them is killed after the test."""
    started = []

    def run(*arguments):
        process = subprocess.Popen([*STREAM_APP, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


async def test_what_is_produced_is_consumed(bootstrap, create_topic):
    topic = await create_topic("echo", partitions=2)
    sent = await produce(bootstrap, topic, b"value")
    record = await first_record(bootstrap, topic, sent.partition)
    assert (record.key, record.value) == (b"key", b"value")


async def test_topics_do_not_come_into_being_by_being_asked_for(bootstrap, unique_name, admin):
    name = unique_name("misspelt")
    await admin.describe_topics([name])
    assert name not in await admin.list_topics()


async def test_a_second_broker_on_a_running_brokers_folder_is_refused(broker):
    with pytest.raises(BrokerUnavailable, match=r"belongs to another running broker; .*--data-dir"):
        LocalBroker(broker.data_dir, port=0).start()
    assert broker.process.exit_code() is None


def test_only_this_user_can_read_what_the_broker_keeps(broker):
    for folder in (broker.data_dir, broker.data_dir / "kafka"):
        assert oct(folder.stat().st_mode & 0o777) == oct(0o700)


async def test_data_survive_a_sigkill_and_a_format_that_was_cut_short(tmp_path):
    broker = LocalBroker(tmp_path, port=0)
    broker.start()
    try:
        await create(broker.bootstrap, "kept")
        await produce(broker.bootstrap, "kept", b"before the kill")
        broker.kill()
        (tmp_path / "formatted").unlink()  # as if the kill had come before the mark

        broker.start()
        assert (await first_record(broker.bootstrap, "kept")).value == b"before the kill"
    finally:
        broker.kill()


def test_a_taken_port_is_named_with_the_option(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"port {port} .* is taken; .*--port"):
            LocalBroker(tmp_path, port=port).start()


def test_a_folder_that_cannot_be_used_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BrokerUnavailable, match=r"cannot use the data folder .*file.*--data-dir"):
        LocalBroker(tmp_path / "file", port=0).start()


@pytest.mark.parametrize("name", ["broker.lock", "cluster-id", "server.properties", "tmp", "broker.log"])
def test_a_file_of_the_folder_that_cannot_be_used_is_one_clear_line(tmp_path, name):
    if name == "tmp":
        (tmp_path / name).write_text("where a folder belongs")
    else:
        (tmp_path / name / "in the way").mkdir(parents=True)
    with pytest.raises(BrokerUnavailable, match=rf"cannot use the data folder {tmp_path}: .*{name}.*; .*--data-dir"):
        LocalBroker(tmp_path, port=0).start()
    if name != "broker.lock":
        assert nobody_holds(tmp_path)


def test_a_jvm_that_does_not_start_tells_why_and_where_its_log_is(tmp_path):
    with pytest.raises(BrokerUnavailable, match=rf"(?i)heap.*{tmp_path}/broker\.log"):
        LocalBroker(tmp_path, port=0, heap_mb=1).start()
    assert nobody_holds(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_says_when_it_is_ready_and_ends_on_a_signal(run_command, tmp_path, number):
    command = run_command("broker", "--port", "0", "--data-dir", str(tmp_path))
    ready = command.stdout.readline()
    assert ready.startswith("broker ready at 127.0.0.1:")
    host, port = ready.split()[-1].split(":")
    socket.create_connection((host, int(port)), timeout=5).close()

    command.send_signal(number)
    _, errors = command.communicate(timeout=15)
    assert command.returncode == 0
    assert "Traceback" not in errors
    assert nobody_holds(tmp_path)


def test_a_command_that_cannot_say_it_is_ready_ends_with_one_line_and_leaves_no_jvm(tmp_path):
    command = [*STREAM_APP, "broker", "--port", "0", "--data-dir", str(tmp_path)]
    closed = ["/bin/sh", "-c", 'exec "$@" >&-', "sh"]
    ended = subprocess.run([*closed, *command], stderr=subprocess.PIPE, text=True, timeout=90, check=False)
    assert ended.returncode == 1
    assert "standard output cannot be written" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert nobody_holds(tmp_path)


def test_a_sigkilled_command_leaves_no_jvm(run_command, tmp_path, eventually):
    command = run_command("broker", "--port", "0", "--data-dir", str(tmp_path))
    assert command.stdout.readline().startswith("broker ready")
    assert not nobody_holds(tmp_path)
    command.kill()
    eventually(lambda: nobody_holds(tmp_path), 10)


def test_a_broker_that_dies_ends_the_command_with_its_last_words(run_command, tmp_path, eventually):
    command = run_command("broker", "--port", "0", "--data-dir", str(tmp_path))
    assert command.stdout.readline().startswith("broker ready")
    [guard] = children_of(command.pid)
    [jvm] = children_of(guard)
    os.kill(jvm, signal.SIGKILL)
    _, errors = command.communicate(timeout=15)
    assert command.returncode == 1
    assert "the local broker ended by itself (exit code 137)" in errors
    assert str(tmp_path / "broker.log") in errors


def children_of(pid):
    listed = subprocess.run(["/bin/ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = (map(int, line.split()) for line in listed.splitlines())
    return [child for child, parent in pairs if parent == pid]
