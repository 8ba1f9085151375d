"""sweep.py: several models and seeds, what a stopped sweep leaves, and the comparison at its end."""

import pytest
from conftest import assert_refused, call

import sweep
import train

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
    result = call("sweep", *SWEEP, "--output-dir", tmp_path)
    assert result.status == 0, result.err
    assert steps == [0, 1, 2, 3, 0, 1, 2, 3]
    assert (tmp_path / "traces" / "comparison.html").exists()
    assert {path.name for path in (tmp_path / "checkpoints").glob("*_best.safetensors")} == {
        "cnn_small_seed3_best.safetensors",
        "cnn_small_seed4_best.safetensors",
    }
    heading, line = result.out.splitlines()[-3:-1]
    assert heading.split() == "model runs accuracy deviation 95 % interval minutes".split()
    assert line.split()[:2] == ["cnn_small", "2"]
    assert_refused(call("sweep", *SWEEP, "--lr", 0.5, "--output-dir", tmp_path), "other arguments: lr")


def test_the_rows_of_a_sweep_are_its_runs(tmp_path):
    words = [str(word) for word in (*SWEEP, "--seeds", 3, "--output-dir", tmp_path)]
    (row,) = sweep.run_sweep(sweep.build_parser().parse_args(words))
    assert (row.name, row.seeds, row.epochs, row.deviation) == ("cnn_small", [3], 2, None)
    assert row.interval.low < row.accuracies[0] == row.interval.value < row.interval.high
    assert 0 < row.minutes[0] < 1


@pytest.mark.parametrize("flag", ["--model=cnn", "--seed=3", "--run-name=x", "--sanity-check"])
def test_flags_that_the_sweep_sets_itself_are_refused(flag):
    assert_refused(call("sweep", "--models", "cnn", flag), flag.split("=")[0], "is not for a sweep")
