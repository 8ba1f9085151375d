"""Every link in the documents leads somewhere, and every command in them parses."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, scripts

DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def split_code(document: Path) -> tuple[list[str], list[str]]:
    """The lines of a document outside its code blocks, and those inside."""
    outside: list[str] = []
    inside: list[str] = []
    in_code = False
    for line in document.read_text().splitlines():
        if line.startswith("```"):
            in_code = not in_code
        else:
            (inside if in_code else outside).append(line)
    return outside, inside


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = [line.lstrip("#").strip() for line in split_code(document)[0] if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def commands(document: Path) -> list[str]:
    """The commands in a document's code blocks; a line that ends with a backslash goes on."""
    lines = "\n".join(split_code(document)[1]).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"(python|make|accelerate launch|torchrun) ", line)]


def check_command(line: str) -> None:
    """Raise an error if a command names a file, a make target or a flag that does not exist."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets), line
        return
    for word in words:
        if word.startswith("accelerate_configs/"):
            assert (ROOT / word).is_file(), word
    (position,) = (number for number, word in enumerate(words) if word.endswith(".py"))
    script = words[position]
    assert (ROOT / script).is_file(), script
    if "/" not in script:
        getattr(scripts, Path(script).stem).build_parser().parse_args(words[position + 1 :])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_a_heading(document):
    assert broken_links(document) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_parses(document):
    for line in commands(document):
        check_command(line)


def test_a_broken_link_and_a_wrong_flag_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One\n[a](page.md#one) [b](page.md#two) [c](no.md)\n```\npython train.py --nonsense 1\n```\n"
    )
    assert broken_links(page) == ["page.md#two", "no.md"]
    with pytest.raises(ValueError, match="nonsense"):
        check_command(*commands(page))


def test_the_documents_have_commands_to_check():
    assert len([line for document in DOCUMENTS for line in commands(document)]) >= 10
