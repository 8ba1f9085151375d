"""Evaluate checkpoints on images and write the results. evaluate.py runs `main`."""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from modeling import cli, metrics, models, report
from modeling.comparison_files import Candidate, keep_older_comparison, write_comparison
from modeling.data.choices import Choices
from modeling.data.division import describe_change, select_rows, split_digest
from modeling.data.folders import SPLITS
from modeling.data.images import Images, decode
from modeling.data.resize import Preprocessing
from modeling.data.sources import Source, full_name, load_source
from modeling.engine import predict
from modeling.errors import UserError
from modeling.files import write_text
from modeling.progress import Progress
from modeling.run import checkpoint, lock
from modeling.run.launch import make_accelerator, on_main_process

LOCK_FILE = ".evaluate.lock"  # in the folder of the results


def build_parser(description: str = "") -> cli.Parser:
    """The flags of evaluate.py."""
    parser = cli.Parser(description)
    inputs = parser.add_argument_group("input")
    inputs.add_argument(
        "--ckpt",
        type=cli.path,
        nargs="+",
        action=cli.ListOnce,
        required=True,
        metavar="FILE",
        help="one or more checkpoints that train.py wrote",
    )
    inputs.add_argument(
        "--dataset",
        help="stl10, cifar10, digits, a hub id (@REVISION), a folder or a table (default: the checkpoint's)",
    )
    inputs.add_argument(
        "--split",
        choices=SPLITS,
        help="the images to evaluate on (default: test if the dataset has one, otherwise validation)",
    )
    inputs.add_argument(
        "--limit-eval",
        type=cli.POSITIVE_INT,
        metavar="N",
        help="evaluate a stratified subset of N images (default: all images)",
    )
    inputs.add_argument(
        "--force",
        action="store_true",
        help="evaluate on validation even if the images changed since training (default: off, refuse)",
    )
    cli.add_data_choices(parser)
    outputs = parser.add_argument_group("evaluation and output")
    outputs.add_argument(
        "--batch-size",
        type=cli.POSITIVE_INT,
        default=64,
        help="images in a batch (default: 64)",
    )
    outputs.add_argument(
        "--output-dir",
        type=cli.path,
        default=Path(),
        help="folder that gets traces/ (default: the current folder)",
    )
    cli.add_hardware_group(parser)
    return parser


def match_classes(path: Path, checkpoint_classes: list[str], source: Source) -> list[int]:
    """Return the checkpoint's number of each class of the dataset, -1 for a class that no image has.

    Classes are matched by name. UserError: images have a class that the checkpoint lacks.
    """
    number = {name: i for i, name in enumerate(checkpoint_classes)}
    used = set().union(*(split.labels.unique().tolist() for split in source.splits.values()))
    unknown = [source.classes[i] for i in sorted(used) if source.classes[i] not in number]
    if unknown:
        noun = "classes" if len(unknown) > 1 else "class"
        raise UserError(
            f"{path} does not know the {noun} {', '.join(map(repr, unknown[:5]))} of {source.name}; "
            f"it knows {', '.join(map(repr, checkpoint_classes[:10]))}: "
            "choose a dataset with these classes by --dataset"
        )
    if source.classes != checkpoint_classes:
        message = f"{source.name} and {path} have different lists of classes: they are matched by name"
        absent = [name for name in checkpoint_classes if name not in source.classes]
        if absent:
            more = f", ... {len(absent) - 5} more" if len(absent) > 5 else ""
            message += f"; the dataset lacks {', '.join(map(repr, absent[:5]))}{more}"
        print(message)
    return [number.get(name, -1) for name in source.classes]


