"""The headings of the page's sections. Each answers the question of its section."""

from modeling.analysis import Analysis
from modeling.pages.names import name_of, over, pair_names, too_sure_text
from modeling.pages.words import (
    join_names,
    milliseconds,
    percent,
    percent_range,
    plural,
    shorten,
    signed,
    signed_range,
)


def best(analysis: Analysis) -> str:
    entry = analysis.entries[0]
    return f"{name_of(analysis, 0)}, with {percent(entry.accuracy.value)} % ({percent_range(entry.accuracy)})"


def real(analysis: Analysis) -> str:
    pairs = analysis.comparison.pairs
    if len(pairs) == 1:
        (pair,) = pairs
        if pair.is_identical:
            return f"No difference: {pair_names(analysis, pair)} are right on the same images"
        word = {"real": "Yes", "a hint": "A hint", "not told apart": "Not told apart"}[pair.verdict]
        return f"{word}: {over(analysis, pair)}"
    unreal = [pair for pair in pairs if not pair.is_real]
    if not unreal:
        return f"Yes: all {len(pairs)} differences are real"
    if len(unreal) == len(pairs):
        return f"No: none of the {len(pairs)} differences is real"
    named = "; ".join(pair_names(analysis, pair) for pair in unreal[:2])
    if len(unreal) > 2:
        named += f"; and {plural(len(unreal) - 2, 'other pair')}"
    num_real = len(pairs) - len(unreal)
    return (
        f"{num_real} of {len(pairs)} differences {'is' if num_real == 1 else 'are'} real; "
        f"not told apart: {named}"
    )


def cost(analysis: Analysis) -> str:
    worth, too_slow = analysis.worth_their_time, analysis.too_slow
    if not worth:
        return "Speed was not measured"
    if len(analysis.entries) == 1:
        return f"{name_of(analysis, 0)} takes {milliseconds(analysis.milliseconds(0))} ms an image"
    if worth == [0] and analysis.entries[0].rank is not None:
        return f"{name_of(analysis, 0)} is the most accurate, and no slower than any other"
    text = f"Worth their time: {join_names([analysis.entries[k].name for k in worth], most=4)}"
    if too_slow:
        names = join_names([analysis.entries[k].name for k in too_slow])
        text += f"; {names} {'is' if len(too_slow) == 1 else 'are'} no faster than a better model"
    return text


def classes(analysis: Analysis) -> str:
    scores = analysis.classes
    mean = scores.recall.mean(axis=0)
    if mean.min() == 1:
        return "Nowhere: every image is right"
    hardest = int(mean.argmin())
    low, high = scores.recall[:, hardest].min(), scores.recall[:, hardest].max()
    share = f"{percent(low)} % right" if low == high else f"{percent(low)} to {percent(high)} % right"
    text = f"Most on {shorten(analysis.shared.classes[scores.classes[hardest]], 30)} ({share})"
    if len(scores.recall) == 1:
        return text
    winners = [k for k in range(len(scores.recall)) if scores.is_better[k].any()]
    best = shorten(analysis.shared_entry(0).name)
    if not winners:
        return f"{text}; no model beats {best} on any class"
    first = winners[0]
    numbers = scores.classes[scores.is_better[first]]
    classes = join_names([analysis.shared.classes[number] for number in numbers], length=20)
    text += f"; {shorten(analysis.shared_entry(first).name)} beats {best} on {classes}"
    return text if len(winners) == 1 else f"{text}, and {plural(len(winners) - 1, 'other model')} on some"


def pictures(analysis: Analysis) -> str:
    num_models = len(analysis.shared.models)
    all_wrong = int((analysis.num_right == 0).sum())
    disagree = int(((analysis.num_right > 0) & (analysis.num_right < num_models)).sum())
    if num_models == 1:
        if all_wrong == 0:
            return "There are none: every image is right"
        return f"{plural(all_wrong, 'image')} {'is' if all_wrong == 1 else 'are'} wrong"
    if all_wrong + disagree == 0:
        return "There are none: every image is right"
    who = "both" if num_models == 2 else "all"
    return f"{plural(all_wrong, 'image')} that {who} get wrong, {disagree:,} on which they disagree"


def trust(analysis: Analysis) -> str:
    honest = [k for k, scores in enumerate(analysis.scores) if scores.verdict == "honest"]
    others = [k for k in range(len(analysis.scores)) if k not in honest]
    names = [analysis.entries[k].name for k in honest]
    if not others:
        return "Yes" if len(honest) == 1 else f"Yes, that of all {len(honest)}"
    worst = too_sure_text(analysis, max(others, key=lambda k: abs(analysis.scores[k].gap.value)))
    if not honest:
        return f"No: {worst}" if len(others) == 1 else f"No model is quite honest: {worst}"
    return f"{join_names(names, length=20)}: yes; {worst}"


def together(analysis: Analysis) -> str:
    everyone = analysis.averages[0]
    num_models = len(everyone.members)
    all_of_them = "both" if num_models == 2 else f"all {num_models}"
    difference = everyone.over_best.interval
    if difference.low > 0:
        return (
            f"Yes: averaging {all_of_them} gains {signed(difference.value)} points "
            f"({signed_range(difference)})"
        )
    if num_models > 2 and analysis.averages[1].over_best.interval.low > 0:
        gain = analysis.averages[1].over_best.interval
        return (
            f"Averaging {all_of_them} does not; the two best together gain {signed(gain.value)} points "
            f"({signed_range(gain)})"
        )
    if difference.high < 0:
        return (
            f"No: averaging {all_of_them} loses {signed(-difference.value).lstrip('+')} points "
            f"({signed_range(difference)})"
        )
    return (
        f"Not clearly: averaging {all_of_them} changes {signed(difference.value)} points "
        f"({signed_range(difference)})"
    )


def labels(analysis: Analysis) -> str:
    count, total = len(analysis.suspects), len(analysis.shared.rows)
    if not count:
        return "None is suspect"
    return (
        f"{count:,} {'is' if count == 1 else 'are'} suspect, {percent(count / total)} % "
        f"of the {analysis.shared.models[0].split} images"
    )


def fair(analysis: Analysis) -> str:
    if len(analysis.entries) == 1:
        return "How it was trained"
    labels = [label for label, _ in analysis.differing if label not in ("epoch kept", "num threads", "seed")]
    if not labels:
        return "Yes: nothing but the model differs in what the checkpoints record"
    return (
        f"Not the same training: {join_names(labels, most=4)} {'differs' if len(labels) == 1 else 'differ'}"
    )
