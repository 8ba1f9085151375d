"""What a run changes in its process, and how a process that goes on gets it back."""

import contextlib
import os
import sys
from collections.abc import Iterator

import datasets
import torch
from accelerate.state import AcceleratorState, PartialState

from modeling import hub


@contextlib.contextmanager
def process_as_it_was() -> Iterator[None]:
    """Leave threads, generators, torch's switches, output and the hub as they were before this block.

    A notebook goes on after train_model(). What it computes then must not depend on how that trained. An
    Accelerator that it had goes on too, for accelerate keeps one state for all of a process.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    num_threads = torch.get_num_threads()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    allow_tf32, benchmark = matmul.allow_tf32, cudnn.benchmark
    generator = torch.get_rng_state()
    gpu_generators = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    bars_are_off, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    shared_states = (AcceleratorState._shared_state, PartialState._shared_state)
    accelerators = [dict(shared) for shared in shared_states]
    environment, stdout = dict(os.environ), sys.stdout
    try:
        with hub.one_command():
            yield
    finally:
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns_only)
        matmul.allow_tf32, cudnn.benchmark = allow_tf32, benchmark
        torch.set_rng_state(generator)
        if gpu_generators:
            torch.cuda.set_rng_state_all(gpu_generators)
        if not bars_are_off:
            datasets.enable_progress_bars()
        datasets.logging.set_verbosity(verbosity)
        for shared, before in zip(shared_states, accelerators, strict=True):
            shared.clear()
            shared.update(before)
        sys.stdout = stdout
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
