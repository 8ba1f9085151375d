"""The comparison page as a reader and a browser get it: one file, no network, names that are only text."""

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from fake_models import answers_of_right, fake_header, fake_labels, fake_model
from PIL import Image

from modeling import page
from modeling.analysis import Analysis, analyse
from modeling.answers import summarize
from modeling.compare import compare
from modeling.cost import Cost, Costs, Speed

HOSTILE = [
    "<script>alert(1)</script>",
    "</script>",
    "{{ 7*7 }}",
    "$x$",
    "犬",
    "x" * 300,
    "",
    "a\"b'c",
    "&amp;",
    "i",
]
VOID = {"meta", "img", "input", "br", "path", "line", "rect", "circle", "use", "stop"}


def picture(row: int, side: int = 32) -> Image.Image:
    pixels = np.random.default_rng(row).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def analysis_of(
    skills: dict[str, float],
    *,
    num_images: int = 400,
    classes: list[str] | None = None,
    num_classes: int = 10,
    costs: Costs | None = None,
) -> Analysis:
    """Models of these skills on the same invented images."""
    labels = fake_labels(num_images, len(classes) if classes else num_classes)
    models = [
        fake_model(
            name,
            labels,
            len(classes) if classes else num_classes,
            skill=skill,
            seed=number,
            classes=classes,
            header=fake_header(name),
        )
        for number, (name, skill) in enumerate(skills.items())
    ]
    return analyse(compare(models), costs or Costs({}, why_no_speed="it was not measured"))


def render(analysis: Analysis, side: int = 32) -> str:
    return page.render(analysis, lambda row: picture(row, side), footer="Invented.")


class Reader(HTMLParser):
    """Collects what the tests ask for, and checks that elements nest."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.script = ""
        self.feed(html)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script += data
        elif self.open and self.open[-1] != "style":
            self.text += data + " "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def four() -> Analysis:
    speeds = {"cnn": 1.0, "vit": 4.0, "deit": 9.0, "weak": 2.0}
    costs = {
        name: Cost(
            parameters=10**6, gflops=0.1, file_bytes=10**6, train_seconds=60, speed=Speed(ms, 2 * ms, 1.0)
        )
        for name, ms in speeds.items()
    }
    return analysis_of(
        {"cnn": 2.5, "vit": 2.4, "deit": 3.4, "weak": 0.5}, costs=Costs(costs, "cpu, 2 threads, precision no")
    )


def test_the_page_is_well_formed_and_accessible(four):
    reader = Reader(render(four))
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = [a["href"][1:] for a in reader.all("a") if (a.get("href") or "").startswith("#")]
    assert set(anchors) <= set(ids) and anchors
    assert len(reader.all("h1")) == 1
    assert all(image.get("alt") is not None for image in reader.all("img"))
    assert all(head.get("scope") for head in reader.all("th"))
    assert all(section.get("aria-labelledby") in ids for section in reader.all("section"))
    assert reader.all("html") == [{"lang": "en"}]


def test_the_page_cannot_call_out(four):
    html = render(four)
    reader = Reader(html)
    (policy,) = (m["content"] for m in reader.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(reader.script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert len(reader.all("script")) == 1 and not reader.all("link")
    for _, attributes in reader.tags:
        for name in ("src", "href", "action"):
            assert not (attributes.get(name) or "").startswith(("http", "//", "javascript"))
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in html and "@import" not in html


def test_the_ten_questions_stand_in_order(four):
    sections = [section["id"] for section in Reader(render(four)).all("section")]
    assert sections == [
        *("models", "real", "cost", "classes", "pictures"),
        *("trust", "together", "labels", "fair", "method"),
    ]


def test_one_model_has_no_pairs_and_no_averages():
    sections = [section["id"] for section in Reader(render(analysis_of({"cnn": 2.0}))).all("section")]
    assert "real" not in sections and "together" not in sections


def test_hostile_names_are_only_text():
    analysis = analysis_of({"<marquee>one": 2.0, "two": 1.0}, classes=HOSTILE)
    html = render(analysis)
    reader = Reader(html)
    assert len(reader.all("script")) == 1 and not reader.all("marquee")
    assert "{{ 7*7 }}" in reader.text
    assert "<script>alert(1)</script>" in reader.text and "犬" in reader.text


def test_the_numbers_are_those_of_the_comparison(four):
    text = Reader(render(four)).text
    for entry in four.entries:
        assert f"{100 * entry.accuracy.value:.1f}" in text
    best = four.entries[0]
    assert f"{100 * best.accuracy.low:.1f} to {100 * best.accuracy.high:.1f}" in text


def test_equal_inputs_give_equal_bytes(four):
    assert render(four) == render(four)


@pytest.mark.parametrize("num_models", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("num_classes", [2, 10, 31, 200])
def test_it_scales(num_models, num_classes):
    skills = {f"model {number}": 1 + 0.2 * number for number in range(num_models)}
    html = render(analysis_of(skills, num_images=300, num_classes=num_classes), side=150)
    assert len(html.encode()) < 3_000_000
    Reader(html)


def test_a_tie_at_the_top_is_said():
    right = np.ones(200, dtype=bool)
    right[:20] = False
    other = np.ones(200, dtype=bool)
    other[10:30] = False
    models = [
        summarize(answers_of_right("one", right, header=fake_header("one"))),
        summarize(answers_of_right("two", other, header=fake_header("two"))),
    ]
    text = Reader(render(analyse(compare(models), Costs({}, why_no_speed="not measured")))).text
    assert "not told apart" in text


def test_models_that_are_right_on_the_same_images_are_called_identical():
    right = np.arange(200) % 5 > 0
    models = [summarize(answers_of_right(name, right, header=fake_header(name))) for name in ("one", "two")]
    text = Reader(render(analyse(compare(models), Costs({}, why_no_speed="not measured")))).text
    assert "same images" in text


def test_few_images_are_said():
    text = Reader(render(analysis_of({"a": 2.0, "b": 1.0}, num_images=40))).text
    assert "40 images" in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is not run in a browser")
def test_a_browser_sorts_the_table_and_opens_the_filters(four, tmp_path):
    html = render(four)
    script = (
        "document.querySelector('th button').click();"
        "const sorted = document.querySelectorAll('[aria-sort]').length;"
        "document.title = 'sorted ' + sorted + ' ' + document.getElementById('filters').hidden;"
    )
    html = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", f"<script>{script}</script></body>")
    path = tmp_path / "page.html"
    path.write_text(html)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout).group(1)
    assert re.fullmatch(r"sorted [1-9]\d* false", title)
