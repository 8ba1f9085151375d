"""TensorBoard's data read back, and metrics.jsonl."""

import json
import threading

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from modeling.run.tracking import HISTOGRAM_SAMPLE, Tracker


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
    assert "TensorBoard" in line and "No space left on device" in line and str(tmp_path) in line
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 30


def test_an_error_of_metrics_jsonl_names_it(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.lines.close()
    tracker.lines = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(OSError, match="/dev/full"):
        tracker.record("epoch", step=1, train_loss=1.0)
    with pytest.raises(OSError, match="/dev/full"):
        tracker.close()
