"""Compare models on the same images: ranking, paired differences, and the images that all models share.

The estimators are in modeling/stats. Nothing here prints or draws: see comparison_text.py and page.py.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from modeling.answers import Model
from modeling.settings import complete
from modeling.stats.proportions import LEVEL, Interval, holm, smallest_visible_difference
from modeling.stats.runs import mean_of_runs, mean_of_separate_runs, paired_difference

# Models that saw different images are compared on their common images, if there are at least this many.
LEAST_COMMON_IMAGES = 100


@dataclass(frozen=True, eq=False)
class Entry:
    """A line of the ranking: one checkpoint, or several runs of one recipe.

    `shown` is the run nearest to the mean accuracy. The page shows its answers in place of all runs. rank is
    1 plus the number of entries that really beat this one. None: the entry is not compared with any other.
    """

    name: str
    runs: list[Model]
    accuracy: Interval
    shown: Model
    rank: int | None = None
    is_tied: bool = False

    @property
    def log_loss(self) -> float:
        """The log loss in nats, averaged over the runs."""
        return float(np.mean([run.loss.mean() for run in self.runs]))

    @property
    def too_sure(self) -> float:
        """Mean confidence minus accuracy, averaged over the runs."""
        return float(np.mean([run.confidence.mean() - run.right.mean() for run in self.runs]))

    @property
    def rank_text(self) -> str:
        return "-" if self.rank is None else f"{self.rank}{'=' if self.is_tied else ''}"


@dataclass(frozen=True)
class Pair:
    """Two entries on the same images. a is above b in the ranking. difference: a's accuracy minus b's.

    only_a counts the images that a has right and b wrong, only_b the reverse. With several runs they are
    means over pairs of runs. corrected_p is p after Holm's correction for the number of pairs.
    """

    a: int
    b: int
    num_images: int
    difference: Interval
    only_a: float
    only_b: float
    p: float
    corrected_p: float = 1.0

    @property
    def is_real(self) -> bool:
        return self.corrected_p < LEVEL

    @property
    def is_identical(self) -> bool:
        """Both are right on exactly the same images."""
        return self.only_a == self.only_b == 0

    @property
    def loser(self) -> int | None:
        """The entry that is really worse. None: the difference may be chance."""
        if not self.is_real:
            return None
        return self.b if self.difference.value > 0 else self.a

    @property
    def verdict(self) -> str:
        if self.is_real:
            return "real"
        return "a hint" if self.p < LEVEL else "not told apart"


@dataclass(frozen=True, eq=False)
class Shared:
    """The images that all compared entries saw. The page's classes, pictures, averages and labels use these.

    entries are positions in Comparison.entries, in that order. runs[k] are the runs of entries[k], and
    models[k] is its shown run. All hold only the shared rows and number the classes in the same way.
    """

    entries: list[int]
    models: list[Model]
    runs: list[list[Model]]

    @property
    def rows(self) -> np.ndarray:
        return self.models[0].rows

    @property
    def labels(self) -> np.ndarray:
        return self.models[0].labels

    @property
    def classes(self) -> list[str]:
        return self.models[0].classes

    @functools.cached_property
    def right(self) -> list[np.ndarray]:
        """right[k] (R_k, n) is True where a run of entry k is right."""
        return [np.stack([run.right for run in runs]) for runs in self.runs]


@dataclass(frozen=True, eq=False)
class Comparison:
    """The entries in the order of the ranking, and the pairs. Entries that are not compared come last."""

    entries: list[Entry]
    pairs: list[Pair]
    shared: Shared

    def pair(self, a: int, b: int) -> Pair | None:
        return next((pair for pair in self.pairs if (pair.a, pair.b) == (a, b)), None)

    def beaten_by(self, k: int) -> list[int]:
        """The entries that really beat entry k."""
        return [pair.a + pair.b - k for pair in self.pairs if pair.loser == k]

    def visible_difference(self) -> tuple[Pair, float] | None:
        """The most similar pair, and the smallest difference that a test on its images can find.

        Only pairs of single runs that are not right on exactly the same images count. None: there is none.
        """
        single = [
            pair
            for pair in self.pairs
            if len(self.entries[pair.a].runs) == len(self.entries[pair.b].runs) == 1 and not pair.is_identical
        ]
        if not single:
            return None
        closest = min(single, key=lambda pair: (pair.only_a + pair.only_b) / pair.num_images)
        disagreement = (closest.only_a + closest.only_b) / closest.num_images
        return closest, smallest_visible_difference(disagreement, closest.num_images)

    def pairs_to_show(self) -> list[Pair]:
        """The pairs that the page shows: all, if at most four entries are compared.

        Otherwise: the best entry with each other one, and neighbours in the ranking.
        """
        compared = sum(entry.rank is not None for entry in self.entries)
        if compared <= 4:
            return self.pairs
        return [pair for pair in self.pairs if pair.a == 0 or pair.b == pair.a + 1]


def recipe_key(model: Model) -> str:
    """Return a text that is equal for the runs of one recipe.

    It is the header without the seed, names, times and results of training.
    """
    same = ("model", "classes", "preprocessing", "weights", "versions")
    header = {name: model.header.get(name) for name in same}
    arguments = {
        name: value
        for name, value in complete(model.header.get("arguments", {})).items()
        if name not in ("seed", "run_name", "num_threads")
    }
    # The training images and their digest depend on the seed, which draws the validation split.
    trained_on = {
        name: value for name, value in model.header.get("dataset", {}).items() if name != "train_sha256"
    }
    kind = model.path.stem.rpartition("_")[2] if model.path.stem.endswith(("_best", "_final")) else ""
    content = [header, arguments, trained_on, kind, model.dataset, model.split, model.images_sha256]
    return json.dumps(content, sort_keys=True)


def group_runs(models: Sequence[Model]) -> list[list[Model]]:
    """Group the runs of one recipe. The groups are in the order of their first runs.

    If two runs of a group have the same seed, each of its runs becomes a group of its own.
    """
    groups: dict[str, list[Model]] = {}
    for model in models:
        groups.setdefault(recipe_key(model), []).append(model)
    result = []
    for model in models:
        group = groups[recipe_key(model)]
        seeds = [run.header.get("arguments", {}).get("seed") for run in group]
        if len(set(seeds)) < len(seeds):
            result.append([model])
        elif model is group[0]:
            result.append(group)
    return result


def _make_entries(models: Sequence[Model]) -> list[Entry]:
    """Make the entries, in the order of the models.

    An entry of several runs has the name of its model, such as "cnn", unless another entry has that name.
    """
    entries: list[Entry] = []
    for runs in group_runs(models):
        name = runs[0].name
        if len(runs) > 1:
            taken_names = {model.name for model in models if model not in runs}
            taken_names |= {entry.name for entry in entries}
            model_name = runs[0].header["model"]["name"]
            name = name if model_name in taken_names else model_name
        entries.append(_make_entry(name, runs))
    return entries


def _make_entry(name: str, runs: list[Model]) -> Entry:
    accuracies = np.array([run.right.mean() for run in runs])
    if all(np.array_equal(run.rows, runs[0].rows) for run in runs):
        accuracy = mean_of_runs(np.stack([run.right for run in runs]))
    else:
        accuracy = mean_of_separate_runs(accuracies)
    shown = runs[int(np.abs(accuracies - accuracies.mean()).argmin())]
    return Entry(name, runs, accuracy, shown)


def _family(entry: Entry) -> tuple[str, str, str, frozenset[str]]:
    """Return the dataset, split, images and classes. Entries where these differ are not compared."""
    model = entry.runs[0]
    return model.dataset, model.split, model.images_sha256, frozenset(model.classes)


def common_rows(models: Sequence[Model]) -> np.ndarray:
    """The rows that all models saw, sorted. Empty: the rows differ, and fewer than 100 are common."""
    rows = functools.reduce(np.intersect1d, [model.rows for model in models])
    if len(rows) < LEAST_COMMON_IMAGES and any(len(rows) < len(model) for model in models):
        return rows[:0]
    return rows


def _align(models: Sequence[Model], rows: np.ndarray, classes: list[str]) -> list[Model]:
    return [model.select(rows).renumber(classes) for model in models]


def _compare_pair(entries: Sequence[Entry], a: int, b: int) -> Pair | None:
    runs_a, runs_b = entries[a].runs, entries[b].runs
    rows = common_rows([*runs_a, *runs_b])
    if not len(rows):
        return None
    right_a = np.stack([run.select(rows).right for run in runs_a])
    right_b = np.stack([run.select(rows).right for run in runs_b])
    found = paired_difference(right_a, right_b)
    return Pair(a, b, len(rows), found.interval, found.only_a, found.only_b, found.p)


def _find_shared(entries: Sequence[Entry], compared: list[int]) -> Shared:
    members = compared
    rows = common_rows([entries[k].shown for k in members])
    if not len(rows):  # take the largest group of entries with exactly the same images
        groups = [
            [k for k in compared if np.array_equal(entries[k].shown.rows, entries[first].shown.rows)]
            for first in compared
        ]
        members = max(groups, key=len)
        rows = entries[members[0]].shown.rows
    classes = entries[members[0]].shown.classes
    shown = [_align([entries[k].shown], rows, classes)[0] for k in members]
    runs = []
    for k, model in zip(members, shown, strict=True):
        has_rows = all(np.isin(rows, run.rows).all() for run in entries[k].runs)
        runs.append(_align(entries[k].runs, rows, classes) if has_rows else [model])
    return Shared(members, shown, runs)


def compare(models: Sequence[Model]) -> Comparison:
    """Rank the models, compare each pair that saw the same images, and find the images that all share.

    A family is a dataset, split and set of classes. Only the entries of the largest family are compared. Of
    equally large families, that is the one given first.
    """
    entries = _make_entries(models)
    families = [_family(entry) for entry in entries]
    main = max(families, key=families.count)
    in_main = [k for k, family in enumerate(families) if family == main]
    compared = {k for k in in_main if _saw_images_of_another(entries, k, in_main)}
    if len(in_main) == 1:
        compared = set(in_main)
    order = sorted(range(len(entries)), key=lambda k: (k not in compared, -entries[k].accuracy.value))
    entries = [entries[k] for k in order]
    num_compared = len(compared)

    pairs = [_compare_pair(entries, a, b) for a, b in combinations(range(num_compared), 2)]
    pairs = [pair for pair in pairs if pair is not None]
    corrected = holm([pair.p for pair in pairs])
    pairs = [replace(pair, corrected_p=float(p)) for pair, p in zip(pairs, corrected, strict=True)]

    ranks = [1 + sum(pair.loser == k for pair in pairs) for k in range(num_compared)]
    ranked = [
        replace(entry, rank=rank, is_tied=ranks.count(rank) > 1)
        for entry, rank in zip(entries, ranks, strict=False)
    ]
    entries = ranked + entries[num_compared:]
    return Comparison(entries, pairs, _find_shared(entries, list(range(max(1, num_compared)))))


def _saw_images_of_another(entries: Sequence[Entry], k: int, others: Sequence[int]) -> bool:
    """Whether another entry has enough images in common with entry k."""
    return any(len(common_rows([*entries[k].runs, *entries[j].runs])) for j in others if j != k)
