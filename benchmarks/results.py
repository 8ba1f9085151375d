"""Rerun rows of the README's results table, and print the table.

    python benchmarks/results.py --data FOLDER                         # all rows for a CPU: takes hours
    python benchmarks/results.py --data FOLDER --rows cnn_small-tuned  # one row
    python benchmarks/results.py --list                                # shows the rows, runs nothing

FOLDER is a copy of CIFAR-10, as train.py takes it as --dataset. Add --clothing FOLDER for the rows of
clothing-dataset-small, 3,409 photographs of 10 classes. Each row is one command of sweep.py. Its runs stay
under --output-dir, so that a second call prints the row without training it again.
"""

import argparse
import platform
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sweep  # noqa: E402
from modeling import cli  # noqa: E402
from modeling.errors import UserError  # noqa: E402
from modeling.run.launch import num_cores  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row of the table: flags of sweep.py. needs: what a CPU without network lacks to measure it."""

    name: str
    flags: str
    needs: str = ""

    @property
    def is_clothing(self) -> bool:
        return "CLOTHING" in self.flags

    def command(self, seeds: list[int]) -> str:
        """The command of this row, as a user types it."""
        return f"python sweep.py {self.flags} --seeds {' '.join(map(str, seeds))}"


WEIGHTS, GPU = "ImageNet weights", "a GPU"
RESULTS = [
    Result(
        name="cnn_small-reference",
        flags="--models cnn_small --recipe reference --dataset FOLDER --mixed-precision bf16",
    ),
    Result(
        name="cnn_small-tuned",
        flags="--models cnn_small --recipe tuned --dataset FOLDER --mixed-precision bf16",
    ),
    Result(
        name="vit_scratch-reference",
        flags="--models vit_scratch --recipe reference --dataset FOLDER --mixed-precision bf16",
    ),
    Result(
        name="vit_scratch-tuned",
        flags="--models vit_scratch --recipe tuned --dataset FOLDER --mixed-precision bf16",
    ),
    Result(
        name="cnn-reference",
        flags="--models cnn --recipe reference --dataset FOLDER --mixed-precision bf16",
    ),
    Result(
        name="cnn-tuned",
        flags="--models cnn --recipe tuned --dataset FOLDER --mixed-precision bf16",
    ),
    Result(
        name="cnn_fast-tuned",
        flags="--models cnn_fast --recipe tuned --dataset FOLDER --mixed-precision bf16",
    ),
    Result(
        name="cnn-clothing",
        flags="--models cnn --recipe tuned --dataset CLOTHING --test-split validation --mixed-precision bf16",
    ),
    Result(
        name="vit_scratch-clothing",
        flags="--models vit_scratch --recipe tuned --dataset CLOTHING --test-split validation "
        "--mixed-precision bf16",
    ),
    Result(
        name="resnet18-clothing",
        flags="--models resnet18 --weights none --image-size 96 --recipe tuned --dataset CLOTHING "
        "--test-split validation --mixed-precision bf16",
    ),
    Result(
        name="cnn_small-224",
        flags="--models cnn_small --recipe reference --dataset cifar10 --image-size 224",
        needs=GPU,
    ),
    Result(
        name="vit_scratch-224",
        flags="--models vit_scratch --recipe reference --dataset cifar10 --image-size 224",
        needs=GPU,
    ),
    Result(
        name="resnet18-reference",
        flags="--models resnet18 --recipe reference --dataset cifar10",
        needs=WEIGHTS,
    ),
    Result(
        name="deit-reference",
        flags="--models deit --recipe reference --dataset cifar10",
        needs=WEIGHTS,
    ),
    Result(name="cnn-stl10", flags="--models cnn --recipe reference --dataset stl10", needs=GPU),
    Result(name="vit-stl10", flags="--models vit --recipe tuned --dataset stl10", needs=WEIGHTS),
]
COLUMNS = [
    "model",
    "recipe",
    "dataset",
    "epochs",
    "seeds",
    "test accuracy",
    "balanced",
    "minutes",
    "commit",
    "machine",
    "command",
]


def machine() -> str:
    """The processor, its cores and the GPU."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{num_cores()} cores of {processor}, {gpu}"


def parse(result: Result, args) -> object:
    """The row's flags as sweep.py parses them."""
    words = shlex.split(result.command(args.seeds))[2:]
    folders = {"FOLDER": args.data, "CLOTHING": args.clothing}
    words = [folders.get(word, word) for word in words]
    return sweep.build_parser().parse_args([*words, "--output-dir", str(args.output_dir / result.name)])


def line(result: Result, args, measured: sweep.Row | None) -> str:
    """The row in Markdown."""
    flags = sweep.build_parser().parse_args(shlex.split(result.flags))
    names = {"FOLDER": args.data_name, "CLOTHING": "clothing-dataset-small"}
    dataset = names.get(flags.dataset, flags.dataset)
    missing = f"not measured here: needs {result.needs}" if result.needs else "not run"
    numbers = ["", "", missing, "", "", "", ""]
    if measured:
        deviation = "" if measured.deviation is None else f" ± {measured.deviation:.4f}"
        dirty = "-dirty" if measured.commit.endswith("-dirty") else ""
        numbers = [
            str(measured.epochs),
            " ".join(map(str, sorted(measured.seeds))),
            f"{measured.interval.value:.4f}{deviation}",
            f"{statistics.mean(measured.balanced_accuracies):.4f}",
            f"{statistics.mean(measured.minutes):.1f}",
            f"{measured.commit[:7]}{dirty}",
            machine(),
        ]
    cells = [flags.models[0], flags.recipe, dataset, *numbers, f"`{result.command(args.seeds)}`"]
    return f"| {' | '.join(cells)} |"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    names = [result.name for result in RESULTS]
    add("--data", default="cifar10", help="CIFAR-10, as --dataset of train.py (default: cifar10)")
    add("--data-name", default="JPEG CIFAR-10", help="what the table calls it (default: JPEG CIFAR-10)")
    add("--clothing", metavar="FOLDER", help="clothing-dataset-small: folders train and validation")
    add("--rows", nargs="+", choices=names, metavar="ROW", help="(default: all for a CPU)")
    add("--seeds", nargs="+", type=cli.SEED, default=[1, 2, 3], help="(default: 1 2 3)")
    add("--output-dir", type=Path, default=Path("results"), help="(default: results)")
    add("--list", action="store_true", help="print the rows and their commands, and run nothing")
    return parser


def chosen_rows(args: argparse.Namespace) -> list[Result]:
    """The rows to run: those of --rows, or all that can run on a CPU with the folders that are given."""
    if not args.rows:
        return [row for row in RESULTS if not row.needs and (args.clothing or not row.is_clothing)]
    rows = [row for row in RESULTS if row.name in args.rows]
    if not args.clothing and any(row.is_clothing for row in rows):
        raise UserError(
            f"these rows need --clothing FOLDER: {' '.join(r.name for r in rows if r.is_clothing)}"
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    measured = {}
    for result in [] if args.list else chosen_rows(args):
        (measured[result.name],) = sweep.run_sweep(parse(result, args))
    print(f"\n{time.strftime('%Y-%m-%d')}, torch {torch.__version__}. FOLDER is {args.data_name}.")
    print("CLOTHING is clothing-dataset-small: its validation images are the test, and a tenth of the rest")
    print("is for validation. Test accuracy: mean ± standard deviation over the seeds. Balanced: the mean")
    print("recall of the classes. Minutes: of the training of one run.\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for result in RESULTS:
        print(line(result, args, measured.get(result.name)))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
