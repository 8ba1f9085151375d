"""The profile against arithmetic: FLOPs, memory, the trace."""

import csv
import json
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import assert_refused, call
from test_page import Reader

from modeling import cost, models, profile_page, profiling, recipes, step_profile, trace
from modeling.data.images import decode
from modeling.data.resize import Preprocessing
from modeling.data.sources import load_source
from modeling.engine import StepSettings
from modeling.trace import Operator


def build(name, size):
    recipe = recipes.get_recipe(name, size, "reference")
    args = models.model_arguments(name, recipe, image_size=size, patch_size=None, head_dropout=None)
    return models.build_model(name, num_classes=10, image_size=size, **args)


def test_flops_are_two_for_each_multiply_add():
    cnn_small = 2 * (32 * 27 * 32 * 32 + 64 * 32 * 9 * 16 * 16 + 4096 * 128 + 128 * 10)
    assert cost.forward_flops(build("cnn_small", 32), 32) == cnn_small
    n, d = 65, 128
    block = n * d * 3 * d + 2 * n * n * d + n * d * d + 2 * n * d * 4 * d
    vit = 2 * (64 * d * 48 + 6 * block + d * 10)
    assert cost.forward_flops(build("vit_scratch", 32), 32) == vit
    # timm's fused attention counts too: 1.26 GMACs is ViT-Tiny's published figure
    assert cost.forward_flops(build("vit", 224), 224) == pytest.approx(2 * 1.26e9, rel=0.03)


def test_the_backward_pass_counts_twice_the_forward_pass_but_for_the_first_layer():
    first = 2 * 32 * 27 * 32 * 32  # no gradient of the image is needed
    model = build("cnn_small", 32)
    assert cost.step_flops(model, 32) == 3 * cost.forward_flops(model, 32) - first
    frozen = build("vit", 224)  # only the head trains
    assert cost.step_flops(frozen, 224) == pytest.approx(cost.forward_flops(frozen, 224), rel=1e-3)


