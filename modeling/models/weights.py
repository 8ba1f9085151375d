"""Find a model's initial weights, on the hub or in a file, and read what is recorded of them."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm

from modeling.data.resize import Preprocessing
from modeling.errors import UserError
from modeling.files import HEADER_KEY, open_safetensors
from modeling.hub import download
from modeling.models.backbones import architecture, pretrained_config
from modeling.run.header import (
    check_model_arguments,
    is_text,
    parse_header,
    parse_json,
    require,
    validate_preprocessing,
)

HUB_FILE = "model.safetensors"
# Arguments that decide how a model trains or begins, not what its weights compute.
_NOT_OF_THE_FUNCTION = {"name", "num_classes", "image_size", "kaiming"}
# Arguments of timm.create_model that are no model's own. Some of them read files or change what is returned.
_NOT_OF_A_MODEL = {
    "cache_dir",
    "checkpoint_path",
    "device",
    "dtype",
    "exportable",
    "feature_cfg",
    "features_only",
    "kwargs_filter",
    "no_jit",
    "out_indices",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_filter_fn",
    "pretrained_strict",
    "scriptable",
}


@dataclass(frozen=True)
class Weights:
    """Where a model's initial weights come from, and what is recorded of them."""

    path: Path | None = None  # None: random weights
    source: str = "random"  # the hub repository or the file
    revision: str | None = None  # the hub commit
    preprocessing: Preprocessing | None = None  # None: the recipe decides
    model_args: dict[str, Any] = field(default_factory=dict)  # of build_model, as the record has them
    classes: list[str] | None = None  # of a checkpoint of train.py

    def __str__(self) -> str:
        return self.source + (f" at {self.revision[:7]}" if self.revision else "")

    def combine_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the record's arguments and the given ones. UserError: one differs."""
        for name, recorded in self.model_args.items():
            # JSON has lists where Python has tuples.
            value = json.loads(json.dumps(given.get(name, recorded)))
            if value != recorded:
                raise UserError(f"{self.source} is of a model with {name} {recorded}, not {value}")
        return self.model_args | given


def locate_weights(model: str, wanted: str, *, from_scratch: bool) -> Weights:
    """Find the file that --weights names, and download it if it is on the hub.

    wanted is default, none, hf-hub:ORG/NAME[@REVISION] or the path of a file. The default weights of a
    backbone are described by timm's own record, all others by read_weights. UserError: there is no such file
    or repository, it has no safetensors file, or its record cannot be used.
    """
    if wanted == "none" or (wanted == "default" and from_scratch):
        return Weights(preprocessing=None if from_scratch else _random_preprocessing(model))
    if wanted != "default" and not wanted.startswith("hf-hub:"):
        path = Path(wanted).expanduser()
        if not path.exists():
            raise UserError(
                f"--weights {wanted}: no such file; give default, none, hf-hub:ORG/NAME or a safetensors file"
            )
        return dataclasses.replace(read_weights(model, path, from_scratch=from_scratch), source=wanted)
    hub_id = pretrained_config(model).hf_hub_id if wanted == "default" else wanted.removeprefix("hf-hub:")
    if not hub_id:
        raise UserError(
            f"timm has no hub weights for {model}: "
            "give --weights FILE.safetensors, or --weights none for random ones"
        )
    hub_id, _, revision = hub_id.partition("@")
    folder = download(hub_id, repo_type="model", revision=revision or None, files=[HUB_FILE, "config.json"])
    path = folder / HUB_FILE
    if not path.exists():
        raise UserError(
            f"model {hub_id} has no {HUB_FILE}: "
            "give --weights FILE.safetensors, or --weights none for random ones"
        )
    if wanted == "default":
        return Weights(path, hub_id, folder.name, timm_preprocessing(vars(pretrained_config(model)), hub_id))
    record = read_weights(model, path, from_scratch=from_scratch)
    return dataclasses.replace(record, source=hub_id, revision=folder.name)


# ---- Records -------------------------------------------------------------------------------------