class Evaluation:
    """One checkpoint and its images. The constructor checks the input; no model runs yet."""

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        dataset: str | None,
        split: str | None,
        limit_eval: int | None,
        choices: Choices,
        force: bool,
        load: Callable[[str, Choices], Source] = load_source,
    ):
        self.path = path
        self.header = checkpoint.read_header(path)
        trained_on, trained = self.header["dataset"], self.header["arguments"]
        trained_choices = Choices.of(trained_on["read"]["choices"])
        if dataset is None or full_name(dataset) == trained_on["name"]:  # read it as in training
            choices = choices.over(trained_choices)
        revision = f"@{trained_on['revision']}" if trained_on["revision"] else ""
        self.source = load(dataset or trained_on["name"] + revision, choices)
        self.class_numbers = match_classes(path, self.header["classes"], self.source)
        changed = describe_change(self.source, trained_on)
        is_own = changed is None or self.source.name == trained_on["name"]
        default_split = self._default_split(is_own)
        self.split = split or default_split
        # Only the images that were divided in training are divided here: else validation would hold images
        # that were trained on.
        divides = is_own and "validation" not in self.source.splits
        if not divides and self.split not in self.source.splits:
            raise UserError(
                f"{self.source.name} has no split {self.split!r}, only {', '.join(self.source.splits)}: "
                "choose one of these with --split"
            )
        self.other_choices = self.source.choices.differences(trained_choices) if is_own else ""
        if is_own and changed:
            reads = f"is not read as in training ({self.other_choices})"
            reason = reads if self.other_choices else f"changed since {path} was trained: {changed}"
            warning = f"{self.source.name} {reason}. Its {self.split} images may have been trained on"
            if divides and self.split == "validation" and not force:
                raise UserError(f"{warning}: give other images with --dataset, or --force")
            print(f"{warning}.")
        self.name = name
        if self.split != default_split or not is_own:
            self.name += f"_{self.split}"
        if not is_own:
            self.name += f"_{models.file_name(Path(self.source.name).name)}"
        elif self.other_choices:
            self.name += "_" + models.file_name(self.other_choices).replace(" ", "_")
        self.source_split, self.rows = select_rows(
            self.source,
            self.split,
            val_fraction=trained["val_fraction"] if divides else 0.0,
            seed=trained["seed"],
            limit_train=limit_eval,
            limit_eval=limit_eval,
        )

    def _default_split(self, is_own: bool) -> str:
        """Test where there is one, else validation. Of another dataset without them, all there is."""
        if "test" in self.source.splits:
            return "test"
        if "validation" in self.source.splits or is_own:
            return "validation"
        return "train"

    @property
    def dataset(self) -> str:
        """The dataset's name, followed by @ and the revision if it has one."""
        return self.source.name + (f"@{self.source.revision}" if self.source.revision else "")

    def decode(self, *, num_workers: int, store_limit: float, skip_bad_images: bool) -> Images:
        """Decode the images. `store_limit` is in bytes."""
        return decode(
            self.source,
            self.source_split,
            self.rows,
            image_size=self.header["preprocessing"]["image_size"],
            num_workers=num_workers,
            store_limit=store_limit,
            skip_bad_images=skip_bad_images,
            progress=Progress,
        )

    def run(self, images: Images, *, accelerator: Accelerator, batch_size: int) -> Candidate:
        """Predict the classes of the images."""
        # Convert the labels from the dataset's class numbers to the checkpoint's.
        labels = images.labels.new_tensor(self.class_numbers)[images.labels]
        images = dataclasses.replace(images, labels=labels, classes=self.header["classes"])
        model, header = checkpoint.load_model(self.path)
        model = accelerator.prepare_model(model, evaluation_mode=True)
        with Progress(len(images), f"evaluating {self.name}") as progress:
            predictions = predict(
                model,
                images,
                Preprocessing.from_json(header["preprocessing"]),
                batch_size=batch_size,
                accelerator=accelerator,
                progress=progress.update,
            )
        if not predictions.logits.isfinite().all():
            raise UserError(
                f"{self.path} gives NaN or infinite logits: leave this checkpoint out, "
                "or train it again with a lower --lr"
            )
        return Candidate(
            name=self.name,
            path=self.path,
            header=header,
            model=model,
            images=images,
            predictions=predictions,
            dataset=self.dataset,
            split=self.split,
            images_sha256=split_digest(self.source, self.source_split),
        )

    def result(self, candidate: Candidate) -> report.Evaluated:
        """Compute the metrics."""
        parameters, trainable = models.count_parameters(candidate.model)
        row = {
            "checkpoint": str(self.path),
            "model": self.header["model"]["name"],
            "dataset": self.source.name + (f" ({self.other_choices})" if self.other_choices else ""),
            "split": self.split,
            "num_samples": len(candidate.images),
            **metrics.compute(candidate.predictions),
            "parameters": parameters,
            "trainable_parameters": trainable,
        }
        return report.Evaluated(
            name=self.name,
            row=row,
            predictions=candidate.predictions,
            classes=self.header["classes"],
            file_of=candidate.images.file_of,
            images_sha256=candidate.images_sha256,
        )


