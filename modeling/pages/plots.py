"""The SVG plots of the comparison page: cost, reliability, risk and coverage, training curves."""

import math

import numpy as np
from markupsafe import Markup

from modeling.analysis import Analysis
from modeling.pages.figures import Plot, hue, percent_label, push_apart, round_ticks
from modeling.pages.words import milliseconds, percent, shorten
from modeling.scores import Scores

LINE_GAP = 14  # pixels between two names in a plot
LEAST_SURE_IMAGES = 60  # the error rate of fewer images is too noisy to draw


def accuracy_range(analysis: Analysis) -> tuple[float, float]:
    """The range that contains all accuracies, their intervals and runs, with a margin."""
    lows = [min(entry.accuracy.low, *_run_accuracies(entry)) for entry in analysis.entries]
    highs = [max(entry.accuracy.high, *_run_accuracies(entry)) for entry in analysis.entries]
    return max(0.0, min(lows) - 0.02), min(1.0, max(highs) + 0.02)


def _run_accuracies(entry) -> list[float]:
    return [float(run.right.mean()) for run in entry.runs]


def cost_plot(analysis: Analysis) -> Markup | None:
    """Plot accuracy against time per image, and the best accuracy that each time allows.

    None: fewer than two speeds are known.
    """
    times = {k: analysis.milliseconds(k) for k in range(len(analysis.entries))}
    times = {k: value for k, value in times.items() if value}
    if len(times) < 2:
        return None
    x_range = (min(times.values()) / 1.8, max(times.values()) * 3.5)
    y_range = accuracy_range(analysis)
    plot = Plot(440, 290, x_range, y_range, pad=(22, 10, 36, 40), is_log_x=True)
    plot.axes(
        _log_ticks(*x_range),
        round_ticks(*y_range, 5),
        "ms per image (log)",
        "accuracy, %",
        lambda value: f"{value:g}",
        percent_label,
    )
    _draw_frontier(plot, analysis, times)
    for k in times:
        accuracy = analysis.entries[k].accuracy
        plot.interval(k, times[k], accuracy.low, accuracy.high)
    points = {k: (plot.x(times[k]), plot.y(analysis.entries[k].accuracy.value)) for k in times}
    heights = push_apart([y + 4 for _, y in points.values()], LINE_GAP)
    for k, height in zip(times, heights, strict=True):
        plot.mark(k, times[k], analysis.entries[k].accuracy.value, 1.15)
        x, name = points[k][0], shorten(analysis.entries[k].name, 20)
        is_left = x + 11 + 7 * len(name) > plot.width or _has_neighbour(points, k)
        plot.label(x - 11 if is_left else x + 11, height, name, "end" if is_left else "start")
    texts = [
        f"{analysis.entries[k].name} {percent(analysis.entries[k].accuracy.value)} % at "
        f"{milliseconds(times[k])} ms"
        for k in times
    ]
    return plot.svg("accuracy against time per image: " + ", ".join(texts))


