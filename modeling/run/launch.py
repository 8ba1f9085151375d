"""Processes, threads and precision, and checks that all processes agree."""

import ctypes
import datetime
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch.distributed import PrefixStore, TCPStore

from modeling.errors import UserError

COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)  # while one process downloads, the others wait
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # constants of glibc's malloc.h


def num_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def make_accelerator(*, mixed_precision: str | None, num_threads: int | None) -> Accelerator:
    """Set the threads, join the other processes, and silence the output of all but the main one.

    None means that the launcher's environment decides. UserError: this machine cannot do it.
    """
    set_num_threads(num_threads)
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions do by default

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    num_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if num_restarts and world_size > 1:
        _join_again(num_restarts, world_size)
    # Losses are summed in float64, which MPS does not have. Several processes without a GPU need cpu=True to
    # find each other.
    use_cpu = torch.backends.mps.is_available() or (world_size > 1 and not torch.cuda.is_available())
    # accelerate keeps its first choices until the process ends. Reset them, because a second run in the same
    # process may choose another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(
        mixed_precision=mixed_precision,
        cpu=use_cpu,
        kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
    )
    if accelerator.num_processes != world_size:
        raise UserError(
            f"{world_size} processes were launched, but each sees only {accelerator.num_processes}: "
            "launch with a file of accelerate_configs/, or with torchrun"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("fp16 needs a GPU; on a CPU use --mixed-precision bf16 or no")
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return accelerator


def set_num_threads(num_threads: int | None) -> None:
    """Use `num_threads` CPU threads. None: use OMP_NUM_THREADS, or this process's share of the cores."""
    by_environment = os.environ.get("OMP_NUM_THREADS")
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if is_launched and by_environment == "1":  # the launcher sets 1 if the user sets nothing
        by_environment = None
    if num_threads:
        torch.set_num_threads(num_threads)
    elif not by_environment:
        processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, num_cores() // processes_here))


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step.

    By default glibc returns large tensors to the system, which has to clear the pages before the next use.
    That slows down every step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _join_again(attempt: int, world_size: int) -> None:
    """Join the process group of a restarted job under new keys.

    Under the old keys the launcher's store still has the addresses of the dead processes:
    https://github.com/pytorch/pytorch/issues/135712.
    """
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=False,
        timeout=COLLECTIVE_TIMEOUT,
    )
    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"attempt_{attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def refuse_processes() -> None:
    """UserError: several processes were launched, but the script supports only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "this script supports only one process: start it with python, or with --num_processes 1"
        )


def precision_text(accelerator: Accelerator) -> str:
    """Name the precision. Add a hint if the hardware has fast bf16 and it is not used."""
    precision = accelerator.mixed_precision
    if accelerator.device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        has_fast_bf16 = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
        hardware = "CPU"
    else:
        has_fast_bf16 = torch.cuda.is_bf16_supported(False)
        hardware = "GPU"
    if precision == "no" and has_fast_bf16:
        return f"precision no (this {hardware} has fast bf16: --mixed-precision bf16)"
    return f"precision {precision}"


def on_main_process(accelerator: Accelerator, action: Callable[[], Any]) -> None:
    """Call `action` on the main process. If it raises UserError there, raise it on every process."""
    messages: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except UserError as error:
            messages = [str(error)]
    if accelerator.num_processes > 1:
        broadcast_object_list(messages)
    if messages[0] is not None:
        raise UserError(messages[0])


def check_agreement(accelerator: Accelerator, content: Any) -> None:
    """UserError: the processes do not have the same `content` (arguments, images), a JSON value."""
    text = json.dumps(content, sort_keys=True, default=str)
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
    digests = accelerator.gather(torch.tensor([digest], device=accelerator.device))
    if len(digests.unique()) > 1:
        raise UserError(
            "the processes have different arguments or images: start all with the same command and data"
        )


def check_shared_folder(accelerator: Accelerator, folder: Path) -> None:
    """UserError: a process does not see the output folder that the main process writes to."""
    if accelerator.num_processes == 1:
        return
    probe = folder / f".shared-{os.environ.get('MASTER_PORT', '0')}"
    if accelerator.is_main_process:
        probe.touch()
    accelerator.wait_for_everyone()
    is_seen = probe.exists()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        probe.unlink()
    if not is_seen:
        raise UserError(
            f"--output-dir {folder} is not the same folder as on the main process: "
            "give a folder that all machines share"
        )
