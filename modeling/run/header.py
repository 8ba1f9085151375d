"""The header of a checkpoint: the JSON in which a file describes its model, read and checked."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from modeling.data.choices import Choices
from modeling.errors import UserError

FORMAT_VERSION = 2  # 1 had no digests
MAX_IMAGE_SIZE = 2048  # pixels. A batch of 64 such images takes 3 GB.
MAX_CLASSES = 1_000_000
MAX_TEXT = 4096  # characters of a name or a path
MAX_ARGUMENT = 2**20  # of a whole number among a model's arguments
CHOICES = tuple(field.name for field in dataclasses.fields(Choices))
INTERPOLATIONS = ("bilinear", "bicubic")


def header_digest(header: dict[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal, of all of the header but its times and this digest itself."""
    content = {name: value for name, value in header.items() if name not in ("clock", "header_sha256")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parse_header(text: str, path: Path) -> dict[str, Any]:
    """Return the header whose JSON is `text`. UserError: it is of another format, damaged, or not valid."""
    try:
        header = parse_json(text)
        require(isinstance(header, dict), "it must be an object")
        version = header.get("format_version")
        require(is_int(version, 1), "format_version must be a positive integer")
        if version != FORMAT_VERSION:
            age = "newer" if version > FORMAT_VERSION else "older"
            advice = "update it" if version > FORMAT_VERSION else "train again"
            raise UserError(
                f"format version {version} is {age} than this program's {FORMAT_VERSION}: {advice}"
            )
        require(header.get("header_sha256") == header_digest(header), "it was altered: its digest differs")
        validate(header)
    except UserError as error:
        raise UserError(f"the header of {path} cannot be used: {error}") from error
    return header


def parse_json(text: str) -> Any:
    """Parse JSON without NaN and infinite numbers. UserError: it is broken, or holds half a character."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"broken JSON ({error})") from error
    return value


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


def validate(header: dict[str, Any]) -> None:
    """Check types, ranges and consistency of a header. UserError: says which field is wrong."""
    for name in ("model", "preprocessing", "arguments", "dataset", "weights", "versions", "metrics", "clock"):
        require(isinstance(header.get(name), dict), f"{name} must be an object")
    require(is_hexadecimal(header.get("tensors_sha256"), 64), "tensors_sha256 must be a SHA-256")

    model = header["model"]
    require(is_text(model.get("name"), 1), "model.name must be text")
    require(is_int(model.get("num_classes"), 1, MAX_CLASSES), f"num_classes must be 1 to {MAX_CLASSES}")
    require(is_int(model.get("image_size"), 1, MAX_IMAGE_SIZE), f"image_size must be 1 to {MAX_IMAGE_SIZE}")
    require("weights" not in model, "model.weights is not an argument")
    check_model_arguments(model)

    classes = header.get("classes")
    require(isinstance(classes, list) and all(map(is_text, classes)), "classes must be a list of names")
    require(len(classes) == len(set(classes)), "classes must differ from each other")
    require(len(classes) == model["num_classes"], "there must be as many classes as outputs")

    validate_preprocessing(header["preprocessing"])
    require(header["preprocessing"]["image_size"] == model["image_size"], "the two image sizes must be equal")

    arguments = header["arguments"]
    require(is_file_name(arguments.get("run_name")), "run_name must be a plain file name")
    require(arguments.get("model") == model["name"], "the two names of the model must be equal")
    require(is_int(arguments.get("seed"), 0, 2**31 - 1), "seed must be a number of 31 bits")
    fraction = arguments.get("val_fraction")
    require(is_number(fraction, 0, 1) and 0 < fraction < 1, "val_fraction must lie between 0 and 1")

    dataset = header["dataset"]
    require(is_text(dataset.get("name"), 1), "dataset.name must be text")
    require(is_text(dataset.get("train_sha256"), 1), "dataset.train_sha256 must be text")
    division = dataset.get("division_sha256")
    require(division is None or is_hexadecimal(division, 64), "dataset.division_sha256 must be a SHA-256")
    validate_reading(dataset.get("read"))
    require(is_text(header["weights"].get("source"), 1), "weights.source must be text")
    for name in ("dataset", "weights"):
        revision = header[name].get("revision")
        require(revision is None or is_text(revision), f"{name}.revision must be text or null")
    require(all(map(is_text, header["versions"].values())), "versions must be texts")
    commit = header.get("git_commit")
    require(commit is None or is_text(commit), "git_commit must be text or null")

    require(is_int(header.get("epoch"), 1), "epoch must be a positive integer")
    require(is_int(header.get("step"), 0), "step must be a number of steps")
    for value in header["metrics"].values():
        require(value is None or is_number(value), "metrics must be numbers")
    require(is_text(header["clock"].get("saved_at")), "clock.saved_at must be text")
    require(is_number(header["clock"].get("train_seconds"), 0), "clock.train_seconds must be a number")


def validate_reading(read: Any) -> None:
    """Check what a header says of how the dataset was read. UserError: says which field is wrong."""
    require(isinstance(read, dict), "dataset.read must be an object")
    for name in ("splits", "left_out"):
        counts = read.get(name)
        is_counts = isinstance(counts, dict) and all(is_int(count, 0) for count in counts.values())
        require(is_counts, f"dataset.read.{name} must be counts")
    choices = read.get("choices")
    require(isinstance(choices, dict) and choices.keys() == set(CHOICES), f"choices must be {CHOICES}")
    is_chosen = all(value is None or is_text(value, 1) for value in choices.values())
    require(is_chosen, "dataset.read.choices must be texts or null")


# The values that torch.amp.GradScaler saves.
SCALER_NAMES = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def validate_state(header: dict[str, Any], position_names: set[str]) -> None:
    """Check the header of a state to resume from. UserError: says which field is wrong."""
    names = {"launcher", "position", "arguments", "versions", "optimizer", "ema_updates", "scaler"}
    require(isinstance(header, dict) and header.keys() >= names, f"it must have {', '.join(sorted(names))}")
    for name in ("position", "arguments", "versions", "optimizer"):
        require(isinstance(header[name], dict), f"{name} must be an object")
    require(all(map(is_text, header["versions"].values())), "versions must be texts")
    scaler = header["scaler"]
    require(scaler is None or isinstance(scaler, dict), "scaler must be an object or null")
    if scaler:  # a scaler that is turned off saves {}
        require(scaler.keys() == SCALER_NAMES, f"scaler must have {', '.join(sorted(SCALER_NAMES))}")
        require(all(map(is_number, scaler.values())), "scaler's values must be numbers")
    require(is_int(header["ema_updates"], 0), "ema_updates must be a number of steps")
    require(is_text(header["arguments"].get("optimizer"), 1), "arguments.optimizer must be text")
    for number, values in header["optimizer"].items():
        require(number.isdecimal() and isinstance(values, dict), "optimizer must have a number's values")
        require(all(map(is_number, values.values())), "values of the optimizer must be numbers")
    position = header["position"]
    require(position.keys() == position_names, f"position must have {', '.join(sorted(position_names))}")
    for name in ("epoch", "step", "num_seen", "best_epoch", "log_bytes"):
        require(is_int(position[name], 0), f"position.{name} must be a count")
    require(position["best"] is None or is_number(position["best"]), "position.best must be a number")
    require(is_number(position["seconds"], 0), "position.seconds must be a number")
    require(isinstance(position["finished"], bool), "position.finished must be true or false")
    for name in ("best_scores", "test"):
        scores = position[name]
        require(isinstance(scores, dict) or (name == "test" and scores is None), f"{name} must be an object")
        require(all(map(is_number, (scores or {}).values())), f"position.{name} must be numbers")


def validate_preprocessing(fields: dict[str, Any]) -> None:
    """Check the fields of a Preprocessing. UserError: says which is wrong."""
    names = {"image_size", "mean", "std", "crop_fraction", "interpolation"}
    require(fields.keys() == names, f"preprocessing must have {', '.join(sorted(names))}")
    require(is_int(fields["image_size"], 1, MAX_IMAGE_SIZE), f"image_size must be 1 to {MAX_IMAGE_SIZE}")
    for name, low in (("mean", -1e4), ("std", 1e-4)):
        numbers = fields[name]
        require(
            isinstance(numbers, list | tuple)
            and len(numbers) == 3
            and all(is_number(number, low, 1e4) for number in numbers),
            f"{name} must be 3 {'positive ' if name == 'std' else ''}finite numbers",
        )
    crop = fields["crop_fraction"]
    require(crop is None or is_number(crop, 0.1, 1), "the crop's fraction must be 0.1 to 1")
    require(fields["interpolation"] in INTERPOLATIONS, f"interpolation must be {' or '.join(INTERPOLATIONS)}")


def check_model_arguments(value: Any) -> None:
    """Check that no number among a model's arguments is so large that building the model takes all memory."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            check_model_arguments(item)
    else:
        is_plain = value is None or isinstance(value, bool) or is_text(value)
        is_small = is_number(value, -MAX_ARGUMENT, MAX_ARGUMENT)
        require(is_plain or is_small, f"{value!r} is too large for an argument of a model")


def require(holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(rule)


def is_int(value: Any, low: int, high: int = 2**63 - 1) -> bool:
    return type(value) is int and low <= value <= high


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """A finite number from low to high. True and False are none."""
    return type(value) in (int, float) and abs(value) < 1e300 and low <= value <= high


def is_text(value: Any, least: int = 0) -> bool:
    return isinstance(value, str) and least <= len(value) <= MAX_TEXT


def is_hexadecimal(value: Any, length: int) -> bool:
    return isinstance(value, str) and len(value) == length and set(value) <= set("0123456789abcdef")


def is_file_name(value: Any) -> bool:
    """A name without folders or a leading dot, as RunFiles wants it."""
    if not is_text(value, 1) or value.startswith(".") or "\0" in value:
        return False
    return Path(value).name == value
