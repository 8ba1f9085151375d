"""Evaluate checkpoints: predictions -> metrics, plots, comparison.

    python evaluate.py --ckpt checkpoints/cnn_best.safetensors
    python evaluate.py --ckpt checkpoints/cnn_best.safetensors checkpoints/vit_best.safetensors --split test
    accelerate launch --config_file accelerate_configs/gpu.yaml evaluate.py --ckpt checkpoints/vit_best.safetensors

A checkpoint says by itself which model, classes, preprocessing and dataset it needs. Writes traces/ under --output-dir.
"""

if __name__ == "evaluate":  # not this script but the package: see modeling/shadow.py
    from modeling.shadow import load_real

    load_real("evaluate")
else:
    import sys
    from pathlib import Path
    from typing import Any

    from modeling import checkpoint, cli, data, metrics, models, report
    from modeling.engine import Predictions, predict

    def build_parser() -> cli.Parser:
        parser = cli.Parser(__doc__)
        parser.add_argument("--ckpt", type=Path, nargs="+", required=True, metavar="FILE", help="checkpoints that train.py wrote")
        parser.add_argument("--dataset", help="stl10, cifar10, digits, a hub id or a local folder (default: the checkpoint's)")
        parser.add_argument("--split", choices=data.SPLITS, help="(default: test where the dataset has one, else validation)")
        parser.add_argument("--batch-size", type=cli.POSITIVE_INT, default=64, help="images at a time (default: 64)")
        parser.add_argument("--limit-eval", type=cli.POSITIVE_INT, metavar="N", help="evaluate a stratified subset of N images")
        parser.add_argument("--output-dir", type=Path, default=Path(), help="where traces/ goes (default: here)")
        cli.add_hardware_group(parser)
        return parser

    def match_classes(path: Path, of_checkpoint: list[str], source: data.Source) -> list[int]:
        """For each class of the dataset its number in the checkpoint, by name. ValueError: a class that the checkpoint lacks."""
        unknown = [name for name in source.classes if name not in of_checkpoint]
        if unknown:
            raise ValueError(
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

    def load_split(header: dict[str, Any], path: Path, args: Any) -> tuple[str, data.Images]:
        """The split that is asked for, decoded, its labels numbered as the checkpoint numbers them."""
        trained = header["arguments"]
        source = data.load_source(args.dataset or header["dataset"]["name"])
        numbers = match_classes(path, header["classes"], source)
        split = args.split or ("test" if "test" in source.splits else "validation")
        own, rows = data.divide(
            source,
            split,
            val_fraction=trained["val_fraction"],
            seed=trained["seed"],
            limit_eval=args.limit_eval,
            limit_train=args.limit_eval,
        )
        with cli.Progress(len(rows), "decoding") as progress:
            size = header["preprocessing"]["image_size"]
            images = data.decode(source, own, rows, image_size=size, num_threads=args.num_workers, progress=progress.update)
        images.labels = images.labels.new_tensor(numbers)[images.labels]
        return split, images

    def evaluate_checkpoint(path: Path, args: Any, accelerator) -> tuple[dict[str, Any], Predictions, list[str]]:
        """A row of metrics.csv, the predictions and the class names of one checkpoint."""
        model, header = checkpoint.load_model(path)
        split, images = load_split(header, path, args)
        parameters, trainable = models.count_parameters(model)
        model = accelerator.prepare(model)
        with cli.Progress(len(images), f"evaluating {path.stem}") as progress:
            predictions = predict(
                model,
                images,
                checkpoint.preprocessing_from(header),
                batch_size=args.batch_size,
                device=accelerator.device,
                progress=progress.update,
            )
        row = {
            "checkpoint": str(path),
            "model": header["model"]["name"],
            "dataset": args.dataset or header["dataset"]["name"],
            "split": split,
            "num_samples": len(images),
            **metrics.compute(predictions),
            "parameters": parameters,
            "trainable_parameters": trainable,
        }
        return row, predictions, header["classes"]

    def main(argv: list[str] | None = None) -> int:
        args = build_parser().parse_args(argv)
        accelerator = cli.make_accelerator(args)
        runs = [checkpoint.read_header(path)["arguments"]["run_name"] for path in args.ckpt]  # all of them, before the first is run
        cli.check_output_dir(args.output_dir)
        # two checkpoints of one run are told apart by the file's stem
        names = [run if runs.count(run) == 1 else path.stem for run, path in zip(runs, args.ckpt, strict=True)]
        if len(set(names)) < len(names):
            raise ValueError(f"two checkpoints would write the same files: {', '.join(map(str, args.ckpt))}; evaluate them one by one")
        traces = args.output_dir / "traces"
        evaluated = []
        for name, path in zip(names, args.ckpt, strict=True):
            row, predictions, classes = evaluate_checkpoint(path, args, accelerator)
            evaluated.append(report.Evaluated(name, row, predictions, classes))
            report.write_evaluation(traces, evaluated[-1])
            print(
                f"{path}: {row['split']} of {row['dataset']}, {row['num_samples']:,} images: accuracy {row['accuracy']:.4f}, "
                f"macro F1 {row['macro_f1']:.4f}"
            )
        report.update_metrics_csv(traces / "metrics.csv", [one.row for one in evaluated])
        checkpoint.write_text(traces / "model_comparison.txt", report.compare_evaluations(evaluated))
        print(f"metrics, classification reports, confusion matrices, predictions and model_comparison.txt are in {traces}")
        return 0

    if __name__ == "__main__":
        sys.exit(cli.run(main))
