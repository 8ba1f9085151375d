"""Evaluate checkpoints: predictions -> metrics, plots, comparison.

    python evaluate.py --ckpt checkpoints/cnn_best.safetensors
    python evaluate.py --ckpt checkpoints/cnn_best.safetensors checkpoints/vit_best.safetensors --split test
    accelerate launch --config_file accelerate_configs/single_gpu_bf16.yaml evaluate.py --ckpt checkpoints/vit_best.safetensors

A checkpoint says by itself which model, classes, preprocessing and dataset it needs. Writes traces/ under --output-dir.
"""

if __name__ == "evaluate":  # not this script but the package: see modeling/shadow.py
    from modeling.shadow import load_real

    load_real("evaluate")
else:
    import functools
    import sys
    from pathlib import Path
    from typing import Any

    from modeling import cli, metrics, models, report
    from modeling.data.images import decode
    from modeling.data.resize import Preprocessing
    from modeling.data.sources import SPLITS, Source, load_source, select_rows
    from modeling.engine import predict
    from modeling.errors import UserError
    from modeling.files import write_text
    from modeling.progress import Progress
    from modeling.run import checkpoint
    from modeling.run.launch import make_accelerator

    load_source = functools.cache(load_source)

    def build_parser() -> cli.Parser:
        parser = cli.Parser(__doc__)
        parser.add_argument(
            "--ckpt",
            type=Path,
            nargs="+",
            required=True,
            metavar="FILE",
            help="checkpoints that train.py wrote",
        )
        parser.add_argument(
            "--dataset",
            help="stl10, cifar10, digits, a hub id (@REVISION) or a local folder (default: the checkpoint's)",
        )
        parser.add_argument(
            "--split", choices=SPLITS, help="(default: test where the dataset has one, else validation)"
        )
        parser.add_argument(
            "--batch-size", type=cli.POSITIVE_INT, default=64, help="images at a time (default: 64)"
        )
        parser.add_argument(
            "--limit-eval",
            type=cli.POSITIVE_INT,
            metavar="N",
            help="evaluate a stratified subset of N images",
        )
        parser.add_argument(
            "--output-dir", type=Path, default=Path(), help="where traces/ goes (default: here)"
        )
        cli.add_hardware_group(parser)
        return parser

    def match_classes(path: Path, of_checkpoint: list[str], source: Source) -> list[int]:
        """For each class of the dataset its number in the checkpoint, by name. UserError: a class that the checkpoint lacks."""
        unknown = [name for name in source.classes if name not in of_checkpoint]
        if unknown:
            raise UserError(
                f"{path} does not know the class{'es' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown[:5]))} of {source.name}; "
                f"it knows {', '.join(map(repr, of_checkpoint[:10]))}: give a dataset of its classes with --dataset"
            )
        if source.classes != of_checkpoint:
            absent = [name for name in of_checkpoint if name not in source.classes]
            print(
                f"{source.name} has its classes in another order or number than {path}: matched by name"
                + (f"; it lacks {', '.join(map(repr, absent))}" if absent else "")
            )
        return [of_checkpoint.index(name) for name in source.classes]

    class Evaluation:
        """A checkpoint and the images that it is to be evaluated on: all that can be refused is refused before anything is run."""

        def __init__(self, name: str, path: Path, args: Any):
            self.name, self.path = name, path
            self.header = checkpoint.read_header(path)
            trained_on = self.header["dataset"]
            own = trained_on["name"] + (f"@{trained_on['revision']}" if trained_on["revision"] else "")
            self.source = load_source(args.dataset or own)
            self.numbers = match_classes(path, self.header["classes"], self.source)
            self.split = args.split or ("test" if "test" in self.source.splits else "validation")
            trained = self.header["arguments"]
            limits = dict(limit_train=args.limit_eval, limit_eval=args.limit_eval)
            options = dict(val_fraction=trained["val_fraction"], seed=trained["seed"])
            self.own_split, self.rows = select_rows(self.source, self.split, **options, **limits)

        def run(self, args: Any, accelerator) -> report.Evaluated:
            """Decode, predict and compute."""
            options = dict(
                image_size=self.header["preprocessing"]["image_size"],
                num_workers=args.num_workers,
                store_limit=1e9 * args.store_limit,
                progress=Progress,
            )
            images = decode(self.source, self.own_split, self.rows, **options)
            images.labels = images.labels.new_tensor(self.numbers)[
                images.labels
            ]  # as the checkpoint numbers its classes
            model, header = checkpoint.load_model(self.path)
            parameters, trainable = models.count_parameters(model)
            model = accelerator.prepare_model(model, evaluation_mode=True)
            with Progress(len(images), f"evaluating {self.name}") as progress:
                options = dict(batch_size=args.batch_size, accelerator=accelerator, progress=progress.update)
                predictions = predict(
                    model, images, Preprocessing.from_json(header["preprocessing"]), **options
                )
            row = {
                "checkpoint": str(self.path),
                "model": header["model"]["name"],
                "dataset": self.source.name,
                "split": self.split,
                "num_samples": len(images),
                **metrics.compute(predictions),
                "parameters": parameters,
                "trainable_parameters": trainable,
            }
            return report.Evaluated(self.name, row, predictions, header["classes"])

    def main(argv: list[str] | None = None) -> int:
        args = build_parser().parse_args(argv)
        accelerator = make_accelerator(mixed_precision=args.mixed_precision, num_threads=args.num_threads)
        traces = args.output_dir / "traces"
        cli.check_output_dir(args.output_dir, "traces")
        report.read_metrics_csv(traces / "metrics.csv")
        runs = [checkpoint.read_header(path)["arguments"]["run_name"] for path in args.ckpt]
        # two checkpoints of one run are told apart by the file's stem
        names = [
            run if runs.count(run) == 1 else path.stem for run, path in zip(runs, args.ckpt, strict=True)
        ]
        if len(set(names)) < len(names):
            raise UserError(
                f"two checkpoints would write the same files: {', '.join(map(str, args.ckpt))}; evaluate them one by one"
            )
        evaluations = [Evaluation(name, path, args) for name, path in zip(names, args.ckpt, strict=True)]
        evaluated = []
        for evaluation in evaluations:
            one = evaluation.run(args, accelerator)
            evaluated.append(one)
            if accelerator.is_main_process:
                report.write_evaluation(traces, one)
                report.update_metrics_csv(traces / "metrics.csv", [one.row])
            print(
                f"{evaluation.path}: {one.row['split']} of {one.row['dataset']}, {one.row['num_samples']:,} images: "
                f"accuracy {one.row['accuracy']:.4f}, macro F1 {one.row['macro_f1']:.4f}"
            )
        if accelerator.is_main_process:
            write_text(traces / "model_comparison.txt", report.compare_evaluations(evaluated))
        print(
            f"metrics, classification reports, confusion matrices, predictions and model_comparison.txt are in {traces}"
        )
        return 0

    if __name__ == "__main__":
        sys.exit(cli.run(main))
