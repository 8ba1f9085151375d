"""Names of entries and pairs, and sentences that several parts of the page use, as plain text."""

from modeling.analysis import Analysis, Average
from modeling.compare import Pair
from modeling.pages.words import dataset_name, join_names, shorten, signed, signed_range


def place(analysis: Analysis) -> str:
    """Where the best entry was evaluated: "cifar10, test"."""
    model = analysis.entries[0].shown
    return f"{dataset_name(model.dataset)}, {model.split}"


def name_of(analysis: Analysis, position: int) -> str:
    return shorten(analysis.entries[position].name)


def pair_names(analysis: Analysis, pair: Pair) -> str:
    return f"{name_of(analysis, pair.a)} and {name_of(analysis, pair.b)}"


def over(analysis: Analysis, pair: Pair) -> str:
    difference = pair.difference
    return (
        f"{name_of(analysis, pair.a)} over {name_of(analysis, pair.b)}, "
        f"{signed(difference.value)} points ({signed_range(difference)})"
    )


def too_sure_text(analysis: Analysis, position: int) -> str:
    scores, name = analysis.scores[position], name_of(analysis, position)
    if scores.verdict == "uneven":
        return f"{name} is too sure of some answers and too unsure of others"
    return f"{name} is {abs(100 * scores.gap.value):.1f} points {scores.verdict}"


def average_name(analysis: Analysis, average: Average) -> str:
    names = [analysis.shared_entry(k).name for k in average.members]
    if average.kind == "all":
        return f"both, {join_names(names)}" if len(names) == 2 else f"all {len(names)}"
    return f"the {average.kind}, {join_names(names, most=12)}"
