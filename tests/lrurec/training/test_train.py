import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lrurec.bundle import load_bundle
from lrurec.catalogue import Catalogue
from lrurec.errors import DeviceError, TrainingError
from lrurec.evaluation import evaluate
from lrurec.interactions import Histories, Interactions, read_interactions
from lrurec.threads import limited_threads
from lrurec.training import command as train_command
from lrurec.training import encoding, gradients, loss, only_one
from lrurec.training import train as training
from lrurec.training.checkpoint import checkpoint_of
from lrurec.training.loss import softmax_cross_entropy
from lrurec.training.only_one import only_training_of
from lrurec.training.presets import PRESETS, TrainingSettings, changed, preset
from lrurec.training.train import resolve, run_id, train

SHOP = Path(__file__).parents[3] / "stream_app" / "dev" / "demo" / "eshop" / "clicks.csv.gz"

SETTINGS = TrainingSettings(
    hidden_units=8,
    num_blocks=1,
    max_len=10,
    batch_size=16,
    max_steps=60,
    learning_rate=1e-2,
    validate_every=20,
    average_decay=0.9,
    threads=1,
)


def cyclic_log(users=60, num_items=12, seed=0):
    """Everybody clicks 1, 2, 3, … in a circle from a random item: after one click the next is certain."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(4, 9, users)
    starts = generator.integers(0, num_items, users)
    items = [(start + np.arange(length)) % num_items + 1 for start, length in zip(starts, lengths, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    catalogue = Catalogue(f"i{row:02}" for row in range(num_items))
    user_ids = tuple(f"u{index}" for index in range(users))
    return Interactions(user_ids, catalogue, Histories(np.concatenate(items).astype(np.int32), offsets))


def weights(bundle):
    return bundle.model.state_dict()


def assert_equal_weights(one, other):
    assert one.version == other.version
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name]), name


@pytest.fixture(scope="module")
def unbroken():
    return train(cyclic_log(), SETTINGS)


def test_what_is_certain_is_learnt():
    log = cyclic_log()
    bundle = train(log, dataclasses.replace(SETTINGS, max_steps=300, dropout=0.0, average_decay=0.0))
    metrics = evaluate(bundle, log).model
    assert metrics.ndcg_at_10 > 0.95


def test_a_part_of_the_shops_preset_already_recommends_better_than_what_is_popular():
    log = read_interactions(SHOP).take(slice(0, 8_000))
    bundle = train(log, dataclasses.replace(preset("eshop"), max_steps=100))
    result = evaluate(bundle, log)
    assert result.model.recall_at_10 > 3 * result.popular.recall_at_10


def test_equal_arguments_give_equal_weights(unbroken):
    assert_equal_weights(train(cyclic_log(), SETTINGS), unbroken)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"dropout": 0.3},
        {"label_smoothing": 0.1},
        {"average_decay": 0.0},
        {"embeddings_from_cooccurrence": True},
        {"bias_from_frequency": True},
        {"clip_norm": 1e-3},
        {"weight_decay": 0.9},
        {"warmup_steps": 9},
        {"max_len": 3},
    ],
)
def test_other_settings_give_other_weights(unbroken, change):
    assert train(cyclic_log(), dataclasses.replace(SETTINGS, **change)).version != unbroken.version


def test_histories_longer_than_a_window_are_learnt_from_whole_where_that_is_asked_for():
    short = dataclasses.replace(SETTINGS, max_len=3)
    assert train(cyclic_log(), dataclasses.replace(short, whole_histories=True)).version != (
        train(cyclic_log(), short).version
    )


def test_biases_and_layer_norms_do_not_decay():
    log = cyclic_log()
    slow = dataclasses.replace(SETTINGS, max_steps=3, learning_rate=1e-9, average_decay=0.0)
    before, after = (weights(train(log, dataclasses.replace(slow, weight_decay=decay))) for decay in (0.0, 1e8))
    changed = {name for name, value in before.items() if not torch.allclose(value, after[name], rtol=1e-2)}
    assert {name for name in before if "bias" not in name and "layer_norm" not in name} == changed


def test_the_precision_of_products_is_what_the_settings_say():
    versions = {
        train(cyclic_log(), dataclasses.replace(SETTINGS, precision=each)).version for each in ("float32", "bfloat16")
    }
    assert len(versions) == 2


def test_the_precision_is_also_that_of_the_scores(monkeypatch):
    seen = []

    def spy(*arguments):
        seen.append(arguments[-1])
        return softmax_cross_entropy(*arguments)

    monkeypatch.setattr(gradients, "softmax_cross_entropy", spy)
    train(cyclic_log(), dataclasses.replace(SETTINGS, max_steps=1, precision="bfloat16"))
    assert seen == ["bfloat16"]


def test_training_leaves_torch_as_it_was():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(cyclic_log(), dataclasses.replace(SETTINGS, max_steps=2, threads=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_the_best_validated_weights_are_kept():
    reports = []
    bundle = train(cyclic_log(), SETTINGS, on_report=reports.append)
    validated = {report.step: report.validation for report in reports if report.validation}
    assert list(validated) == [20, 40, 60]
    best = max(validated, key=lambda step: (validated[step].recall_at_10, validated[step].ndcg_at_10))
    assert bundle.metadata["best_step"] == best
    assert bundle.metadata["metrics"]["validation"] == validated[best].to_json()
    recalls = [metrics.recall_at_10 for metrics in validated.values()]
    assert recalls.count(max(recalls)) > 1, "no tie: only Recall@10 was tested"


def test_a_training_that_diverges_ends_with_what_to_do():
    with pytest.raises(TrainingError, match="lower learning rate than 1e"):
        train(cyclic_log(), dataclasses.replace(SETTINGS, learning_rate=1e30, validate_every=5))


def test_epochs_count_passes_over_the_windows():
    bundle = train(cyclic_log(users=60), dataclasses.replace(SETTINGS, epochs=3))
    assert bundle.metadata["steps"] == 3 * 4  # 60 windows, 16 at a time
    for limits, steps in (({"max_steps": 5}, 5), ({"min_steps": 14}, 14), ({"min_steps": 14, "max_steps": 13}, 13)):
        assert train(cyclic_log(), dataclasses.replace(SETTINGS, epochs=3, **limits)).metadata["steps"] == steps


def test_a_linear_schedule_reaches_0_just_beyond_the_last_step_whatever_ends_the_training():
    settings = dataclasses.replace(SETTINGS, schedule="linear", epochs=2)
    rates = [settings.rate_at(step, settings.steps_over(60)) for step in range(9)]
    assert rates == pytest.approx([settings.learning_rate * (1 - step / 8) for step in range(9)])


def test_the_rate_rises_over_the_warm_up():
    settings = dataclasses.replace(SETTINGS, warmup_steps=4, schedule="constant")
    rates = [settings.rate_at(step, 60) for step in range(6)]
    assert rates == pytest.approx([settings.learning_rate * share for share in (0.25, 0.5, 0.75, 1, 1, 1)])


def test_training_ends_early_without_progress():
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-12, max_steps=10_000, validate_every=5, patience=2)
    assert train(cyclic_log(), settings).metadata["steps"] == 15


def test_the_metadata_say_where_a_model_comes_from(unbroken):
    log, metadata = cyclic_log(), unbroken.metadata
    assert metadata["data"] == {
        "fingerprint": log.fingerprint,
        "users": 60,
        "items": 12,
        "clicks": len(log.histories.items),
    }
    assert metadata["settings"] == resolve(SETTINGS).to_json()
    assert set(metadata["versions"]) == {"lrurec", "python", "torch", "numpy", "numba"}
    assert metadata["metrics"]["test"] == evaluate(unbroken, log).model.to_json()
    assert metadata["device"] in ("cpu", "cuda")


def test_the_metadata_hold_every_validation(unbroken):
    reports = []
    curve = train(cyclic_log(), SETTINGS, on_report=reports.append).metadata["curve"]
    validated = [report for report in reports if report.validation]
    assert [point["step"] for point in curve] == [20, 40, 60]
    for point, report in zip(curve, validated, strict=True):
        assert point["validation"] == report.validation.to_json()
        assert point["loss"] == pytest.approx(report.loss, abs=1e-6)
        assert point["learning_rate"] == SETTINGS.rate_at(point["step"] - 1, 60)
    assert curve == unbroken.metadata["curve"]
    best = unbroken.metadata["best_step"]
    assert unbroken.metadata["metrics"]["validation"] == curve[best // 20 - 1]["validation"]


def test_the_loss_of_the_curve_falls_by_the_learning_rate(unbroken):
    settings = dataclasses.replace(SETTINGS, schedule="linear", warmup_steps=5)
    curve = train(cyclic_log(), settings).metadata["curve"]
    rates, losses = ([point[name] for point in curve] for name in ("learning_rate", "loss"))
    assert rates == sorted(rates, reverse=True)
    assert losses == sorted(losses, reverse=True)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("interrupted_at", [20, 40])
def test_a_training_that_was_broken_off_goes_on_to_the_same_weights(tmp_path, unbroken, interrupted_at):
    def interrupt(report):
        if report.step >= interrupted_at:
            raise Interrupted

    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(Interrupted):
        train(cyclic_log(), SETTINGS, checkpoint=checkpoint, on_report=interrupt)
    reports = []
    resumed = train(cyclic_log(), SETTINGS, checkpoint=checkpoint, on_report=reports.append)
    assert reports[0].step > interrupted_at
    assert_equal_weights(resumed, unbroken)
    assert resumed.metadata == unbroken.metadata


def test_threads_that_share_out_a_batch_train_the_same_again_also_after_a_break(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_TOKENS_PER_THREAD", 4)
    monkeypatch.setattr(loss, "_LABELS_PER_THREAD", 4)
    shared, settings = [], dataclasses.replace(SETTINGS, max_steps=30, threads=2)
    apply = encoding._SharedOut.apply
    monkeypatch.setattr(encoding._SharedOut, "apply", lambda *args: (shared.append(1), apply(*args))[1])

    def interrupt(report):
        if report.step >= 20:
            raise Interrupted

    unbroken, checkpoint = train(cyclic_log(), settings), tmp_path / "c.safetensors"
    assert len(shared) == 30
    with pytest.raises(Interrupted):
        train(cyclic_log(), settings, checkpoint=checkpoint, on_report=interrupt)
    assert_equal_weights(train(cyclic_log(), settings, checkpoint=checkpoint), unbroken)


def test_the_loss_is_gone_on_from_between_two_validations(tmp_path, unbroken, monkeypatch):
    """The running loss of a point of the curve has terms from before the kill."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(training, "REPORT_SECONDS", 0)

    def interrupt(report):
        if report.step == 33:
            raise Interrupted

    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(Interrupted):
        train(cyclic_log(), SETTINGS, checkpoint=checkpoint, on_report=interrupt)
    assert train(cyclic_log(), SETTINGS, checkpoint=checkpoint).metadata == unbroken.metadata


