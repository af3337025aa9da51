"""Kafka's jars are the pinned ones, byte for byte, however they came."""

from __future__ import annotations

import hashlib
import re
import shutil
import threading

import pytest

from stream_app.dev.deadline import Deadline
from stream_app.dev.kafka.jars import KAFKA_VERSION, Jar, ensure_jars, pinned_jars
from stream_app.errors import BrokerUnavailable


def content_of(name):
    return f"the jar {name}".encode()


JARS = tuple(
    Jar("org.example", name, "1.0", hashlib.sha256(content_of(name)).hexdigest()) for name in ("core", "tools", "raft")
)


class Repository:
    """Serves the jars into the folder asked for, and counts; `spoil` changes what is served."""

    def __init__(self):
        self.fetched = []
        self.spoil = lambda jar, content: content

    def __call__(self, jar, folder):
        self.fetched.append(jar.artifact)
        folder.mkdir(parents=True)
        path = folder / jar.filename
        path.write_bytes(self.spoil(jar, content_of(jar.artifact)))
        return path


@pytest.fixture
def repository():
    return Repository()


def test_the_list_pins_every_jar_by_version_and_hash():
    jars = pinned_jars()
    assert f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}" in {jar.coordinate for jar in jars}
    assert len({jar.filename for jar in jars}) == len(jars)
    assert all(re.fullmatch(r"[0-9a-f]{64}", jar.sha256) for jar in jars)


def test_missing_jars_are_fetched_once(tmp_path, repository):
    for _ in range(2):
        paths = ensure_jars(tmp_path, jars=JARS, fetch=repository)
        assert [path.read_bytes() for path in paths] == [content_of(jar.artifact) for jar in JARS]
    assert sorted(repository.fetched) == ["core", "raft", "tools"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(jar.filename for jar in JARS)


@pytest.mark.parametrize("damage", [b"", b"something else", content_of("core")[:-1]])
def test_a_damaged_jar_is_fetched_again(tmp_path, repository, damage):
    ensure_jars(tmp_path, jars=JARS, fetch=repository)
    (tmp_path / "core-1.0.jar").write_bytes(damage)
    repository.fetched.clear()
    ensure_jars(tmp_path, jars=JARS, fetch=repository)
    assert repository.fetched == ["core"]
    assert (tmp_path / "core-1.0.jar").read_bytes() == content_of("core")


def test_a_download_with_another_hash_is_refused_and_never_used(tmp_path, repository):
    repository.spoil = lambda jar, content: b"malice" if jar.artifact == "core" else content
    with pytest.raises(BrokerUnavailable, match=r"org\.example:core:1\.0 has another SHA-256"):
        ensure_jars(tmp_path, jars=JARS, fetch=repository)
    assert not (tmp_path / "core-1.0.jar").exists()


def test_a_broken_transfer_is_tried_again(tmp_path, repository):
    failures = iter([ConnectionError("reset"), RuntimeError("503")])

    def flaky(jar, folder):
        if jar.artifact == "core" and (failure := next(failures, None)):
            raise failure
        return repository(jar, folder)

    ensure_jars(tmp_path, jars=JARS, fetch=flaky)
    assert (tmp_path / "core-1.0.jar").exists()


def test_offline_is_one_clear_line_that_says_what_to_do(tmp_path):
    def offline(jar, folder):
        raise ConnectionError("Name or service not known\nsecond line")

    with pytest.raises(BrokerUnavailable) as error:
        ensure_jars(tmp_path, jars=JARS, fetch=offline)
    message = str(error.value)
    assert "\n" not in message
    assert "needs the network" in message
    assert str(tmp_path) in message


def test_a_hanging_transfer_is_given_up_at_the_deadline(tmp_path):
    released = threading.Event()

    def hang(jar, folder):
        released.wait(60)
        raise ConnectionError("too late")

    try:
        with pytest.raises(BrokerUnavailable, match="no answer within the time allowed"):
            ensure_jars(tmp_path, jars=JARS, fetch=hang, deadline=Deadline.after(0.2))
    finally:
        released.set()


def test_two_starts_at_once_both_get_every_jar(tmp_path, repository):
    together = threading.Barrier(2)
    results = []

    def start():
        together.wait(10)
        results.append(ensure_jars(tmp_path, jars=JARS, fetch=repository))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 2
    for paths in results:
        assert all(jar.is_intact(path) for jar, path in zip(JARS, paths, strict=True))


def test_a_cache_copied_from_another_machine_needs_no_network(tmp_path, repository):
    ensure_jars(tmp_path / "theirs", jars=JARS, fetch=repository)
    shutil.copytree(tmp_path / "theirs", tmp_path / "ours")
    ensure_jars(tmp_path / "ours", jars=JARS, fetch=lambda *_: pytest.fail("nothing is missing"))
