"""sweep.py: several models and seeds, what a stopped sweep leaves, and the comparison at its end."""

import csv
import dataclasses
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, assert_refused, call, make_image_folder

import sweep
import train
from modeling.data.division import select_rows
from modeling.data.sources import load_source
from modeling.errors import UserError
from modeling.run import checkpoint
from modeling.stats.proportions import Interval

SMALL = ("--dataset", "digits", "--limit-train", 64, "--limit-eval", 40, "--batch-size", 32, "--epochs", 2)
SWEEP = ("--models", "cnn_small", "--seeds", 3, 4, *SMALL)


def trained_steps(monkeypatch) -> list[int]:
    """The steps that train.py takes from here on."""
    steps, step = [], train.train_step

    def counted(*args, **kwargs):
        steps.append(kwargs["step"])
        return step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", counted)
    return steps


def test_a_stopped_sweep_goes_on_where_it_was_and_ends_with_a_table_and_the_comparison(tmp_path, monkeypatch):
    steps = trained_steps(monkeypatch)
    finish_epoch = train.finish_epoch

    def stopped_in_the_second_run(run, *args):
        finish_epoch(run, *args)
        if run.settings.seed == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "finish_epoch", stopped_in_the_second_run)
    assert call("sweep", *SWEEP, "--output-dir", tmp_path).status == 130
    assert steps == [0, 1, 2, 3, 0, 1]
    monkeypatch.setattr(train, "finish_epoch", finish_epoch)
    words = map(str, (*SWEEP, "--output-dir", tmp_path))
    (row,) = rows = sweep.run_sweep(sweep.build_parser().parse_args(words))
    assert steps == [0, 1, 2, 3, 0, 1, 2, 3]
    assert (tmp_path / "traces" / "comparison.html").exists()
    assert {path.name for path in (tmp_path / "checkpoints").glob("*_best.safetensors")} == {
        "cnn_small_seed3_best.safetensors",
        "cnn_small_seed4_best.safetensors",
    }
    assert (row.name, row.seeds, row.epochs) == ("cnn_small", [3, 4], 2)
    assert row.interval.low < row.interval.value == pytest.approx(sum(row.accuracies) / 2)
    assert row.deviation == pytest.approx(abs(row.accuracies[0] - row.accuracies[1]) / 2**0.5)
    assert all(0 < minutes < 2 for minutes in row.minutes)
    heading, line = sweep.table(rows).splitlines()
    assert heading.split() == "model runs accuracy deviation 95 % interval balanced minutes".split()
    assert line.split()[:3] == ["cnn_small", "2", f"{row.interval.value:.4f}"]
    written = csv.DictReader((tmp_path / "traces" / "metrics.csv").open())
    assert row.balanced_accuracies == [float(line["balanced_accuracy"]) for line in written]
    assert dataclasses.replace(row, accuracies=[0.5]).deviation is None
    assert_refused(call("sweep", *SWEEP, "--lr", 0.5, "--output-dir", tmp_path), "other arguments: lr")


@pytest.mark.parametrize("flag", ["--model=cnn", "--seed=0", "--seed=3", "--run-name=x", "--sanity-check"])
def test_flags_that_the_sweep_sets_itself_are_refused(flag):
    assert_refused(call("sweep", "--models", "cnn", flag), flag.split("=")[0], "is not for a sweep")


