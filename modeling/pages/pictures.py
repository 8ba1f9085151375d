"""Which images the page shows, and their pictures as data: URIs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from PIL import Image

from modeling import randomness
from modeling.analysis import Analysis
from modeling.pages.figures import data_uri

MOST_PICTURES = 250
SIDE = 112  # pixels of a shrunk picture
SMALL = 64  # pixels; smaller pictures are encoded at full size without loss
NUM_SUSPECTS = 12
_PER_PAIR = 12
_PER_KIND = 24
_PER_CONFUSION = 6
_SEED = 0


@dataclass(frozen=True)
class Tile:
    """An image of the page: its position among the shared images, and the reasons to show it.

    kinds: "pair" (one model right, another wrong), "all" (all wrong), "random" (an error drawn at random),
    "label" (its label is suspect), "cell" (one of a frequent confusion).
    """

    position: int
    kinds: tuple[str, ...]


def encode(image: Image.Image) -> str:
    """Encode a picture as WebP. Small ones have no loss; larger ones shrink to 112 pixels."""
    image = image.convert("RGB")
    if max(image.size) <= SMALL:
        return data_uri(image, "WEBP")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return data_uri(image, "WEBP", lossless=False)


def choose_tiles(analysis: Analysis, most: int = MOST_PICTURES) -> list[Tile]:
    """Choose at most `most` images, the most confident errors first.

    If there are too many, the first reasons of `_reasons` have priority.
    """
    kinds: dict[int, set[str]] = {}
    for kind, positions in _reasons(analysis):
        for position in positions.tolist():
            if position in kinds:
                kinds[position].add(kind)
            elif len(kinds) < most:
                kinds[position] = {kind}
    confidence = np.max([model.confidence for model in analysis.shared.models], axis=0)
    ordered = sorted(kinds, key=lambda position: (-confidence[position], position))
    return [Tile(position, tuple(sorted(kinds[position]))) for position in ordered]


def _reasons(analysis: Analysis) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (kind, positions) of the images that are worth showing."""
    shared = analysis.shared
    right = np.stack([model.right for model in shared.models])
    confidence = np.stack([model.confidence for model in shared.models])
    all_wrong = np.flatnonzero(~right.any(axis=0))
    yield "all", _largest(all_wrong, confidence.min(axis=0))[:_PER_KIND]
    some_wrong = np.flatnonzero(~right.all(axis=0))
    keys = randomness.bits(_SEED, randomness.PICTURE, torch.from_numpy(shared.rows[some_wrong])).numpy()
    yield "random", some_wrong[np.argsort(keys, kind="stable")][:_PER_KIND]
    suspect_rows = [suspect.row for suspect in analysis.suspects[:_PER_KIND]]
    yield "label", np.searchsorted(shared.rows, np.array(suspect_rows, dtype=int))
    label_probability = np.stack([model.label_probability for model in shared.models])
    num_models = len(right)
    for a, b in permutations(range(num_models), 2):
        if num_models <= 4 or 0 in (a, b):
            only_a = np.flatnonzero(right[a] & ~right[b])
            yield "pair", _largest(only_a, label_probability[a] + confidence[b])[:_PER_PAIR]
    for confusion in analysis.confusions:
        k = int(np.argmax(confusion.counts))
        model = shared.models[k]
        inside = (shared.labels == confusion.true) & (model.predicted == confusion.predicted)
        yield "cell", _largest(np.flatnonzero(inside), model.confidence)[:_PER_CONFUSION]


def _largest(positions: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sort the positions by their values, the largest first."""
    return positions[np.argsort(-values[positions], kind="stable")]


PictureOfRow = Callable[[int], Image.Image]