def test_a_training_that_diverges_is_not_saved_between_validations_either(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    checkpoint, reports = tmp_path / "c.safetensors", []
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d{1,2}; "):
        train(
            cyclic_log(),
            dataclasses.replace(SETTINGS, learning_rate=1e30, validate_every=60),
            checkpoint=checkpoint,
            on_report=reports.append,
        )
    with safe_open(checkpoint, framework="pt") as file:
        assert file.get_tensor("loss").isfinite()
    assert not [report for report in reports if report.validation]


def test_the_time_left_is_that_of_the_steps_left_also_after_a_resume(tmp_path, monkeypatch):
    """A clock on which the first step of a process takes 100 s and any other 1 s."""
    monkeypatch.setattr(training, "time", clock := Clock())
    advance = training.TrainingRun.advance

    def advance_in_time(run):
        clock.now += 1 if clock.now else 100
        advance(run)

    monkeypatch.setattr(training.TrainingRun, "advance", advance_in_time)

    def interrupt(report):
        if report.step == 40:
            raise Interrupted

    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(Interrupted):
        train(cyclic_log(), SETTINGS, checkpoint=checkpoint, on_report=interrupt)
    clock.now, reports = 0, []
    train(cyclic_log(), SETTINGS, checkpoint=checkpoint, on_report=reports.append)
    left = {report.step: report.seconds_left for report in reports}
    assert left[41] == pytest.approx(19 * 100)
    assert [left[step] for step in range(42, 61)] == pytest.approx(list(range(18, -1, -1)))


class Clock:
    now = 0

    def monotonic(self):
        return self.now


def test_a_checkpoint_of_another_training_is_refused_and_kept(tmp_path):
    checkpoint = tmp_path / "c.safetensors"
    train(cyclic_log(), SETTINGS, checkpoint=checkpoint)
    content = checkpoint.read_bytes()
    for log, settings in [(cyclic_log(seed=1), SETTINGS), (cyclic_log(), dataclasses.replace(SETTINGS, seed=9))]:
        with pytest.raises(TrainingError, match="other data, arguments, threads"):
            train(log, settings, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == content


@pytest.mark.parametrize(
    "harm", [lambda content: content[: len(content) // 2], lambda content: b"", lambda content: b"x" * 99]
)
def test_a_harmed_checkpoint_is_refused_in_one_line(tmp_path, harm):
    checkpoint = tmp_path / "c.safetensors"
    train(cyclic_log(), dataclasses.replace(SETTINGS, max_steps=1), checkpoint=checkpoint)
    checkpoint.write_bytes(harm(checkpoint.read_bytes()))
    with pytest.raises(TrainingError, match="delete it") as refused:
        train(cyclic_log(), dataclasses.replace(SETTINGS, max_steps=1), checkpoint=checkpoint)
    assert "\n" not in str(refused.value)


def test_a_catalogue_may_hold_items_that_were_never_clicked():
    log = cyclic_log()
    wider = Catalogue([*log.catalogue.item_ids, "new"])
    assert train(log, dataclasses.replace(SETTINGS, max_steps=1), catalogue=wider).catalogue == wider


def test_a_catalogue_without_a_clicked_item_is_refused():
    with pytest.raises(TrainingError, match="another catalogue"):
        train(cyclic_log(), SETTINGS, catalogue=Catalogue(["new"]))


def test_histories_too_short_to_validate_on_are_refused():
    log = cyclic_log()
    short = Interactions(log.user_ids, log.catalogue, log.histories.last(2))
    with pytest.raises(TrainingError, match="3 clicks"):
        train(short, SETTINGS)


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_device_that_is_not_there_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=device):
        train(cyclic_log(), SETTINGS, device=device)


def test_the_published_preset_computes_as_published():
    assert preset("published").precision == "float32"


def test_settings_are_changed_by_name_and_value():
    assert changed(SETTINGS, ["threads=2", "schedule=linear", "dropout=0.5", "bias_from_frequency=true"]) == (
        dataclasses.replace(SETTINGS, threads=2, schedule="linear", dropout=0.5, bias_from_frequency=True)
    )


@pytest.mark.parametrize("change", ["thread=1", "threads", "threads=two", "max_len=[]", "dropout={}", "seed=null"])
def test_a_change_that_cannot_be_is_refused_by_name(change):
    with pytest.raises(TrainingError, match=change.partition("=")[0]):
        changed(SETTINGS, [change])


def test_an_unknown_preset_is_refused_by_name():
    with pytest.raises(TrainingError, match="eshop"):
        preset("ebay")


@pytest.mark.parametrize("settings", PRESETS.values(), ids=PRESETS)
def test_a_preset_describes_a_model(settings):
    assert settings.architecture(100).num_items == 100
    steps = settings.steps_over(10_000)
    assert 0 < settings.rate_at(steps - 1, steps) <= settings.learning_rate


IMPOSSIBLE = {
    "batch_size": 1.5, "max_steps": -1, "max_len": 2**40, "epochs": 0, "threads": -1, "seed": -1, "warmup_steps": -5,
    "average_decay": 1.0, "label_smoothing": float("nan"), "dropout": 1, "learning_rate": float("nan"), "clip_norm": -1,
    "weight_decay": float("inf"), "schedule": "liner", "precision": "x", "bias_from_frequency": "yes",
}  # fmt: skip


@pytest.mark.parametrize("change", [{name: value} for name, value in IMPOSSIBLE.items()], ids=IMPOSSIBLE)
def test_settings_out_of_range_are_refused_by_name(change):
    with pytest.raises(TrainingError, match=next(iter(change))):
        dataclasses.replace(SETTINGS, **change)


KILLED = TrainingSettings(hidden_units=16, num_blocks=1, batch_size=32, max_steps=150, validate_every=10, threads=1)

PROGRAM = textwrap.dedent(
    f"""
    import sys
    from pathlib import Path
    from lrurec.training import command as train_command, train as training
    from lrurec.training.presets import TrainingSettings

    train_command.preset = lambda name: {KILLED!r}
    log, out = map(Path, sys.argv[1:])
    train_command.train_bundle(log, out, preset_name="default", max_steps=None, seed=3, device="cpu")
    """
)


def start_training(log, out):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(log), str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(path, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def log_file(tmp_path):
    log = cyclic_log(users=300, num_items=40)
    rows = ["user_id,item_id,position"]
    for index, user in enumerate(log.user_ids):
        rows += [f"{user},i{row},{place}" for place, row in enumerate(log.histories[index].tolist())]
    (tmp_path / "log.csv").write_text("\n".join(rows))
    return tmp_path / "log.csv"


def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(tmp_path, log_file, monkeypatch, capsys):
    out = tmp_path / "shop.bundle"
    first = start_training(log_file, out)
    wait_for(checkpoint_of(out), first)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert not out.exists()
    second = start_training(log_file, out)
    output = second.communicate(timeout=60)[0]
    assert second.returncode == 0, output
    assert "going on from" in output
    assert not checkpoint_of(out).exists()
    undisturbed = train(read_interactions(log_file), dataclasses.replace(KILLED, seed=3), device="cpu")
    assert_equal_weights(load_bundle(out), undisturbed)
    assert load_bundle(out).metadata["curve"] == undisturbed.metadata["curve"]
    # The same command once more has nothing left to do.
    monkeypatch.setattr(train_command, "preset", lambda name: KILLED)
    train_command.train_bundle(log_file, out, preset_name="default", max_steps=None, seed=3, device="cpu")
    assert capsys.readouterr().out.count("\n") == 1


def test_the_log_that_was_trained_on_is_the_one_in_the_file(log_file):
    assert read_interactions(log_file).histories.lengths.tolist() == cyclic_log(300, 40).histories.lengths.tolist()


def test_what_the_machine_decides_is_part_of_what_a_checkpoint_must_fit():
    log = cyclic_log()

    def identity(**change):
        return run_id(log, dataclasses.replace(SETTINGS, **change), log.catalogue, "cpu")

    assert identity() == run_id(
        log, resolve(SETTINGS), log.catalogue, "auto" if not torch.cuda.is_available() else "cpu"
    )
    assert len({identity(), identity(threads=2), identity(precision="float32"), identity(seed=1)}) >= 3
    with limited_threads(1):
        one = identity(threads=None)
    with limited_threads(2):
        assert identity(threads=None) != one


def quick(log_file, out, monkeypatch, seed=3, steps=20):
    settings = dataclasses.replace(KILLED, max_steps=steps, validate_every=10)
    monkeypatch.setattr(train_command, "preset", lambda name: settings)
    train_command.train_bundle(log_file, out, preset_name="default", max_steps=None, seed=seed, device="cpu")


def test_a_finished_training_leaves_another_ones_checkpoint(tmp_path, log_file, monkeypatch):
    out = tmp_path / "shop.bundle"
    quick(log_file, out, monkeypatch)
    log = read_interactions(log_file)
    other = dataclasses.replace(KILLED, seed=4)
    with pytest.raises(Interrupted):
        train(log, other, device="cpu", checkpoint=checkpoint_of(out), on_report=interrupt)
    quick(log_file, out, monkeypatch)
    assert checkpoint_of(out).exists()


def interrupt(report):
    if report.step >= 10:
        raise Interrupted


def test_a_lock_file_that_its_holder_removes_while_we_wait_for_it_locks_nothing(tmp_path, monkeypatch):
    lock, removed = only_one._lock, []

    def lock_as_the_holder_ends(file, folder):
        lock(file, folder)
        if not removed:
            removed.append((tmp_path / "shop.bundle.lock").unlink())

    monkeypatch.setattr(only_one, "_lock", lock_as_the_holder_ends)
    out = tmp_path / "shop.bundle"
    with only_training_of(out), pytest.raises(TrainingError, match="another training"), only_training_of(out):
        pass
    assert removed


def test_a_full_pipe_is_not_taken_for_another_training(tmp_path):
    with pytest.raises(BlockingIOError), only_training_of(tmp_path / "shop.bundle"):
        raise BlockingIOError


def test_two_trainings_of_one_bundle_are_one_too_many(tmp_path, log_file, monkeypatch):
    out = tmp_path / "shop.bundle"
    with only_training_of(out), pytest.raises(TrainingError, match="another training is writing"):
        quick(log_file, out, monkeypatch)
    quick(log_file, out, monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "shop.bundle"]


@pytest.mark.parametrize(
    "change",
    [
        {"step": -4},
        {"step": "1"},
        {"best_step": 7},
        {"best_recall": None},
        {"best_recall": 2},
        {"curve": 5},
        {"curve": [1]},
        {"more": 1},
    ],
)
def test_a_checkpoint_whose_header_cannot_be_is_refused_in_one_line(tmp_path, change):
    checkpoint = tmp_path / "c.safetensors"
    train(cyclic_log(), dataclasses.replace(SETTINGS, max_steps=20), checkpoint=checkpoint)
    with safe_open(checkpoint, framework="pt") as file:
        header = json.loads(file.metadata()["training"])
    tensors = load_file(checkpoint)
    save_file(tensors, checkpoint, {"training": json.dumps({**header, **change})})
    with pytest.raises(TrainingError, match="delete it"):
        train(cyclic_log(), dataclasses.replace(SETTINGS, max_steps=20), checkpoint=checkpoint)