def _has_neighbour(points: dict[int, tuple[float, float]], k: int) -> bool:
    """Whether another mark is close to the right of mark k, where the name of k would be."""
    x, y = points[k]
    return any(0 < other_x - x < 60 and abs(other_y - y) < LINE_GAP for other_x, other_y in points.values())


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten in the range. If there are fewer than two, add 2 and 5 times each power."""
    powers = [10.0**exponent for exponent in range(-5, 7)]
    ticks = [value for value in powers if low <= value <= high]
    if len(ticks) >= 2:
        return ticks
    return [round(f * value, 6) for value in powers for f in (1, 2, 5) if low <= f * value <= high]


def _draw_frontier(plot: Plot, analysis: Analysis, times: dict[int, float]) -> None:
    """Draw the best accuracy that each time allows, as a step line."""
    steps, best = [], -1.0
    for k in analysis.worth_their_time:
        if analysis.entries[k].accuracy.value > best:
            best = analysis.entries[k].accuracy.value
            steps.append((plot.x(times[k]), plot.y(best)))
    path = f"M{steps[0][0]} {steps[0][1]}" + "".join(f"H{x}V{y}" for x, y in steps[1:])
    plot.add('<path class="front" d="{}H{}"/>', path, plot.right)


def lowest_confidence(analysis: Analysis) -> float:
    """The lower end of the scale that all reliability panels share."""
    lowest = min(one.confidence for scores in analysis.scores for one in scores.bins)
    return min(0.5, math.floor(10 * lowest) / 10)


def reliability_plot(scores: Scores, confidence: np.ndarray, number: int, low: float, name: str) -> Markup:
    """Plot accuracy against confidence. At the bottom, a histogram of the confidence."""
    plot = Plot(220, 236, (low, 1), (low, 1), pad=(8, 8, 52, 32))
    ticks = [value for value in (0, 0.2, 0.4, 0.6, 0.8, 1) if value >= low]
    plot.axes(ticks, ticks, "", "", percent_label, percent_label)
    plot.line("diag", [low, 1], [low, 1])
    colour = hue(number)
    confidences = [one.confidence for one in scores.bins]
    outline = [*zip(confidences, [one.accuracy for one in scores.bins], strict=True)]
    outline += [(value, value) for value in reversed(confidences)]
    points = "L".join(f"{plot.x(x)} {plot.y(y)}" for x, y in outline)
    plot.add('<path class="gap f{}" d="M{}Z"/>', colour, points)
    num_images = sum(one.num_images for one in scores.bins)
    for one in scores.bins:
        plot.interval(number, one.confidence, one.low, one.high)
    for one in scores.bins:
        radius = 2.2 + 5 * math.sqrt(one.num_images / num_images)
        at = (plot.x(one.confidence), plot.y(one.accuracy))
        plot.add('<circle class="halo f{}" cx="{}" cy="{}" r="{:.1f}"/>', colour, *at, radius)
    counts = np.histogram(confidence, bins=20, range=(low, 1))[0]
    width = (plot.right - plot.left) / len(counts)
    for position, count in enumerate(counts):
        height = 22 * count / counts.max()
        plot.add(
            '<rect class="hist f{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>',
            colour,
            plot.left + position * width,
            plot.height - height,
            width - 1,
            height,
        )
    texts = [f"says {percent(one.confidence)} %, is right {percent(one.accuracy)} %" for one in scores.bins]
    return plot.svg(f"{name}: {'; '.join(texts)}")


def coverage_plot(analysis: Analysis) -> Markup:
    """Plot the error rate against the share of images that a model answers, the surest first."""
    worst = max(1 - scores.accuracy.value for scores in analysis.scores)
    top = max(0.01, 1.08 * worst)
    plot = Plot(440, 290, (0, 1), (0, top), pad=(22, 92, 36, 40))
    plot.axes(
        [0, 0.2, 0.4, 0.6, 0.8, 1],
        round_ticks(0, top, 5),
        "share of images answered, %",
        "error, %",
        percent_label,
        percent_label,
    )
    for k, scores in enumerate(analysis.scores):
        num_images = len(scores.errors)
        first = min(num_images, max(LEAST_SURE_IMAGES, num_images // 50))
        counts = np.unique(np.linspace(first, num_images, 70).round().astype(int))
        plot.line(f"line s{hue(k)}", counts / num_images, scores.errors[counts - 1] / counts)
    ends = [scores.errors[-1] / len(scores.errors) for scores in analysis.scores]
    for k, height in enumerate(push_apart([plot.y(end) + 4 for end in ends], LINE_GAP)):
        plot.mark(k, 1, ends[k], 0.8)
        plot.label(plot.x(1) + 9, height, shorten(analysis.entries[k].name, 13))
    return plot.svg("error against the share of images answered; its numbers are in the table")


def curves_plot(analysis: Analysis) -> Markup | None:
    """Plot validation accuracy by epoch. A ring marks the checkpoint's epoch. None: there are no curves."""
    curves = {
        k: analysis.curves[entry.shown.name]
        for k, entry in enumerate(analysis.entries)
        if entry.shown.name in analysis.curves
    }
    if not curves:
        return None
    last = max(epoch for curve in curves.values() for epoch, _ in curve)
    values = [accuracy for curve in curves.values() for _, accuracy in curve]
    low, high = max(0.0, min(values) - 0.03), min(1.0, max(values) + 0.01)
    plot = Plot(440, 280, (1, max(2, last)), (low, high), pad=(22, 92, 36, 40))
    epochs = [value for value in round_ticks(0, last, 5) if value == int(value) and value >= 1]
    plot.axes(
        sorted({1.0, *epochs}),
        round_ticks(low, high, 4),
        "epoch",
        "validation accuracy, %",
        lambda value: f"{value:g}",
        percent_label,
    )
    for k, curve in curves.items():
        plot.line(f"line s{hue(k)}", [epoch for epoch, _ in curve], [accuracy for _, accuracy in curve])
        kept = analysis.entries[k].shown.header.get("epoch")
        for epoch, accuracy in curve:
            if epoch == kept:
                plot.add(
                    '<circle class="ring s{}" cx="{}" cy="{}" r="4.5"/>',
                    hue(k),
                    plot.x(epoch),
                    plot.y(accuracy),
                )
    _label_ends(plot, analysis, curves)
    return plot.svg("validation accuracy by epoch")


def _label_ends(plot: Plot, analysis: Analysis, curves: dict[int, list[tuple[int, float]]]) -> None:
    """Write the names beside the last points of the curves, without overlap."""
    heights = push_apart([plot.y(curve[-1][1]) + 4 for curve in curves.values()], LINE_GAP)
    for (k, curve), height in zip(curves.items(), heights, strict=True):
        plot.label(plot.x(curve[-1][0]) + 8, height, shorten(analysis.entries[k].name, 13))
