"""Evaluate checkpoints on images and write the results. evaluate.py runs `main`."""

import dataclasses
import functools
from pathlib import Path

from accelerate import Accelerator

from modeling import cli, metrics, models, report
from modeling.comparison_files import Candidate, write_comparison
from modeling.data.images import Images, decode
from modeling.data.resize import Preprocessing
from modeling.data.sources import SPLITS, Source, load_source, select_rows
from modeling.engine import predict
from modeling.errors import UserError
from modeling.files import write_text
from modeling.progress import Progress
from modeling.run import checkpoint
from modeling.run.launch import make_accelerator, on_main_process

load_source = functools.cache(load_source)  # load a dataset once, even for several checkpoints


def build_parser(description: str = "") -> cli.Parser:
    """The flags of evaluate.py."""
    parser = cli.Parser(description)
    inputs = parser.add_argument_group("input")
    inputs.add_argument(
        "--ckpt",
        type=cli.path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="one or more checkpoints that train.py wrote",
    )
    inputs.add_argument(
        "--dataset",
        help="stl10, cifar10, digits, a hub id (@REVISION) or a local folder (default: the checkpoint's)",
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
    """Return for each class of the dataset its number in the checkpoint. Classes are matched by name.

    UserError: the checkpoint lacks a class of the dataset.
    """
    unknown = [name for name in source.classes if name not in checkpoint_classes]
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
            message += f"; the dataset lacks {', '.join(map(repr, absent))}"
        print(message)
    return [checkpoint_classes.index(name) for name in source.classes]


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
    ):
        self.name = name
        self.path = path
        self.header = checkpoint.read_header(path)
        trained_on = self.header["dataset"]
        own_dataset = trained_on["name"]
        if trained_on["revision"]:
            own_dataset += f"@{trained_on['revision']}"
        self.source = load_source(dataset or own_dataset)
        self.class_numbers = match_classes(path, self.header["classes"], self.source)
        self.split = split or ("test" if "test" in self.source.splits else "validation")
        trained = self.header["arguments"]
        self.source_split, self.rows = select_rows(
            self.source,
            self.split,
            val_fraction=trained["val_fraction"],
            seed=trained["seed"],
            limit_train=limit_eval,
            limit_eval=limit_eval,
        )

    @property
    def dataset(self) -> str:
        """The dataset's name, followed by @ and the revision if it has one."""
        return self.source.name + (f"@{self.source.revision}" if self.source.revision else "")

    def decode(self, *, num_workers: int, store_limit: float) -> Images:
        """Decode the images. `store_limit` is in bytes."""
        return decode(
            self.source,
            self.source_split,
            self.rows,
            image_size=self.header["preprocessing"]["image_size"],
            num_workers=num_workers,
            store_limit=store_limit,
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
        )

    def result(self, candidate: Candidate) -> report.Evaluated:
        """Compute the metrics."""
        parameters, trainable = models.count_parameters(candidate.model)
        row = {
            "checkpoint": str(self.path),
            "model": self.header["model"]["name"],
            "dataset": self.source.name,
            "split": self.split,
            "num_samples": len(candidate.images),
            **metrics.compute(candidate.predictions),
            "parameters": parameters,
            "trainable_parameters": trainable,
        }
        return report.Evaluated(self.name, row, candidate.predictions, self.header["classes"])


def decode_once(evaluations: list[Evaluation], *, num_workers: int, store_limit: float) -> list[Images]:
    """Decode the images of each evaluation. Evaluations that need the same images share them."""
    decoded: dict[tuple, Images] = {}
    images = []
    for evaluation in evaluations:
        side = evaluation.header["preprocessing"]["image_size"]
        key = (id(evaluation.source), evaluation.source_split, tuple(evaluation.rows.tolist()), side)
        if key not in decoded:
            decoded[key] = evaluation.decode(num_workers=num_workers, store_limit=store_limit)
        images.append(decoded[key])
    return images


def output_names(paths: list[Path]) -> list[str]:
    """Return a name for each checkpoint's output files: its run's name, or its file's if two share a run.

    UserError: two checkpoints have the same name.
    """
    runs = [checkpoint.read_header(path)["arguments"]["run_name"] for path in paths]
    names = [run if runs.count(run) == 1 else path.stem for run, path in zip(runs, paths, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(
            f"two checkpoints would write the same files: {', '.join(map(str, paths))}; "
            "evaluate them one by one, each with its own --output-dir"
        )
    return names


def main(argv: list[str] | None = None, description: str = __doc__) -> int:
    """Evaluate the checkpoints of the command line and write the results. Return the exit status."""
    args = build_parser(description).parse_args(argv)
    accelerator = make_accelerator(mixed_precision=args.mixed_precision, num_threads=args.num_threads)
    traces = args.output_dir / "traces"
    on_main_process(accelerator, lambda: cli.check_output_dir(args.output_dir, "traces"))
    report.read_metrics_csv(traces / "metrics.csv")  # raise UserError before any work
    evaluations = [
        Evaluation(name, path, dataset=args.dataset, split=args.split, limit_eval=args.limit_eval)
        for name, path in zip(output_names(args.ckpt), args.ckpt, strict=True)
    ]
    all_images = decode_once(evaluations, num_workers=args.num_workers, store_limit=1e9 * args.store_limit)
    evaluated, candidates = [], []
    for evaluation, images in zip(evaluations, all_images, strict=True):
        candidate = evaluation.run(images, accelerator=accelerator, batch_size=args.batch_size)
        one = evaluation.result(candidate)
        candidates.append(candidate)
        evaluated.append(one)
        if accelerator.is_main_process:
            report.write_evaluation(traces, one)
            report.update_metrics_csv(traces / "metrics.csv", [one.row])
        print(
            f"{evaluation.path}: {one.row['split']} of {one.row['dataset']}, "
            f"{one.row['num_samples']:,} images: "
            f"accuracy {one.row['accuracy']:.4f}, macro F1 {one.row['macro_f1']:.4f}",
            flush=True,
        )
    if accelerator.is_main_process:
        lines = "\n".join(write_comparison(traces, candidates, accelerator))
        tables = report.compare_evaluations(evaluated)
        write_text(traces / "model_comparison.txt", f"{tables}\nRanking and pairs\n\n{lines}\n")
        print(lines)
    print(
        "metrics.csv, reports, confusion matrices, predictions, pairs.csv, class_metrics.csv, "
        f"label_suspects.csv and model_comparison.txt are in {traces}"
    )
    return 0
