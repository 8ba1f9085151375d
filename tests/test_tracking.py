"""TensorBoard's data read back, and metrics.jsonl."""

import json
import threading

import numpy as np
import pytest
import torch
from conftest import TINY, assert_refused, call
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from modeling.data.resize import Preprocessing
from modeling.run import curves, pictures, tracking
from modeling.run.pace import Pace
from modeling.run.tracking import HISTOGRAM_SAMPLE, Tracker

METRICS = ("loss", "accuracy")


def test_scalars_and_histograms_can_be_read_back(tmp_path):
    tracker = Tracker(tmp_path)
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 3))
    model(torch.ones(1, 2)).sum().backward()
    model[1].bias.grad = None
    tracker.record("epoch", step=5, epoch=1, train_loss=2.5, validation_accuracy=0.75, learning_rate=0.01)
    tracker.histograms(model, 5)
    tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"epoch", "loss/train", "accuracy/validation", "learning_rate"}
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [(5, 2.5)]
    # Frozen parameters have no histogram.
    assert set(events.Tags()["histograms"]) == {"weights/1.weight", "weights/1.bias", "gradients/1.weight"}
    histogram = events.Histograms("weights/1.weight")[0].histogram_value
    assert histogram.num == 6
    assert histogram.sum == pytest.approx(model[1].weight.sum().item(), rel=1e-5)
    line = {
        "kind": "epoch",
        "step": 5,
        "epoch": 1,
        "train_loss": 2.5,
        "validation_accuracy": 0.75,
        "learning_rate": 0.01,
    }
    assert [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [line]


def test_lines_are_there_before_the_run_ends(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.record("epoch", step=1, train_loss=1.0)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    tracker.close()


def test_large_tensors_are_sampled(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.histograms(nn.Linear(2000, 2000, bias=False), 1)
    tracker.close()
    histogram = EventAccumulator(str(tmp_path)).Reload().Histograms("weights/weight")[0].histogram_value
    assert HISTOGRAM_SAMPLE / 2 <= histogram.num <= HISTOGRAM_SAMPLE * 2


def test_other_processes_write_nothing(tmp_path):
    tracker = Tracker(tmp_path / "x", enabled=False)
    tracker.record("epoch", step=1, train_loss=1.0)
    tracker.histograms(nn.Linear(2, 2), 1)
    tracker.close()
    assert not (tmp_path / "x").exists()


def test_the_scalars_of_two_models_have_the_same_tags(trained, tmp_path):
    other = call(
        "train",
        *TINY,
        "--model",
        "vit_scratch",
        "--patch-size",
        16,
        "--max-steps",
        2,
        "--output-dir",
        tmp_path,
    )
    assert other.status == 0, other.err
    folders = (trained.folder / "runs" / "cnn_small", tmp_path / "runs" / "vit_scratch")
    tags = [set(EventAccumulator(str(folder)).Reload().Tags()["scalars"]) for folder in folders]
    assert tags[0] == tags[1]


def test_without_a_tracker_there_is_still_metrics_jsonl(tmp_path):
    tracker = Tracker(tmp_path, report_to="none")
    tracker.record("epoch", step=1, train_loss=1.0)
    tracker.scalars({"speed": 3.0}, 1)
    tracker.image("images", np.zeros((2, 2, 3), np.uint8), 1)
    tracker.final({"lr": 0.1}, {"accuracy": 0.5}, 2)
    tracker.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused(package, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    result = call("train", *TINY, "--report-to", package, "--output-dir", tmp_path / "out")
    assert_refused(result, f"--report-to {package}", f"pip install {package}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_there_under_its_id_and_tells_no_step_twice(package, tmp_path, monkeypatch):
    told = []

    class Fake(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "fake", False, None

        def __init__(self, project, name, resume, config, id=None, dir=None):
            self.run_id = id or name
            assert resume == "allow" and config == {"lr": 0.1, "size": "(3, 4)"}

        def log(self, values, step):
            told.append((self.run_id, step, *values))

    monkeypatch.setattr(tracking, "TrackioTracker", Fake)
    monkeypatch.setattr(tracking, "WandBTracker", Fake)
    monkeypatch.setattr(tracking, "_started", lambda tracker: tracker)
    for steps in ((1, 2, 3), (2, 3, 4)):  # a state was saved after step 1
        tracker = Tracker(tmp_path, report_to=package, config={"lr": 0.1, "size": (3, 4)})
        for step in steps:
            tracker.scalars({"a": 1.0}, step)
            tracker.scalars({"b": 1.0}, step)
        tracker.lines.close()
    assert [entry[1:] for entry in told] == [(step, tag) for step in (1, 2, 3, 4) for tag in "ab"]
    assert len({entry[0] for entry in told}) == 1


def test_the_final_numbers_stand_beside_the_settings(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.final({"lr": 0.1, "model": "cnn", "size": (3, 4)}, {"test_accuracy": 0.5}, 7)
    tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("final/test_accuracy")] == [(7, 0.5)]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.summary_metadata)
    assert len(list(tmp_path.glob("events*"))) == 1  # and no run of its own


def test_pace_reads_the_steps_since_the_last_reading():
    pace = Pace()
    assert pace.read() == {}
    for norm, _ in zip((1.0, 3.0, float("inf")), pace.watch([["a"], ["b"], ["c"]]), strict=True):
        pace.add(8, torch.tensor(norm))
    values = pace.read()
    assert values["gradient_norm/mean"] == 2.0 and values["gradient_norm/largest"] == 3.0
    assert values["speed/images_per_second"] > 0 and 0 <= values["speed/data_wait_share"] <= 1
    assert pace.read() == {}


def test_the_grid_shows_the_images_that_the_model_sees():
    preprocessing = Preprocessing(image_size=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images = torch.rand(5, 3, 64, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    grid = pictures.image_grid((images - mean) / std, preprocessing)
    assert grid.shape == (2 * 64 + 2, 3 * 64 + 2 * 2, 3)
    second = torch.from_numpy(grid[:64, 66:130].copy()).permute(2, 0, 1)
    torch.testing.assert_close(second.float() / 255, images[1], atol=0.6 / 255, rtol=0)
    assert max(pictures.image_grid(torch.rand(64, 3, 224, 224), preprocessing).shape) <= 1000


def test_the_confusion_matrix_is_darkest_on_its_diagonal():
    labels = np.arange(40) % 4
    picture = pictures.confusion_picture(labels, labels, ["cat", "犬", "x" * 50, ""])
    cells = picture[pictures.MARGIN + 3 :: pictures.CELL, pictures.MARGIN + 3 :: pictures.CELL].sum(axis=2)
    assert (np.diag(cells) < 300).all() and (cells[~np.eye(4, dtype=bool)] == 765).all()
    many = np.arange(1000)
    assert pictures.confusion_picture(many, many, list(map(str, many))).shape == (1000, 1000, 3)


def test_curves_are_drawn_of_what_was_logged(tmp_path):
    tracker = Tracker(tmp_path, report_to="none")
    for epoch in (1, 2, 3):
        values = {f"{split}_{name}": 0.1 * epoch for split in ("train", "validation") for name in METRICS}
        tracker.record("epoch", step=epoch, epoch=epoch, **values)
    tracker.close()
    curves.draw_curves(tmp_path / "a.png", tmp_path / "metrics.jsonl", title="$x$ _{ %", best_epoch=2)
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.width > 800


@pytest.mark.parametrize("moment", ["at the start", "later"])
def test_without_room_for_tensorboard_there_is_one_line_and_metrics_jsonl(
    moment, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(28, "No space left on device")

    writer = "tensorboard.summary.writer.event_file_writer.RecordWriter.write"
    before = threading.excepthook
    if moment == "at the start":
        monkeypatch.setattr(writer, full)
    tracker = Tracker(tmp_path)
    monkeypatch.setattr(writer, full)
    for step in range(30):
        tracker.record("epoch", step=step, train_loss=1.0)
        tracker.histograms(nn.Linear(2, 2), step)
    assert tracker.flush() > 0
    tracker.close()
    assert threading.excepthook is before
    (line,) = capsys.readouterr().err.splitlines()
    assert "tensorboard" in line and "No space left on device" in line and str(tmp_path) in line
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 30


def test_an_error_of_metrics_jsonl_names_it(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.lines.close()
    tracker.lines = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(OSError, match="/dev/full"):
        tracker.record("epoch", step=1, train_loss=1.0)
    with pytest.raises(OSError, match="/dev/full"):
        tracker.close()
