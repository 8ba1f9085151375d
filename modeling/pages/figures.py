"""Scales, marks and small SVG plots. Colours are CSS classes, so a figure adapts to a light or dark theme."""

import base64
import io
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup
from PIL import Image

# Each of the first six models has a shape and a hue of its own. Later models repeat the shapes in grey.
SHAPES = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0",
    "M-4.5 -4.5h9v9h-9z",
    "M0 -6L6 0L0 6L-6 0z",
    "M0 -5.6L5.6 4.4H-5.6z",
    "M0 5.6L5.6 -4.4H-5.6z",
    "M-2 -5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5z",
)
NUM_HUES = len(SHAPES)


def hue(number: int) -> str:
    """The suffix of the CSS classes that colour model `number`."""
    return str(number) if number < NUM_HUES else "x"


def shape(number: int) -> str:
    return SHAPES[number % len(SHAPES)]


def round_ticks(low: float, high: float, at_most: int) -> list[float]:
    """Return about `at_most` round numbers from low to high, for the ticks of an axis.

    The step is 1, 2 or 5 times a power of ten, such as 0.05.
    """
    rough = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def percent_label(share: float) -> str:
    return f"{100 * share:.3g}".replace("-", "\N{MINUS SIGN}")


class Axis:
    """A horizontal scale of shares.

    axis(value) returns a position in percent of the width. Values beyond the scale are placed at its ends.
    """

    def __init__(self, low: float, high: float, at_most: int = 4):
        self.low, self.high = low, high
        self.ticks = [
            (self(value), percent_label(value), value == 0) for value in round_ticks(low, high, at_most)
        ]

    def __call__(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return round(100 * (inside - self.low) / (self.high - self.low), 2)

    def width(self, low: float, high: float) -> float:
        return round(self(high) - self(low), 2)


class Plot:
    """A small SVG plot. x and y: (low, high) of the data. pad: top, right, bottom, left margin in pixels."""

    def __init__(
        self,
        width: int,
        height: int,
        x: tuple[float, float],
        y: tuple[float, float],
        pad: tuple[int, int, int, int],
        is_log_x: bool = False,
    ):
        self.width, self.height, self.x_range, self.y_range, self.is_log_x = width, height, x, y, is_log_x
        self.top, right, bottom, self.left = pad
        self.right, self.bottom = width - right, height - bottom
        self.parts: list[Markup] = []

    def x(self, value: float) -> float:
        low, high = self.x_range
        if self.is_log_x:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        inside = min(max(value, low), high)
        return round(self.bottom - (inside - low) / (high - low) * (self.bottom - self.top), 1)

    def add(self, template: str, *values: object) -> None:
        """Add an element; the values are escaped."""
        self.parts.append(Markup(template).format(*values))

    def axes(
        self,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        x_label: str,
        y_label: str,
        x_format: Callable[[float], str],
        y_format: Callable[[float], str],
    ) -> None:
        for value in y_ticks:
            at = self.y(value)
            self.add('<path class="grid" d="M{} {}H{}"/>', self.left, at, self.right)
            self.add(
                '<text x="{}" y="{}" text-anchor="end">{}</text>', self.left - 6, at + 4, y_format(value)
            )
        for value in x_ticks:
            at = self.x(value)
            self.add('<path class="grid" d="M{} {}V{}"/>', at, self.bottom, self.top)
            self.add(
                '<text x="{}" y="{}" text-anchor="middle">{}</text>', at, self.bottom + 15, x_format(value)
            )
        self.add('<path class="axis" d="M{} {}H{}"/>', self.left, self.bottom, self.right)
        if x_label:
            self.add('<text x="{}" y="{}" text-anchor="end">{}</text>', self.right, self.bottom + 30, x_label)
        if y_label:
            self.add('<text x="{}" y="{}">{}</text>', self.left - 34, self.top - 7, y_label)

    def line(self, css_class: str, xs: Sequence[float], ys: Sequence[float]) -> None:
        points = "L".join(f"{self.x(x)} {self.y(y)}" for x, y in zip(xs, ys, strict=True))
        self.add('<path class="{}" d="M{}"/>', css_class, points)

    def interval(self, number: int, x: float, low: float, high: float) -> None:
        """A vertical bar of the model's colour."""
        self.add('<path class="err s{}" d="M{} {}V{}"/>', hue(number), self.x(x), self.y(low), self.y(high))

    def mark(self, number: int, x: float, y: float, scale: float = 1.0) -> None:
        """The mark of a model."""
        self.add(
            '<path class="halo f{}" transform="translate({} {}) scale({:.2f})" d="{}"/>',
            hue(number),
            self.x(x),
            self.y(y),
            scale,
            shape(number),
        )

    def label(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        """A name beside a mark; x and y in pixels."""
        self.add('<text class="lab" x="{}" y="{:.1f}" text-anchor="{}">{}</text>', x, y, anchor, text)

    def svg(self, description: str) -> Markup:
        return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            self.width, self.height, description, Markup("").join(self.parts)
        )


def push_apart(positions: Sequence[float], gap: float) -> list[float]:
    """Move labels apart until neighbours have a distance of `gap`. Keep their order."""
    order = np.argsort(positions, kind="stable")
    moved = np.array(positions, dtype=float)
    for _ in range(60):
        for first, second in itertools.pairwise(order):
            overlap = gap - (moved[second] - moved[first])
            if overlap > 0:
                moved[first] -= overlap / 2
                moved[second] += overlap / 2
    return moved.tolist()


def data_uri(image: Image.Image, kind: str, *, lossless: bool = True) -> str:
    """The image as a data: URI. kind: "WEBP" or "PNG", which is always lossless."""
    out = io.BytesIO()
    image.save(out, kind, lossless=lossless, quality=80, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def confusion_picture(matrix: np.ndarray, order: np.ndarray) -> str:
    """Draw a confusion matrix with one pixel per cell. Return a PNG as a data: URI.

    A pixel's opacity is the cell's share of its row. So the picture fits a light or dark background.
    """
    shares = matrix[np.ix_(order, order)] / np.maximum(matrix.sum(axis=1)[order][:, None], 1)
    pixels = np.zeros((*shares.shape, 4), dtype=np.uint8)
    pixels[..., :3] = (60, 130, 215)
    pixels[..., 3] = np.where(shares > 0, 40 + 215 * np.sqrt(shares), 0)
    image = Image.fromarray(pixels).quantize(64, method=Image.Quantize.FASTOCTREE)
    return data_uri(image, "PNG")
