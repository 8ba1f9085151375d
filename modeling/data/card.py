"""A dataset card: what the README.md of a dataset says about its files and classes."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modeling.data.folders import split_keyword
from modeling.errors import UserError


@dataclass
class Card:
    """configs maps each configuration to its splits, and these to patterns of file paths.

    class_names maps a configuration and a column to the names of its classes by their numbers. default is
    the configuration that is taken if the user chooses none, or None.
    """

    configs: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    class_names: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    default: str | None = None

    def names_of(self, config: str | None, column: str) -> list[str] | None:
        """The class names of a column, in order, or None.

        A card of a single configuration speaks of every file. UserError: the numbers are not 0, 1, ...
        """
        configs = {name for name, _ in self.class_names}
        if config is None:
            config = configs.pop() if len(configs) == 1 else "default"
        names = self.class_names.get((config, column))
        if names is None:
            return None
        numbers = [str(number) for number in range(len(names))]
        if names.keys() != set(numbers):
            found = ", ".join(list(names)[:9])
            raise UserError(f"README.md must number the classes of {column!r} 0, 1, ..., but has {found}")
        return [names[number] for number in numbers]


def read_card(root: Path) -> Card:
    """Read the YAML at the top of README.md. A card that is missing or broken says nothing.

    UserError: a pattern names files outside the folder.
    """
    try:
        text = (root / "README.md").read_text(encoding="utf-8")
        front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        values = yaml.safe_load(front.group(1)) if front else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError):
        return Card()
    card = Card()
    if not isinstance(values, dict):
        return card
    for config in _dicts(values.get("configs")):
        name = str(config.get("config_name", "default"))
        patterns = _patterns(config.get("data_files"), str(config.get("data_dir") or ""))
        if patterns:
            card.configs[name] = patterns
            if config.get("default") is True or name == "default":
                card.default = name
    for info in _dicts(values.get("dataset_info")):
        for feature in _dicts(info.get("features")):
            kind = feature.get("dtype")
            names = kind.get("class_label", {}).get("names") if isinstance(kind, dict) else None
            if isinstance(names, list):
                names = dict(enumerate(names))
            if isinstance(names, dict):
                key = (str(info.get("config_name", "default")), str(feature.get("name")))
                card.class_names[key] = {str(number): str(name) for number, name in names.items()}
    return card


def _dicts(value: Any) -> list[dict]:
    """Give the dictionaries of a list, or a single dictionary as a list; anything else says nothing."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, dict)]


def _patterns(data_files: Any, data_dir: str) -> dict[str, list[str]]:
    """Give the patterns of each split. data_files is a pattern, a list of them, or a list with splits."""
    found: dict[str, list[str]] = {}
    for item in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = (item.get("split"), item.get("path")) if isinstance(item, dict) else (None, item)
        for path in paths if isinstance(paths, list) else [paths]:
            if not isinstance(path, str):
                continue
            if "://" in path or path.startswith("/") or ".." in path.split("/"):
                raise UserError(
                    f"README.md names the data file {path}, which is outside the dataset's folder: "
                    "only files in the folder are read"
                )
            name = str(split) if split else split_keyword(path) or "train"
            found.setdefault(name, []).append(f"{data_dir}/{path}" if data_dir else path)
    return found


def matches(path: str, pattern: str) -> bool:
    """Tell whether a path fits a pattern: "*" and "?" stay in a folder, "**" does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.fullmatch("".join(wild.get(part) or re.escape(part) for part in parts), path) is not None