def decode_once(
    evaluations: list[Evaluation], *, num_workers: int, store_limit: float, skip_bad_images: bool
) -> list[Images]:
    """Decode the images of each evaluation. Those that need the same images share them."""
    decoded: dict[tuple, Images] = {}
    images = []
    for evaluation in evaluations:
        side = evaluation.header["preprocessing"]["image_size"]
        key = (id(evaluation.source), evaluation.source_split, tuple(evaluation.rows.tolist()), side)
        if key not in decoded:
            print(evaluation.source.describe(), flush=True)
            decoded[key] = evaluation.decode(
                num_workers=num_workers, store_limit=store_limit, skip_bad_images=skip_bad_images
            )
            skipped = decoded[key].skipped
            if skipped:
                print(f"{len(skipped)} images cannot be decoded and are skipped, such as {skipped[0]}")
        images.append(decoded[key])
    return images


def output_names(paths: list[Path]) -> list[str]:
    """The names of the checkpoints' output files: the run's name where no other checkpoint has it.

    Else the file's stem, and where these are equal too, the folders above it that tell them apart.
    UserError: one checkpoint is given twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("--ckpt names the same checkpoint twice: name each once")
    runs = [checkpoint.read_header(path)["arguments"]["run_name"] for path in paths]
    names = [run if runs.count(run) == 1 else path.stem for run, path in zip(runs, paths, strict=True)]
    for depth in range(2, 50):
        if len(set(names)) == len(names):
            return names
        folders = [path.resolve().with_suffix("").parts[-depth:] for path in paths]
        names = ["_".join(part for part in parts if part not in ("/", "checkpoints")) for parts in folders]
    return [f"{name}_{number}" for number, name in enumerate(names, 1)]


def evaluate_checkpoints(args: argparse.Namespace) -> list[Candidate]:
    """Evaluate the checkpoints of the command line, write the results and the comparison."""
    accelerator = make_accelerator(mixed_precision=args.mixed_precision, num_threads=args.num_threads)
    traces = args.output_dir / "traces"
    on_main_process(accelerator, lambda: cli.check_output_dir(args.output_dir, "traces"))
    report.read_metrics_csv(traces / "metrics.csv")  # raise UserError before any work
    load_once = functools.cache(load_source)  # several checkpoints of one dataset load it once
    evaluations = [
        Evaluation(
            name,
            path,
            dataset=args.dataset,
            split=args.split,
            limit_eval=args.limit_eval,
            choices=Choices.of(vars(args)),
            force=args.force,
            load=load_once,
        )
        for name, path in zip(output_names(args.ckpt), args.ckpt, strict=True)
    ]
    all_images = decode_once(
        evaluations,
        num_workers=args.num_workers,
        store_limit=1e9 * args.store_limit,
        skip_bad_images=args.skip_bad_images,
    )
    evaluated, candidates = [], []
    for evaluation, images in zip(evaluations, all_images, strict=True):
        candidate = evaluation.run(images, accelerator=accelerator, batch_size=args.batch_size)
        one = evaluation.result(candidate)
        candidates.append(candidate)
        evaluated.append(one)
        if accelerator.is_main_process:
            # Another evaluation may write into this folder, too. Each reads metrics.csv and writes it anew.
            with lock.Lock([traces / LOCK_FILE], description=str(traces), waits=True):
                report.write_evaluation(traces, one)
                report.update_metrics_csv(traces / "metrics.csv", [one.row])
        print(
            f"{evaluation.path}: {one.row['split']} of {one.row['dataset']}, {len(images):,} images: "
            f"accuracy {one.row['accuracy']:.4f}, macro F1 {one.row['macro_f1']:.4f}",
            flush=True,
        )
    if accelerator.is_main_process:
        with lock.Lock([traces / LOCK_FILE], description=str(traces), waits=True):
            keep_older_comparison(traces)
            lines = "\n".join(write_comparison(traces, candidates, accelerator))
            tables = report.compare_evaluations(evaluated)
            write_text(traces / "model_comparison.txt", f"{tables}\nRanking and pairs\n\n{lines}\n")
        print(lines)
    print(
        "metrics.csv, reports, confusion matrices, predictions, pairs.csv, class_metrics.csv, "
        f"label_suspects.csv and model_comparison.txt are in {traces}"
    )
    return candidates


def main(argv: list[str] | None = None, description: str = __doc__) -> int:
    """Evaluate the checkpoints of the command line. Return the exit status."""
    evaluate_checkpoints(build_parser(description).parse_args(argv))
    return 0
