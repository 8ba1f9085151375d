"""timm backbones: a new head, freezing, weights from the hub or a local file. timm: https://github.com/huggingface/pytorch-image-models."""

import difflib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import nn

from modeling.hub import download
from modeling.transforms import Preprocessing

HEADER_KEY = "checkpoint"  # of a checkpoint's metadata; one key: safetensors writes several in random order
HUB_FILE = "model.safetensors"


def timm_name(model: str) -> str:
    """timm's name of one of our models, or of timm/NAME. ValueError: timm has no such model."""
    name = {"resnet18": "resnet18.tv_in1k", "vit": "vit_tiny_patch16_224", "deit": "deit_tiny_patch16_224"}.get(model)
    name = name or model.removeprefix("timm/")
    if not timm.is_model(name.split(".")[0]) or ("." in name and not timm.is_model_pretrained(name)):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"timm has no model {name!r}" + (f": did you mean {', '.join(near)}?" if near else ""))
    return name


def pretrained_config(model: str):
    """timm's record of a model's weights: input size, mean, std, crop fraction, interpolation, hub id."""
    config = timm.get_pretrained_cfg(timm_name(model))
    return config or timm.models.PretrainedCfg()


def create_backbone(model: str, *, num_classes: int, image_size: int, head_dropout: float = 0.0) -> nn.Module:
    """A timm model with random weights and a head of `num_classes` (0: none, it gives features). ValueError: a size it cannot take."""
    # On a CPU two products and a softmax are faster than the fused attention, and take little memory while tokens are few.
    timm.layers.set_fused_attn(torch.cuda.is_available() or image_size > 512)
    kwargs = {"img_size": image_size} if pretrained_config(model).fixed_input_size else {}
    try:
        backbone = timm.create_model(timm_name(model), pretrained=False, num_classes=num_classes, drop_rate=head_dropout, **kwargs)
        if image_size != pretrained_config(model).input_size[-1]:
            with torch.no_grad():
                backbone.eval()(torch.zeros(1, 3, image_size, image_size))
        return backbone.train()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"{model} cannot take image size {image_size}: {error}") from error
    finally:
        timm.layers.set_fused_attn(True)  # timm's own default


class ViTLinearProbe(nn.Module):
    """A frozen ViT-Tiny and a Linear on its 192 features: images (B, 3, S, S), or features (B, 192), float -> logits (B, num_classes).

    The backbone gets no gradient and stays in eval mode while the probe trains; only the head is for the optimizer. With 10
    classes 1,930 of 5,526,346 parameters are trainable. head_dropout 0.1 is the notebook's variant.
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
        """Images (B, 3, S, S) -> (B, 192) float32."""
        return self.backbone(x).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = x if x.dim() == 2 else self.features(x)
        return self.head(self.dropout(features))  # (B, num_classes)


@dataclass(frozen=True)
class Weights:
    """Where a model's first weights come from: a file or none (random), its name and hub commit, and the input that it wants."""

    path: Path | None = None
    source: str = "random"
    revision: str | None = None
    preprocessing: Preprocessing | None = None

    def __str__(self) -> str:
        return self.source + (f" at {self.revision[:7]}" if self.revision else "")


def find_weights(model: str, wanted: str, *, from_scratch: bool) -> Weights:
    """Find, and download where needed, the file that --weights means: default, none, hf-hub:ORG/NAME[@REVISION], or a file's path.

    Its preprocessing is what the file's own header says where it is a checkpoint of ours, else the repository's config.json, else
    timm's record of the model. ValueError: no such file or repository, no safetensors file in it, or one of another architecture.
    """
    own = None if from_scratch else _preprocessing(vars(pretrained_config(model)))
    if wanted == "none" or (wanted == "default" and from_scratch):
        return Weights(preprocessing=own)
    if wanted != "default" and not wanted.startswith("hf-hub:"):
        path = Path(wanted).expanduser()
        if not path.exists():
            raise ValueError(f"--weights {wanted}: no such file; give default, none, hf-hub:ORG/NAME or a safetensors file")
        with open_safetensors(path) as file:
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "{}"))
        return Weights(path, wanted, None, Preprocessing.from_json(header["preprocessing"]) if header else own)
    hub_id = pretrained_config(model).hf_hub_id if wanted == "default" else wanted.removeprefix("hf-hub:")
    if not hub_id:
        raise ValueError(f"timm has no hub weights for {model}: give --weights FILE.safetensors, or --weights none for random ones")
    hub_id, _, revision = hub_id.partition("@")
    folder = download(hub_id, repo_type="model", revision=revision or None, files=[HUB_FILE, "config.json"])
    if not (folder / HUB_FILE).exists():
        raise ValueError(f"model {hub_id} has no {HUB_FILE}: give --weights FILE.safetensors, or --weights none for random ones")
    if wanted != "default" and (folder / "config.json").exists():
        try:
            config = json.loads((folder / "config.json").read_text())
        except ValueError as error:
            raise ValueError(f"the config.json of model {hub_id} is broken ({error}): give --weights FILE.safetensors") from error
        architecture = config.get("architecture", "")
        if from_scratch or architecture.split(".")[0] != timm_name(model).split(".")[0]:
            raise ValueError(f"model {hub_id} is a {architecture or 'model of another library'}, not {model}: choose --model timm/NAME")
        own = _preprocessing(vars(pretrained_config(model)) | config.get("pretrained_cfg", {}))
    return Weights(folder / HUB_FILE, hub_id, folder.name, own)


def _preprocessing(config: dict[str, Any]) -> Preprocessing:
    return Preprocessing(
        image_size=config["input_size"][-1],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_fraction=config["crop_pct"],
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
    )


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata. ValueError: missing, truncated, or something else, such as a pickle."""
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def open_safetensors(path: Path):
    """The open file, whose lengths are checked by then. ValueError: missing, truncated, or something else, such as a pickle."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        reason = "pickled checkpoints can run code and are not read" if path.suffix in (".pth", ".pt", ".bin") else str(error)
        raise ValueError(f"{path} is not a whole safetensors file: {reason}") from error


def head_keys(model: nn.Module) -> list[str]:
    """The keys of the last layer, or of the two of a distilled model, whose shape follows the classes."""
    config = getattr(model, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    heads = (heads,) if isinstance(heads, str) else heads
    return [key for key in model.state_dict() if key.startswith(tuple(f"{head}." for head in heads))]


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a local file of timm or of ours into `model`; a head of other classes is left as it is. ValueError: keys or shapes differ."""
    state, _ = read_tensors(path)
    target = model.state_dict()
    probe = isinstance(model, ViTLinearProbe)
    if not (probe and any(key.startswith("backbone.") for key in state)):
        backbone = model.backbone if probe else model
        adapt = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
        state = adapt(state, backbone) if adapt else state  # timm's own: fits position embeddings to another image size
        if probe:
            state = {f"backbone.{key}": value for key, value in state.items() if not key.startswith("head.")}
    for key in head_keys(model):
        if key not in state or state[key].shape != target[key].shape:
            state[key] = target[key]
    missing, unexpected = sorted(target.keys() - state.keys()), sorted(state.keys() - target.keys())
    misshapen = sorted(k for k in target.keys() & state.keys() if target[k].shape != state[k].shape)
    for what, keys in (("lacks", missing), ("has unexpected", unexpected), ("has other shapes of", misshapen)):
        if keys:
            raise ValueError(f"{path} does not fit the model: it {what} {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}")
    model.load_state_dict(state)
