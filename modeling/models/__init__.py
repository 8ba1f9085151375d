"""Build a model from its name, and find its weights and the preprocessing of its input."""

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from modeling import recipes
from modeling.data.resize import Preprocessing
from modeling.errors import UserError
from modeling.models import backbones
from modeling.models.backbones import ViTLinearProbe
from modeling.models.cnn import SimpleCNN
from modeling.models.cnn_fast import CNNFast
from modeling.models.layout import set_memory_layout
from modeling.models.tensors import load_state, read_state
from modeling.models.vit import SimpleViT
from modeling.models.weights import Weights, locate_weights, read_weights
from modeling.run.header import MAX_IMAGE_SIZE

FROM_SCRATCH = {"cnn": SimpleCNN, "cnn_small": SimpleCNN, "cnn_fast": CNNFast, "vit_scratch": SimpleViT}
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
    name: str,
    *,
    num_classes: int,
    image_size: int,
    weights: Weights | Path | None = None,
    new_head: bool = False,
    **model_args: Any,
) -> nn.Module:
    """Build a model: images (B, 3, image_size, image_size), float32 -> logits (B, num_classes).

    Weights are drawn from torch's generator, then replaced by those of the file `weights`, if it is given
    (with `new_head`, all but those of the last layer).
    model_args go to the constructor, because each model has arguments of its own. Those that the record of
    `weights` has are used too. UserError: the name is unknown, the model cannot take the image size, or the
    weights do not fit.
    """
    check_model_name(name)
    if image_size > MAX_IMAGE_SIZE:
        raise UserError(f"image size {image_size} is too large: give at most {MAX_IMAGE_SIZE}")
    if isinstance(weights, Path):
        weights = read_weights(name, weights, from_scratch=name in FROM_SCRATCH)
    constructor = MODELS.get(name) or functools.partial(backbones.create_backbone, name)
    path = weights.path if weights else None
    tensors = read_state(path) if path else {}
    if path and weights.model_args:
        model_args = weights.combine_arguments(model_args)
        # A record of a few letters can describe a model of any size.
        arguments = {"name": name, "num_classes": num_classes, "image_size": image_size, **model_args}
        num_wanted, num_there = (
            sum(value.numel() for value in state.values())
            for state in (build_empty_model(len(tensors), arguments).state_dict(), tensors)
        )
        if num_wanted > 4 * num_there + num_classes * 2**16:
            raise UserError(
                f"{path} has {num_there:,} numbers, but the model of its record would have {num_wanted:,}"
            )
    model = constructor(num_classes=num_classes, image_size=image_size, **model_args)
    if path:
        load_state(model, tensors, path, new_head=new_head)
    return set_memory_layout(model)


def build_empty_model(num_tensors: int, arguments: dict[str, Any]) -> nn.Module:
    """Build a model whose tensors have shapes but no memory (torch's meta device).

    UserError: it would have many more tensors than num_tensors, or it cannot be built.
    """
    num_registered = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal num_registered
        num_registered += 1
        if num_registered > 4 * num_tensors + 1000:
            raise UserError(f"the model that is described has far more than {num_tensors} tensors")

    handle = register_module_parameter_registration_hook(count)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build_model(**arguments)
    except UserError:
        raise
    except Exception as error:  # a constructor raises whatever it comes across
        raise UserError(f"model {arguments['name']} cannot be built: {error}") from error
    finally:
        handle.remove()


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
