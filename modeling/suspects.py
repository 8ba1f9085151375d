"""Labels that are probably wrong: all models contradict them, or an identical picture has another label."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modeling.compare import Shared
from modeling.stats.together import suspect_labels


@dataclass(frozen=True)
class Suspect:
    """An image whose label is suspect. label and suggested are class numbers. row is its row in the split.

    The probabilities are means over the models, after temperature scaling. twin is the row of an identical
    picture with the label `suggested`, or None. With a twin, the models need not agree with `suggested`, and
    suggested_probability is None.
    """

    row: int
    label: int
    suggested: int
    label_probability: float
    suggested_probability: float | None
    twin: int | None = None


def find_suspects(shared: Shared, digests: Sequence[bytes] | None = None) -> list[Suspect]:
    """Return the suspects: first identical pictures with two labels, then labels that all models contradict.

    digests: a hash of the pixels of each shared image. None: pictures are not compared.
    """
    label_probability = np.mean([model.tempered_label for model in shared.models], axis=0)
    twins = [] if digests is None else twins_with_other_label(digests, shared.labels)
    suspects = [
        Suspect(
            row=int(shared.rows[i]),
            label=int(shared.labels[i]),
            suggested=int(shared.labels[j]),
            label_probability=float(label_probability[i]),
            suggested_probability=None,
            twin=int(shared.rows[j]),
        )
        for i, j in twins
    ]
    found = suspect_labels(
        shared.labels,
        np.stack([model.predicted for model in shared.models]),
        np.stack([model.tempered_label for model in shared.models]),
    )
    already = {suspect.row for suspect in suspects}
    contradicted = [i for i in found.tolist() if int(shared.rows[i]) not in already]
    suggested_probability = np.mean([model.tempered_confidence for model in shared.models], axis=0)
    suspects += [
        Suspect(
            row=int(shared.rows[i]),
            label=int(shared.labels[i]),
            suggested=int(shared.models[0].predicted[i]),
            label_probability=float(label_probability[i]),
            suggested_probability=float(suggested_probability[i]),
        )
        for i in contradicted
    ]
    return suspects


def twins_with_other_label(digests: Sequence[bytes], labels: np.ndarray) -> list[tuple[int, int]]:
    """Return (i, j) for each image i that is identical to an image j with another label: the first such j."""
    groups: dict[bytes, list[int]] = {}
    for position, digest in enumerate(digests):
        groups.setdefault(digest, []).append(position)
    twins = []
    for group in groups.values():
        for i in group:
            others = [j for j in group if labels[j] != labels[i]]
            if others:
                twins.append((i, others[0]))
    return sorted(twins)
