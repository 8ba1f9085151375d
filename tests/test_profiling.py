"""The profile against arithmetic: FLOPs, memory, the trace."""

import csv
import json
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import assert_refused, call

from modeling import models, profiling, recipes
from modeling.data.images import decode
from modeling.data.resize import Preprocessing
from modeling.data.sources import load_source
from modeling.engine import StepSettings


def build(name, size):
    args = models.model_arguments(
        name, recipes.get_recipe(name, size), image_size=size, patch_size=None, head_dropout=None
    )
    return models.build_model(name, num_classes=10, image_size=size, **args)


def test_flops_are_two_for_each_multiply_add():
    cnn_small = 2 * (32 * 27 * 32 * 32 + 64 * 32 * 9 * 16 * 16 + 4096 * 128 + 128 * 10)
    assert profiling.forward_flops(build("cnn_small", 32), 32) == cnn_small
    n, d = 65, 128
    block = n * d * 3 * d + 2 * n * n * d + n * d * d + 2 * n * d * 4 * d
    vit = 2 * (64 * d * 48 + 6 * block + d * 10)
    assert profiling.forward_flops(build("vit_scratch", 32), 32) == vit
    # timm's fused attention counts too: 1.26 GMACs is ViT-Tiny's published figure
    assert profiling.forward_flops(build("vit", 224), 224) == pytest.approx(2 * 1.26e9, rel=0.03)


def test_the_mode_is_left_as_it_was():
    model = build("cnn", 32).train()
    profiling.forward_flops(model, 32)
    assert model.training


def test_profile_py_compares_models_and_writes_what_it_says(tmp_path):
    result = call(
        "profile",
        "--models",
        "cnn_small",
        "vit_scratch",
        "--num-steps",
        4,
        "--batch-size",
        8,
        "--output-dir",
        tmp_path,
    )
    assert result.status == 0, result.err
    traces = tmp_path / "traces"
    with (traces / "profile_comparison.csv").open(newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"cnn_small", "vit_scratch"}
    for name, parameters in (("cnn_small", 545_098), ("vit_scratch", 1_205_898)):
        row = {key: float(value) for key, value in rows[name].items() if key != "model"}
        assert tuple(rows[name]) == profiling.COLUMNS
        assert row["parameters"] == row["trainable_parameters"] == parameters
        assert 0 < row["step_ms_median"] <= row["step_ms_p95"]
        assert row["images_per_second"] == pytest.approx(8 / row["step_ms_median"] * 1e3, rel=1e-6)
        assert 0 < row["data_share"] <= 1
        # weights, gradients, Adam's two moments, and activations
        assert 4 * 4 * parameters / 1e6 < row["peak_memory_mb"] < 20 * 4 * parameters / 1e6
        events = json.loads((traces / f"profiler_trace_{name}.json").read_text())["traceEvents"]
        assert any("convolution" in event["name"] for event in events)
        assert sum(event["name"] == "Optimizer.step#Adam.step" for event in events) == profiling.TRACED_STEPS
        assert "aten::convolution_backward" in (traces / f"profiler_stats_{name}.txt").read_text()
    comparison = (traces / "profile_comparison.txt").read_text()
    assert comparison in result.out
    assert len(comparison.splitlines()) == 4
    assert max(map(len, comparison.splitlines())) < 130
    assert not [path for path in traces.iterdir() if path.name.startswith(".")]


def test_memory_grows_with_the_batch(tmp_path):

    images = decode(load_source("digits"), "train", torch.arange(64), image_size=32, num_workers=1)
    step_settings = StepSettings(Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3))
    accelerator = accelerate.Accelerator(cpu=True)
    peaks = [
        profiling.profile_model(
            "cnn_small",
            build("cnn_small", 32),
            images,
            step_settings,
            accelerator=accelerator,
            batch_size=size,
            num_steps=2,
        )["peak_memory_mb"]
        for size in (8, 32)
    ]
    # the first convolution's output, kept for its backward: 32 x 32 x 32 floats an image
    assert peaks[1] - peaks[0] > 24 * 32 * 32 * 32 * 4 / 1e6


def test_bad_input(tmp_path):
    assert_refused(call("profile", "--models", "vgg", "--output-dir", tmp_path), "'vgg'", "cnn_small")
    assert_refused(call("profile", "--num-steps", "0"), "--num-steps")
    assert_refused(call("profile", "--dataset", tmp_path / "absent"), "absent")
    assert_refused(
        call("profile", "--models", "cnn", "--batch-size", 5000, "--output-dir", tmp_path),
        "--batch-size 5000",
    )


@pytest.mark.parametrize("written", [None, "", '{"traceEvents": ['])
def test_a_trace_that_is_not_whole_is_an_error_and_leaves_nothing(written, tmp_path):
    """As on a full disk, of which the profiler says nothing."""

    class Profiler:
        def export_chrome_trace(self, path):
            if written is not None:
                Path(path).write_text(written)

    with pytest.raises(OSError, match="not whole: is the disk full"):
        profiling._write_trace(Profiler(), tmp_path / "trace.json")
    assert not list(tmp_path.iterdir())
