"""Find a model's initial weights, on the hub or in a file, and load them."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from modeling.data.resize import Preprocessing
from modeling.errors import UserError
from modeling.files import HEADER_KEY, open_safetensors, read_tensors
from modeling.hub import download
from modeling.models.backbones import ViTLinearProbe, pretrained_config, timm_name

HUB_FILE = "model.safetensors"


@dataclass(frozen=True)
class Weights:
    """Where a model's initial weights come from, and how its input is preprocessed."""

    path: Path | None = None  # None: random weights
    source: str = "random"  # the hub repository or the file
    revision: str | None = None  # the hub commit
    preprocessing: Preprocessing | None = None  # None: the recipe decides

    def __str__(self) -> str:
        return self.source + (f" at {self.revision[:7]}" if self.revision else "")


def locate_weights(model: str, wanted: str, *, from_scratch: bool) -> Weights:
    """Find the file that --weights names, and download it if it is on the hub.

    wanted is default, none, hf-hub:ORG/NAME[@REVISION] or the path of a file. The preprocessing comes from
    the header of one of our checkpoints, from the config.json of an hf-hub: repository, or otherwise from
    timm's record of the backbone. UserError: there is no such file or repository, it has no safetensors
    file, or the weights belong to another architecture.
    """
    own = None if from_scratch else _preprocessing(vars(pretrained_config(model)))
    if wanted == "none" or (wanted == "default" and from_scratch):
        return Weights(preprocessing=own)
    if wanted != "default" and not wanted.startswith("hf-hub:"):
        path = Path(wanted).expanduser()
        if not path.exists():
            raise UserError(
                f"--weights {wanted}: no such file; give default, none, hf-hub:ORG/NAME or a safetensors file"
            )
        with open_safetensors(path) as file:
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "{}"))
        return Weights(
            path, wanted, None, Preprocessing.from_json(header["preprocessing"]) if header else own
        )
    hub_id = pretrained_config(model).hf_hub_id if wanted == "default" else wanted.removeprefix("hf-hub:")
    if not hub_id:
        raise UserError(
            f"timm has no hub weights for {model}: "
            "give --weights FILE.safetensors, or --weights none for random ones"
        )
    hub_id, _, revision = hub_id.partition("@")
    folder = download(hub_id, repo_type="model", revision=revision or None, files=[HUB_FILE, "config.json"])
    if not (folder / HUB_FILE).exists():
        raise UserError(
            f"model {hub_id} has no {HUB_FILE}: "
            "give --weights FILE.safetensors, or --weights none for random ones"
        )
    if wanted != "default" and (folder / "config.json").exists():
        try:
            config = json.loads((folder / "config.json").read_text())
        except ValueError as error:
            raise UserError(
                f"the config.json of model {hub_id} is broken ({error}): give --weights FILE.safetensors"
            ) from error
        architecture = config.get("architecture", "")
        if from_scratch or architecture.split(".")[0] != timm_name(model).split(".")[0]:
            raise UserError(
                f"model {hub_id} is a {architecture or 'model of another library'}, not {model}: "
                "choose --model timm/NAME"
            )
        own = _preprocessing(vars(pretrained_config(model)) | config.get("pretrained_cfg", {}))
    return Weights(folder / HUB_FILE, hub_id, folder.name, own)


def _preprocessing(config: dict[str, Any]) -> Preprocessing:
    """Convert timm's record of a model's weights to a Preprocessing."""
    return Preprocessing(
        image_size=config["input_size"][-1],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_fraction=config["crop_pct"],
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
    )


def head_keys(model: nn.Module) -> list[str]:
    """Return the keys of the layers whose shape depends on the number of classes.

    They belong to the last layer, or to the two heads of a distilled model.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    heads = (
        config.get("classifier")
        or [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    )
    heads = (heads,) if isinstance(heads, str) else heads
    return [key for key in model.state_dict() if key.startswith(tuple(f"{head}." for head in heads))]


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file that timm or this project wrote into `model`.

    A head with another number of classes is skipped. UserError: any other key or shape differs.
    """
    state, _ = read_tensors(path)
    target = model.state_dict()
    probe = isinstance(model, ViTLinearProbe)
    if not (probe and any(key.startswith("backbone.") for key in state)):
        backbone = model.backbone if probe else model
        # timm's function for this architecture, if any. It resizes position embeddings to the image size.
        adapt = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
        state = adapt(state, backbone) if adapt else state
        if probe:
            state = {f"backbone.{key}": value for key, value in state.items() if not key.startswith("head.")}
    for key in head_keys(model):
        if key not in state or state[key].shape != target[key].shape:
            state[key] = target[key]
    missing, unexpected = sorted(target.keys() - state.keys()), sorted(state.keys() - target.keys())
    misshapen = sorted(k for k in target.keys() & state.keys() if target[k].shape != state[k].shape)
    for what, keys in (
        ("lacks", missing),
        ("has unexpected", unexpected),
        ("has other shapes of", misshapen),
    ):
        if keys:
            names = ", ".join(keys[:3]) + (" ..." if len(keys) > 3 else "")
            raise UserError(f"{path} does not fit the model: it {what} {names}")
    model.load_state_dict(state)
