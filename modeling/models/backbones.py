"""timm models with a new head, and the linear probe on a frozen one.

timm: https://github.com/huggingface/pytorch-image-models
"""

import difflib

import timm
import torch
from torch import nn

from modeling.errors import UserError


def timm_name(model: str) -> str:
    """Return timm's name for one of our models or for timm/NAME. UserError: timm has no such model."""
    name = {
        "resnet18": "resnet18.tv_in1k",
        "vit": "vit_tiny_patch16_224",
        "deit": "deit_tiny_patch16_224",
    }.get(model)
    name = name or model.removeprefix("timm/")
    if not timm.is_model(name.split(".")[0]) or ("." in name and not timm.is_model_pretrained(name)):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise UserError(
            f"timm has no model {name!r}" + (f": did you mean {', '.join(near)}?" if near else "")
        )
    return name


def pretrained_config(model: str):
    """Return timm's record of a model's weights: input size, mean, std, crop, interpolation, hub id."""
    config = timm.get_pretrained_cfg(timm_name(model))
    return config or timm.models.PretrainedCfg()


def create_backbone(model: str, *, num_classes: int, image_size: int, head_dropout: float = 0.0) -> nn.Module:
    """Build a timm model with random weights and a head of `num_classes` outputs.

    num_classes 0 leaves the head out, so that the model returns features. UserError: the model cannot take
    this image size.
    """
    # On a CPU, attention as two matrix products and a softmax is faster than fused attention, but needs more
    # memory. Images up to 512 pixels have few tokens, so the memory is small.
    timm.layers.set_fused_attn(torch.cuda.is_available() or image_size > 512)
    fixed_input_size = pretrained_config(model).fixed_input_size
    try:
        backbone = timm.create_model(
            timm_name(model),
            pretrained=False,
            num_classes=num_classes,
            drop_rate=head_dropout,
            img_size=image_size if fixed_input_size else None,  # timm ignores an argument that is None
        )
        if image_size != pretrained_config(model).input_size[-1]:
            # Some models reject a size only in the forward pass, so try one image.
            with torch.no_grad():
                backbone.eval()(torch.zeros(1, 3, image_size, image_size))
        return backbone.train()
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"{model} cannot take image size {image_size}: {error}") from error
    finally:
        timm.layers.set_fused_attn(True)  # timm's own default


class ViTLinearProbe(nn.Module):
    """A frozen ViT-Tiny and a trainable Linear on its 192 features.

    Input: images (B, 3, S, S) or features (B, 192), float. Output: logits (B, num_classes). The backbone gets
    no gradient and stays in eval mode while the head trains. With 10 classes, 1,930 of 5,526,346 parameters
    are trainable. The notebook also has a variant with head_dropout 0.1.
    """

    def __init__(self, *, num_classes: int = 10, image_size: int = 224, head_dropout: float = 0.0):
        super().__init__()
        self.backbone = create_backbone("vit", num_classes=0, image_size=image_size)
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