def test_the_search_of_the_documents_runs(tmp_path, monkeypatch):
    """optuna is not installed, so a stand-in calls the function for one trial."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "search.md").read_text(), re.DOTALL)[1]

    class Study:
        def optimize(self, function, n_trials):
            trial = SimpleNamespace(number=7, suggest_float=lambda name, low, high, log: low)
            self.best_params = {"accuracy": function(trial)}

    optuna = SimpleNamespace(create_study=lambda direction: Study())
    train_model = train.train_model
    monkeypatch.setitem(sys.modules, "optuna", optuna)
    monkeypatch.setattr(
        train, "train_model", lambda **given: train_model(**given, limit_train=40, max_steps=1)
    )
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    header = checkpoint.read_header(tmp_path / "search/checkpoints/trial7_best.safetensors")
    assert header["arguments"]["lr"] == 1e-4


def test_time_to_accuracy_reads_the_epochs_of_a_process_and_stops_at_the_target(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import time_to_accuracy as benchmark

    lines = ["data 3", *(f"epoch {n}/3  step 9  validation loss 1.5 acc 0.{n}00  best" for n in (1, 2, 3))]
    script = f"for line in {lines}: print(line, flush=True)"
    points = benchmark.run(["-c", script])
    assert [accuracy for _, accuracy in points] == [0.1, 0.2, 0.3]
    assert benchmark.seconds_to(0.2, points) == points[1][0]
    assert benchmark.seconds_to(0.9, points) is None
    points = benchmark.run(["-c", f"{script}\nimport time; time.sleep(600)"], target=0.3)
    assert points[-1][1] == 0.3


def test_time_to_accuracy_gives_the_notebook_the_split_of_train(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import time_to_accuracy as benchmark

    folder = make_image_folder(tmp_path / "images", {"train": {"a": 20, "b": 20}})
    benchmark.write_split(folder, 3, tmp_path / "split.npz")
    split = np.load(tmp_path / "split.npz")
    assert (len(split["train"]), len(split["validation"])) == (36, 4)
    _, rows = select_rows(load_source(str(folder)), "validation", val_fraction=0.1, seed=3)
    assert split["validation"].tolist() == rows.tolist()


def test_every_row_of_the_results_table_is_a_command_that_parses(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import results

    row = sweep.Row(
        name="cnn_small",
        seeds=[2, 1],
        accuracies=[0.7, 0.8],
        balanced_accuracies=[0.5, 0.7],
        interval=Interval(0.75, 0.6, 0.9),
        minutes=[1.0, 2.0],
        epochs=10,
        commit="0123456789abcdef-dirty",
    )
    calls = []
    monkeypatch.setattr(sweep, "run_sweep", lambda args: calls.append(args) or [row])
    assert results.main(["--data", "folder", "--rows", "cnn_small-tuned", "--seeds", "1", "2"]) == 0
    (args,) = calls
    assert (args.models, args.recipe, args.dataset, args.seeds) == (["cnn_small"], "tuned", "folder", [1, 2])
    heading, _, *lines = capsys.readouterr().out.splitlines()[-2 - len(results.RESULTS) :]
    assert {line.count("|") for line in (heading, *lines)} == {len(results.COLUMNS) + 1}
    assert (
        "| 10 | 1 2 | 0.7500 ± 0.0707 | 0.6000 | 1.5 | 0123456-dirty |" in lines[1] and "not run" in lines[0]
    )
    assert "not measured here: needs ImageNet weights" in lines[-1]
    calls.clear()
    assert results.main(["--clothing", "photos"]) == 0
    assert {args.dataset for args in calls} == {"cifar10", "photos"} and len(calls) == 10
    with pytest.raises(UserError, match="--clothing FOLDER: cnn-clothing"):
        results.main(["--rows", "cnn-clothing", "cnn-tuned"])


def test_a_sweep_skips_the_bad_images_of_test_too(tmp_path):
    make_image_folder(tmp_path / "data", {"train": {"a": 8, "b": 8}, "test": {"a": 3, "b": 3}})
    (tmp_path / "data/test/a/bad.png").write_bytes(b"no image")
    words = ("--models", "cnn_small", "--seeds", 1, "--dataset", tmp_path / "data", "--epochs", 1)
    result = call("sweep", *words, "--batch-size", 4, "--skip-bad-images", "--output-dir", tmp_path)
    assert result.status == 0 and "1 images cannot be decoded" in result.out
