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
from modeling.errors import UserError
from modeling.files import atomic_write, read_tensors, tensors_digest, write_text
from modeling.run import checkpoint
from modeling.run.files import RunFiles
from modeling.run.header import CHOICES, header_digest

MODEL = {
    "name": "cnn_small",
    "num_classes": 3,
    "image_size": 8,
    "channels": [4],
    "batch_norm": True,
    "pool": None,
    "hidden": 5,
}


HEADER = {
    "model": MODEL,
    "classes": ["a", "b", "ü"],
    "preprocessing": {
        "image_size": 8,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "crop_fraction": None,
        "interpolation": "bilinear",
    },
    "arguments": {"model": "cnn_small", "run_name": "run", "seed": 42, "val_fraction": 0.1},
    "dataset": {
        "name": "digits",
        "revision": None,
        "train_sha256": 64 * "0",
        "division_sha256": None,
        "read": {"splits": {"train": 3}, "left_out": {}, "choices": dict.fromkeys(CHOICES)},
    },
    "weights": {"source": "random", "revision": None},
    "versions": {"torch": "2"},
    "git_commit": None,
    "epoch": 1,
    "step": 3,
    "metrics": {"accuracy": 0.5},
}


def save(path, model, **header):
    checkpoint.save_checkpoint(path, model.state_dict(), {**HEADER, **header}, {"train_seconds": 1.0})


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
    save(tmp_path / "newer.safetensors", model)
    rewrite(tmp_path / "newer.safetensors", tmp_path / "newer.safetensors", format_version=99)
    with pytest.raises(ValueError, match="format version 99 is newer"):
        checkpoint.load_model(tmp_path / "newer.safetensors")
    state = model.state_dict()
    state.pop("classifier.4.bias")
    checkpoint.save_checkpoint(tmp_path / "lacks.safetensors", state, HEADER, {"train_seconds": 1.0})
    with pytest.raises(ValueError, match="does not fit the model: it lacks classifier.4.bias"):
        checkpoint.load_model(tmp_path / "lacks.safetensors")


def rewrite(path, source, tensors=None, *, digest=True, **changes):
    """Write a checkpoint again with another header, and with the digest that fits it."""
    state, metadata = read_tensors(source)
    header = {**json.loads(metadata["checkpoint"]), **changes}
    if digest:
        header["tensors_sha256"] = tensors_digest(tensors or state)
        header["header_sha256"] = header_digest(header)
    safetensors.torch.save_file(tensors or state, path, metadata={"checkpoint": json.dumps(header)})


