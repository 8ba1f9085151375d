"""timm models with a new head, and the linear probe on a frozen one.

timm: https://github.com/huggingface/pytorch-image-models
"""

import difflib
from typing import Any

import timm
import torch
from torch import nn

from modeling.errors import UserError

TIMM_NAMES = {
    "resnet18": "resnet18.tv_in1k",
    "vit": "vit_tiny_patch16_224",
    "deit": "deit_tiny_patch16_224",
}


def timm_name(model: str) -> str:
    """Return timm's name for one of our models or for timm/NAME. UserError: timm has no such model."""
    name = TIMM_NAMES.get(model) or model.removeprefix("timm/")
    if not timm.is_model(name.split(".")[0]) or ("." in name and not timm.is_model_pretrained(name)):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise UserError(
            f"timm has no model {name!r}" + (f": did you mean {', '.join(near)}?" if near else "")
        )
    return name


def architecture(model: str) -> str:
    """Return the architecture's name: timm's, without that of its weights, or our own."""
    return (TIMM_NAMES.get(model) or model.removeprefix("timm/")).split(".")[0]


def pretrained_config(model: str):
    """Return timm's record of a model's weights: input size, mean, std, crop, interpolation, hub id."""
    config = timm.get_pretrained_cfg(timm_name(model))
    return config or timm.models.PretrainedCfg()


def create_backbone(
    model: str,
    *,
    num_classes: int,
    image_size: int,
    head_dropout: float | None = None,
    timm_args: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a timm model with random weights and a head of `num_classes` outputs.

    num_classes 0 leaves the head out, so that the model returns features. timm_args are further arguments of
    timm's constructor, as the config.json of a hub model has them. UserError: the model cannot take this
    image size or these arguments.
    """
    timm_args = dict(timm_args or {})
    name = timm_name(model)
    # On a CPU, attention as two matrix products and a softmax is faster than fused attention, but needs more
    # memory. Images up to 512 pixels have few tokens, so the memory is small.
    timm.layers.set_fused_attn(torch.cuda.is_available() or image_size > 512)
    takes_size = pretrained_config(model).fixed_input_size or timm_args.pop("img_size", None)
    drop_rate = timm_args.pop("drop_rate", 0.0)
    try:
        backbone = timm.create_model(
            name,
            pretrained=False,
            num_classes=num_classes,
            drop_rate=drop_rate if head_dropout is None else head_dropout,
            img_size=image_size if takes_size else None,  # timm ignores an argument that is None
            **timm_args,
        )
        if timm_args or image_size != pretrained_config(model).input_size[-1]:
            # Some models reject a size only in the forward pass, so try one image.
            with torch.no_grad():
                logits = backbone.eval()(torch.zeros(1, 3, image_size, image_size))
            if logits.shape != (1, num_classes or backbone.num_features):
                raise ValueError(f"it gives {tuple(logits.shape)} for one image")
        return backbone.train()
    except UserError:
        raise
    except Exception as error:  # timm's models raise whatever their code comes across
        if isinstance(error, TypeError) and not timm_args:  # such as an encoder, which takes no drop_rate
            raise UserError(f"{model} cannot be built as a classifier: {error}") from error
        what = f" with {timm_args}" if timm_args else ""
        raise UserError(f"{model} cannot take image size {image_size}{what}: {error}") from error
    finally:
        timm.layers.set_fused_attn(True)  # timm's own default


class ViTLinearProbe(nn.Module):
    """A frozen ViT-Tiny and a trainable Linear on its 192 features.

    Input: images (B, 3, S, S) or features (B, 192), float. Output: logits (B, num_classes). The backbone gets
    no gradient and stays in eval mode while the head trains. With 10 classes, 1,930 of 5,526,346 parameters
    are trainable. The notebook also has a variant with head_dropout 0.1.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 224,
        head_dropout: float = 0.0,
        timm_args: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.backbone = create_backbone("vit", num_classes=0, image_size=image_size, timm_args=timm_args)
        self.backbone.requires_grad_(False)
        self.dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(self.backbone.num_features, num_classes)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ViTLinearProbe":
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features (B, 192), float32, of images (B, 3, S, S)."""
        return self.backbone(x).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = x if x.dim() == 2 else self.features(x)
        return self.head(self.dropout(features))  # (B, num_classes)
