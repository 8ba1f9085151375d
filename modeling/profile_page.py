"""The profile page: one HTML file that needs no network and no script, made from the rows of a profile."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from modeling.page import environment
from modeling.pages.figures import Plot, hue, percent_label, push_apart, round_ticks
from modeling.pages.words import percent, shorten
from modeling.step_profile import PHASES

LINE_GAP = 14  # pixels between the names at the ends of lines
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Series:
    """The rows of one model at one precision, by batch size. number is the model's, for its colour."""

    number: int
    name: str
    is_dashed: bool
    rows: list[dict[str, Any]]


def render(rows: Sequence[dict[str, Any]], conditions: str) -> str:
    """Return the page's HTML. rows are those of profile_model; conditions name device and threads."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    series = make_series(rows, models, precisions)
    best = best_rows(rows, models)
    return (
        environment()
        .get_template("profile.html.j2")
        .render(
            style=Markup((_FOLDER / "page.css").read_text()),
            title=title(best),
            lead=lead(best),
            conditions=conditions,
            facts=facts(best),
            rows=rows,
            numbers={name: number for number, name in enumerate(models)},
            has_precisions=len(precisions) > 1,
            phases=PHASES,
            precision_name=precision_name,
            memory_heading=memory_heading(rows, models),
            batch_heading=batch_heading(best, series),
            phase_heading=phase_heading(best),
            operator_heading=operator_heading(best),
            machine_heading=machine_heading(best),
            speed_plot=batch_plot(series, "images_per_second", "images/s", thousands),
            memory_plot=batch_plot(series, "peak_memory_mb", "peak memory, MB", thousands),
            machine_plot=batch_plot(series, "matrix_share", "share of the matrix rate, %", percent_label),
        )
    )


def make_series(rows: Sequence[dict[str, Any]], models: list[str], precisions: list[str]) -> list[Series]:
    series = []
    for number, model in enumerate(models):
        for place, precision in enumerate(precisions):
            own = [row for row in rows if (row["model"], row["precision"]) == (model, precision)]
            name = (
                f"{shorten(model, 14)} {precision_name(precision)}"
                if len(precisions) > 1
                else shorten(model, 18)
            )
            series.append(Series(number, name, place > 0, sorted(own, key=lambda row: row["batch_size"])))
    return series


def best_rows(rows: Sequence[dict[str, Any]], models: list[str]) -> list[dict[str, Any]]:
    """Of each model the row with most images per second; the fastest model first."""
    best = [max((r for r in rows if r["model"] == m), key=lambda r: r["images_per_second"]) for m in models]
    return sorted(best, key=lambda row: -row["images_per_second"])


# ---- Sentences -----------------------------------------------------------------------------------


def thousands(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio < 9.95 else f"{ratio:,.0f} times"


def precision_name(precision: str) -> str:
    return "fp32" if precision == "no" else precision


def at(row: dict[str, Any]) -> str:
    return f"batch {row['batch_size']}, {precision_name(row['precision'])}"


def memory_heading(rows: Sequence[dict[str, Any]], models: list[str]) -> str:
    largest = [
        max((row for row in rows if row["model"] == model), key=lambda row: row["peak_memory_mb"])
        for model in models[:3]
    ]
    parts = [f"{shorten(row['model'])} {thousands(row['peak_memory_mb'])} MB ({at(row)})" for row in largest]
    return f"A step needs at most: {', '.join(parts)}"


def title(best: list[dict[str, Any]]) -> str:
    first = best[0]
    if len(best) == 1:
        return f"{shorten(first['model'])} trains {thousands(first['images_per_second'])} images a second"
    second = best[1]
    ratio = first["images_per_second"] / second["images_per_second"]
    if ratio < 1.05:
        return f"{shorten(first['model'])} and {shorten(second['model'])} train about equally fast"
    return f"{shorten(first['model'])} trains {times(ratio)} as fast as {shorten(second['model'])}"


def lead(best: list[dict[str, Any]]) -> str:
    parts = [
        f"{shorten(row['model'])}: {thousands(row['images_per_second'])} images/s ({at(row)})" for row in best
    ]
    return "At its fastest, " + "; ".join(parts) + "."


def facts(best: list[dict[str, Any]]) -> list[dict[str, str]]:
    smallest = min(best, key=lambda row: row["peak_memory_mb"] / row["batch_size"])
    used = max(best, key=lambda row: row["matrix_share"])
    waits = max(best, key=lambda row: row["data_share"])
    return [
        {
            "anchor": "batch",
            "label": "least memory an image",
            "text": f"{shorten(smallest['model'])}: "
            f"{smallest['peak_memory_mb'] / smallest['batch_size']:.2g} MB ({at(smallest)})",
        },
        {
            "anchor": "phases",
            "label": "most time for data",
            "text": f"{shorten(waits['model'])}: {percent(waits['data_share'])} % of its step",
        },
        {
            "anchor": "machine",
            "label": "best use of the machine",
            "text": f"{shorten(used['model'])}: {percent(used['matrix_share'])} % of the matrix rate",
        },
    ]


def batch_heading(best: list[dict[str, Any]], series: list[Series]) -> str:
    sizes = [row["batch_size"] for row in series[0].rows]
    if len(sizes) == 1:
        return "One batch size was measured; --batch-sizes 16 32 64 shows what a larger one gives"
    gains = []
    for row in best[:3]:
        (one,) = (one for one in series if row in one.rows)
        ratio = one.rows[-1]["images_per_second"] / one.rows[0]["images_per_second"]
        gains.append(f"{one.name} trains {times(ratio)} as fast")
    return f"With batch {sizes[-1]} instead of {sizes[0]}: {', '.join(gains)}"


def phase_heading(best: list[dict[str, Any]]) -> str:
    def largest(row: dict[str, Any]) -> str:
        phase = max(PHASES, key=lambda phase: row[f"{phase}_share"])
        return f"{shorten(row['model'])} spends {percent(row[f'{phase}_share'])} % in {phase}"

    return ", ".join(largest(row) for row in best[:3])


def operator_heading(best: list[dict[str, Any]]) -> str:
    parts = [f"{row['costliest_operators'][0]} of {shorten(row['model'])}" for row in best[:3]]
    return f"The costliest operator: {', '.join(parts)}"


def machine_heading(best: list[dict[str, Any]]) -> str:
    parts = [f"{shorten(row['model'])} {percent(row['matrix_share'])} %" for row in best[:3]]
    return f"Of the rate of matrix products, training reaches: {', '.join(parts)}"


# ---- Figures -------------------------------------------------------------------------------------


def batch_plot(series: list[Series], column: str, label: str, y_format) -> Markup:
    """A column of the profile over the batch size (log), a line for each series."""
    sizes = sorted({row["batch_size"] for one in series for row in one.rows})
    top = 1.08 * max(row[column] for one in series for row in one.rows)
    margin = 1.25 if len(sizes) > 1 else 2.0
    plot = Plot(
        440, 290, (sizes[0] / margin, sizes[-1] * margin), (0, top), pad=(22, 104, 36, 48), is_log_x=True
    )
    plot.axes(_apart(plot, sizes), round_ticks(0, top, 5), "batch size (log)", label, str, y_format)
    ends = []
    for one in series:
        xs, ys = [row["batch_size"] for row in one.rows], [row[column] for row in one.rows]
        plot.line(f"line s{hue(one.number)}{' dash' if one.is_dashed else ''}", xs, ys)
        for x, y in zip(xs, ys, strict=True):
            plot.mark(one.number, x, y)
        ends.append(plot.y(ys[-1]) + 4)
    for one, height in zip(series, push_apart(ends, LINE_GAP), strict=True):
        plot.label(plot.x(one.rows[-1]["batch_size"]) + 10, height, one.name)
    texts = [
        f"{one.name} at batch {row['batch_size']}: {y_format(row[column])}"
        for one in series
        for row in one.rows
    ]
    return plot.svg(f"{label}: {'; '.join(texts)}")


def _apart(plot: Plot, sizes: list[int]) -> list[int]:
    """The batch sizes whose labels do not touch."""
    shown, last = [], -math.inf
    for size in sizes:
        if plot.x(size) - last >= 26:
            shown.append(size)
            last = plot.x(size)
    return shown