def test_altered_checkpoints_are_refused(tmp_path, model):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save(good, model)
    content = bytearray(good.read_bytes())
    content[-3] ^= 1  # one bit of a tensor
    bad.write_bytes(content)
    with pytest.raises(ValueError, match="the tensors of .* were altered"):
        checkpoint.load_model(bad)
    rewrite(bad, good, digest=False, epoch=2)
    with pytest.raises(ValueError, match="its digest differs"):
        checkpoint.read_header(bad)
    rewrite(bad, good, format_version=1)
    with pytest.raises(ValueError, match="format version 1 is older"):
        checkpoint.read_header(bad)
    rewrite(bad, good)
    assert checkpoint.load_model(bad)[1]["classes"] == HEADER["classes"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"arguments": HEADER["arguments"] | {"run_name": "../x"}}, "run_name must be a plain file name"),
        ({"arguments": HEADER["arguments"] | {"run_name": 3}}, "run_name must be a plain file name"),
        ({"arguments": HEADER["arguments"] | {"val_fraction": "0.1"}}, "val_fraction must lie"),
        ({"arguments": HEADER["arguments"] | {"model": "cnn"}}, "the two names of the model"),
        ({"classes": ["a", "b", "a"]}, "classes must differ"),
        ({"classes": ["a", "b"]}, "as many classes as outputs"),
        ({"classes": ["a", "b", 3]}, "classes must be a list of names"),
        ({"classes": ["a", "b", "\ud800"]}, "broken JSON"),
        ({"preprocessing": {"image_size": 8}}, "preprocessing must have crop_fraction"),
        ({"preprocessing": HEADER["preprocessing"] | {"mean": [0.5]}}, "mean must be 3 finite numbers"),
        ({"preprocessing": HEADER["preprocessing"] | {"std": [1, 1, 0]}}, "std must be 3 positive"),
        ({"preprocessing": HEADER["preprocessing"] | {"crop_fraction": 2}}, "crop's fraction must be"),
        ({"preprocessing": HEADER["preprocessing"] | {"image_size": 16}}, "image sizes must be equal"),
        ({"model": MODEL | {"image_size": 30_000}}, "image_size must be 1 to 2048"),
        (
            {
                "model": MODEL | {"name": "timm/absent"},
                "arguments": HEADER["arguments"] | {"model": "timm/absent"},
            },
            "timm has no model 'absent'",
        ),
        ({"model": MODEL | {"hidden": 10**9}}, "too large for an argument"),
        ({"model": MODEL | {"hidden": 10**6}}, "other shapes of classifier"),
        ({"model": MODEL | {"hidden": "5"}}, "cnn_small cannot be built"),
        ({"model": MODEL | {"hiden": 5}}, "cnn_small cannot be built"),
        ({"model": MODEL | {"channels": 50 * [4]}}, "too small for 50 halvings"),
        ({"model": MODEL | {"weights": "/etc/passwd"}}, "weights is not an argument"),
        ({"model": []}, "model must be an object"),
        ({"metrics": {"accuracy": "high"}}, "metrics must be numbers"),
        ({"clock": {}}, "saved_at must be text"),
    ],
)
def test_headers_that_are_not_valid_are_refused_in_one_line(tmp_path, model, changes, words):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save(good, model)
    rewrite(bad, good, **changes)
    with pytest.raises(ValueError, match=words) as error:
        checkpoint.load_model(bad)
    assert type(error.value) is UserError


def test_a_header_cannot_take_much_memory_or_time(tmp_path, model):
    """A billion layers are refused when more are built than the file has."""
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save(good, model)
    arguments = HEADER["arguments"] | {"model": "vit_scratch"}
    vit = {"name": "vit_scratch", "num_classes": 3, "image_size": 8}
    for more, words in (({"depth": 10**6}, "far more than"), ({"dim": 2**20}, "does not fit the model")):
        rewrite(bad, good, model=vit | more, arguments=arguments)
        with pytest.raises(ValueError, match=words):
            checkpoint.load_model(bad)
    bad.write_bytes((90_000_000).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="its header would have 90,000,000 bytes"):
        checkpoint.load_model(bad)
    rewrite(bad, good, tensors={k: v.int().contiguous() for k, v in model.state_dict().items()})
    with pytest.raises(ValueError, match="another kind of numbers"):
        checkpoint.load_model(bad)


def test_a_module_in_two_places_is_saved_once(tmp_path):
    torch.manual_seed(0)
    model = models.build_model("timm/coat_tiny", num_classes=3, image_size=32).eval()
    path = tmp_path / "m.safetensors"
    header = {
        **HEADER,
        "model": {"name": "timm/coat_tiny", "num_classes": 3, "image_size": 32},
        "arguments": HEADER["arguments"] | {"model": "timm/coat_tiny"},
        "preprocessing": HEADER["preprocessing"] | {"image_size": 32},
    }
    checkpoint.save_checkpoint(path, model.state_dict(), header, {"train_seconds": 1.0})
    assert len(read_tensors(path)[0]) < len(model.state_dict())
    loaded, _ = checkpoint.load_model(path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert loaded.cpe1.proj.weight is loaded.serial_blocks1[0].cpe.proj.weight


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
    checkpoint.save_checkpoint(
        Path({str(path)!r}), tensors, {{**{HEADER!r}, "step": i}}, {{"train_seconds": 1.0}}
    )
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
