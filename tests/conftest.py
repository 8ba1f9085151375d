"""Shared by the tests: scripts in-process, small image folders, a trained checkpoint and real images."""

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

# Several workers of pytest-xdist share the cores, and threads that wait for each other would be slow.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# No test may depend on the network. The tests about it start their own process.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# torch reads the number of threads when it is imported, so it comes after the lines above.
import torch

from modeling import cli, cost, evaluation, profiling, progression

NUM_THREADS = torch.get_num_threads()

cost.MATRIX_SECONDS, cost.MATRIX_SIDE = 0.01, (128, 128)  # profile.py measures it beside each model
cost.ROUND_SECONDS = 0.01  # evaluate.py times each model; no test looks at the times

# train.py ends with a picture of the curves, which takes most of a second. test_tracking draws it.
progression.curves = SimpleNamespace(draw_curves=lambda path, *_, **__: path.touch())

# Proofs that take long, and whose kind has a shorter test that stays: `make test` leaves them out, and
# `make test-all` runs them too. Each entry is the beginning of a test's id.
SLOW = (
    "test_features.py::test_as_many_views_as_epochs_are_bitwise_the_head_without_a_cache[bf16]",
    "test_features.py::test_each_view_is_computed_once_by_any_number_of_runs",
    "test_features.py::test_killed_and_resumed_it_ends_the_same",
    "test_features.py::test_two_processes_agree_with_one_whether_they_share_the_cache_or_not",
    "test_hub.py::test_a_failing_hub_is_one_line_within_a_minute[all-401",
    "test_hub.py::test_a_failing_hub_is_one_line_within_a_minute[all-500",
    "test_hub.py::test_other_models_online_and_offline[deit]",
    "test_hub.py::test_ranks_wait_for_a_slow_download_outside_of_any_collective",
    "test_hub.py::test_the_literal_command_online_and_offline",
    "test_lock.py::test_a_second_run_of_a_name_is_refused_and_the_first_ends_as_if_alone[resume]",
    "test_processes.py::test_a_stopped_job_resumed_is_bitwise_the_one_never_stopped[3]",
    "test_processes.py::test_a_rank_that_is_killed_comes_back_and_the_job_goes_on",
    "test_processes.py::test_accumulation_ends_in_the_same_weights_and_a_wrong_scale_does_not",
    "test_processes.py::test_any_number_of_processes_ends_in_the_same_weights[3]",
    "test_processes.py::test_evaluation_is_exact_on_any_number_of_images[3]",
    "test_processes.py::test_resuming_on_another_number_of_processes",
    "test_processes.py::test_two_machines_match_one_process",
    "test_resume.py::test_a_signal_saves_one_state_and_resume_ends_the_same[10-143]",
    "test_resume.py::test_a_signal_saves_one_state_and_resume_ends_the_same[15-143]",
    "test_resume.py::test_killed_at_random_moments_and_resumed_it_ends_the_same",
    "test_resume.py::test_stopped_in_the_loop_and_resumed_it_ends_the_same[attention dropout]",
    "test_scripts.py::test_every_script_runs_by_path_from_any_folder[export_data]",
    "test_scripts.py::test_every_script_runs_by_path_from_any_folder[sweep]",
    "test_scripts.py::test_the_launcher_trains_and_the_checkpoint_evaluates[cpu_bf16",
    "test_scripts.py::test_the_real_modules_are_found_in_the_root[cProfile train.py]",
    "test_scripts.py::test_the_real_modules_are_found_in_the_root[dynamo]",
    "test_train.py::test_compile_trains_the_same_weights",
    "test_train.py::test_each_model_overfits_real_images[resnet18]",
    "test_train.py::test_each_model_overfits_real_images[vit_scratch]",
    "test_train.py::test_vit_scratch_learns_at_224_pixels",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests. The longest file comes first, so that no worker waits for it at the end."""
    items.sort(key=lambda item: "test_processes.py" not in item.nodeid)
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(SLOW):
            item.add_marker(pytest.mark.slow)


ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("IMAGE_DATA", ROOT.parent / "shared" / "data"))


def load_script(name: str):
    """Load a script as a module whose name is not the script's own."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# The bodies of evaluate.py and profile.py are modules of the package.
scripts = SimpleNamespace(
    train=load_script("train"),
    evaluate=evaluation,
    profile=profiling,
    export_data=load_script("export_data"),
    sweep=load_script("sweep"),
)


def call(script: str, *argv) -> SimpleNamespace:
    """Run a script's main in this process: status, out, err."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.run(lambda: getattr(scripts, script).main([str(a) for a in argv]))
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def command(*argv, cwd=ROOT, env=None, timeout=200) -> subprocess.CompletedProcess:
    """Run a command as a user would, from a folder."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | (env or {})
    return subprocess.run(
        [str(a) for a in argv], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def assert_refused(result, *words: str, statuses=(2,)) -> None:
    """Exit status 2 and one line on standard error, without traceback, that holds the words."""
    status = result.status if hasattr(result, "status") else result.returncode
    err = result.err if hasattr(result, "err") else result.stderr
    assert status in statuses, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1, err
    for word in words:
        assert word in lines[0]


def make_image_folder(root: Path, counts: dict[str, dict[str, int]], size=(20, 16)) -> Path:
    """An ImageFolder of noise with a colour for each class: {split: {class: images}}."""
    rng = np.random.default_rng(0)
    for split, classes in counts.items():
        for number, (name, count) in enumerate(classes.items()):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (*size, 3)) + np.array(
                    [[(number * 60) % 176, (number * 110) % 176, (number * 30) % 176]]
                )
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def real_images(name: str) -> Path:
    """A folder of real images. The test is skipped where they are not."""
    if not (DATA / name).is_dir():
        pytest.skip(
            f"the real images {name} are not in {DATA}: set IMAGE_DATA to a folder that holds {name}/"
        )
    return DATA / name


@pytest.fixture(scope="session")
def cifar10() -> Path:
    return real_images("cifar10")


@pytest.fixture(scope="session")
def stl10_sample() -> Path:
    return real_images("stl10-sample")


@pytest.fixture(scope="session")
def clothing() -> Path:
    return real_images("clothing")


def newest_step(states: Path) -> int:
    """Return the step of the newest state in a folder, or 0. Another process may write and remove states."""
    return max((int(path.name[5:13]) for path in states.glob("step_*.safetensors")), default=0)


TINY = (
    "--model",
    "cnn_small",
    "--recipe",
    "reference",
    "--dataset",
    "digits",
    "--limit-train",
    96,
    "--limit-eval",
    40,
    "--batch-size",
    32,
)


@pytest.fixture(autouse=True)
def the_same_number_of_threads() -> Iterator[None]:
    """A script may change it. Sums on another number of threads differ in their last bits."""
    yield
    torch.set_num_threads(NUM_THREADS)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> SimpleNamespace:
    """A small run of cnn_small on digits: folder, best and final checkpoint, what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    result = call("train", *TINY, "--epochs", 3, "--output-dir", folder)
    assert result.status == 0, result.err
    best, final = (folder / "checkpoints" / f"cnn_small_{kind}.safetensors" for kind in ("best", "final"))
    return SimpleNamespace(folder=folder, best=best, final=final, out=result.out)
