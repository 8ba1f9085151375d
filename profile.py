"""Profile the real training step of models, with random weights, and compare them.

    python profile.py --models cnn vit
    accelerate launch --config_file accelerate_configs/cpu.yaml profile.py --models cnn_small vit_scratch --dataset cifar10
    accelerate launch --config_file accelerate_configs/single_gpu_bf16.yaml profile.py --models resnet18 deit --batch-size 64

Writes a Chrome trace and an operator table of each model, and profile_comparison.txt and .csv, to traces/ under --output-dir.
"""

if __name__ == "profile":  # not this script but the standard library's module: see modeling/shadow.py
    from modeling.shadow import load_real

    load_real("profile")
else:
    import sys
    from pathlib import Path
    from typing import Any

    import torch

    from modeling import cli, models, profiling, recipes, report
    from modeling.data.images import Images, decode, native_size
    from modeling.data.sources import load_source, select_rows
    from modeling.engine import StepSettings
    from modeling.files import write_text
    from modeling.progress import Progress
    from modeling.run.launch import make_accelerator, precision_text, refuse_processes

    def build_parser() -> cli.Parser:
        parser = cli.Parser(__doc__)
        names = f"{', '.join(models.MODELS)}, timm/NAME"
        parser.add_argument(
            "--models",
            nargs="+",
            default=["cnn", "vit"],
            metavar="MODEL",
            help=f"of {names} (default: cnn vit)",
        )
        parser.add_argument(
            "--dataset",
            default="digits",
            help="stl10, cifar10, digits, a hub id or a local folder (default: digits)",
        )
        parser.add_argument(
            "--num-steps", type=cli.POSITIVE_INT, default=100, help="steps that are timed (default: 100)"
        )
        parser.add_argument(
            "--batch-size", type=cli.POSITIVE_INT, default=32, help="images a step (default: 32)"
        )
        parser.add_argument(
            "--image-size",
            type=cli.POSITIVE_INT,
            help="in pixels (default: a backbone's own, else the images')",
        )
        parser.add_argument(
            "--recipe",
            choices=("tuned", "reference"),
            default="tuned",
            help="whose step is timed (default: tuned)",
        )
        parser.add_argument(
            "--output-dir", type=Path, default=Path(), help="where traces/ goes (default: here)"
        )
        cli.add_hardware_group(parser)
        return parser

    def profile_one(name: str, images: Images, args: Any, accelerator) -> dict[str, Any]:
        """A row of the comparison: the step of the model's recipe on these images."""
        size = args.image_size or models.default_image_size(name) or native_size(images)
        recipe = recipes.get_recipe(name, size, args.recipe)
        model_args = models.model_arguments(name, recipe, image_size=size, patch_size=None, head_dropout=None)
        step_settings = StepSettings(
            preprocessing=models.preprocessing(name, recipe, size),
            augment=recipe.augment,
            label_smoothing=recipe.label_smoothing,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
            clip_grad=recipe.clip_grad,
        )
        with Progress(
            profiling.WARMUP_STEPS + args.num_steps + profiling.TRACED_STEPS, f"profiling {name}", " steps"
        ) as progress:
            return profiling.profile_model(
                name,
                models.build_model(name, num_classes=len(images.classes), image_size=size, **model_args),
                images,
                step_settings,
                accelerator=accelerator,
                optimizer=recipe.optimizer,
                lr=recipe.lr,
                weight_decay=recipe.weight_decay,
                batch_size=args.batch_size,
                num_steps=args.num_steps,
                output_dir=args.output_dir / "traces",
                progress=progress.update,
            )

    def main(argv: list[str] | None = None) -> int:
        args = build_parser().parse_args(argv)
        args.models = list(dict.fromkeys(map(models.check_model_name, args.models)))
        refuse_processes()
        accelerator = make_accelerator(mixed_precision=args.mixed_precision, num_threads=args.num_threads)
        cli.check_output_dir(args.output_dir, "traces")
        source = load_source(args.dataset)
        own, rows = select_rows(
            source, "train", val_fraction=0.1, seed=42, limit_train=max(1024, args.batch_size)
        )
        largest = max(args.image_size or models.default_image_size(name) or 0 for name in args.models)
        images = decode(
            source,
            own,
            rows,
            image_size=largest,
            num_workers=args.num_workers,
            store_limit=1e9 * args.store_limit,
        )
        print(
            f"{accelerator.device}, {torch.get_num_threads()} threads, {precision_text(accelerator)}",
            flush=True,
        )
        results = [profile_one(name, images, args, accelerator) for name in args.models]
        comparison = report.compare_models(results)
        traces = args.output_dir / "traces"
        write_text(traces / "profile_comparison.txt", comparison + "\n")
        write_text(traces / "profile_comparison.csv", report.csv_text(results, profiling.COLUMNS))
        print(f"{comparison}\nTraces, operator tables and the comparison are in {traces}")
        return 0

    if __name__ == "__main__":
        sys.exit(cli.run(main))
