"""build_model: from a name to a module, and what its input must look like."""

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
    """The name. UserError: unknown, with the choices."""
    if name.startswith("timm/"):
        backbones.timm_name(name)
    elif name not in MODELS:
        raise UserError(
            f"unknown model {name!r}: choose from {', '.join(MODELS)}, or timm/NAME for any other timm model"
        )
    return name


def file_name(model: str) -> str:
    """The model's name as file names have it: timm/NAME is timm_NAME."""
    return model.replace("/", "_")


def build_model(
    name: str, *, num_classes: int, image_size: int, weights: Path | None = None, **model_args: Any
) -> nn.Module:
    """A model: (B, 3, image_size, image_size) float32 -> logits (B, num_classes).

    Its weights are drawn from torch's generator, and then, where `weights` is a safetensors file, read from that; model_args go to
    the constructor. UserError: an unknown name, a size that the model cannot take, weights that do not fit.
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
    """The constructor's arguments: the recipe's, then the flags. UserError: a patch size for a model without patches."""
    arguments = dict(recipe.model_args)
    if name == "vit_scratch":
        arguments["patch_size"] = patch_size or recipes.default_patch_size(image_size)
    elif patch_size is not None:
        raise UserError(f"--patch-size is for vit_scratch; {name} has its own")
    if head_dropout is not None:
        arguments["head_dropout"] = head_dropout
    return arguments


def find_weights(name: str, wanted: str = "none") -> Weights:
    """locate_weights for any of our models."""
    return locate_weights(name, wanted, from_scratch=name in FROM_SCRATCH)


def default_image_size(name: str, weights: Weights | None = None) -> int | None:
    """The size a backbone's weights were trained at; None for a model from scratch, which takes the images' own."""
    return None if name in FROM_SCRATCH else (weights or find_weights(name)).preprocessing.image_size


def preprocessing(
    name: str, recipe: recipes.Recipe, image_size: int, weights: Weights | None = None
) -> Preprocessing:
    """What the weights were trained with; for random ones, the recipe's mean and std, and no crop, or timm's record of a backbone."""
    own = (weights or find_weights(name)).preprocessing or Preprocessing(
        image_size=image_size, mean=recipe.mean, std=recipe.std
    )
    return dataclasses.replace(own, image_size=image_size)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters, and the trainable ones."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trainable in counts if trainable)
