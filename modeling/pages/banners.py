"""The warnings at the top of the page. Each function returns a warning, or None if it does not apply."""

from dataclasses import dataclass

from modeling.analysis import BUSY, Analysis
from modeling.pages.words import dataset_name, join_names, plural

FEW_IMAGES = 100


@dataclass(frozen=True)
class Banner:
    strong: str
    text: str


def banners(analysis: Analysis) -> list[Banner]:
    """Return the warnings that apply, in the order of the page."""
    found = [
        _runs(analysis),
        _not_compared(analysis),
        _not_the_same_images(analysis),
        _few_images(analysis),
        _busy_machine(analysis),
        _pretrained_on_stl10(analysis),
    ]
    return [banner for banner in found if banner]


def _runs(analysis: Analysis) -> Banner | None:
    compared = [entry for entry in analysis.entries if entry.rank is not None]
    single = [entry.name for entry in compared if len(entry.runs) == 1]
    several = [entry.name for entry in compared if len(entry.runs) > 1]
    if several and single:
        return Banner(
            f"One run of {join_names(single)}.",
            f"Another seed would change its accuracy too. The intervals of {join_names(several)} cover other "
            f"seeds and other images. " + _shown_runs(analysis),
        )
    if several:
        return Banner(
            "Several runs of each.",
            "Small circles are the runs. The intervals cover other seeds and other images. "
            + _shown_runs(analysis),
        )
    if len(single) > 1:
        return Banner(
            "One run of each.",
            "The intervals cover other images, but not other seeds. Another seed changes the accuracy too. "
            "To compare recipes, train three or more runs of each with different seeds.",
        )
    return None


def _shown_runs(analysis: Analysis) -> str:
    names = [entry.shown.name for entry in analysis.entries if len(entry.runs) > 1]
    return (
        "Confusions, pictures, confidence, averages and labels show one run of a recipe, the nearest to its "
        "mean accuracy: "
        f"{join_names(names, most=12)}."
    )


def _not_compared(analysis: Analysis) -> Banner | None:
    names = [entry.name for entry in analysis.entries if entry.rank is None]
    if not names or len(analysis.entries) == 1:
        return None
    if len(names) == len(analysis.entries):
        return Banner(
            "Different images or classes.",
            "No two models saw the same images with the same classes, so none is compared with another.",
        )
    return Banner(
        "Different images or classes.",
        f"{join_names(names, most=12)} saw other images or {'knows' if len(names) == 1 else 'know'} other "
        f"classes. "
        "So there is no rank and no comparison with the other models.",
    )


def _not_the_same_images(analysis: Analysis) -> Banner | None:
    shared = analysis.shared
    compared = [entry for entry in analysis.entries if entry.rank is not None]
    saw_more = [entry for entry in compared if len(entry.shown) > len(shared.rows)]
    if len(compared) < 2 or (len(shared.entries) == len(compared) and not saw_more):
        return None
    names = join_names([analysis.entries[k].name for k in shared.entries], most=12)
    return Banner(
        "Not the same images.",
        "Each pair is compared on the images that both saw. Classes, pictures, averages and labels use "
        "the "
        f"{plural(len(shared.rows), 'image')} that {names} saw.",
    )


def _few_images(analysis: Analysis) -> Banner | None:
    num_images = len(analysis.entries[0].shown)
    if num_images >= FEW_IMAGES:
        return None
    return Banner(
        f"Only {plural(num_images, 'image')}.", "The intervals are wide, so most differences cannot be shown."
    )


def _busy_machine(analysis: Analysis) -> Banner | None:
    names = []
    for entry in analysis.entries:
        cost = analysis.costs.get(entry.shown.name)
        if cost and cost.speed and cost.speed.spread > BUSY:
            names.append(entry.name)
    if not names:
        return None
    return Banner(
        "The machine was busy.",
        f"The slowest and the fastest round of {join_names(names)} differ by more than {BUSY:g} times: "
        f"measure the "
        "speed again on a quiet machine.",
    )


def _pretrained_on_stl10(analysis: Analysis) -> Banner | None:
    names = [
        entry.name
        for entry in analysis.entries
        if dataset_name(entry.shown.dataset) == "stl10"
        and entry.shown.header.get("weights", {}).get("source", "random") != "random"
    ]
    if not names:
        return None
    return Banner(
        "Pretrained weights on STL-10.",
        f"STL-10 was drawn from ImageNet: the weights that {join_names(names)} started from may have seen "
        f"these "
        "images with their labels.",
    )
