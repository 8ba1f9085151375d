"""One process, several and accumulation compute the same. A job of several is stopped and resumed exactly."""

import csv
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import DATA, ROOT, call, command, newest_step
from sklearn import metrics as sklearn_metrics
from test_resume import assert_no_step_twice, assert_same_outcome

from modeling.run import resume
from modeling.run.files import RunFiles
from modeling.run.launch import check_shared_folder

IMAGES = DATA / "cifar10" if (DATA / "cifar10").is_dir() else "digits"
# Runs the script of argv[1] once for each list of arguments in argv[2]; vit_scratch without its dropout.
WORKER = """
import dataclasses, importlib, json, sys
sys.path.insert(0, ".")
from modeling import cli, recipes
for key, recipe in list(recipes.REFERENCE.items()):
    if "dropout" in recipe.model_args:
        model_args = {**recipe.model_args, "dropout": 0.0, "attention_dropout": 0.0}
        recipes.REFERENCE[key] = dataclasses.replace(recipe, model_args=model_args)
#before
name = {"evaluate": "modeling.evaluation"}.get(sys.argv[1], sys.argv[1])
script = importlib.import_module(name)
sys.argv[0], calls = sys.argv[1] + ".py", json.loads(sys.argv[2])
sys.exit(cli.run(lambda: max(script.main(argv) or 0 for argv in calls)))
"""


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def start_rank(
    rank: int, world_size: int, port: str, script: str, *calls, before: str = "", **environment
) -> subprocess.Popen:
    """A process that is one of a launcher's, of one thread; it runs the code `before` first."""
    env = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    env |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | environment
    argv = [
        sys.executable,
        "-c",
        WORKER.replace("#before", before),
        script,
        json.dumps([[str(a) for a in one] for one in calls]),
    ]
    return subprocess.Popen(
        argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_ranks(world_size: int, script: str, *calls) -> list[subprocess.Popen]:
    port = free_port()
    return [start_rank(rank, world_size, port, script, *calls) for rank in range(world_size)]


def finish(processes: list[subprocess.Popen], status: int = 0) -> list[tuple[str, str]]:
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), outputs
    return outputs


def run_ranks(world_size: int, script: str, *calls) -> list[tuple[str, str]]:
    return finish(start_ranks(world_size, script, *calls))


def weights(folder: Path) -> torch.Tensor:
    (path,) = (folder / "checkpoints").glob("*_final.safetensors")
    return torch.cat(
        [value.double().flatten() for _, value in sorted(safetensors.torch.load_file(path).items())]
    )


# ---- the same result -----------------------------------------------------------------------------

# 202 images in batches of 16 leave 10; three processes share 16 as 6, 5, 5. 4 epochs are 52 steps.
SAME = (
    "--dataset",
    IMAGES,
    "--limit-train",
    202,
    "--limit-eval",
    50,
    "--batch-size",
    16,
    "--epochs",
    4,
    "--optimizer",
    "sgd",
    "--lr",
    0.05,
)
SAME += ("--augment", "standard", "--mixup", 0.4, "--num-threads", 1)
# Now and then the last bit decides which value of a pool is the maximum. Flat areas of digits have many ties.
TOLERANCE = {"cnn_small": 1e-2 if IMAGES == "digits" else 1e-3, "vit_scratch": 1e-5}
MODELS = {
    "cnn_small": ("--model", "cnn_small", "--recipe", "reference"),
    "vit_scratch": ("--model", "vit_scratch", "--recipe", "reference", "--patch-size", 8),
}


@functools.cache
def alone(folder: Path, model: str, *flags) -> Path:
    """The run of one process, with the patched recipe too."""
    folder = folder / f"{model}{''.join(map(str, flags))}"
    run_ranks(1, "train", (*MODELS[model], *SAME, *flags, "--output-dir", folder))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("alone")


def distance(folder: Path, reference: Path) -> float:
    return float((weights(folder) - weights(reference)).norm() / weights(reference).norm())


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes_ends_in_the_same_weights(place, world_size, tmp_path):
    flags = [(*MODELS[model], *SAME, "--output-dir", tmp_path / model) for model in MODELS]
    outputs = run_ranks(world_size, "train", *flags)
    assert (
        f"batch      16 = processes {world_size} x accumulation 1 x micro-batch {-(-16 // world_size)}"
        in outputs[0][0]
    )
    assert all(out == "" for out, _ in outputs[1:]), "only the main process speaks"
    for model in MODELS:
        assert distance(tmp_path / model, alone(place, model)) < TOLERANCE[model]
        lines = [
            (folder / "runs" / model / "metrics.jsonl").read_text()
            for folder in (tmp_path / model, alone(place, model))
        ]
        ours, theirs = ([json.loads(line) for line in text.splitlines()] for text in lines)
        for a, b in zip(ours, theirs, strict=True):
            losses = {name: value for name, value in b.items() if name.endswith("_loss")}
            assert losses
            assert {name: a[name] for name in losses} == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_accumulation_ends_in_the_same_weights_and_a_wrong_scale_does_not(place, model, tmp_path):
    flags = (*MODELS[model], *SAME)
    run_ranks(
        1, "train", (*flags, "--gradient-accumulation-steps", 3, "--output-dir", tmp_path / "accumulated")
    )
    assert distance(tmp_path / "accumulated", alone(place, model)) < TOLERANCE[model]
    # under SGD a gradient k times too large is a learning rate k times too large
    run_ranks(1, "train", (*flags, "--lr", 0.05 * 1.03, "--output-dir", tmp_path / "scaled"))
    assert distance(tmp_path / "scaled", alone(place, model)) > 1e-3


