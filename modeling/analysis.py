"""Everything that a comparison's page says, as numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modeling.compare import Comparison, Entry, Shared
from modeling.cost import Costs
from modeling.fairness import compare_settings
from modeling.scores import Scores, macro_f1, score_models
from modeling.stats import together
from modeling.stats.classes import ClassScores, class_scores, confusion_matrix, similar_side_by_side
from modeling.stats.proportions import Interval, wilson_interval
from modeling.stats.runs import Difference, paired_difference
from modeling.suspects import Suspect, find_suspects

NUM_CONFUSIONS = 10
SAME_TIME = 1.05  # a model that takes at most this much longer is as fast
BUSY = 1.5  # slowest round over fastest round of a busy machine


@dataclass(frozen=True)
class Confusion:
    """How often each shared model takes images of class `true` for class `predicted` (class numbers)."""

    true: int
    predicted: int
    counts: list[int]


@dataclass(frozen=True, eq=False)
class Average:
    """Several models whose probabilities are averaged; members are positions in Shared.models.

    kind is "all", "two best" or "best subset"; the last two were chosen on these very images.
    over_best compares the average with the best model alone.
    """

    kind: str
    members: tuple[int, ...]
    accuracy: Interval
    over_best: Difference
    milliseconds: float | None


@dataclass(frozen=True, eq=False)
class Analysis:
    """The numbers of a page. Lists over entries follow Comparison.entries, lists over models Shared.models.

    matrices are confusion matrices (C, C), class_order an order of the classes with similar ones side by
    side. worth_their_time and too_slow are positions of the entries whose speed is known. num_right (n,) is
    how many shared models have an image right. agreement[a, b] is Cohen's kappa of two shared models. curves
    are (epoch, validation accuracy) by the name of a model.
    """

    comparison: Comparison
    costs: Costs
    scores: list[Scores]
    macro_f1: list[float]
    classes: ClassScores
    matrices: list[np.ndarray]
    class_order: np.ndarray
    confusions: list[Confusion]
    worth_their_time: list[int]
    too_slow: list[int]
    num_right: np.ndarray
    averages: list[Average]
    agreement: dict[tuple[int, int], Interval]
    suspects: list[Suspect]
    differing: list[tuple[str, list[str]]]
    same: list[tuple[str, str]]
    curves: dict[str, list[tuple[int, float]]]

    @property
    def entries(self) -> list[Entry]:
        return self.comparison.entries

    @property
    def shared(self) -> Shared:
        return self.comparison.shared

    def milliseconds(self, position: int) -> float | None:
        """Of one image in a batch, of the entry at this position; None: not measured."""
        cost = self.costs.get(self.entries[position].shown.name)
        return cost.speed.batch_ms if cost and cost.speed else None

    def shared_entry(self, k: int) -> Entry:
        """The entry of the k-th shared model."""
        return self.entries[self.shared.entries[k]]


def analyse(
    comparison: Comparison,
    costs: Costs,
    *,
    digests: Sequence[bytes] | None = None,
    curves: dict[str, list[tuple[int, float]]] | None = None,
) -> Analysis:
    """Compute everything that the page says. digests: of the pixels of the shared images, in their order."""
    shared = comparison.shared
    num_classes = len(shared.classes)
    matrices = [confusion_matrix(model.labels, model.predicted, num_classes) for model in shared.models]
    total = np.sum(matrices, axis=0)
    right = np.stack([model.right for model in shared.models])
    worth_their_time, too_slow = divide_by_cost(comparison, costs)
    differing, same = compare_settings(comparison.entries)
    return Analysis(
        comparison=comparison,
        costs=costs,
        scores=score_models([entry.shown for entry in comparison.entries]),
        macro_f1=[float(np.mean([macro_f1(run) for run in entry.runs])) for entry in comparison.entries],
        classes=class_scores(shared.right, shared.labels, best=0),
        matrices=matrices,
        class_order=similar_side_by_side(total),
        confusions=most_frequent_confusions(matrices),
        worth_their_time=worth_their_time,
        too_slow=too_slow,
        num_right=right.sum(axis=0),
        averages=averages(comparison, costs),
        agreement=together.error_consistency(right) if len(right) > 1 else {},
        suspects=find_suspects(shared, digests),
        differing=differing,
        same=same,
        curves=curves or {},
    )


def most_frequent_confusions(matrices: Sequence[np.ndarray]) -> list[Confusion]:
    """The confusions of two classes that are most frequent over all models, at most ten."""
    total = np.sum(matrices, axis=0)
    np.fill_diagonal(total, 0)
    order = np.argsort(-total, axis=None, kind="stable")[:NUM_CONFUSIONS]
    cells = [divmod(int(cell), len(total)) for cell in order]
    return [
        Confusion(true, predicted, [int(matrix[true, predicted]) for matrix in matrices])
        for true, predicted in cells
        if total[true, predicted] > 0
    ]


def divide_by_cost(comparison: Comparison, costs: Costs) -> tuple[list[int], list[int]]:
    """Positions of the entries that are worth their time, the fastest first, and of those that are not.

    An entry is not worth its time if one that really beats it is at least as fast, give or take 5 %.
    """
    times = {}
    for position, entry in enumerate(comparison.entries):
        cost = costs.get(entry.shown.name)
        if cost and cost.speed:
            times[position] = cost.speed.batch_ms
    worth, too_slow = [], []
    for position in sorted(times, key=times.__getitem__):
        faster = [k for k in times if times[k] <= SAME_TIME * times[position]]
        is_beaten = any(k in faster for k in comparison.beaten_by(position))
        (too_slow if is_beaten else worth).append(position)
    return worth, too_slow


def averages(comparison: Comparison, costs: Costs) -> list[Average]:
    """All models averaged.

    Of more than two also the two best, and the best subset, unless it is one of these.
    """
    shared = comparison.shared
    num_models = len(shared.models)
    if num_models < 2:
        return []
    everyone = tuple(range(num_models))
    subsets = list(dict.fromkeys([everyone, (0, 1), *together.candidate_subsets(num_models)]))
    right = together.right_of_averages(
        [model.probabilities for model in shared.models], shared.labels, subsets
    )
    chosen = {"all": 0}
    if num_models > 2:
        chosen["two best"] = 1
        best = int(right.sum(axis=1).argmax())
        if best > 1:
            chosen["best subset"] = best
    result = []
    for kind, number in chosen.items():
        names = [comparison.entries[shared.entries[k]].shown.name for k in subsets[number]]
        speeds = [cost.speed if cost else None for cost in map(costs.get, names)]
        known = [speed.batch_ms for speed in speeds if speed]
        result.append(
            Average(
                kind=kind,
                members=subsets[number],
                accuracy=wilson_interval(int(right[number].sum()), right.shape[1]),
                over_best=paired_difference(right[number][None], shared.models[0].right[None]),
                milliseconds=sum(known) if len(known) == len(names) else None,
            )
        )
    return result
