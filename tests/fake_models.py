"""Invented answers of invented models, for tests of the comparison and of its page."""

from pathlib import Path
from typing import Any

import numpy as np

from modeling.answers import Answers, Model, summarize


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(np.float32)


def fake_labels(num_images: int, num_classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, num_classes, num_images)


def fake_header(name: str = "cnn", seed: int = 42, **arguments: Any) -> dict[str, Any]:
    """What the comparison reads of a checkpoint's header."""
    return {
        "model": {"name": name, "num_classes": 10},
        "arguments": {"model": name, "run_name": name, "seed": seed, "lr": 0.001, **arguments},
        "dataset": {"name": "digits", "revision": None, "train_sha256": f"{seed:064}"},
        "weights": {"source": "random", "revision": None},
        "preprocessing": {"image_size": 32},
        "versions": {"torch": "2.14.1"},
        "git_commit": "0123456789abcdef",
        "epoch": 3 + seed % 3,
        "metrics": {"accuracy": 0.9},
        "clock": {"train_seconds": 60.0},
    }


def fake_answers(
    name: str,
    labels: np.ndarray,
    num_classes: int,
    *,
    skill: float = 2.0,
    sharpness: float = 1.0,
    seed: int = 0,
    rows: np.ndarray | None = None,
    classes: list[str] | None = None,
    dataset: str = "digits",
    split: str = "test",
    images_sha256: str = "0123",
    header: dict[str, Any] | None = None,
    path: Path | None = None,
) -> Answers:
    """A model whose logit of the label is `skill` above the others', which are standard normal."""
    logits = np.random.default_rng(seed).normal(size=(len(labels), num_classes))
    logits[np.arange(len(labels)), labels] += skill
    return Answers(
        name=name,
        path=path or Path(f"checkpoints/{name}_best.safetensors"),
        header=fake_header(name) if header is None else header,
        dataset=dataset,
        split=split,
        images_sha256=images_sha256,
        classes=classes or [f"class {number}" for number in range(num_classes)],
        rows=np.arange(len(labels)) if rows is None else rows,
        labels=labels,
        log_probabilities=log_softmax(sharpness * logits),
    )


def fake_model(name: str, labels: np.ndarray, num_classes: int, **options: Any) -> Model:
    return summarize(fake_answers(name, labels, num_classes, **options))


def answers_of_right(name: str, right: np.ndarray, **options: Any) -> Answers:
    """A model of two classes, of confidence 0.9, that is right exactly where `right` (N,) says so."""
    labels = np.arange(len(right)) % 2
    predicted = np.where(right, labels, 1 - labels)
    probabilities = np.full((len(right), 2), 0.1)
    probabilities[np.arange(len(right)), predicted] = 0.9
    answers = fake_answers(name, labels, 2, **options)
    return Answers(**{**vars(answers), "log_probabilities": np.log(probabilities).astype(np.float32)})


def model_of_right(name: str, right: np.ndarray, **options: Any) -> Model:
    return summarize(answers_of_right(name, right, **options))