def read_weights(model: str, path: Path, *, from_scratch: bool) -> Weights:
    """Read what is recorded of the weights in a file.

    The record is the header of one of our checkpoints, or the config.json that stands beside a timm model's
    model.safetensors. All other weights of a backbone use timm's record. UserError: the weights are of
    another architecture, or the record has something that this program cannot do.
    """
    with open_safetensors(path) as file:
        header = (file.metadata() or {}).get(HEADER_KEY)
    if header is not None:
        return _read_own_record(model, path, parse_header(header, path))
    config = path.with_name("config.json")
    if path.name == HUB_FILE and config.is_file():
        try:
            return _read_timm_record(model, path, config, from_scratch=from_scratch)
        except UserError as error:
            raise UserError(f"{config}: {error}") from error
    if from_scratch:
        return Weights(path, str(path))
    return Weights(path, str(path), None, timm_preprocessing(vars(pretrained_config(model)), model))


def _read_own_record(model: str, path: Path, header: dict[str, Any]) -> Weights:
    recorded = header["model"]
    _check_architecture(model, architecture(recorded["name"]), path)
    model_args = {
        name: value
        for name, value in recorded.items()
        if name not in _NOT_OF_THE_FUNCTION and not name.endswith("dropout")
    }
    return Weights(
        path=path,
        source=str(path),
        preprocessing=Preprocessing.from_json(header["preprocessing"]),
        model_args=model_args,
        classes=header["classes"],
    )


def _read_timm_record(model: str, path: Path, config_path: Path, *, from_scratch: bool) -> Weights:
    """Read config.json as timm does: an old one has the fields of pretrained_cfg at the top."""
    try:
        text = config_path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"broken text ({error})") from error
    config = parse_json(text)
    require(isinstance(config, dict), "it must be an object")
    name = config.get("architecture")
    if from_scratch or not is_text(name, 1):
        raise UserError(
            f"it is a {name or 'model of another library'}, not {model}: choose --model timm/NAME"
        )
    _check_architecture(model, architecture(f"timm/{name}"), path)
    fields = config.get("pretrained_cfg", config)
    require(isinstance(fields, dict), "pretrained_cfg must be an object")
    preprocessing = timm_preprocessing(vars(timm.models.PretrainedCfg()) | fields, "it")
    arguments = config.get("model_args", {})
    require(isinstance(arguments, dict), "model_args must be an object")
    check_model_arguments(arguments)
    refused = sorted(arguments.keys() & _NOT_OF_A_MODEL)
    require(not refused, f"model_args has {', '.join(refused)}, which is not used here")
    require(arguments.get("in_chans", 3) == 3, "the model must take images of 3 channels")
    arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
    return Weights(path, str(path), None, preprocessing, {"timm_args": arguments} if arguments else {})


def _check_architecture(model: str, recorded: str, path: Path) -> None:
    if recorded != architecture(model):
        raise UserError(f"{path} is a {recorded}, not {model}: choose the --model of these weights")


def timm_preprocessing(record: dict[str, Any], source: str) -> Preprocessing:
    """Convert timm's record of a model's weights. UserError: it has something that cannot be done here."""
    size, crop, mode = record["input_size"], record["crop_pct"], record.get("crop_mode") or "center"
    try:
        require(
            isinstance(size, list | tuple) and len(size) == 3 and size[0] == 3 and size[1] == size[2],
            f"the input must be a square image of 3 channels, not {size}",
        )
        # Without a crop, "squash" is a resize to the square, which is our crop_fraction None.
        require(
            mode == "center" or (mode == "squash" and crop == 1),
            f"crop_mode {mode!r} with crop_pct {crop} is not supported",
        )
        fields = {
            "image_size": size[-1],
            "mean": record["mean"],
            "std": record["std"],
            "crop_fraction": None if mode == "squash" else crop,
            "interpolation": record["interpolation"],
        }
        validate_preprocessing(fields)
    except UserError as error:
        raise UserError(f"the record of {source} cannot be used: {error}") from error
    return Preprocessing.from_json(fields)


def _random_preprocessing(model: str) -> Preprocessing:
    """The preprocessing of a backbone with random weights: timm's record, with the crop that we have."""
    record = vars(pretrained_config(model))
    return Preprocessing(
        image_size=record["input_size"][-1],
        mean=tuple(record["mean"]),
        std=tuple(record["std"]),
        crop_fraction=min(1.0, record["crop_pct"]),
        interpolation="bilinear" if record["interpolation"] == "bilinear" else "bicubic",
    )
