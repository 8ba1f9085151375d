"""What the commands share: argument types and groups, progress, hardware, and the one place where an error becomes an exit status."""

import argparse
import ctypes
import datetime
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.state import AcceleratorState
from torch.distributed import PrefixStore, TCPStore
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)  # while one process downloads the others wait
_LOG_SECONDS = 30
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_SAME_ERROR_SECONDS = 5


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ValueErrors, so that a script and its Python API say the same; no abbreviations."""

    def __init__(self, description: str):
        super().__init__(
            usage="%(prog)s [flags]", description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str):
        raise ValueError(f"{message} (see --help)")

    def parse_options(self, options: dict[str, Any]) -> argparse.Namespace:
        """Parse keyword options as if they were flags: batch_size=64 is --batch-size 64, True the flag alone, None and False nothing."""
        argv = []
        for name, value in options.items():
            if value is not None and value is not False:
                argv += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
        return self.parse_args(argv)


def number(kind: type = float, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False, open_high: bool = False):
    """An argparse type: a finite number in an interval, with an error that names the interval."""
    bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}".replace("inf]", "inf)")
    wanted = f"an integer from {low} to {high}" if kind is int else f"a number in {bounds}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        inside = low <= value <= high and value not in (math.inf, -math.inf)  # which nan is not
        if not inside or (open_low and value == low) or (open_high and value == high):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return parse


POSITIVE_INT = number(int, low=1, high=2**31 - 1)
NUM_WORKERS = number(int, low=0, high=1024)
POSITIVE = number(low=0, open_low=True)
NON_NEGATIVE = number(low=0)
SEED = number(int, low=0, high=2**31 - 1)
FRACTION = number(low=0, high=1, open_low=True, open_high=True)


def add_hardware_group(parser: Parser) -> None:
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--mixed-precision", choices=("no", "bf16", "fp16"), help="precision of the forward pass (default: the launcher's, else no)"
    )
    group.add_argument(
        "--num-threads",
        type=POSITIVE_INT,
        help="CPU threads of each process (default: OMP_NUM_THREADS, or the cores divided by the processes on this machine)",
    )
    group.add_argument(
        "--num-workers", type=NUM_WORKERS, default=num_cores(), help="threads that decode images, 0: the main one (default: the cores)"
    )
    group.add_argument(
        "--store-limit",
        type=NON_NEGATIVE,
        default=100.0,
        metavar="GB",
        help="largest store of a split's decoded images on disk, in 10**9 bytes; above it images are decoded as used (default: 100)",
    )


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def make_accelerator(args: argparse.Namespace) -> accelerate.Accelerator:
    """Set the threads, join the other processes, and silence all but the main one. ValueError: what this machine cannot do."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    omp = os.environ.get("OMP_NUM_THREADS")
    if args.num_threads or not omp or (launched and omp == "1"):  # the launcher sets 1 where nobody chose
        torch.set_num_threads(args.num_threads or max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions do by default
    AcceleratorState._reset_state(reset_partial_state=True)  # a second run in one Python may choose another precision
    # MPS lacks the float64 that we sum in: there the CPU works. Several processes without a GPU find each other only when told so.
    on_cpu = torch.backends.mps.is_available() or (world_size > 1 and not torch.cuda.is_available())
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt and world_size > 1:
        _join_again(attempt, world_size)
    patience = accelerate.InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)
    accelerator = accelerate.Accelerator(mixed_precision=args.mixed_precision, cpu=on_cpu, kwargs_handlers=[patience])
    if accelerator.num_processes != world_size:
        raise ValueError(
            f"{world_size} processes were launched, but they do not see each other: each is one of {accelerator.num_processes}; "
            "launch with a file of accelerate_configs/, or with torchrun"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("fp16 needs a GPU; on a CPU use --mixed-precision bf16 or no")
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return accelerator


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step: by default large tensors go back to the system, and come back as zeroed pages."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _join_again(attempt: int, world_size: int) -> None:
    """Join the group of a restarted job under keys of its own: the launcher's store still has the addresses of the ended processes.

    https://github.com/pytorch/pytorch/issues/135712
    """
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False, timeout=COLLECTIVE_TIMEOUT)
    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"attempt_{attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def refuse_processes() -> None:
    """ValueError: this is one of several processes, in a script that is for one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this script is for one process: start it with python, or launch it with --num_processes 1")


def precision_text(accelerator: accelerate.Accelerator) -> str:
    """The precision, and where the hardware has fast bf16 that is off, that it has."""
    precision, on_cpu = accelerator.mixed_precision, accelerator.device.type == "cpu"
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") if on_cpu else torch.cuda.is_bf16_supported(False)
    hint = f" (this {'CPU' if on_cpu else 'GPU'} has fast bf16: --mixed-precision bf16)"
    return f"precision {precision}{hint if precision == 'no' and fast else ''}"


class Progress:
    """Progress with a rate and an ETA: a bar on a terminal, elsewhere a line on standard error every 30 seconds.

    Of the main process; with `everywhere`, of each that makes one.
    """

    def __init__(self, total: int, description: str, unit: str = " images", done: int = 0, everywhere: bool = False):
        self.shown = everywhere or is_main_process()
        self.total, self.count, self.description, self.unit, self.done = total, done, description, unit, done
        self.started = self.logged = time.monotonic()
        self.bar = (
            tqdm(total=total, initial=done, desc=description, unit=unit, dynamic_ncols=True) if sys.stderr.isatty() and self.shown else None
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, n: int) -> None:
        self.count += n
        if self.bar is not None:
            self.bar.update(n)
        elif self.shown and time.monotonic() - self.logged >= _LOG_SECONDS:
            self.logged = time.monotonic()
            seconds, options = self.logged - self.started, dict(prefix=self.description, unit=self.unit, ncols=0, initial=self.done)
            meter = tqdm.format_meter(self.count, self.total, seconds, **options)
            print(meter, file=sys.stderr, flush=True)

    def describe(self, text: str) -> None:
        self.description = text
        if self.bar is not None:
            self.bar.set_description(text)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)
        if self.bar is not None:
            self.bar.refresh()


def check_output_dir(folder: Path, *subfolders: str) -> None:
    """Make the folder and try to write in it, and in those subfolders that exist. ValueError: it cannot be written."""
    for place in (folder, *(folder / name for name in subfolders if (folder / name).exists())):
        probe = place / f".writable-{os.getpid()}"
        try:
            place.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)  # processes of other machines may have this one's number
        except OSError as error:
            raise ValueError(f"cannot write to the output folder {place}: {error.strerror}") from error


def run(main: Callable[[], int | None]) -> int:
    """Call `main` and give the exit status: 0 done, 2 bad input with one line, 130 interrupted, 1 anything else.

    A ValueError that our own code raises speaks to the user; one from inside a library is a bug, and keeps its traceback.
    """
    program = Path(sys.argv[0]).name
    try:
        return main() or 0
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve().parent
        if isinstance(error, OSError):
            message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        elif raised_in in (ROOT, ROOT / "modeling"):
            message = str(error)
        else:
            raise
        if not is_main_process():
            time.sleep(_SAME_ERROR_SECONDS)  # the main process most likely has it too, says so, and the launcher ends this one
        print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    finally:
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()  # else its threads can abort the process as it ends