def test_counting_leaves_the_model_as_it_was():
    model = build("cnn", 32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost.forward_flops(model, 32)
    cost.step_flops(model, 32)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def chrome_trace(path) -> list[dict]:
    """The events of a trace, which must be strict JSON with the fields that Perfetto's importer reads."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    events = json.loads(path.read_text(), parse_constant=refuse)["traceEvents"]
    for event in events:
        assert event["ph"] in "BEXMiICsftP" and isinstance(event["name"], str), event
        assert event["ph"] == "M" or isinstance(event["ts"], int | float), event
        assert event["ph"] != "X" or event["dur"] >= 0, event
        assert "pid" in event and "tid" in event, event
    return events


def rows_of(models, sizes=(16, 32, 64), precisions=("no", "bf16")) -> list[dict]:
    """Invented rows of a profile: model number k is k times as slow as the first."""
    rows = []
    for number, model in enumerate(models, start=1):
        for precision in precisions:
            for size in sizes:
                row = dict.fromkeys(step_profile.COLUMNS, 1.0)
                row |= {"model": model, "precision": precision, "batch_size": size, "image_size": 32}
                row |= {"images_per_second": 10.0 * size / number, "peak_memory_mb": 2.0 * size}
                row |= {f"{phase}_share": 0.25 for phase in step_profile.PHASES}
                row |= {"matrix_share": 0.5, "costliest_operators": [Operator("aten::mm", 0.5, 2.0)] * 5}
                rows.append(row)
    return rows


def test_the_page_compares_models_batch_sizes_and_precisions():
    html = profile_page.render(rows_of(["cnn", "vit"]), "cpu, 2 threads")
    reader = Reader(html)
    assert "cnn trains 2.0 times as fast as vit" in reader.text
    assert "cnn fp32 trains 4.0 times as fast" in reader.text
    sections = [section["id"] for section in reader.all("section")]
    assert sections == ["speed", "batch", "phases", "operators", "machine"]
    assert {a["href"][1:] for a in reader.all("a")} <= set(sections)
    assert all(head.get("scope") for head in reader.all("th"))
    (policy,) = (m["content"] for m in reader.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy and not reader.all("script")
    assert "http://" not in html and "https://" not in html and "url(" not in html


@pytest.mark.parametrize(
    "rows",
    [
        rows_of(["cnn"], sizes=[32], precisions=["no"]),
        rows_of(["<script>alert(1)</script>", "{{ 7*7 }}", *"cdefgh"]),
        rows_of(["a", "b"], sizes=[1, 2, 3, 4, 5, 6, 1024], precisions=["no", "bf16", "fp16"]),
    ],
    ids=["one row", "hostile names", "many sizes"],
)
def test_the_page_stands_for_any_rows(rows):
    reader = Reader(profile_page.render(rows, "cpu"))
    assert rows[0]["model"] in reader.text and not reader.all("script")


def test_profile_py_compares_models_and_writes_what_it_says(tmp_path):
    result = call(
        "profile",
        "--models",
        "cnn_small",
        "vit_scratch",
        "--recipe",
        "reference",
        "--num-steps",
        4,
        "--batch-sizes",
        8,
        "--output-dir",
        tmp_path,
    )
    assert result.status == 0, result.err
    assert "USDT" not in result.err
    traces = tmp_path / "traces"
    with (traces / "profile_comparison.csv").open(newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"cnn_small", "vit_scratch"}
    for name, parameters in (("cnn_small", 545_098), ("vit_scratch", 1_205_898)):
        texts = ("model", "precision", "costliest_operators")
        row = {key: float(value) for key, value in rows[name].items() if key not in texts}
        assert tuple(rows[name]) == profiling.COLUMNS
        assert row["parameters"] == row["trainable_parameters"] == parameters
        assert 0 < row["step_ms_median"] <= row["step_ms_p95"]
        assert row["images_per_second"] == pytest.approx(8 / row["step_ms_median"] * 1e3, rel=1e-6)
        shares = [row[f"{phase}_share"] for phase in step_profile.PHASES]
        assert min(shares) > 0 and sum(shares) == pytest.approx(1)
        assert row["matrix_share"] == pytest.approx(
            row["step_gflops"] * row["images_per_second"] / row["matrix_gflops_per_second"]
        )
        assert len(rows[name]["costliest_operators"].split("; ")) == 5
        # weights, gradients, Adam's two moments, and activations
        assert 4 * 4 * parameters / 1e6 < row["peak_memory_mb"] < 20 * 4 * parameters / 1e6
        events = chrome_trace(traces / f"profiler_trace_{name}.json")
        steps = [event["name"] for event in events if event["name"] in step_profile.PHASES]
        assert set(steps) == set(step_profile.PHASES)
        assert steps.count("optimizer") == profiling.TRACED_STEPS
        assert any("convolution" in event["name"] for event in events)
        assert sum(event["name"] == "Optimizer.step#Adam.step" for event in events) == profiling.TRACED_STEPS
        assert "aten::convolution_backward" in (traces / f"profiler_stats_{name}.txt").read_text()
    comparison = (traces / "profile_comparison.txt").read_text()
    assert comparison in result.out
    assert len(comparison.split("\n\n")[0].splitlines()) == 4
    assert "vit_scratch, batch 8, no: " in comparison
    html = (traces / "profile_comparison.html").read_text()
    for row in rows.values():
        assert f"{float(row['images_per_second']):,.1f}" in html
    assert max(map(len, comparison.split("\n\n")[0].splitlines())) < 130
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
        "--batch-sizes 5000",
    )
    assert_refused(call("profile", "--precisions", "int8"), "--precisions")


@pytest.mark.parametrize("written", [None, "", '{"traceEvents": ['])
def test_a_trace_that_is_not_whole_is_an_error_and_leaves_nothing(written, tmp_path):
    """As on a full disk, of which the profiler says nothing."""

    class Profiler:
        def export_chrome_trace(self, path):
            if written is not None:
                Path(path).write_text(written)

    with pytest.raises(OSError, match="not whole: is the disk full"):
        trace._write_trace(Profiler(), tmp_path / "trace.json")
    assert not list(tmp_path.iterdir())
