"""Is a comparison fair? What differs between the headers of checkpoints, and what is the same."""

from collections.abc import Sequence
from typing import Any

from modeling.answers import Model
from modeling.compare import Entry

# The parts of the header that the page shows, in this order. It omits the architecture, which the user
# compares.
_PARTS = ("weights", "preprocessing", "arguments", "dataset", "versions")
# Values that the page does not list, because they are names or appear elsewhere.
_HIDDEN = {"run_name", "model", "name", "revision", "dataset"}
_LABELS = {
    "source": "weights",
    "augment": "augmentation",
    "ema": "weight averaging",
    "lr": "learning rate",
    "train_sha256": "training images (SHA-256)",
    "git_commit": "commit",
}


def settings(model: Model) -> dict[str, str]:
    """Return what the header records about the training: label -> value, as text."""
    header = model.header
    result: dict[str, str] = {}
    for part in _PARTS:
        for name, value in header.get(part, {}).items():
            label = _LABELS.get(name, name.replace("_", " "))
            if name not in _HIDDEN and label not in result:
                result[label] = value[:8] if name == "train_sha256" else value_text(value)
    trained_on = header.get("dataset", {})
    if "name" in trained_on:
        revision = trained_on.get("revision")
        result["trained on"] = trained_on["name"] + (f"@{revision[:8]}" if revision else "")
    if "epoch" in header:
        result["epoch kept"] = str(header["epoch"])
    if header.get("git_commit"):
        result["commit"] = header["git_commit"][:8]
    return result


def value_text(value: Any) -> str:
    """Format a value of the header for people."""
    if value is None:
        return "none"
    if value is True or value is False:
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(value_text(item) for item in value)
    return str(value)


def compare_settings(entries: Sequence[Entry]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Return the differing settings (label, value of each entry) and the common ones (label, value).

    If the runs of one entry differ, for example in the seed, its value lists them all.
    """
    of_entries = []
    for entry in entries:
        of_runs = [settings(run) for run in entry.runs]
        labels = dict.fromkeys(label for one in of_runs for label in one)
        of_entries.append(
            {label: ", ".join(dict.fromkeys(one.get(label, "") for one in of_runs)) for label in labels}
        )
    differing, same = [], []
    for label in dict.fromkeys(label for one in of_entries for label in one):
        values = [one.get(label, "") for one in of_entries]
        if len(set(values)) > 1:
            differing.append((label, values))
        else:
            same.append((label, values[0]))
    return differing, same
