"""All numbers that the page of a comparison shows."""

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
SAME_TIME = 1.05  # two models count as equally fast up to this ratio of their times
BUSY = 1.5  # above this ratio of slowest to fastest round, the machine counts as busy


@dataclass(frozen=True)
class Confusion:
    """A pair of class numbers. counts[k]: images of `true` that shared model k takes for `predicted`."""

    true: int
    predicted: int
    counts: list[int]


@dataclass(frozen=True, eq=False)
class Average:
    """The average of several models' probabilities. members are positions in Shared.models.

    kind is "all", "two best" or "best subset". The last two were chosen on these same images, so they are
    optimistic. over_best compares the average with the best model alone.
    """

    kind: str
    members: tuple[int, ...]
    accuracy: Interval
    over_best: Difference
    milliseconds: float | None


@dataclass(frozen=True, eq=False)
class Analysis:
    """The numbers of a page.

    Per entry, in the order of Comparison.entries: scores, macro_f1. Per shared model, in the order of
    Shared.models: matrices (confusion matrices, (C, C)). class_order is an order of the classes that puts
    similar ones side by side. worth_their_time and too_slow are positions of entries; entries without a
    measured speed are in neither. num_right (n,): how many shared models are right on each image.
    agreement[a, b]: Cohen's kappa of two shared models. curves: a model's name -> its list of (epoch,
    validation accuracy).
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
        """The time of one image in a batch, for the entry at this position. None: it was not measured."""
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
    """Compute all numbers of the page. digests: a hash of the pixels of each shared image, in their order."""
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
    """The most frequent confusions, summed over all models, at most ten."""
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
    """Divide the entries into those that are worth their time and those that are not, the fastest first.

    An entry is not worth its time if another entry really beats it and is as fast, or at most 5 % slower.
    Returns two lists of positions.
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
    """Average the probabilities of all models.

    With more than two models, also average the two best, and the best subset if it is another one.
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
