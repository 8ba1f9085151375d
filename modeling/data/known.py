"""The datasets that have a short name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A dataset that has a short name.

    hub_id is None where the dataset does not come from the hub. classes (in any order) and side (height and
    width in pixels) are what the dataset must have. val_fraction is the default share of train for
    validation.
    """

    name: str
    hub_id: str | None
    classes: tuple[str, ...]
    side: int
    val_fraction: float


DEFAULT_VAL_FRACTION = 0.1

KNOWN = (
    Known(
        name="digits",
        hub_id=None,
        classes=tuple("0123456789"),
        side=32,
        val_fraction=DEFAULT_VAL_FRACTION,
    ),
    Known(
        name="stl10",
        hub_id="tanganke/stl10",
        classes=("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
        side=96,
        val_fraction=0.2,
    ),
    Known(
        name="cifar10",
        hub_id="uoft-cs/cifar10",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        side=32,
        val_fraction=DEFAULT_VAL_FRACTION,
    ),
)


def find_known(dataset: str) -> Known | None:
    """Find a dataset in KNOWN by its short name or its hub id, with or without "@revision"."""
    name = dataset.partition("@")[0]
    for known in KNOWN:
        if name in (known.name, known.hub_id):
            return known
    return None


def is_stl10(dataset: str) -> bool:
    """Tell whether a --dataset value names STL-10, by its short name or its hub id."""
    known = find_known(dataset)
    return known is not None and known.name == "stl10"
