"""Folders that can't be used are one line that says which variable or option names another."""

from __future__ import annotations

import pwd
import tempfile

import pytest
from click.testing import CliRunner

from stream_app.cli import main
from stream_app.dev.cache import cache_folder, data_folder
from stream_app.errors import SettingsError

CACHE = cache_folder()  # as the tests of the broker find it
VARIABLES = ("STREAM_APP_CACHE_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME", "HOME")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command whose cache, data and temporary files belong into folders of its own; answers its one line."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def run_with(*arguments, **environment):
        result = CliRunner().invoke(main, arguments, env=environment)
        assert result.exit_code == 1, result.exception
        return result.stderr.splitlines()[-1]

    return run_with


@pytest.fixture(params=["a file", "below a file", "no permission"])
def unusable(request, tmp_path):
    """A folder that nobody can make, root included."""
    (tmp_path / "file").write_text("")
    return {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "no permission": "/proc/nope"}[
        request.param
    ]


def homeless(_uid):
    raise KeyError("as in a container that runs under a number without a name")


@pytest.mark.parametrize("command", [["broker", "--port", "0", "--data-dir", "data"], ["demo", "--clicks", "1"]])
@pytest.mark.parametrize("variable", ["STREAM_APP_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
def test_a_cache_folder_that_cannot_be_used_is_named_with_its_variable(run, unusable, tmp_path, command, variable):
    line = run(*command, **{variable: str(unusable)})
    assert line.startswith(f"Error: the cache folder {unusable}")
    assert "cannot be used: " in line
    assert line.endswith("name one that can be written by STREAM_APP_CACHE_DIR")
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("command", ["broker", "demo"])
def test_a_cache_folder_in_the_home_of_nobody_is_one_line(run, command):
    line = run(command, STREAM_APP_CACHE_DIR="~no-such-user/cache", HOME="/")
    assert line == "Error: STREAM_APP_CACHE_DIR='~no-such-user/cache' names the home of nobody; it must be a path"


@pytest.mark.parametrize("variable", ["XDG_DATA_HOME", "HOME"])
def test_a_data_folder_that_cannot_be_used_is_named_with_the_option(run, unusable, broker, variable):
    line = run("broker", "--port", "0", STREAM_APP_CACHE_DIR=str(CACHE), **{variable: str(unusable)})
    assert line.startswith(f"Error: the local broker cannot use the data folder {unusable}")
    assert line.endswith("name another with --data-dir")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", homeless)
    with pytest.raises(SettingsError, match=r"no home for \.cache/.*HOME or XDG_CACHE_HOME.*STREAM_APP_CACHE_DIR"):
        cache_folder({})
    with pytest.raises(SettingsError, match=r"no home for \.local/share/.*HOME or XDG_DATA_HOME.*--data-dir"):
        data_folder({})
    assert str(cache_folder({"STREAM_APP_CACHE_DIR": "/c"})) == "/c"
    assert str(data_folder({"XDG_DATA_HOME": "/d"})) == "/d/stream-app"


def test_a_demo_without_a_temporary_folder_is_told_what_to_set(run, unusable, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(unusable))  # as if the system's own could not be used either
    line = run("demo", HOME="/")
    assert line.startswith("Error: the demo has no temporary folder: ")
    assert line.endswith("name one that can be written by TMPDIR")
