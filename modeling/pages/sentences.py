"""The page's title, the sentence below it, and the facts, computed from the analysis."""

from dataclasses import dataclass

from modeling.analysis import Analysis
from modeling.pages.names import average_name, name_of, over, pair_names, place, too_sure_text
from modeling.pages.words import (
    join_names,
    milliseconds,
    percent,
    percent_range,
    plural,
    shorten,
    signed,
    signed_range,
    times_as_long,
)


@dataclass(frozen=True)
class Fact:
    """A fact under the title: its label, the section that it links to, and its sentence."""

    label: str
    anchor: str
    text: str


def title(analysis: Analysis) -> str:
    entries = analysis.entries
    best = name_of(analysis, 0)
    if len(entries) == 1:
        return f"{best} is right on {percent(entries[0].accuracy.value)} % of the images."
    pairs = [pair for pair in analysis.comparison.pairs if pair.a == 0]
    if not pairs:
        return f"{best} has the highest accuracy, but no other model saw the same images."
    equal = [entries[pair.b].name for pair in pairs if pair.difference.value == 0]
    if len(equal) == len(pairs) > 1 and len(equal) + 1 == len(entries):
        return f"All {len(entries)} models are equally accurate."
    if equal:
        return f"{join_names([best, *equal])} lead with the same accuracy."
    apart = [entries[pair.b].name for pair in pairs if pair.verdict == "not told apart"]
    if apart:
        return f"{best} leads, but was not told apart from {join_names(apart)}."
    hints = [entries[pair.b].name for pair in pairs if pair.verdict == "a hint"]
    if hints:
        return f"{best} leads, but its lead over {join_names(hints)} is only a hint."
    return f"{best} is the most accurate, and its lead is real."


def lead(analysis: Analysis) -> str:
    entry = analysis.entries[0]
    text = (
        f"{percent(entry.accuracy.value)} % right on {place(analysis)} "
        f"(95 % interval {percent_range(entry.accuracy)})"
    )
    pair = analysis.comparison.pair(0, 1)
    if pair is None:
        return f"{text}."
    other, difference = name_of(analysis, 1), pair.difference.value
    if difference == 0:
        return f"{text}, as many as {other}."
    if difference < 0:  # they saw different images
        return f"{text}; on the images that both saw, {other} is {signed(-difference)} points ahead."
    return f"{text}, {signed(difference).lstrip('+')} points ahead of {other}."


def scope(analysis: Analysis) -> str:
    """How many images, classes, checkpoints and runs."""
    entries = analysis.entries
    model = entries[0].shown
    num_checkpoints = sum(len(entry.runs) for entry in entries)
    num_runs = sorted({len(entry.runs) for entry in entries})
    text = (
        f"{place(analysis)}: {plural(len(model), 'image')}, {len(model.classes):,} classes. "
        f"{plural(num_checkpoints, 'checkpoint')}"
    )
    if len(entries) == 1 and num_checkpoints == 1:
        return f"{text}."
    if num_runs == [1]:
        return f"{text}, one run each."
    if len(num_runs) == 1:
        return f"{text}: {plural(len(entries), 'recipe')} of {num_runs[0]} runs each."
    return f"{text}: {plural(len(entries), 'recipe')} of {num_runs[0]} to {num_runs[-1]} runs."


def facts(analysis: Analysis) -> list[Fact]:
    """The linked facts under the title, at most six."""
    found = []
    if analysis.comparison.pairs:
        found.append(Fact("Real?", "real", _real_fact(analysis)))
    found.append(Fact("Cost", "cost", _cost_fact(analysis)))
    found.append(Fact("Failures", "classes", _failures_fact(analysis)))
    found.append(Fact("Confidence", "trust", _confidence_fact(analysis)))
    if analysis.averages:
        found.append(Fact("Together", "together", _together_fact(analysis)))
    found.append(Fact("Labels", "labels", _labels_fact(analysis)))
    return found


def _real_fact(analysis: Analysis) -> str:
    pair = analysis.comparison.pairs[0]
    if pair.is_identical:
        text = f"{pair_names(analysis, pair)} are right on the same images."
    else:
        suffix = "" if pair.is_real else f": {pair.verdict}"
        text = f"{over(analysis, pair)}{suffix}."
    more = [other for other in analysis.comparison.pairs[1:] if not other.is_real]
    if more:
        text += f" {pair_names(analysis, more[0])} were not told apart."
    return text


def _cost_fact(analysis: Analysis) -> str:
    timed = sorted(
        (k for k in range(len(analysis.entries)) if analysis.milliseconds(k)), key=analysis.milliseconds
    )
    if not timed:
        why = analysis.costs.why_no_speed
        return f"Speed was not measured: {why}." if why else "Speed was not measured."
    fastest, best = timed[0], 0
    fast_ms = analysis.milliseconds(fastest)
    if len(timed) == 1:
        return f"{name_of(analysis, fastest)} takes {milliseconds(fast_ms)} ms an image."
    if fastest == best:
        ratio = analysis.milliseconds(timed[1]) / fast_ms
        return (
            f"{name_of(analysis, best)} is also the fastest: {milliseconds(fast_ms)} ms an image; "
            f"{name_of(analysis, timed[1])} takes {times_as_long(ratio)}."
        )
    best_ms = analysis.milliseconds(best)
    return (
        f"{name_of(analysis, fastest)} takes {milliseconds(fast_ms)} ms an image, "
        f"{name_of(analysis, best)} {milliseconds(best_ms)} ms: {times_as_long(best_ms / fast_ms)}."
    )


def _failures_fact(analysis: Analysis) -> str:
    if not analysis.confusions:
        return "No model makes an error on these images."
    classes = analysis.shared.classes
    mean = analysis.classes.recall.mean(axis=0)
    hardest = [classes[analysis.classes.classes[j]] for j in mean.argsort(kind="stable")[:2]]
    first = analysis.confusions[0]
    return (
        f"Hardest: {join_names(hardest, length=40)}. Most frequent: {shorten(classes[first.true], 40)} "
        f"taken for "
        f"{shorten(classes[first.predicted], 40)}."
    )


def _confidence_fact(analysis: Analysis) -> str:
    honest = [
        entry.name
        for entry, s in zip(analysis.entries, analysis.scores, strict=True)
        if s.verdict == "honest"
    ]
    others = [k for k, scores in enumerate(analysis.scores) if scores.verdict != "honest"]
    if not others:
        return f"{join_names(honest)} can be taken at {'its' if len(honest) == 1 else 'their'} word."
    worst = too_sure_text(analysis, max(others, key=lambda k: abs(analysis.scores[k].gap.value)))
    if not honest:
        return f"{worst}{'; none can be taken at its word' if len(others) > 1 else ''}."
    return (
        f"{worst}; {join_names(honest, most=2)} can be taken at "
        f"{'its' if len(honest) == 1 else 'their'} word."
    )


def _together_fact(analysis: Analysis) -> str:
    best = max(analysis.averages[:2], key=lambda average: average.accuracy.value)
    difference = best.over_best.interval
    return (
        f"Averaging {average_name(analysis, best)}: {percent(best.accuracy.value)} %, "
        f"{signed(difference.value)} points "
        f"over {shorten(analysis.shared_entry(0).name)} alone ({signed_range(difference)})."
    )


def _labels_fact(analysis: Analysis) -> str:
    count, total = len(analysis.suspects), len(analysis.shared.rows)
    split = analysis.shared.models[0].split
    if not count:
        return f"No {split} label is suspect."
    return f"{count:,} of {total:,} {split} labels {'is' if count == 1 else 'are'} suspect."
