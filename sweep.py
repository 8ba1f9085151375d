"""Train several models with several seeds each, and compare them.

    python sweep.py --models cnn vit_scratch --seeds 1 2 3 --dataset digits --epochs 3             # CPU
    accelerate launch --config_file accelerate_configs/single_gpu.yaml sweep.py --models vit deit  # one GPU
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml sweep.py --models vit deit   # many GPUs

Takes every flag of train.py, but --models and --seeds instead of --model and --seed. If a sweep was stopped,
the same command continues it: finished runs are not trained again, and a stopped run resumes from its state.
At the end it prints a table with a row for each model, and writes the comparison that evaluate.py makes.
"""

import argparse
import copy
import statistics
import sys
from dataclasses import dataclass

import train
from modeling import cli, evaluation, models
from modeling.compare import compare
from modeling.comparison_files import summarize_candidate
from modeling.run import checkpoint
from modeling.run.files import RunFiles
from modeling.run.process import process_as_it_was
from modeling.scores import balanced_accuracy
from modeling.stats.proportions import Interval

NOT_OF_A_SWEEP = ("model", "seed", "run_name", "sanity_check")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The runs of one model. accuracies are the runs' own, of the split that evaluate.py chooses.

    balanced_accuracies: of the same runs, the mean recall of the classes.
    interval: of the mean accuracy, over other seeds and other images. minutes: of training, for each run.
    """

    name: str
    seeds: list[int]
    accuracies: list[float]
    balanced_accuracies: list[float]
    interval: Interval
    minutes: list[float]
    epochs: int
    commit: str

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the accuracy over the seeds; None: there is one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


def build_parser() -> cli.Parser:
    parser = train.build_parser()
    parser.description = __doc__
    parser.set_defaults(model=None, seed=None)
    add = parser.add_argument_group("sweep (instead of --model, --seed and --run-name)").add_argument
    add(
        "--models", nargs="+", action=cli.ListOnce, required=True, metavar="MODEL", help="train each of these"
    )
    add(
        "--seeds",
        nargs="+",
        action=cli.ListOnce,
        type=cli.SEED,
        default=[1, 2, 3],
        metavar="SEED",
        help="(default: 1 2 3)",
    )
    return parser


def train_all(args: argparse.Namespace) -> list[RunFiles]:
    """Train each model with each seed, or finish what an earlier call began. Return the runs' files."""
    runs = [(model, seed) for seed in dict.fromkeys(args.seeds) for model in dict.fromkeys(args.models)]
    files = []
    for number, (model, seed) in enumerate(runs, start=1):
        one = copy.copy(args)
        one.model, one.seed, one.resume = model, seed, True
        one.run_name = f"{models.file_name(models.check_model_name(model))}_seed{seed}"
        print(f"\nRun {number} of {len(runs)}: {one.run_name}", flush=True)
        with process_as_it_was():
            train.run_training(one)
        files.append(RunFiles(args.output_dir, one.run_name))
    return files


def compare_runs(files: list[RunFiles], args: argparse.Namespace) -> list[Row]:
    """Evaluate the best checkpoint of each run, write the comparison, and return a row for each model."""
    flags = ["--output-dir", args.output_dir, "--num-workers", args.num_workers]
    flags += ["--store-limit", args.store_limit]
    for name in ("mixed_precision", "num_threads", "limit_eval"):
        value = getattr(args, name)
        flags += [] if value is None else [f"--{name.replace('_', '-')}", value]
    flags += ["--skip-bad-images"] if args.skip_bad_images else []
    words = ["--ckpt", *(one.best for one in files), *flags]
    candidates = evaluation.evaluate_checkpoints(evaluation.build_parser().parse_args(map(str, words)))
    finals = {one.run: checkpoint.read_header(one.final) for one in files}
    rows = []
    for entry in compare([summarize_candidate(candidate) for candidate in candidates]).entries:
        headers = [finals[run.name] for run in entry.runs]
        row = Row(
            name=headers[0]["model"]["name"],
            seeds=[header["arguments"]["seed"] for header in headers],
            accuracies=[float(run.right.mean()) for run in entry.runs],
            balanced_accuracies=[balanced_accuracy(run) for run in entry.runs],
            interval=entry.accuracy,
            minutes=[header["clock"]["train_seconds"] / 60 for header in headers],
            epochs=headers[0]["arguments"]["epochs"],
            commit=headers[0]["git_commit"] or "",
        )
        rows.append(row)
    return rows


def run_sweep(args: argparse.Namespace) -> list[Row]:
    """Train, compare, and return a row for each model, the most accurate one first."""
    for name in NOT_OF_A_SWEEP:
        value = getattr(args, name)
        if value is not None and value is not False:  # the seed may be 0
            build_parser().error(f"--{name.replace('_', '-')} is not for a sweep: give --models and --seeds")
    return compare_runs(train_all(args), args)


def table(rows: list[Row]) -> str:
    lines = ["model             runs  accuracy  deviation      95 % interval  balanced   minutes"]
    for row in rows:
        deviation = "" if row.deviation is None else f"{row.deviation:.4f}"
        interval = f"{row.interval.low:.4f} to {row.interval.high:.4f}"
        lines.append(
            f"{row.name:<17} {len(row.seeds):>4} {row.interval.value:>9.4f} {deviation:>10} {interval:>18} "
            f"{statistics.mean(row.balanced_accuracies):>9.4f} {statistics.mean(row.minutes):>9.1f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    rows = run_sweep(build_parser().parse_args(argv))
    print(f"\n{table(rows)}\nMinutes are of the training of one run, on average.")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
