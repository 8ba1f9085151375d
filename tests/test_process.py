"""In a notebook a run puts back what it changes in the process, and interrupts do not end that."""

import os
import random
import signal
import sys
import threading
import time

import accelerate
import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import scripts
from huggingface_hub import constants
from huggingface_hub import utils as hub_utils

from modeling.data.images import Images
from modeling.data.resize import Preprocessing
from modeling.engine import StepSettings, evaluate_model
from modeling.models import build_model
from modeling.profiling import profile_model

SMALL = dict(
    model="cnn_small", dataset="digits", limit_train=32, limit_eval=16, batch_size=32, max_steps=1, epochs=1
)


def process_state() -> dict:
    """All that a library could change for the rest of the process."""
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "TF32": torch.backends.cuda.matmul.allow_tf32,
        "cuDNN": torch.backends.cudnn.benchmark,
        "torch's generator": torch.get_rng_state().tolist(),
        "numpy's generator": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "Python's generator": random.getstate(),
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "thread errors": threading.excepthook,
        "environment": {name: text for name, text in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "output": sys.stdout,
        "offline": constants.HF_HUB_OFFLINE,
        "xet": constants.HF_HUB_DISABLE_XET,
        "hub's log": hub_utils.logging.get_verbosity(),
        "datasets' log": datasets.logging.get_verbosity(),
        "datasets' bars": datasets.utils.are_progress_bars_disabled(),
        "umask": os.umask(os.umask(0o022)),
    }


@pytest.fixture
def odd_process():
    """A process with odd settings, which are put back after the test."""
    generator = torch.get_rng_state()
    os.umask(0o022)
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    datasets.enable_progress_bars()
    yield process_state()
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.set_rng_state(generator)
    AcceleratorState._reset_state(reset_partial_state=True)


def small_images() -> tuple[Images, StepSettings]:
    rows = torch.arange(40)
    pixels = torch.zeros(40, 3, 16, 16, dtype=torch.uint8)
    images = Images(pixels, rows, torch.full((40, 2), 16), rows % 2, rows, ["a", "b"])
    return images, StepSettings(Preprocessing(16, (0.5,) * 3, (0.5,) * 3))


def test_the_python_api_leaves_the_process_as_it_was(odd_process, tmp_path):
    own = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    scripts.train.train_model(**SMALL, num_threads=1, deterministic=True, output_dir=tmp_path)
    assert process_state() == odd_process
    assert (own.mixed_precision, own.device.type) == ("bf16", "cpu")
    with pytest.raises(ValueError, match="no dataset"):
        scripts.train.train_model(**SMALL | {"dataset": "no/such/thing"}, num_threads=1)
    assert process_state() == odd_process
    images, step_settings = small_images()
    model = build_model("cnn_small", num_classes=2, image_size=16)
    torch.set_num_threads(1)
    odd_process = process_state()  # the model's weights were drawn
    profile_model("tiny", model, images, step_settings, batch_size=8, num_steps=1)
    evaluate_model(model, images, step_settings.preprocessing)
    assert process_state() == odd_process


def test_a_second_interrupt_in_a_notebook_is_an_exception_and_the_process_lives(tmp_path, monkeypatch):
    """The first one is seen at the end of a step. In a step that lasts, the second one ends it at once."""

    def slow(*_, **__):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        raise AssertionError("the second interrupt was not seen")

    before = process_state()
    monkeypatch.setattr("modeling.run.preemption.SAME_SIGNAL_SECONDS", 0.05)
    monkeypatch.setattr(scripts.train, "train_step", slow)
    with pytest.raises(KeyboardInterrupt):
        scripts.train.train_model(**SMALL, output_dir=tmp_path)
    assert process_state() == before
    monkeypatch.undo()
    scripts.train.train_model(**SMALL, output_dir=tmp_path)  # nothing holds the run's lock


def test_a_state_that_cannot_be_saved_leaves_the_handlers_as_they_were(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.zeros(3, dtype=torch.float64)

    before = process_state()
    monkeypatch.setattr(scripts.train, "train_step", stop)
    monkeypatch.setattr("modeling.run.state.States.save", full)
    with pytest.raises(OSError, match="No space"):
        scripts.train.train_model(**SMALL, output_dir=tmp_path)
    assert process_state() == before
