"""Checkpoints: whole, self-describing, reproducible; killed writers leave the old file or the new one."""

import json
import signal
import subprocess
import sys
import time

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import ROOT

from modeling import models
from modeling.files import atomic_write, write_text
from modeling.run import checkpoint
from modeling.run.files import RunFiles

MODEL = {
    "name": "cnn_small",
    "num_classes": 3,
    "image_size": 8,
    "channels": [4],
    "batch_norm": True,
    "pool": None,
    "hidden": 5,
}


def save(path, model, **header):
    header = {"model": MODEL, "classes": ["a", "b", "ü"], "metrics": {"accuracy": 0.5}, **header}
    checkpoint.save_checkpoint(path, model.state_dict(), header, {"train_seconds": 1.0})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.build_model(**MODEL).eval()


def test_the_file_alone_rebuilds_the_model(tmp_path, model):
    path = tmp_path / "deep" / "m.safetensors"
    save(path, model)
    loaded, header = checkpoint.load_model(path)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x), model(x))
    assert not loaded.training
    assert header["classes"] == ["a", "b", "ü"]
    assert header["model"] == MODEL
    with safetensors.safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["checkpoint"]
        assert json.loads(file.metadata()["checkpoint"]) == header


def test_equal_runs_write_equal_files_but_for_the_clock(tmp_path, model):
    save(tmp_path / "1", model)
    save(tmp_path / "2", model)
    one, two = (checkpoint.read_header(tmp_path / name) for name in "12")
    assert one.pop("clock").keys() == two.pop("clock").keys() == {"saved_at", "train_seconds"}
    assert json.dumps(one) == json.dumps(two)
    tensors = [safetensors.torch.load_file(tmp_path / name) for name in "12"]
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])


def test_broken_and_foreign_files_are_refused_in_one_line(tmp_path, model):
    good = tmp_path / "good.safetensors"
    save(good, model)
    content = good.read_bytes()
    cases = {
        "cut.safetensors": content[:-10],
        "short.safetensors": content[:5],
        "empty.safetensors": b"",
        "text.safetensors": b"hello, this is text and not tensors",
    }
    for name, bad in cases.items():
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(ValueError, match="is not a whole safetensors file") as error:
            checkpoint.load_model(tmp_path / name)
        assert "\n" not in str(error.value)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="pickled checkpoints can run code"):
        checkpoint.load_model(tmp_path / "model.pth")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="no description of a model"):
        checkpoint.load_model(tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="is not a file"):
        checkpoint.load_model(tmp_path / "absent.safetensors")
    save(tmp_path / "newer.safetensors", model, format_version=99)
    with pytest.raises(ValueError, match="format version 99"):
        checkpoint.load_model(tmp_path / "newer.safetensors")
    state = model.state_dict()
    state.pop("classifier.4.bias")
    header = {"model": MODEL}
    checkpoint.save_checkpoint(tmp_path / "lacks.safetensors", state, header, {})
    with pytest.raises(ValueError, match=r"missing \['classifier.4.bias'\]"):
        checkpoint.load_model(tmp_path / "lacks.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def full_disk():
        with atomic_write(path) as file:
            file.write(b"new")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        full_disk()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "m.safetensors"
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from pathlib import Path
from modeling.run import checkpoint
print("ready", flush=True)
for i in range(10**6):
    tensors = {{"w": torch.full((300_000,), float(i))}}
    checkpoint.save_checkpoint(Path({str(path)!r}), tensors, {{"step": i}}, {{}})
    if i == 0: print("first", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    assert process.stdout.readline() == "first\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = safetensors.torch.load_file(path)
    assert (state["w"] == checkpoint.read_header(path)["step"]).all()


def test_an_older_run_is_moved_aside_whole(tmp_path):
    files = RunFiles(tmp_path, "run")
    assert files.move_aside() == []
    for name in (
        "checkpoints/run_best.safetensors",
        "runs/run/metrics.jsonl",
        "runs/run2/metrics.jsonl",
        "traces/predictions_run.csv",
    ):
        write_text(tmp_path / name, name)
    (moved,) = files.move_aside()
    assert (moved / "checkpoints/run_best.safetensors").read_text() == "checkpoints/run_best.safetensors"
    assert (moved / "runs/run/metrics.jsonl").exists()
    assert (moved / "traces/predictions_run.csv").exists()
    assert not (tmp_path / "runs/run").exists()
    assert (tmp_path / "runs/run2/metrics.jsonl").exists()
    write_text(tmp_path / "runs/run/metrics.jsonl", "second")
    assert files.move_aside() != [moved]
