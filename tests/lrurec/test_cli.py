"""The commands as users and programs meet them."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lrurec.bundle import load_bundle, save_bundle
from lrurec.cli import main
from lrurec.recommendation import recommend
from lrurec.training import command as train_command
from lrurec.training import presets

COMMAND = [sys.executable, "-c", "from lrurec.cli import main; main()"]
SHOP = Path(__file__).parents[2] / "stream_app" / "dev" / "demo" / "eshop" / "clicks.csv.gz"


@pytest.fixture
def lrurec(capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


@pytest.fixture
def folder(tmp_path, small_bundle):
    save_bundle(tmp_path / "b", small_bundle)
    return tmp_path / "b"


@pytest.fixture
def log(tmp_path):
    rows = [f"u{user},item-{(user + place) % 20 + 1},{place}" for user in range(50) for place in range(user % 6 + 1)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,position", *rows]))
    return tmp_path / "log.csv"


@pytest.fixture
def timed_log(tmp_path, log):
    """The same clicks, a second each from 1000 on in every user's history."""
    rows = [line.split(",") for line in log.read_text().splitlines()[1:]]
    lines = [f"{user},{item},{1_000 + int(place)}" for user, item, place in rows]
    (tmp_path / "timed.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]))
    return tmp_path / "timed.csv"


@pytest.fixture
def quick_preset(monkeypatch):
    quick = dataclasses.replace(presets.preset("eshop"), hidden_units=8, validate_every=10)
    monkeypatch.setattr(train_command, "preset", lambda name: quick)


def assert_one_line(text):
    assert text.startswith("lrurec: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1


class TestHelp:
    @pytest.mark.parametrize("command", [[], ["train"], ["report"], ["evaluate"], ["recommend"], ["convert"]])
    def test_shows_an_example(self, lrurec, command):
        code, out, _ = lrurec(*command, "--help")
        assert code == 0
        assert f"Example:\n  lrurec {' '.join(command)}" in out

    def test_does_not_wait_for_torch(self):
        program = "import sys; sys.modules['torch'] = None\nfrom lrurec.cli import main; main(['train', '--help'])"
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


class TestConvert:
    def test_makes_a_bundle_of_the_published_weights(self, lrurec, golden, tmp_path):
        code, out, _ = lrurec("convert", golden.path, "--out", tmp_path / "b")
        assert code == 0
        assert golden.bundle.version in out
        assert load_bundle(tmp_path / "b").version == golden.bundle.version

    def test_never_writes_over_other_files(self, lrurec, golden, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        code, _, err = lrurec("convert", golden.path, "--out", tmp_path)
        assert code == 1
        assert_one_line(err)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


class TestRecommend:
    def test_prints_the_json_of_the_contract(self, lrurec, folder, small_bundle):
        code, out, err = lrurec("recommend", folder, "--items", "item-3, x,item-5", "-k", 4, "--json")
        expected = recommend(small_bundle, ["item-3", "item-5"], 4)
        assert code == 0
        assert err == ""
        assert json.loads(out) == {
            "items": [{"item_id": item.item_id, "score": item.score} for item in expected.items],
            "model_version": small_bundle.version,
            "clicks": 2,
            "unknown_items": ["x"],
        }

    def test_gives_ten_items_after_no_clicks(self, lrurec, folder):
        value = json.loads(lrurec("recommend", folder, "--json")[1])
        assert len(value["items"]) == 10
        assert value["clicks"] == 0

    def test_includes_seen_items_if_asked(self, lrurec, folder):
        out = lrurec("recommend", folder, "--items", "item-3", "-k", 50, "--include-seen", "--json")[1]
        assert len(json.loads(out)["items"]) == 20

    def test_prints_a_line_an_item_and_names_what_it_skipped(self, lrurec, folder):
        code, out, err = lrurec("recommend", folder, "--items", "item-3,x", "-k", 5)
        assert code == 0
        assert len(out.splitlines()) == 5
        assert "x" in err


class TestEvaluate:
    def test_prints_the_json_of_the_contract(self, lrurec, folder, log):
        code, out, _ = lrurec("evaluate", folder, "--interactions", log, "--json")
        value, four = json.loads(out), {"recall@10", "ndcg@10", "recall@20", "ndcg@20"}
        assert code == 0
        assert {"users", "baselines"} | four <= set(value)
        assert all(set(baseline) == four for baseline in value["baselines"].values())
        assert "popular" in value["baselines"]
        assert value["users"] == 32

    def test_prints_a_table(self, lrurec, folder, log):
        code, out, _ = lrurec("evaluate", folder, "--interactions", log)
        assert code == 0
        assert out.startswith("32 users, leave-one-out\n")
        assert {"model", "popular", "last_item", "item_knn"} <= {line.split()[0] for line in out.splitlines() if line}

    def test_cuts_at_a_share_of_the_clicks_or_at_a_time(self, lrurec, folder, timed_log):
        command = ("evaluate", folder, "--interactions", timed_log, "--protocol", "time-split", "--json")
        cuts = [(), ("--cut-quantile", 0.5), ("--cut", 1_003)]
        values = [json.loads(lrurec(*command, *cut)[1]) for cut in cuts]
        assert [value["cut"] for value in values] == [1_004, 1_001, 1_003]
        assert {value["protocol"] for value in values} == {"time-split"}


LITTLE = [["aaa"], ["aaaaaaaa"], ["aba"], ["abcde"], ["aaa", "a", "b"], ["abc", "bca", "cab"], ["abc", "d"]]
"""Logs in which little is to be learnt: a user each, a letter for a click."""

TOO_LITTLE = [["a"], ["ab"], ["a", "b", "c"], ["ab", "ba"]]


def write_log(path, users):
    rows = [f"u{user},{item},{place}" for user, items in enumerate(users) for place, item in enumerate(items)]
    path.write_text("\n".join(["user_id,item_id,position", *rows]))
    return path


@pytest.mark.usefixtures("quick_preset")
class TestTrain:
    def test_writes_a_bundle_and_leaves_nothing_beside_it(self, lrurec, log, tmp_path):
        code, out, _ = lrurec("train", "--interactions", log, "--out", tmp_path / "b", "--max-steps", 25, "--seed", 7)
        bundle = load_bundle(tmp_path / "b")
        assert code == 0
        assert bundle.version in out.splitlines()[-1]
        assert "validation recall@10" in out
        assert bundle.metadata["settings"]["seed"] == 7
        assert bundle.metadata["steps"] == 25
        assert {path.name for path in tmp_path.iterdir()} == {"b", "log.csv"}

    def test_once_more_finds_its_bundle_and_does_nothing(self, lrurec, log, tmp_path):
        command = ("train", "--interactions", log, "--out", tmp_path / "b", "--max-steps", 5)
        last = lrurec(*command)[1].splitlines()[-1]
        before = (tmp_path / "b" / "model.safetensors").stat()
        code, out, _ = lrurec(*command)
        after = (tmp_path / "b" / "model.safetensors").stat()
        assert (code, out) == (0, last + "\n")
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_with_other_arguments_replaces_the_bundle(self, lrurec, log, tmp_path):
        command = ("train", "--interactions", log, "--out", tmp_path / "b", "--max-steps")
        lrurec(*command, 5)
        assert lrurec(*command, 6)[0] == 0
        assert load_bundle(tmp_path / "b").metadata["steps"] == 6

    def test_takes_another_setting_than_the_presets_and_refuses_what_is_none(self, lrurec, log, tmp_path):
        command = ("train", "--interactions", log, "--out", tmp_path / "b", "--max-steps", 5)
        assert lrurec(*command, "--set", "threads=1", "--set", "hidden_units=8")[0] == 0
        settings = load_bundle(tmp_path / "b").metadata["settings"]
        assert (settings["threads"], settings["hidden_units"]) == (1, 8)
        code, _, error = lrurec(*command, "--set", "hidden=8")
        assert (code, error.count("\n")) == (1, 1)
        assert "hidden_units" in error

    def test_a_bundle_whose_metadata_were_edited_is_trained_again(self, lrurec, log, tmp_path):
        command = ("train", "--interactions", log, "--out", tmp_path / "b", "--max-steps", 5)
        last = lrurec(*command)[1].splitlines()[-1]
        config = json.loads((tmp_path / "b" / "config.json").read_text())
        del config["metadata"]["metrics"]["test"]
        (tmp_path / "b" / "config.json").write_text(json.dumps(config))
        code, out, _ = lrurec(*command)
        assert (code, out.splitlines()[-1]) == (0, last)

    def test_records_its_arguments(self, lrurec, log, tmp_path):
        lrurec("train", "--interactions", log, "--out", tmp_path / "b", "--max-steps", 1, "--device", "cpu")
        expected = {"interactions": "log.csv", "preset": "default", "device": "cpu"}
        assert load_bundle(tmp_path / "b").metadata["arguments"] == expected

    @pytest.mark.parametrize("users", LITTLE, ids=str)
    def test_learns_what_there_is_from_little(self, lrurec, tmp_path, users):
        log = write_log(tmp_path / "little.csv", users)
        code, out, err = lrurec("train", "--interactions", log, "--out", tmp_path / "b", "--max-steps", 3)
        assert (code, err) == (0, "")
        assert out.count("step ") >= 1
        code, out, _ = lrurec("evaluate", tmp_path / "b", "--interactions", log, "--json")
        assert (code, json.loads(out)["users"]) == (0, sum(len(user) >= 3 for user in users))
        code, out, _ = lrurec("recommend", tmp_path / "b", "--json")
        assert len(json.loads(out)["items"]) == len({item for user in users for item in user})

    @pytest.mark.parametrize("users", TOO_LITTLE, ids=str)
    def test_says_what_is_missing_where_there_is_nothing_to_learn(self, lrurec, tmp_path, users):
        log = write_log(tmp_path / "little.csv", users)
        code, _, err = lrurec("train", "--interactions", log, "--out", tmp_path / "b")
        assert code == 1
        assert_one_line(err)
        assert "no user has 3 clicks" in err
        assert {path.name for path in tmp_path.iterdir()} == {"little.csv"}

    @pytest.mark.parametrize("name", ["r.html", "r.png", "r.svg", "r.PNG"])
    def test_draws_a_report_also_when_the_bundle_is_there(self, lrurec, log, tmp_path, name):
        command = ("train", "--interactions", log, "--out", tmp_path / "b", "--max-steps", 20, "--report")
        assert lrurec(*command, tmp_path / name)[0] == 0
        first = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        assert lrurec(*command, tmp_path / name)[0] == 0
        assert (tmp_path / name).read_bytes() == first

    @pytest.mark.parametrize("name", ["r.txt", "r", "no such folder/r.html", "folder.html"])
    def test_refuses_a_report_that_cannot_be_before_it_trains(self, lrurec, log, tmp_path, name):
        (tmp_path / "folder.html").mkdir()
        code, out, err = lrurec("train", "--interactions", log, "--out", tmp_path / "b", "--report", tmp_path / name)
        assert (code, out) == (1, "")
        assert_one_line(err)
        assert not (tmp_path / "b").exists()

    def test_until_a_time_knows_nothing_of_what_came_after(self, lrurec, timed_log, tmp_path):
        lrurec("train", "--interactions", timed_log, "--out", tmp_path / "b", "--max-steps", 1, "--until", 1_004)
        lines = timed_log.read_text().splitlines()
        earlier = [line for line in lines[1:] if int(line.rpartition(",")[2]) < 1_004]
        assert load_bundle(tmp_path / "b").metadata["data"]["clicks"] == len(earlier) < len(lines) - 1
        command = ("evaluate", tmp_path / "b", "--interactions", timed_log, "--protocol", "time-split", "--json")
        known = {cut: json.loads(lrurec(*command, "--cut", cut)[1])["trained_before_cut"] for cut in (1_003, 1_004)}
        assert known == {1_003: False, 1_004: True}

    def test_refuses_a_folder_of_other_files_before_it_trains(self, lrurec, log, tmp_path):
        code, out, err = lrurec("train", "--interactions", log, "--out", tmp_path)
        assert (code, out) == (1, "")
        assert_one_line(err)


class TestReport:
    def test_draws_a_bundle(self, lrurec, folder, tmp_path):
        code, out, err = lrurec("report", folder, "--out", tmp_path / "r.html")
        assert (code, err) == (0, "")
        assert "r.html" in out
        assert "<svg" in (tmp_path / "r.html").read_text()


ERRORS = {
    "no bundle to draw": (["report", "nothing", "--out", "r.html"], 1),
    "a report of another kind": (["report", "b", "--out", "r.pdf"], 1),
    "a report over a folder": (["report", "b", "--out", "b"], 1),
    "no such bundle": (["recommend", "nothing"], 1),
    "no such log": (["evaluate", "b", "--interactions", "nothing.csv"], 1),
    "a cut in a log of positions": (["evaluate", "b", "--interactions", "log.csv", "--protocol", "time-split"], 1),
    "a cut of leave-one-out": (["evaluate", "b", "--interactions", "log.csv", "--cut", "5"], 2),
    "two cuts": (
        "evaluate b --interactions log.csv --protocol time-split --cut 5 --cut-quantile .5".split(),  # noqa: SIM905
        2,
    ),
    "a cut at no number": (["evaluate", "b", "--interactions", "log.csv", "--cut", "nan"], 2),
    "a share above one": (["evaluate", "b", "--interactions", "log.csv", "--cut-quantile", "1"], 2),
    "a share that is no number": (
        "evaluate b --interactions log.csv --protocol time-split --cut-quantile nan".split(),  # noqa: SIM905
        2,
    ),
    "a log whose name is no text": (["evaluate", "b", "--interactions", "n\udcffn.csv"], 2),
    "a bundle whose name is no text": (["report", "q\udcff.bundle", "--out", "r.html"], 2),
    "an unknown protocol": (["evaluate", "b", "--interactions", "log.csv", "--protocol", "loo"], 2),
    "an end in a log of positions": (["train", "--interactions", "log.csv", "--out", "x", "--until", "5"], 1),
    "no such checkpoint": (["convert", "nothing.pth", "--out", "x"], 1),
    "a log for a bundle": (["recommend", "log.csv"], 1),
    "a target that is a file": (["train", "--interactions", "log.csv", "--out", "log.csv"], 1),
    "a target below a file": (["train", "--interactions", "log.csv", "--out", "log.csv/b", "--max-steps", "1"], 1),
    "a target where the command runs": (["train", "--interactions", "log.csv", "--out", "."], 1),
    "a target above where the command runs": (["convert", "log.csv", "--out", "b/../.."], 1),
    "an unknown preset": (["train", "--interactions", "log.csv", "--out", "x", "--preset", "ebay"], 2),
    "no steps": (["train", "--interactions", "log.csv", "--out", "x", "--max-steps", "0"], 2),
    "a missing option": (["train"], 2),
    "a missing argument": (["recommend"], 2),
    "an unknown command": (["advise"], 2),
    "an unknown option": (["recommend", "b", "--colour"], 2),
    "k below one": (["recommend", "b", "-k", "0"], 2),
}


@pytest.mark.usefixtures("quick_preset", "folder", "log")
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_one_line_on_stderr(lrurec, tmp_path, monkeypatch, error):
    arguments, expected = ERRORS[error]
    monkeypatch.chdir(tmp_path)
    code, out, err = lrurec(*arguments)
    assert (code, out) == (expected, "")
    assert_one_line(err)


def test_an_interrupt_ends_quietly_with_130(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "train", "--interactions", str(SHOP), "--out", str(tmp_path / "b"), "--preset", "eshop"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().endswith("items\n")
    assert process.stdout.readline().startswith("step ")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")


def test_on_a_terminal_a_bar_fits_its_line_and_every_validation_has_one(tmp_path, log):
    terminal, end = os.openpty()
    command = [*COMMAND, "train", "--interactions", str(log), "--out", str(tmp_path / "b"), "--preset", "eshop"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}
    with subprocess.Popen([*command, "--max-steps", "460"], stdout=end, stderr=end, env=environment) as process:
        os.close(end)
        shown = read_terminal(terminal)
    assert process.returncode == 0, shown
    lines = [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)) if line.strip()]
    bars = [line for line in lines if "━" in line]
    assert max(map(len, bars)) == 80
    assert re.search(r"━ 460/460  loss \d\.\d+  best \d\.\d+  [\d,]+ examples/s  0:00:00 left$", bars[-1])
    validations = [line for line in lines if re.match(r"step \d+: loss .*, validation recall@10 ", line)]
    assert [line.split(":")[0] for line in validations] == ["step 225", "step 450", "step 460"]
    assert validations[0].endswith(", best")


def read_terminal(terminal):
    """All that comes until the last process on the other end is gone, when Linux says EIO."""
    content = b""
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 65_536):
            content += part
    os.close(terminal)
    return content.decode()


def test_a_reader_that_goes_away_gets_no_traceback(folder):
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [*COMMAND, "recommend", str(folder)], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 1


PRINTING = {
    "version": ["--version"],
    "help": ["train", "--help"],
    "recommend": ["recommend", "b"],
    "more than a buffer": ["recommend", "b", "--items", ",".join(["unknown"] * 10_000), "--json"],
    "evaluate": ["evaluate", "b", "--interactions", "log.csv"],
    "train": ["train", "--interactions", "log.csv", "--out", "trained", "--max-steps", "1"],
}
CANNOT_BE_WRITTEN = [(name, ">/dev/full") for name in PRINTING] + [("help", ">&-"), ("help", "<&- >&-")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
@pytest.mark.usefixtures("folder", "log")
@pytest.mark.parametrize(("printing", "redirection"), CANNOT_BE_WRITTEN)
def test_a_standard_output_that_cannot_be_written_is_one_line(tmp_path, printing, redirection):
    command = ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND, *PRINTING[printing]]
    ended = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False)
    assert_one_line(ended.stderr)
    assert "standard output cannot be written" in ended.stderr
    assert ended.returncode == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_is_what_the_environment_makes_it(unbuffered):
    program = (
        "import sys; from lrurec.standard_streams import guard_standard_streams\n"
        "guard_standard_streams(); out = sys.stdout\n"
        "print(out.encoding, out.errors, out.write_through, out.isatty(), out.fileno(), 'ü')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1:replace", "PYTHONUNBUFFERED": unbuffered}
    out = subprocess.run([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, check=True).stdout
    assert out.decode("latin-1").split() == ["iso8859-1", "replace", str(bool(unbuffered)), "False", "1", "ü"]


def test_what_the_terminals_encoding_lacks_is_printed_as_its_code():
    program = "from lrurec.standard_streams import guard_standard_streams\nguard_standard_streams()\nprint('50 – 60 %')"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    out = subprocess.run([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, check=True).stdout
    assert out == b"50 \\u2013 60 %\n"