@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluation_is_exact_on_any_number_of_images(place, world_size, tmp_path):
    checkpoint = alone(place, "cnn_small") / "checkpoints" / "cnn_small_final.safetensors"
    counts = (109, 1000, 4999) if IMAGES != "digits" else (109, 200, 358)
    flags = [("--ckpt", checkpoint, "--limit-eval", n, "--num-threads", 1) for n in counts]
    run_ranks(
        world_size,
        "evaluate",
        *((*one, "--output-dir", tmp_path / str(n)) for n, one in zip(counts, flags, strict=True)),
    )
    for n, one in zip(counts, flags, strict=True):
        reference = tmp_path / f"{n}_alone"
        assert call("evaluate", *one, "--output-dir", reference).status == 0
        ours, theirs = (
            list(csv.DictReader((folder / "traces" / "predictions_cnn_small.csv").open()))
            for folder in (tmp_path / str(n), reference)
        )
        assert len(ours) == n
        assert ours == theirs
        (row,) = csv.DictReader((tmp_path / str(n) / "traces" / "metrics.csv").open())
        true, predicted = ([r[column] for r in ours] for column in ("true", "predicted"))
        assert int(row["num_samples"]) == n
        assert float(row["accuracy"]) == pytest.approx(
            sklearn_metrics.accuracy_score(true, predicted), abs=1e-9
        )
        for name in ("macro", "weighted"):
            expected = sklearn_metrics.f1_score(
                true, predicted, average=name, labels=sorted(set(true)), zero_division=0
            )
            assert float(row[f"{name}_f1"]) == pytest.approx(expected, abs=1e-9)


# ---- stopped and resumed -------------------------------------------------------------------------

RUN = (
    "--dataset",
    IMAGES,
    "--limit-train",
    100,
    "--limit-eval",
    40,
    "--batch-size",
    16,
    "--epochs",
    3,
    "--num-threads",
    1,
)
RUN += (
    *MODELS["cnn_small"],
    "--head-dropout",
    0.5,
    "--ema",
    0.9,
    "--mixup",
    0.4,
    "--gradient-accumulation-steps",
    2,
)


@functools.cache
def whole(folder: Path, world_size: int, *flags) -> Path:
    folder = folder / f"{world_size}{''.join(map(str, flags))}"
    run_ranks(world_size, "train", (*RUN, *flags, "--output-dir", folder))
    return folder


def wait_for_step(folder: Path, step: int, *processes: subprocess.Popen) -> None:
    states = folder / "checkpoints" / "cnn_small_state"
    while newest_step(states) < step and all(process.poll() is None for process in processes):
        time.sleep(0.005)
    assert newest_step(states) >= step, [
        process.communicate() for process in processes if process.poll() is not None
    ]


@pytest.mark.parametrize(
    "world_size, flags", [(2, ("--mixed-precision", "bf16")), (3, ())], ids=["2 in bf16", "3"]
)
def test_a_stopped_job_resumed_is_bitwise_the_one_never_stopped(place, world_size, flags, tmp_path):
    command_line = (*RUN, *flags, "--output-dir", tmp_path, "--checkpoint-every", 1)
    processes = start_ranks(world_size, "train", command_line)
    wait_for_step(tmp_path, 5, *processes)
    processes[-1].send_signal(signal.SIGTERM)  # to one rank that is not the main one
    outputs = finish(processes, status=143)
    assert "SIGTERM: a state is saved" in outputs[0][1]
    stopped = newest_step(tmp_path / "checkpoints" / "cnn_small_state")
    processes = start_ranks(world_size, "train", (*command_line, "--resume"))
    wait_for_step(tmp_path, stopped + 3, *processes)
    for process in processes:
        process.kill()
        process.communicate()
    outputs = run_ranks(world_size, "train", (*command_line, "--resume"))
    assert "Resuming 'cnn_small' after step" in outputs[0][0]
    assert_same_outcome(tmp_path, whole(place, world_size, *flags))
    assert_no_step_twice(tmp_path)


