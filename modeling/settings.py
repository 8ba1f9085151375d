"""Settings: every value that a run uses, resolved once from flags, recipe, data and machine."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling.errors import UserError
from modeling.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every value that a run uses. No value is None, and none changes later. 0 turns a number off.

    The names are those of the flags. num_threads counts the CPU threads of each process. model_args go to
    build_model. total_steps is the number of updates. store_limit is in bytes.
    """

    model: str
    model_args: dict[str, Any]
    weights: str
    dataset: str
    recipe: str
    run_name: str
    output_dir: Path
    seed: int
    image_size: int
    val_fraction: float
    limit_train: int
    limit_eval: int
    dataset_config: str
    image_column: str
    label_column: str
    train_split: str
    test_split: str
    skip_bad_images: bool

    epochs: int
    max_steps: int
    steps_per_epoch: int
    total_steps: int
    batch_size: int
    gradient_accumulation_steps: int
    optimizer: str
    lr: float
    weight_decay: float
    momentum: float
    schedule: str
    warmup_epochs: float
    augment: str
    label_smoothing: float
    mixup: float
    cutmix: float
    clip_grad: float
    ema: float
    feature_views: int

    best_metric: str
    early_stop: int
    checkpoint_every: int
    resume: bool
    force: bool
    report_to: str

    mixed_precision: str
    num_threads: int
    num_workers: int
    store_limit: float
    compile: bool
    deterministic: bool

    def recorded(self) -> dict[str, Any]:
        """The values that a checkpoint's header records: all that influence the weights."""
        values = dataclasses.asdict(self)
        unrecorded = {name for name, rule in MAY_DIFFER.items() if not rule.recorded}
        # The header has model_args under a key of their own. The step counts follow from other values.
        derived = {"model_args", "steps_per_epoch", "total_steps"}
        return {name: value for name, value in values.items() if name not in unrecorded | derived}


@dataclass(frozen=True)
class MayDiffer:
    """The places where a flag's values may differ within one run."""

    on_resume: bool  # a run may be resumed with another value
    between_processes: bool  # the processes may have different values
    recorded: bool  # the checkpoint's header records the value nevertheless


# The flags that do not change what is computed. All others must have one value in a run.
# dataset and weights are paths: a resumed run must find the same images and weights (progression.identity).
MAY_DIFFER = {
    "output_dir": MayDiffer(on_resume=True, between_processes=True, recorded=False),
    "num_workers": MayDiffer(on_resume=True, between_processes=True, recorded=False),
    "store_limit": MayDiffer(on_resume=True, between_processes=True, recorded=False),
    "num_threads": MayDiffer(on_resume=True, between_processes=True, recorded=True),
    "dataset": MayDiffer(on_resume=True, between_processes=False, recorded=True),
    "weights": MayDiffer(on_resume=True, between_processes=False, recorded=True),
    "run_name": MayDiffer(on_resume=True, between_processes=False, recorded=True),
    "checkpoint_every": MayDiffer(on_resume=True, between_processes=False, recorded=False),
    "report_to": MayDiffer(on_resume=True, between_processes=False, recorded=False),
    "resume": MayDiffer(on_resume=True, between_processes=False, recorded=False),
    "force": MayDiffer(on_resume=True, between_processes=False, recorded=False),
}


def complete(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A header's arguments, with those that earlier versions did not record."""
    return {"momentum": 0.9, **arguments}


def resolve(
    flags: Mapping[str, Any],
    recipe: Recipe,
    *,
    run_name: str,
    image_size: int,
    model_args: dict[str, Any],
    val_fraction: float,
    num_train_images: int,
    is_linear_probe: bool,
    mixed_precision: str,
    num_threads: int,
) -> Settings:
    """Combine the flags (None: not given) with the recipe and with values that depend on data and machine.

    UserError: --feature-views for a model whose features cannot be kept.
    """

    def flag_or_recipe(name: str) -> Any:
        given = flags[name]
        return getattr(recipe, name) if given is None else given

    batch_size = flag_or_recipe("batch_size")
    steps_per_epoch = math.ceil(num_train_images / batch_size)
    if flags["epochs"] is None and flags["max_steps"] is None:
        recipe = recipe.stretched(steps_per_epoch)
    total_steps = flags["max_steps"] or flag_or_recipe("epochs") * steps_per_epoch
    return Settings(
        model=flags["model"],
        model_args=model_args,
        weights=flags["weights"],
        dataset=flags["dataset"],
        recipe=flags["recipe"],
        run_name=run_name,
        output_dir=flags["output_dir"],
        seed=flags["seed"],
        image_size=image_size,
        val_fraction=val_fraction,
        limit_train=flags["limit_train"] or 0,
        limit_eval=flags["limit_eval"] or 0,
        dataset_config=flags["dataset_config"] or "",
        image_column=flags["image_column"] or "",
        label_column=flags["label_column"] or "",
        train_split=flags["train_split"] or "",
        test_split=flags["test_split"] or "",
        skip_bad_images=flags["skip_bad_images"],
        epochs=math.ceil(total_steps / steps_per_epoch),
        max_steps=flags["max_steps"] or 0,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        batch_size=batch_size,
        gradient_accumulation_steps=flags["gradient_accumulation_steps"],
        optimizer=flag_or_recipe("optimizer"),
        lr=flag_or_recipe("lr"),
        weight_decay=flag_or_recipe("weight_decay"),
        momentum=recipe.momentum,
        schedule=recipe.schedule,
        warmup_epochs=flag_or_recipe("warmup_epochs"),
        augment=flag_or_recipe("augment"),
        label_smoothing=flag_or_recipe("label_smoothing"),
        mixup=flag_or_recipe("mixup"),
        cutmix=flag_or_recipe("cutmix"),
        clip_grad=flag_or_recipe("clip_grad"),
        ema=flag_or_recipe("ema"),
        feature_views=num_feature_views(
            asked=flags["feature_views"],
            of_recipe=recipe.feature_views,
            model=flags["model"],
            is_linear_probe=is_linear_probe,
            is_augmented=flag_or_recipe("augment") != "none",
            mixes=flag_or_recipe("mixup") > 0 or flag_or_recipe("cutmix") > 0,
        ),
        best_metric=flags["best_metric"],
        early_stop=flags["early_stop"] or 0,
        checkpoint_every=flags["checkpoint_every"] or 0,
        resume=flags["resume"],
        force=flags["force"],
        report_to=flags["report_to"],
        mixed_precision=mixed_precision,
        num_threads=num_threads,
        num_workers=flags["num_workers"],
        store_limit=1e9 * flags["store_limit"],
        compile=flags["compile"],
        deterministic=flags["deterministic"],
    )


def num_feature_views(
    *, asked: int | None, of_recipe: int, model: str, is_linear_probe: bool, is_augmented: bool, mixes: bool
) -> int:
    """Return the number of augmented views of each training image whose features are kept on disk.

    0 means a new view in each epoch, or that no features can be kept. `asked` is the flag's value or None.
    UserError: the flag asks for features that cannot be kept.
    """
    if is_linear_probe and not mixes:
        if asked is not None:
            return asked
        return of_recipe if is_augmented else 1  # without augmentation all views are equal
    if asked:
        reason = (
            "mixup and cutmix blend images" if is_linear_probe else f"the backbone of {model} is not frozen"
        )
        raise UserError(
            f"--feature-views keeps a frozen backbone's features of single images, but {reason}: "
            "use --feature-views 0"
        )
    return 0
