"""A run that is stopped anywhere and resumed ends bitwise where the one never stopped does."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import DATA, ROOT, assert_refused, call, make_image_folder, newest_step, scripts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modeling import engine, files
from modeling.errors import UserError
from modeling.run import checkpoint, resume, state, tracking

IMAGES = DATA / "cifar10" if (DATA / "cifar10").is_dir() else "digits"
SMALL = ("--recipe", "reference", "--dataset", IMAGES, "--limit-train", 100, "--limit-eval", 40)
SMALL += ("--batch-size", 16, "--epochs", 3)
CNN = ("--model", "cnn_small", *SMALL)
RUNS = {
    "plain": CNN,
    "workers 0": (*CNN, "--num-workers", 0),
    "dropout, EMA, clipping": (*CNN, "--head-dropout", 0.5, "--ema", 0.9, "--clip-grad", 1),
    "mixing, accumulation": (
        *CNN,
        "--augment",
        "standard",
        "--mixup",
        0.4,
        "--cutmix",
        1,
        "--gradient-accumulation-steps",
        2,
    ),
    "bf16, SGD, warm-up": (
        *CNN,
        "--mixed-precision",
        "bf16",
        "--optimizer",
        "sgd",
        "--warmup-epochs",
        1,
        "--ema",
        0.9,
    ),
    "batch normalisation": ("--model", "cnn", *SMALL, "--image-size", 32, "--augment", "light", "--ema", 0.9),
    "Muon": ("--model", "cnn_fast", *SMALL, "--image-size", 32, "--ema", 0.9),
    "attention dropout": ("--model", "vit_scratch", *SMALL, "--patch-size", 8),
    "probe": ("--model", "vit", "--weights", "none", *SMALL, "--image-size", 32, "--augment", "none"),
    "max-steps, early stop, loss": (
        *CNN,
        "--max-steps",
        17,
        "--best-metric",
        "loss",
        "--early-stop",
        1,
        "--lr",
        0.01,
    ),
}


def outcome(folder: Path) -> dict:
    """Return what must be bitwise equal: metrics.jsonl, and both checkpoints without their clock."""
    result = {"metrics.jsonl": next((folder / "runs").glob("*/metrics.jsonl")).read_bytes()}
    for path in sorted((folder / "checkpoints").glob("*.safetensors")):
        header = checkpoint.read_header(path)
        result[path.name] = (
            {k: v for k, v in header.items() if k != "clock"},
            safetensors.torch.load_file(path),
        )
    assert len(result) == 3
    return result


def assert_same_outcome(folder: Path, reference: Path) -> None:
    ours, theirs = outcome(folder), outcome(reference)
    assert ours.pop("metrics.jsonl") == theirs.pop("metrics.jsonl")
    assert ours.keys() == theirs.keys()
    for name, (header, weights) in theirs.items():
        assert ours[name][0] == header
        assert ours[name][1].keys() == weights.keys()
        for key, value in weights.items():
            assert torch.equal(ours[name][1][key], value), (name, key)


def assert_no_step_twice(folder: Path) -> None:
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0, "images": 0}).Reload()
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), tag
    for tag in events.Tags()["images"]:
        steps = [event.step for event in events.Images(tag)]
        assert steps == sorted(set(steps)), tag
    for tag in events.Tags()["histograms"]:
        steps = [event.step for event in events.Histograms(tag)]
        assert steps == sorted(set(steps)), tag


class Killed(BaseException):
    """Stands for a kill: no handler of ours may catch it."""


def kill_at(monkeypatch, module, name: str, number: int, after: bool = False):
    """The process dies at call `number` of module.name, before it or after it."""
    real, calls = getattr(module, name), []

    def dying(*args, **kwargs):
        calls.append(0)
        if len(calls) == number and not after:
            raise Killed
        result = real(*args, **kwargs)
        if len(calls) == number and after:
            raise Killed
        return result

    monkeypatch.setattr(module, name, dying)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """{name of RUNS: folder of the run that was never stopped}, made when first asked for."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("reference")
            result = call("train", *RUNS[name], "--output-dir", folders[name])
            assert result.status == 0, result.err
        return folders[name]

    return get


