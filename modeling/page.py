"""The comparison page: one HTML file, computed from an Analysis. It works without network and without script.

The template is page.html.j2, with page.css and page.js. The page's content security policy (CSP) forbids
every request, and every script except page.js. jinja2 escapes every name. So the name of a class or a file
cannot inject code.
"""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from modeling.analysis import Analysis
from modeling.pages import confusions, headings, plots, tables
from modeling.pages.banners import banners
from modeling.pages.figures import Axis, hue, shape
from modeling.pages.names import place
from modeling.pages.pictures import NUM_SUSPECTS, PictureOfRow, Tile, choose_tiles, encode
from modeling.pages.sentences import facts, lead, scope, title
from modeling.pages.words import (
    milliseconds,
    p_value,
    percent,
    percent_range,
    plural,
    short_count,
    shorten,
    signed,
    signed_range,
)

LARGEST_PAGE = 3_000_000  # bytes
PICTURES = (250, 120, 60, 24, 0)  # numbers of pictures to try, until the page is small enough
LONGEST_TITLE = 300  # letters of a name in an HTML attribute
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Answer:
    """One model's answer on a picture."""

    number: int
    name: str
    confidence: str
    is_right: bool


@dataclass(frozen=True)
class Picture:
    """A picture of section 5. right, predicted and kinds are for the script's filters."""

    row: int
    source: str
    label: int
    label_name: str
    right: str
    predicted: str
    kinds: str
    answers: list[Answer]


@dataclass(frozen=True)
class SuspectPicture:
    """A picture of section 8."""

    row: int
    source: str
    label_name: str
    suggested_name: str
    reason: str
    share: str


def render(analysis: Analysis, picture_of_row: PictureOfRow, footer: str) -> str:
    """Return the page's HTML. If it is larger than 3 MB, render it with fewer pictures.

    picture_of_row returns the picture of an image, given its row in the split.
    """
    template = environment().get_template("page.html.j2")
    values = _values(analysis) | {"footer": footer}
    encoded: dict[int, str] = {}

    def source(row: int) -> str:
        if row not in encoded:
            encoded[row] = encode(picture_of_row(row))
        return encoded[row]

    for most in PICTURES:
        pictures = [_picture(analysis, tile, source) for tile in choose_tiles(analysis, most)]
        suspects = _suspect_pictures(analysis, source, min(most, NUM_SUSPECTS))
        options = sorted({(picture.label_name, picture.label) for picture in pictures})
        html = template.render(values, pictures=pictures, suspects=suspects, class_options=options)
        if len(html.encode()) <= LARGEST_PAGE:
            break
    return html


def environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["percent_range"] = percent_range
    environment.filters["signed"] = signed
    environment.filters["signed_range"] = signed_range
    environment.filters["p_value"] = p_value
    environment.filters["ms"] = milliseconds
    environment.filters["short_count"] = short_count
    environment.filters["shorten"] = shorten
    environment.filters["cut"] = lambda name: shorten(name, LONGEST_TITLE)
    environment.filters["thousands"] = lambda count: f"{count:,.0f}"
    environment.filters["hue"] = hue
    environment.filters["shape"] = shape
    return environment


def _values(analysis: Analysis) -> dict[str, object]:
    """The template's variables, except the pictures and the footer."""
    script = (_FOLDER / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shared = analysis.shared
    pairs = analysis.comparison.pairs
    shown_pairs = analysis.comparison.pairs_to_show()
    pair_axis = tables.pair_axis(shown_pairs) if pairs else None
    classes = tables.class_rows(analysis)
    low = plots.lowest_confidence(analysis)
    panels = [
        plots.reliability_plot(scores, entry.shown.confidence, number, low, entry.name)
        for number, (entry, scores) in enumerate(zip(analysis.entries, analysis.scores, strict=True))
    ]
    return {
        "script": Markup(script),
        "style": Markup((_FOLDER / "page.css").read_text()),
        "script_hash": digest,
        "title": title(analysis),
        "lead": lead(analysis),
        "scope": scope(analysis),
        "place": place(analysis),
        "banners": banners(analysis),
        "facts": facts(analysis),
        "headings": headings,
        "analysis": analysis,
        "models": tables.model_rows(analysis),
        "measures": tables.measures_rows(analysis),
        "accuracy_axis": Axis(*plots.accuracy_range(analysis)),
        "largest_class": tables.largest_class(analysis),
        "pair_axis": pair_axis,
        "pairs": tables.pair_rows(analysis, shown_pairs, pair_axis) if pairs else [],
        "all_pairs": pairs,
        "visible": analysis.comparison.visible_difference(),
        "cost_plot": plots.cost_plot(analysis),
        "classes": classes,
        "class_axis": tables.class_axis(classes),
        "num_classes": len(shared.classes),
        "class_names": shared.classes,
        "confusions": confusions.confusion_rows(analysis),
        "matrices": confusions.matrices(analysis),
        "trust": tables.trust_rows(analysis, panels),
        "coverages": tables.COVERAGES,
        "coverage_plot": plots.coverage_plot(analysis),
        "parts": tables.parts(analysis) if analysis.averages else [],
        "averages": tables.average_rows(analysis),
        "agreement": tables.agreement_rows(analysis),
        "curves_plot": plots.curves_plot(analysis),
        "shared_numbers": shared.entries,
        "shared_names": [analysis.shared_entry(k).name for k in range(len(shared.models))],
        "has_winners": any(row.winners for row in classes),
        "has_runs": any(len(entry.runs) > 1 for entry in analysis.entries),
        "num_images": len(shared.rows),
        "split": shared.models[0].split,
        "plural": plural,
    }


def _picture(analysis: Analysis, tile: Tile, source) -> Picture:
    shared, i = analysis.shared, tile.position
    row, label = int(shared.rows[i]), int(shared.labels[i])
    answers = [
        Answer(
            number=number,
            name=shared.classes[model.predicted[i]],
            confidence=f"{100 * model.confidence[i]:.0f} %",
            is_right=bool(model.right[i]),
        )
        for number, model in zip(shared.entries, shared.models, strict=True)
    ]
    return Picture(
        row=row,
        source=source(row),
        label=label,
        label_name=shared.classes[label],
        right="".join("1" if answer.is_right else "0" for answer in answers),
        predicted=",".join(str(model.predicted[i]) for model in shared.models),
        kinds=" ".join(tile.kinds),
        answers=answers,
    )


def _suspect_pictures(analysis: Analysis, source, most: int) -> list[SuspectPicture]:
    classes = analysis.shared.classes
    one_model = len(analysis.shared.models) == 1
    pictures = []
    for suspect in analysis.suspects[:most]:
        if suspect.suggested_probability is None:
            reason, share = f"the same picture as row {suspect.twin}, labelled", ""
        else:
            reason = "the model says" if one_model else "all say"
            share = f", {np.floor(100 * suspect.suggested_probability):.0f} %"
        pictures.append(
            SuspectPicture(
                row=suspect.row,
                source=source(suspect.row),
                label_name=classes[suspect.label],
                suggested_name=classes[suspect.suggested],
                reason=reason,
                share=share,
            )
        )
    return pictures