def test_resuming_on_another_number_of_processes(place, tmp_path):
    flags = (*MODELS["cnn_small"], *SAME, "--output-dir", tmp_path)
    processes = start_ranks(2, "train", (*flags, "--checkpoint-every", 1))
    wait_for_step(tmp_path, 20, *processes)
    processes[0].send_signal(signal.SIGUSR1)
    finish(processes, status=143)
    run_ranks(1, "train", (*flags, "--resume"))
    assert distance(tmp_path, alone(place, "cnn_small")) < TOLERANCE["cnn_small"]
    last = [
        json.loads((folder / "runs/cnn_small/metrics.jsonl").read_text().splitlines()[1])
        for folder in (tmp_path, alone(place, "cnn_small"))
    ]
    assert last[0]["train_loss"] == pytest.approx(last[1]["train_loss"], rel=1e-3), (
        "the sums of a half-done epoch go with it"
    )


LAUNCH = (
    Path(sys.executable).parent / "accelerate",
    "launch",
    "--config_file",
    ROOT / "accelerate_configs" / "multi_cpu.yaml",
)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
def test_a_rank_that_is_killed_comes_back_and_the_job_goes_on(place, tmp_path):
    """Under the launcher, with nobody's help."""
    argv = [
        *LAUNCH,
        "--main_process_port",
        free_port(),
        "--max_restarts",
        "3",
        ROOT / "train.py",
        *RUN,
        "--checkpoint-every",
        "1",
    ]
    argv = [str(a) for a in (*argv, "--output-dir", tmp_path)]
    launcher = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, 4, launcher)
    os.kill(children(launcher.pid)[-1], signal.SIGKILL)
    out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, err
    assert len(re.findall("Resuming 'cnn_small' after step", out)) == 1
    assert "hardware   cpu, 2 processes of 1 threads" in out
    assert_same_outcome(tmp_path, whole(place, 2))
    assert_no_step_twice(tmp_path)


def test_two_machines_match_one_process(place, tmp_path):
    port = free_port()
    argv = [
        *LAUNCH,
        "--num_machines",
        "2",
        "--num_processes",
        "2",
        "--main_process_ip",
        "127.0.0.1",
        "--main_process_port",
        port,
    ]
    launchers = [
        subprocess.Popen(
            [
                str(a)
                for a in (
                    *argv,
                    "--machine_rank",
                    rank,
                    ROOT / "train.py",
                    *MODELS["cnn_small"],
                    *SAME,
                    "--output-dir",
                    tmp_path,
                )
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = finish(launchers)
    assert "batch      16 = processes 2" in outputs[0][0]
    assert outputs[1][0] == ""
    assert distance(tmp_path, alone(place, "cnn_small")) < TOLERANCE["cnn_small"]


# ---- what is refused -----------------------------------------------------------------------------


def test_a_bad_launch_is_one_line(tmp_path):
    result = command(
        *LAUNCH,
        "--main_process_port",
        free_port(),
        ROOT / "train.py",
        "--dataset",
        "digits",
        "--batch-size",
        1,
        cwd=tmp_path,
    )
    assert result.returncode == 1, "the launcher makes 1 of 2"
    assert len(re.findall("train.py: error: --batch-size 1 is shared by 2 processes", result.stderr)) == 1, (
        result.stderr
    )


def test_processes_that_disagree_are_refused(tmp_path):
    flags = (
        "--model",
        "cnn_small",
        "--dataset",
        "digits",
        "--limit-train",
        40,
        "--max-steps",
        1,
        "--output-dir",
        tmp_path,
    )
    port = free_port()
    processes = [start_rank(rank, 2, port, "train", (*flags, *("--resume",) * rank)) for rank in range(2)]
    for _, err in finish(processes, status=2):
        assert "error: the processes have different arguments or images" in err
    assert not (tmp_path / "checkpoints").exists()


def test_a_validation_loss_that_is_not_finite_ends_every_process_with_one_line(tmp_path):
    flags = (*MODELS["cnn_small"], "--dataset", "digits", "--limit-train", 32, "--limit-eval", 21)
    flags += ("--lr", "1e36", "--epochs", 1, "--output-dir", tmp_path)
    for _, err in finish(start_ranks(2, "train", flags), status=1):
        assert "error: the validation loss was not finite: use a lower --lr" in err
        assert "Traceback" not in err


def test_the_output_folder_must_be_shared(tmp_path):
    class Two:
        num_processes, is_main_process, device = 2, False, torch.device("cpu")
        gather = staticmethod(lambda tensor: tensor)
        wait_for_everyone = staticmethod(lambda: None)

    with pytest.raises(ValueError, match="all machines share"):
        check_shared_folder(Two, tmp_path)


def test_processes_that_find_different_states_are_refused(tmp_path):
    class Two:
        is_main_process, device = False, torch.device("cpu")
        gather = staticmethod(lambda tensor: torch.cat([tensor, tensor + 1]))

    states = SimpleNamespace(accelerator=Two, restored_digest=0, folder=tmp_path, restore=lambda **_: None)
    with pytest.raises(ValueError, match="found different states"):
        resume.restore_or_begin(states, RunFiles(tmp_path, "run"), resume=True, force=False)
