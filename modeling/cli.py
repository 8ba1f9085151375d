"""What the commands share: argument types, hardware flags, and how an error becomes an exit status."""

import argparse
import io
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modeling import hub
from modeling.errors import UserError
from modeling.files import check_writable
from modeling.run import preemption
from modeling.run.launch import is_main_process, num_cores

SAME_ERROR_SECONDS = 5  # the other processes report an error so much later than the main one


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, so that a script and its Python API give the same message."""

    def __init__(self, description: str):
        super().__init__(
            usage="%(prog)s [flags]",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")

    def parse_options(self, options: dict[str, Any]) -> argparse.Namespace:
        """Parse keyword options as flags: batch_size=64 is --batch-size=64, resume=True is --resume.

        Options that are None or False are left out.
        """
        argv = []
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                argv.append(flag)
            elif value is not None and value is not False:
                argv.append(f"{flag}={value}")  # "=" allows values that begin with a dash
        return self.parse_args(argv)


class ListOnce(argparse.Action):
    """Store the values of a flag. A second use of the flag is an error: it would replace the first values."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest) is not self.default:
            parser.error(f"{option_string} is given twice: give all its values at once")
        setattr(namespace, self.dest, values)


def number(
    kind: type = float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
):
    """Return an argparse type for a finite number in an interval. Its error message names the interval."""
    bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}".replace("inf]", "inf)")
    wanted = f"an integer from {low} to {high}" if kind is int else f"a number in {bounds}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        inside = low <= value <= high and value not in (math.inf, -math.inf)  # False for nan
        if not inside or (open_low and value == low) or (open_high and value == high):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return parse


POSITIVE_INT = number(int, low=1, high=2**31 - 1)
NUM_WORKERS = number(int, low=0, high=1024)
POSITIVE = number(low=0, open_low=True)
NON_NEGATIVE = number(low=0)
EPOCHS = number(low=0, high=1e6)
SEED = number(int, low=0, high=2**31 - 1)
FRACTION = number(low=0, high=1, open_low=True, open_high=True)
SHARE = number(low=0, high=1, open_high=True)


def add_hardware_group(parser: Parser) -> None:
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        help="precision of the forward pass (default: the launcher's, or no)",
    )
    group.add_argument(
        "--num-threads",
        type=POSITIVE_INT,
        help="CPU threads of each process (default: OMP_NUM_THREADS, or the cores divided by the processes)",
    )
    group.add_argument(
        "--num-workers",
        type=NUM_WORKERS,
        default=num_cores(),
        help="threads that decode images; 0: the main thread decodes (default: the number of cores)",
    )
    group.add_argument(
        "--store-limit",
        type=NON_NEGATIVE,
        default=100.0,
        metavar="GB",
        help="largest size on disk of a split's decoded images, in 10**9 bytes; a larger split is decoded "
        "anew in each epoch (default: 100)",
    )


def add_data_choices(parser: Parser) -> None:
    """Add the flags that choose where a dataset can be read in several ways. None: found out."""
    group = parser.add_argument_group("reading the dataset (default: found out, see docs/data.md)")
    group.add_argument(
        "--dataset-config", metavar="NAME", help="configuration, where the dataset has several"
    )
    group.add_argument("--image-column", metavar="NAME", help="column of images, or of their file names")
    group.add_argument("--label-column", metavar="NAME", help="column of class labels")
    group.add_argument("--train-split", metavar="NAME", help="split or folder to train on")
    group.add_argument("--test-split", metavar="NAME", help="split or folder to test on")
    group.add_argument(
        "--skip-bad-images",
        action="store_true",
        help="leave out images that cannot be decoded, and list them (default: off, the first is an error)",
    )


def path(text: str) -> Path:
    """An argparse type: a path, in which ~ is the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def check_output_dir(folder: Path, *subfolders: str) -> None:
    """Try to write in the folder and in its subfolders. UserError: that fails."""
    for place in (folder, *(folder / name for name in subfolders)):
        check_writable(place)


def open_streams() -> None:
    """Open what is closed of the standard streams, and let them print every text, in ASCII too.

    A file that is opened later would get the number of a closed stream, and libraries would print into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def error_text(error: BaseException) -> str:
    """One line for an error. An OSError without a file is said with the place in the program."""
    if not isinstance(error, OSError):
        return str(error)
    if error.filename:
        return f"{error.strerror}: {error.filename}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error.strerror or error} (in {place.name} of {place.filename}:{place.lineno})"


def run(main: Callable[[], int | None]) -> int:
    """Call `main` and return the exit status: 0 done, 2 bad input, 130 interrupted, 1 anything else.

    A bad flag or bad input raises UserError: one line on standard error, status 2. An error of the system or
    a loss that is not finite also prints one line, status 1. Any other error is a bug and keeps its
    traceback.
    """
    program = Path(sys.argv[0]).name
    open_streams()
    preemption.ends_process = True
    try:
        with hub.one_command():
            return main() or 0
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except (UserError, OSError, FloatingPointError) as error:
        if not is_main_process():
            # The main process most likely has the same error. Let it report the error first: then the
            # launcher ends this process, and the message appears once.
            time.sleep(SAME_ERROR_SECONDS)
        print(f"{program}: error: {' '.join(error_text(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    finally:
        preemption.ends_process = False
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            # The threads of gloo can abort a process that ends while they run.
            torch.distributed.destroy_process_group()
