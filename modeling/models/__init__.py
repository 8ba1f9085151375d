"""Build a model from its name, and find its weights and the preprocessing of its input."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling import recipes
from modeling.data.resize import Preprocessing
from modeling.errors import UserError
from modeling.models import backbones
from modeling.models.backbones import ViTLinearProbe
from modeling.models.cnn import SimpleCNN
from modeling.models.vit import SimpleViT
from modeling.models.weights import Weights, load_weights, locate_weights

FROM_SCRATCH = {"cnn": SimpleCNN, "cnn_small": SimpleCNN, "vit_scratch": SimpleViT}
PRETRAINED = {
    "resnet18": functools.partial(backbones.create_backbone, "resnet18"),
    "vit": ViTLinearProbe,
    "deit": functools.partial(backbones.create_backbone, "deit"),
}
MODELS = {**FROM_SCRATCH, **PRETRAINED}


def check_model_name(name: str) -> str:
    """Return the name. UserError: there is no such model; it lists the choices."""
    if name.startswith("timm/"):
        backbones.timm_name(name)
    elif name not in MODELS:
        raise UserError(
            f"unknown model {name!r}: choose from {', '.join(MODELS)}, or timm/NAME for any other timm model"
        )
    return name


def file_name(model: str) -> str:
    """Return the model's name for use in file names: timm/NAME becomes timm_NAME."""
    return model.replace("/", "_")


def build_model(
    name: str, *, num_classes: int, image_size: int, weights: Path | None = None, **model_args: Any
) -> nn.Module:
    """Build a model: images (B, 3, image_size, image_size), float32 -> logits (B, num_classes).

    Weights are drawn from torch's generator, then replaced by those of the file `weights`, if it is given.
    model_args go to the constructor, because each model has arguments of its own. UserError: the name is
    unknown, the model cannot take the image size, or the weights do not fit.
    """
    check_model_name(name)
    constructor = MODELS.get(name) or functools.partial(backbones.create_backbone, name)
    model = constructor(num_classes=num_classes, image_size=image_size, **model_args)
    if weights:
        load_weights(model, weights)
    return model.to(memory_format=torch.channels_last)


def model_arguments(
    name: str, recipe: recipes.Recipe, *, image_size: int, patch_size: int | None, head_dropout: float | None
) -> dict[str, Any]:
    """Return the constructor's arguments: the recipe's, overridden by the flags.

    UserError: a patch size is given, but the model is not vit_scratch.
    """
    arguments = dict(recipe.model_args)
    if name == "vit_scratch":
        arguments["patch_size"] = patch_size or recipes.default_patch_size(image_size)
    elif patch_size is not None:
        raise UserError(f"--patch-size is for vit_scratch; {name} has its own")
    if head_dropout is not None:
        arguments["head_dropout"] = head_dropout
    return arguments


def find_weights(name: str, wanted: str = "none") -> Weights:
    """Call locate_weights for any model that build_model knows."""
    return locate_weights(name, wanted, from_scratch=name in FROM_SCRATCH)


def default_image_size(name: str, weights: Weights | None = None) -> int | None:
    """Return the image size that a backbone's weights were trained at.

    None: the model is trained from scratch and takes the images' own size.
    """
    return None if name in FROM_SCRATCH else (weights or find_weights(name)).preprocessing.image_size


def preprocessing(
    name: str, recipe: recipes.Recipe, image_size: int, weights: Weights | None = None
) -> Preprocessing:
    """Return the preprocessing of the weights, with `image_size` in place of their own image size.

    A backbone with random weights uses timm's record of its pretrained weights. A model from scratch uses the
    recipe's mean and std, and no crop.
    """
    own = (weights or find_weights(name)).preprocessing or Preprocessing(
        image_size=image_size, mean=recipe.mean, std=recipe.std
    )
    return dataclasses.replace(own, image_size=image_size)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of all parameters and the number of trainable ones."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trainable in counts if trainable)
