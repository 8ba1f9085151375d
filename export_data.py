"""Export a dataset as an ImageFolder with a manifest.

    python export_data.py --dataset stl10 --output-dir data
    python export_data.py --verify --output-dir data
    python train.py --model cnn --dataset data

The folders are train/<class>/, val/<class>/ and, where the dataset has a test split, test/<class>/.
PNG keeps every pixel as it is. manifest.json holds the counts and the SHA-256 of each file.
To finish an export that was stopped, run the same command again.
"""

import hashlib
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from modeling import cli
from modeling.data import decoding
from modeling.data.sources import default_val_fraction, load_source, select_rows
from modeling.errors import UserError
from modeling.files import write_text
from modeling.progress import Progress
from modeling.run.launch import num_cores, refuse_processes

FOLDERS = {"train": "train", "validation": "val", "test": "test"}
MANIFEST = "manifest.json"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--dataset",
        default="stl10",
        help="stl10, cifar10, digits, a hub id (@REVISION) or a local folder (default: stl10)",
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("data"), help="the folder to fill or verify (default: data)"
    )
    parser.add_argument(
        "--val-fraction",
        type=cli.FRACTION,
        help="share of train that becomes val where the dataset has none (default: stl10 0.2, else 0.1)",
    )
    parser.add_argument(
        "--seed", type=cli.SEED, default=42, help="seed of the division into train and val (default: 42)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="write nothing; list missing, extra, altered and undecodable files (default: export)",
    )
    parser.add_argument(
        "--num-workers",
        type=cli.NUM_WORKERS,
        default=num_cores(),
        help="threads that decode images, 0: the main one (default: the cores)",
    )
    return parser


def class_folder(name: str) -> str:
    """Return a class's folder name. Characters that paths or patterns cannot hold are percent-encoded."""
    encoded = "".join(quote(c, safe="") if c in '/\\%*?[]<>:"|' or ord(c) < 32 else c for c in name)
    return f"%{ord(encoded[0]):02X}{encoded[1:]}" if encoded[:1] in (".", "_", " ") else encoded


def export_to_imagefolder(
    dataset: str,
    output_dir: str | Path,
    *,
    val_fraction: float | None = None,
    seed: int = 42,
    num_workers: int = 1,
) -> dict[str, Any]:
    """Write train/, val/ and, where the dataset has one, test/ under output_dir, and return the manifest.

    Files that exist with the right content are not written again, so a second call finishes a stopped one.
    UserError: the folder holds something else, or an image cannot be decoded.
    """
    output_dir = Path(output_dir)
    source = load_source(dataset)
    val_fraction = val_fraction or default_val_fraction(dataset)
    folders = {name: class_folder(name) for name in source.classes}
    settings = {
        "format_version": 1,
        "dataset": source.name,
        "revision": source.revision,
        "seed": seed,
        "val_fraction": val_fraction,
        "classes": folders,
    }
    splits = [split for split in FOLDERS if split in source.splits or split != "test"]
    parts = {split: select_rows(source, split, val_fraction=val_fraction, seed=seed) for split in splits}
    _refuse_other_content(output_dir, settings)
    cli.check_output_dir(output_dir)
    if not (output_dir / MANIFEST).exists():
        write_text(output_dir / MANIFEST, json.dumps({**settings, "complete": False}, indent=1))
    files: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}
    with Progress(sum(len(rows) for _, rows in parts.values()), "exporting") as progress:
        for split, (own, rows) in parts.items():
            names = [source.classes[label] for label in source.labels(own)[rows].tolist()]
            counted = Counter(names)
            counts[FOLDERS[split]] = {name: counted[name] for name in source.classes}
            images = source.encoded(own).map(decoding.read_image, rows.tolist(), num_workers)
            for name, row, image in zip(names, rows.tolist(), images, strict=True):
                relative = f"{FOLDERS[split]}/{folders[name]}/{row:06d}.png"
                buffer = io.BytesIO()
                image.save(buffer, format="PNG")
                files[relative] = _write_if_different(output_dir / relative, buffer.getvalue())
                progress.update(1)
    stale = sorted(_found(output_dir) - files.keys())
    if stale:
        raise UserError(
            f"{output_dir} holds {len(stale)} files that are not of this export, "
            f"such as {stale[0]}: remove them"
        )
    manifest = {**settings, "complete": True, "counts": counts, "files": files}
    write_text(output_dir / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def _refuse_other_content(output_dir: Path, settings: dict[str, Any]) -> None:
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    old = read_manifest(output_dir)
    for key, value in settings.items():
        if old.get(key) != value:
            raise UserError(
                f"{output_dir} holds an export with {key} {old.get(key)!r}, not {value!r}: "
                "choose another --output-dir"
            )


def _write_if_different(path: Path, content: bytes) -> str:
    """Write the file, unless it already has this content. Return the SHA-256 of the content."""
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(content)
        os.replace(part, path)
    return hashlib.sha256(content).hexdigest()


def read_manifest(output_dir: Path) -> dict[str, Any]:
    """Read the manifest of an export. UserError: it is missing or broken."""
    path = output_dir / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{output_dir} holds no export: it has no {MANIFEST}; "
            "choose an empty --output-dir, or the folder of an export"
        )
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is broken ({error}): remove it and export again into an empty folder"
        ) from error
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is not a manifest of an export")
    return manifest


def verify_dataset(output_dir: str | Path) -> list[str]:
    """Compare the files with the manifest and return a line for each that differs. Nothing is written.

    A line says whether the file is missing, extra, altered or undecodable.

    UserError: no manifest, or an export that was not finished.
    """
    output_dir = Path(output_dir)
    manifest = read_manifest(output_dir)
    if not manifest.get("complete"):
        raise UserError(
            f"the export in {output_dir} was not finished: run export_data.py again with the same arguments"
        )
    expected = manifest["files"]
    found = _found(output_dir)
    problems = [f"extra {name}" for name in sorted(found - expected.keys())]
    with Progress(len(expected), "verifying", " files") as progress:
        for name, digest in expected.items():
            problems += _check_file(output_dir / name, name, digest) if name in found else [f"missing {name}"]
            progress.update(1)
    return problems


def _found(output_dir: Path) -> set[str]:
    return {
        path.relative_to(output_dir).as_posix() for path in output_dir.rglob("*") if not path.is_dir()
    } - {MANIFEST}


def _check_file(path: Path, name: str, digest: str) -> list[str]:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() == digest:
        return []
    try:
        decoding.read_image({"bytes": content, "path": None}, name)
    except ValueError:
        return [f"undecodable {name}"]
    return [f"altered {name}"]


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    refuse_processes()
    torch.set_num_threads(1)  # the tensors here are too small to share among threads
    if args.verify:
        problems = verify_dataset(args.output_dir)
        print(
            "\n".join(problems)
            if problems
            else f"{args.output_dir} is whole: every file is as its manifest says"
        )
        return 1 if problems else 0
    manifest = export_to_imagefolder(
        args.dataset,
        args.output_dir,
        val_fraction=args.val_fraction,
        seed=args.seed,
        num_workers=args.num_workers,
    )
    counts = ", ".join(
        f"{sum(by_class.values()):,} in {split}/" for split, by_class in manifest["counts"].items()
    )
    print(
        f"{args.output_dir}: {counts}; {len(manifest['classes'])} classes, "
        f"listed with every file's SHA-256 in {MANIFEST}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
