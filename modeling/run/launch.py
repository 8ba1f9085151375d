"""Processes, threads and precision, and checks that all processes agree."""

import contextlib
import ctypes
import datetime
import hashlib
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
from torch.distributed import DistError, PrefixStore, TCPStore

from modeling.errors import UserError
from modeling.run import environment
from modeling.run.cores import busy_advice, num_cores

COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)  # while one process downloads, the others wait
WAIT_SECONDS = 10.0  # until the first line about processes that are waited for; twice as long to the next
LOOK_SECONDS = 0.05  # between two looks for them
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # constants of glibc's malloc.h


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def make_accelerator(*, mixed_precision: str | None, num_threads: int | None) -> Accelerator:
    """Set the threads, join the other processes, and silence the output of all but the main one.

    None means that the launcher's environment decides. UserError: this machine cannot do it.
    """
    world_size = environment.num_processes()
    environment.check_accelerate(mixed_precision)
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions do by default

    # Losses are summed in float64, which MPS does not have. Several processes without a GPU need cpu=True to
    # find each other.
    use_cpu = (
        torch.backends.mps.is_available()
        or environment.is_set("ACCELERATE_USE_CPU")
        or (world_size > 1 and not torch.cuda.is_available())
    )
    # accelerate keeps its first choices until the process ends. Reset them, because a second run in the same
    # process may choose another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    must_join = world_size > 1 and not torch.distributed.is_initialized()
    with joined(world_size, use_cpu) if must_join else contextlib.nullcontext():
        accelerator = _build_accelerator(mixed_precision, use_cpu)
    if accelerator.num_processes != world_size:
        raise UserError(
            f"{world_size} processes were launched, but each sees only {accelerator.num_processes}: "
            "launch with a file of accelerate_configs/, or with torchrun"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("fp16 needs a GPU; on a CPU use --mixed-precision bf16 or no")
    set_num_threads(num_threads)  # after accelerate, which chooses for several processes on a CPU
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if line := environment.ignored():
        print(line)
    if accelerator.device.type == "cpu":
        processes_here = environment.integer("LOCAL_WORLD_SIZE", 1)
        if line := busy_advice(num_threads=torch.get_num_threads(), processes_here=processes_here):
            print(line)
    return accelerator


def _build_accelerator(mixed_precision: str | None, use_cpu: bool) -> Accelerator:
    """UserError: accelerate refuses what the environment asks for."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")  # set_num_threads decides
            return accelerate.Accelerator(
                mixed_precision=mixed_precision,
                cpu=use_cpu,
                # train_step accumulates by itself. Without this plugin accelerate would read a number of
                # steps from the environment, and divide the loss by it.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
            )
    # accelerate raises NotImplementedError for an RTX 4000 without the NCCL variables that it needs.
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"accelerate refuses this environment: {error}") from error


@contextlib.contextmanager
def joined(world_size: int, use_cpu: bool) -> Iterator[None]:
    """Wait for the other processes, and say who is missing. In this block the process group is made.

    After a restart it is made here: accelerate would ask the launcher's store, which still has the addresses
    of the dead processes: https://github.com/pytorch/pytorch/issues/135712.
    """
    attempt = environment.integer("TORCHELASTIC_RESTART_COUNT", 0)
    rank = environment.integer("RANK", 0)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_host = rank == 0 and not environment.is_set("TORCHELASTIC_USE_AGENT_STORE")  # else the launcher is
    if not is_host:
        wait_until(lambda: _listens(address, port), lambda: [0])
    try:
        # The store lives until the group is made, whose own store is the same where this process is the host.
        store = TCPStore(
            address,
            port,
            world_size,
            is_master=is_host,
            timeout=COLLECTIVE_TIMEOUT,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except DistError as error:
        raise UserError(
            f"process {rank} cannot use {address}:{port} (MASTER_ADDR, MASTER_PORT), which another program "
            "may have: choose another port, such as --main_process_port 29511"
        ) from error
    roll = PrefixStore(f"attempt_{attempt}", store)
    roll.set(f"here_{rank}", "")
    roll.add("count", 1)
    wait_until(
        lambda: roll.add("count", 0) >= world_size,
        lambda: [one for one in range(world_size) if not roll.check([f"here_{one}"])],
    )
    if attempt:
        torch.distributed.init_process_group(
            "gloo" if use_cpu else "nccl",
            store=roll,
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    yield


def _listens(address: str, port: int) -> bool:
    """Whether somebody listens there. An address that is not known yet may become known later."""
    try:
        with socket.create_connection((address, port), timeout=WAIT_SECONDS):
            return True
    except OSError:
        return False


def wait_until(is_done: Callable[[], bool], find_missing: Callable[[], list[int]]) -> None:
    """Wait, and say every now and then which processes are missing.

    UserError: some did not come within COLLECTIVE_TIMEOUT.
    """
    rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    start, next_line = time.monotonic(), WAIT_SECONDS
    while not is_done():
        waited = time.monotonic() - start
        if waited > next_line:
            missing = find_missing()
            names = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            if waited > COLLECTIVE_TIMEOUT.total_seconds():
                raise UserError(
                    f"of {world_size} processes these did not come to {where}: {names}; "
                    "start all of them, with the same MASTER_ADDR and MASTER_PORT"
                )
            print(f"Process {rank} of {world_size} waits at {where} for process {names}", file=sys.stderr)
            next_line *= 2
        time.sleep(LOOK_SECONDS)


def set_num_threads(num_threads: int | None) -> None:
    """Use `num_threads` CPU threads. None: use OMP_NUM_THREADS, or this process's share of the cores."""
    by_environment = os.environ.get("OMP_NUM_THREADS")
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if is_launched and by_environment == "1":  # the launcher sets 1 if the user sets nothing
        by_environment = None
    if num_threads:
        torch.set_num_threads(num_threads)
    elif not by_environment:
        processes_here = environment.integer("LOCAL_WORLD_SIZE", 1)
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


def refuse_processes() -> None:
    """UserError: several processes were launched, but the script supports only one."""
    if environment.num_processes() > 1:
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