@pytest.mark.parametrize("name", RUNS)
def test_stopped_in_the_loop_and_resumed_it_ends_the_same(references, name, tmp_path, monkeypatch):
    flags = (*RUNS[name], "--checkpoint-every", 3, "--output-dir", tmp_path)
    steps = json.loads(
        (references(name) / "runs").glob("*/metrics.jsonl").__next__().read_text().splitlines()[-1]
    )["step"]
    for number in (2, 6, 9):  # before the first state; in the first epoch or the second; later
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, scripts.train, "train_step", number)
            call("train", *flags, "--resume")
    result = call("train", *flags, "--resume")
    assert result.status == 0, result.err
    assert re.search(r"Resuming '\w+' after step \d+, in epoch [23]", result.out)
    assert f"Trained {steps} steps" in result.out
    assert_same_outcome(tmp_path, references(name))
    assert_no_step_twice(tmp_path)


MOMENTS = {
    "in validation": (scripts.train, "predict", 2, False),
    "in the test": (scripts.train, "evaluate_model", 1, False),
    "before the best checkpoint": (checkpoint, "save_checkpoint", 2, False),
    "after the best checkpoint": (checkpoint, "save_checkpoint", 2, True),
    "after the record": (tracking.Tracker, "record", 2, True),
    "after the record of the test": (tracking.Tracker, "record", 4, True),
    "before a state": (state.States, "save", 5, False),
    "after a state": (state.States, "save", 5, True),
    "while a state is written": (files.os, "fsync", 10, False),
    "after the last state": (state.States, "save", 8, True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_elsewhere_and_resumed_it_ends_the_same(references, moment, tmp_path, monkeypatch):
    flags = (*RUNS["dropout, EMA, clipping"], "--checkpoint-every", 4, "--output-dir", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, *MOMENTS[moment])
        call("train", *flags)
    result = call("train", *flags, "--resume")
    assert result.status == 0, result.err
    assert "Resuming" in result.out
    assert_same_outcome(tmp_path, references("dropout, EMA, clipping"))
    assert_no_step_twice(tmp_path)


def test_a_finished_run_resumed_says_its_result_again(references, tmp_path):
    shutil.copytree(references("plain"), tmp_path, dirs_exist_ok=True)
    again = call("train", *RUNS["plain"], "--output-dir", tmp_path, "--resume")
    assert again.status == 0, again.err
    assert "after step 21, in epoch 3" in again.out
    assert re.search(r"test accuracy 0\.\d+, macro F1", again.out)
    assert_same_outcome(tmp_path, references("plain"))
    assert_no_step_twice(tmp_path)


def test_force_goes_on_with_more_epochs(references, tmp_path):
    shutil.copytree(references("plain"), tmp_path, dirs_exist_ok=True)
    flags = (*RUNS["plain"], "--output-dir", tmp_path, "--resume", "--epochs", 4, "--lr", 0.002)
    assert_refused(call("train", *flags), "other arguments", "epochs 3 -> 4", "lr 0.001 -> 0.002", "--force")
    assert_same_outcome(tmp_path, references("plain"))
    more = call("train", *flags, "--force")
    assert more.status == 0, more.err
    assert "Trained 28 steps" in more.out
    records = [
        json.loads(line)
        for line in (tmp_path / "runs" / "cnn_small" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["epoch"] for r in records if r["kind"] == "epoch"] == [1, 2, 3, 4]
    assert_no_step_twice(tmp_path)


def test_force_goes_on_after_an_epoch_that_was_cut(references, tmp_path):
    """An epoch has 7 steps. --max-steps 10 cuts the second one; 14 finishes it on the images not yet seen."""
    flags = (*CNN, "--output-dir", tmp_path)
    assert call("train", *flags, "--max-steps", 10).status == 0
    seen = []
    real = scripts.train.train_step

    def watched(*args, epoch, num_images, **kwargs):
        seen.append((epoch, num_images, args[3][0].indices.tolist()))
        return real(*args, epoch=epoch, num_images=num_images, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.train, "train_step", watched)
        result = call("train", *flags, "--max-steps", 14, "--resume", "--force")
    assert result.status == 0, result.err
    assert "Trained 14 steps" in result.out
    assert [(epoch, n) for epoch, n, _ in seen] == [(1, 16), (1, 16), (1, 16), (1, 4)]
    final = checkpoint.read_header(tmp_path / "checkpoints" / "cnn_small_final.safetensors")
    assert (final["epoch"], final["step"]) == (2, 14)
    assert_no_step_twice(tmp_path)
    whole = call("train", *CNN, "--max-steps", 14, "--output-dir", tmp_path / "whole")
    assert whole.status == 0
    ours, theirs = (
        safetensors.torch.load_file(f / "checkpoints" / "cnn_small_final.safetensors")
        for f in (tmp_path, tmp_path / "whole")
    )
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_what_force_cannot_do(references, tmp_path, monkeypatch):
    flags = (*CNN, "--output-dir", tmp_path, "--checkpoint-every", 1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, scripts.train, "train_step", 11)
        call("train", *flags)
    forced = (*flags, "--resume", "--force")
    assert_refused(
        call("train", *forced, "--batch-size", 20),
        "48 images of its epoch, not a multiple of --batch-size 20",
    )
    assert_refused(call("train", *forced, "--max-steps", 9), "after step 10", "give a larger --epochs")
    assert_refused(call("train", *forced, "--epochs", 1), "in epoch 2", "give a larger --epochs")
    assert_refused(call("train", *forced, "--optimizer", "sgd"), "belongs to another optimizer")
    assert call("train", *flags, "--resume").status == 0
    assert_same_outcome(tmp_path, references("plain"))


def test_a_restart_does_not_take_up_an_older_run(references, tmp_path, monkeypatch):
    """A job that torch elastic restarts before its first state finds the states of the run before."""
    shutil.copytree(references("plain"), tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(resume, "launcher", lambda _: "another")
    result = call("train", *RUNS["plain"], "--lr", 0.01, "--output-dir", tmp_path)
    assert result.status == 0, result.err
    assert "The files of an older run 'cnn_small' are now in" in result.out


def test_what_a_kill_left_half_written_is_removed_and_a_newer_broken_state_too(references, tmp_path):
    shutil.copytree(references("plain"), tmp_path, dirs_exist_ok=True)
    states = tmp_path / "checkpoints" / "cnn_small_state"
    halves = [
        states / ".step_00000021_x.safetensors.abc.tmp",
        tmp_path / "checkpoints" / ".cnn_small_best.safetensors.abc.tmp",
    ]
    for path in halves:
        path.write_bytes(b"half")
    newest = state.list_states(states)[0]
    newest.write_bytes(b"broken")
    result = call("train", *RUNS["plain"], "--output-dir", tmp_path, "--resume", "--checkpoint-every", 1)
    assert result.status == 0, result.err
    assert not any(path.exists() for path in (*halves, newest))
    assert len(state.list_states(states)) == state.NUM_KEPT
    assert_same_outcome(tmp_path, references("plain"))


def test_what_may_differ_when_resuming(references, tmp_path):
    shutil.copytree(references("plain"), tmp_path, dirs_exist_ok=True)
    flags = ("--num-workers", 1, "--num-threads", 1, "--checkpoint-every", 5, "--resume")
    assert call("train", *RUNS["plain"], "--output-dir", tmp_path, *flags).status == 0
    for flag, word in (
        (("--seed", 1), "seed 42 -> 1"),
        (("--limit-train", 99), "limit_train 100 -> 99"),
        (("--ema", 0.9), "ema 0.0 -> 0.9"),
    ):
        assert_refused(
            call("train", *RUNS["plain"], "--output-dir", tmp_path, *flags, *flag), "other arguments", word
        )


def test_resume_without_a_state_starts_from_the_beginning_and_says_so(tmp_path):
    result = call("train", *CNN, "--max-steps", 1, "--output-dir", tmp_path, "--resume")
    assert result.status == 0
    assert "There is no state of 'cnn_small' in" in result.out


def test_torch_elastics_restart_implies_resume(references, tmp_path, monkeypatch):
    flags = (*RUNS["plain"], "--output-dir", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, scripts.train, "train_step", 9)
        call("train", *flags)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = call("train", *flags)
    assert "Resuming 'cnn_small' after step 7" in result.out
    assert_same_outcome(tmp_path, references("plain"))


@pytest.mark.parametrize("damage", ["truncated", "altered", "both"])
def test_a_damaged_state_is_passed_over_with_a_warning(references, damage, tmp_path, monkeypatch):
    flags = (*RUNS["plain"], "--output-dir", tmp_path, "--checkpoint-every", 2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, scripts.train, "train_step", 12)
        call("train", *flags)
    newest, older = state.list_states(tmp_path / "checkpoints" / "cnn_small_state")
    content = newest.read_bytes()
    newest.write_bytes(
        content[:-100]
        if damage == "truncated"
        else content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    )
    if damage == "both":
        older.write_bytes(b"")
    result = call("train", *flags, "--resume")
    assert result.status == 0
    assert f"{newest} is truncated or altered" in result.err
    assert ("starting from the beginning" if damage == "both" else "after step 8") in result.out
    shutil.rmtree(tmp_path / "previous", ignore_errors=True)
    assert_same_outcome(tmp_path, references("plain"))


def test_a_state_is_tensors_and_json_and_two_are_kept(references):
    states = state.list_states(references("bf16, SGD, warm-up") / "checkpoints" / "cnn_small_state")
    assert len(states) == state.NUM_KEPT
    assert sorted(p for p in states[0].parent.iterdir()) == sorted(states)
    _, tensors, header = state.read_newest(states[0].parent)
    assert {key.split(".")[0] for key in tensors} == {"model", "optimizer", "ema", "totals"}
    assert header["position"]["step"] == 21
    assert any(key.endswith("momentum_buffer") for key in tensors)


def test_a_state_of_another_model_is_refused_even_by_force(references, tmp_path):
    shutil.copytree(references("plain"), tmp_path, dirs_exist_ok=True)
    flags = (
        "--model",
        "vit_scratch",
        *SMALL,
        "--run-name",
        "cnn_small",
        "--output-dir",
        tmp_path,
        "--resume",
    )
    assert_refused(call("train", *flags), "other arguments", "model")
    assert_refused(call("train", *flags, "--force"), "belongs to another model")
    assert_same_outcome(tmp_path, references("plain"))


def test_a_state_with_a_loss_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    real = engine.train_step

    def poisoned(*args, step, **kwargs):
        return real(*args, step=step, **kwargs) * (float("nan") if step == 2 else 1)

    monkeypatch.setattr(scripts.train, "train_step", poisoned)
    result = call("train", *CNN, "--output-dir", tmp_path, "--checkpoint-every", 1)
    assert_refused(result, "not finite at step 2", statuses=(1,))
    assert [p.name[:13] for p in state.list_states(tmp_path / "checkpoints" / "cnn_small_state")] == [
        "step_00000002",
        "step_00000001",
    ]


# ---- what is checked before the first step -------------------------------------------------------


def test_the_best_checkpoint_must_be_the_one_that_the_run_wrote(references, tmp_path, monkeypatch):
    flags = (*CNN, "--output-dir", tmp_path, "--lr", 1e-9)  # no later epoch is better
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, scripts.train, "train_step", 15)
        call("train", *flags)
    best = tmp_path / "checkpoints" / "cnn_small_best.safetensors"
    best.unlink()
    result = call("train", *flags, "--resume")
    assert_refused(result, f"{best} should be the best checkpoint of this run", "it is missing", "--force")
    shutil.copy(references("plain") / "checkpoints" / best.name, best)
    assert_refused(call("train", *flags, "--resume"), "it is of another run: put the right file back")
    result = call("train", *flags, "--resume", "--force")
    assert result.status == 0, result.err
    assert (
        f"The best epoch is chosen from those to come, because of {best}: it is of another run" in result.out
    )
    assert "Best epoch 3" in result.out
    final = tmp_path / "checkpoints" / "cnn_small_final.safetensors"
    assert checkpoint.read_header(best)["metrics"] == checkpoint.read_header(final)["metrics"]


def test_what_is_said_of_a_best_checkpoint(trained, tmp_path):
    header = checkpoint.read_header(trained.best)
    process = SimpleNamespace(num_processes=1, is_main_process=True)

    def check(path=trained.best, force=False, **changes):
        values = {"run_id": header["run_id"], "best_epoch": header["epoch"], "best_scores": header["metrics"]}
        run_state = state.RunState(**values | {"best": 0.5, "epoch": 5} | changes)
        resume.check_best(process, run_state, path, force=force)
        return run_state.best_epoch

    assert check() == header["epoch"]
    assert check(best_epoch=0) == 0, "no epoch was validated yet"
    assert check(best_epoch=1, epoch=header["epoch"] - 1) == 0, "killed before its state: trained again"
    assert check(tmp_path / "none", test={}) == header["epoch"], "nothing is left to evaluate"
    assert check(best_epoch=9, force=True) == 0
    for path, changes, words in (
        (trained.best, {"best_scores": {}}, f"it is of epoch {header['epoch']}"),
        (trained.best, {"run_id": "x"}, "it is of another run"),
        (Path(__file__), {}, "it is not a checkpoint"),
        (tmp_path / "none", {}, "it is missing"),
    ):
        with pytest.raises(UserError, match=f"{words}: put the right file back, or give --force"):
            check(path, **changes)
        with pytest.raises(UserError, match=f"{words}: put the right file back$"):
            check(path, finished=True, force=True, **changes)


def forced(run_state: state.RunState, *differing: str, **changes) -> state.RunState:
    """Resume by --force a run of 4 epochs of 6 steps of 16 images."""
    values = {"epochs": 4, "max_steps": 0, "batch_size": 16, "steps_per_epoch": 6, "schedule": "cosine"}
    settings = SimpleNamespace(**values | {"warmup_epochs": 0, "best_metric": "loss"} | changes)
    resume.apply_forced_arguments(
        run_state, torch.zeros(2), differing=set(differing), settings=settings, num_train_images=96
    )
    return run_state


def test_a_saved_number_that_means_something_else_is_refused_or_computed_anew(capsys):
    def after_two_epochs(**changes):
        scores = {"accuracy": 0.5, "loss": 2.0}
        return state.RunState(epoch=2, step=12, best=0.5, best_epoch=1, best_scores=scores, **changes)

    assert forced(after_two_epochs()) == after_two_epochs()
    other_batch = {"batch_size": 48, "steps_per_epoch": 2}
    with pytest.raises(UserError, match="after step 12, which would be step 4 with this batch size"):
        forced(after_two_epochs(), "batch_size", **other_batch)
    for flag in ({"warmup_epochs": 1}, {"max_steps": 20, "epochs": 10}):
        with pytest.raises(UserError, match="learning rate or --max-steps counts steps"):
            forced(after_two_epochs(), "batch_size", **other_batch, schedule="constant", **flag)
    assert forced(after_two_epochs(), "batch_size", **other_batch, schedule="constant").step == 12
    assert forced(after_two_epochs(), "best_metric").best == 2.0
    assert forced(after_two_epochs(), "validation images").best is None
    assert "the best epoch is chosen from those to come" in capsys.readouterr().out
    with pytest.raises(UserError, match="other arguments change nothing in it"):
        forced(state.RunState(epoch=3, step=24, num_seen=96, finished=True), "test images")


def test_the_same_images_and_weights_under_another_path(trained, tmp_path, monkeypatch):
    counts = {split: {"a": 12, "b": 12} for split in ("train", "val", "test")}
    folder = make_image_folder(tmp_path / "one", counts)
    shutil.copy(trained.best, tmp_path / "w1.safetensors")
    flags = (
        "--model",
        "cnn_small",
        "--image-size",
        32,
        "--batch-size",
        8,
        "--output-dir",
        tmp_path,
        "--resume",
    )

    def train(dataset, weights):
        return call("train", *flags, "--epochs", 1, "--dataset", dataset, "--weights", weights)

    assert train(folder, tmp_path / "w1.safetensors").status == 0
    assert "it was finished" in train(f"{folder}/", tmp_path / "w1.safetensors").out
    folder = folder.rename(tmp_path / "two")
    (tmp_path / "w1.safetensors").rename(tmp_path / "w2.safetensors")
    monkeypatch.setattr(checkpoint, "versions", lambda: {"torch": "9.9"})
    result = train(folder, tmp_path / "w2.safetensors")
    assert result.status == 0, result.err
    assert re.search(
        r"Other versions than when the state was saved: .*torch '[\d.+a-z]+' -> '9.9'", result.out
    )
    others = {name: value + 1 for name, value in safetensors.torch.load_file(trained.best).items()}
    safetensors.torch.save_file(others, tmp_path / "w3.safetensors")
    assert_refused(train(folder, tmp_path / "w3.safetensors"), "weights file '", "other arguments")
    for split, name in (("val", "validation"), ("test", "test")):
        path = folder / split / "a" / "0.png"
        old = path.read_bytes()
        shutil.copy(folder / split / "b" / "0.png", path)
        assert_refused(train(folder, tmp_path / "w2.safetensors"), f"other arguments: {name} images '")
        path.write_bytes(old)


def test_states_beyond_a_hundred_million_steps_are_seen(tmp_path):
    names = [
        f"step_{step}_{'0' * 16}.safetensors" for step in ("00000007", "99999999", "100000000", "1200000000")
    ]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in state.list_states(tmp_path)] == names[::-1]


# ---- signals and kills, in processes of their own ------------------------------------------------

LONG = (*RUNS["dropout, EMA, clipping"], "--checkpoint-every", 1)


def start(folder: Path, *flags) -> subprocess.Popen:
    argv = [sys.executable, ROOT / "train.py", *LONG, "--output-dir", folder, *flags]
    return subprocess.Popen(
        [str(a) for a in argv], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until a state of that step or a later one is there."""
    while process.poll() is None and newest_step(folder / "checkpoints" / "cnn_small_state") < step:
        time.sleep(0.005)


@pytest.mark.parametrize(
    "number, status",
    [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)],
    ids=lambda v: str(v),
)
def test_a_signal_saves_one_state_and_resume_ends_the_same(references, number, status, tmp_path):
    process = start(tmp_path)
    wait_for_step(tmp_path, 4, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert f"{signal.Signals(number).name}: a state is saved; run the same command with --resume" in err
    assert "Traceback" not in err
    result = call("train", *LONG, "--output-dir", tmp_path, "--resume")
    assert result.status == 0, result.err
    assert_same_outcome(tmp_path, references("dropout, EMA, clipping"))
    assert_no_step_twice(tmp_path)


def test_a_signal_in_validation_and_one_in_the_test(references, tmp_path, monkeypatch):
    def signalled(name, number):
        real, calls = getattr(engine, name), []

        def evaluate(*args, **kwargs):
            calls.append(0)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        return evaluate

    flags = (*RUNS["dropout, EMA, clipping"], "--output-dir", tmp_path)
    for name, number, extra in (("predict", 2, ()), ("evaluate_model", 1, ("--resume",))):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(scripts.train, name, signalled(name, number))
            call("train", *flags, *extra)
        assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert call("train", *flags, "--resume").status == 0
    assert_same_outcome(tmp_path, references("dropout, EMA, clipping"))
    assert_no_step_twice(tmp_path)


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch):
    flags = (*RUNS["dropout, EMA, clipping"], "--output-dir", tmp_path)
    code = (
        "import os, signal, sys, time; sys.argv = ['train.py', *sys.argv[1:]]; sys.path.insert(0, '.')\n"
        "from modeling.run import state; import train\n"
        "def slow(*_):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.7)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        "state.States.save = slow\n"
        "train.main()"
    )
    argv = [sys.executable, "-c", code, *map(str, flags)]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert result.returncode == 143, result.stderr
    assert "Traceback" not in result.stderr


def test_killed_at_random_moments_and_resumed_it_ends_the_same(references, tmp_path):
    """The short version of benchmarks/kill_and_resume.py: three kills of a running job."""
    rng = random.Random(0)
    for _ in range(3):
        process = start(tmp_path, "--resume")
        before = newest_step(tmp_path / "checkpoints" / "cnn_small_state")
        wait_for_step(tmp_path, before + rng.randint(1, 4), process)
        time.sleep(rng.random() * 0.05)
        assert process.poll() is None, process.communicate()[1]
        process.kill()
        process.communicate()
    process = start(tmp_path, "--resume")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert_same_outcome(tmp_path, references("dropout, EMA, clipping"))
    assert_no_step_twice(tmp_path)
