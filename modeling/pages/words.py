"""Format numbers and names for the comparison page."""

from collections.abc import Sequence

from modeling.comparison_text import p_text, points
from modeling.stats.proportions import Interval

LONGEST_NAME = 24  # letters, in a sentence


def percent(share: float) -> str:
    """Format a share in percent: 94.4. A share below 1 is never 100.0, and a share above 0 is never 0.0."""
    text = f"{100 * share:.1f}"
    if text == "100.0" and share < 1:
        return "> 99.9"
    return "< 0.1" if text == "0.0" and share > 0 else text


def signed(difference: float) -> str:
    """Format a difference of shares in percentage points, with a minus sign instead of a hyphen."""
    return points(difference).replace("-", "\N{MINUS SIGN}")


def signed_range(interval: Interval) -> str:
    return f"{signed(interval.low)} to {signed(interval.high)}"


def percent_range(interval: Interval) -> str:
    return f"{percent(interval.low)} to {percent(interval.high)}"


def p_value(p: float) -> str:
    return p_text(p).removeprefix("= ")


def shorten(name: str, length: int = LONGEST_NAME) -> str:
    """Cut the name to `length` letters. A name of spaces alone becomes "(empty name)"."""
    if not name.strip():
        return "(empty name)"
    return name if len(name) <= length else name[: length - 1] + "…"


def join_names(names: Sequence[str], most: int = 3, length: int = LONGEST_NAME) -> str:
    """Examples: "a"; "a and b"; "a, b and c"; "a, b, c and 2 others"."""
    shown = [shorten(name, length) for name in names[:most]]
    num_others = len(names) - len(shown)
    if num_others:
        shown.append("1 other" if num_others == 1 else f"{num_others} others")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def plural(count: int, noun: str) -> str:
    """Examples: "1 image"; "2,000 images"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def milliseconds(value: float) -> str:
    """Format milliseconds: one decimal from 10 ms on, two below, two significant digits below 0.1 ms."""
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def times_as_long(ratio: float) -> str:
    if ratio < 1.05:
        return "about as long"
    return f"{ratio:.1f} times as long" if ratio < 9.95 else f"{ratio:.0f} times as long"


def short_count(count: float) -> str:
    """Format a number of parameters: "545 k", "5.5 M"."""
    if count >= 1e6:
        return f"{count / 1e6:.1f} M"
    return f"{count / 1e3:.0f} k" if count >= 1e3 else f"{count:.0f}"


def dataset_name(dataset: str) -> str:
    """The last part of a hub id or of a folder, without the revision."""
    return dataset.partition("@")[0].rstrip("/").rpartition("/")[2] or dataset
