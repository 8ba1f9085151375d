"""Export a dataset as an ImageFolder with a manifest.

    python export_data.py --dataset stl10 --output-dir data
    python export_data.py --verify --output-dir data
    python train.py --model cnn --dataset data

The folders are train/<class>/, val/<class>/ and, if the dataset has a test split, test/<class>/.
PNG keeps every pixel as it is. manifest.json holds the counts and the SHA-256 of each file.
To finish an export that was stopped, run the same command again.
"""

import functools
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from modeling import cli
from modeling.data import decoding
from modeling.data.choices import NO_CHOICES, Choices
from modeling.data.class_names import encode_class
from modeling.data.division import choose_val_fraction, select_rows
from modeling.data.sources import Source, load_source
from modeling.errors import UserError
from modeling.files import named_errors, write_text
from modeling.progress import Progress
from modeling.run.launch import num_cores, refuse_processes
from modeling.run.lock import Lock

FOLDERS = {"train": "train", "validation": "val", "test": "test"}
MANIFEST = "manifest.json"
LOCK = ".export.lock"
# Files that an export makes for itself. One that is killed leaves them.
OWN_FILES = re.compile(r"\.export\.lock|\.manifest\.json\.\w+\.tmp|\.\d+\.png\.part|\.+writable-.*")


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    inputs = parser.add_argument_group("input")
    inputs.add_argument(
        "--dataset",
        help="stl10, cifar10, digits, a hub id (@REVISION) or a local folder (default: stl10)",
    )
    inputs.add_argument(
        "--val-fraction",
        type=cli.FRACTION,
        help="share of train, between 0 and 1, that becomes val if the dataset has no val "
        "(default: 0.2 for stl10, otherwise 0.1)",
    )
    inputs.add_argument(
        "--seed",
        type=cli.SEED,
        default=42,
        help="seed of the random division into train and val (default: 42)",
    )
    cli.add_data_choices(parser)
    outputs = parser.add_argument_group("output")
    outputs.add_argument(
        "--output-dir",
        type=cli.path,
        default=Path("data"),
        help="the folder to fill, or to verify (default: data)",
    )
    outputs.add_argument(
        "--verify",
        action="store_true",
        help="write nothing; list the missing, extra, altered and undecodable files (default: off, export)",
    )
    hardware = parser.add_argument_group("hardware")
    hardware.add_argument(
        "--num-workers",
        type=cli.NUM_WORKERS,
        default=num_cores(),
        help="number of threads that decode images; 0: the main thread does (default: the number of cores)",
    )
    return parser


def export_to_imagefolder(
    dataset: str,
    output_dir: str | Path,
    *,
    val_fraction: float | None = None,
    seed: int = 42,
    num_workers: int = 1,
    skip_bad_images: bool = False,
    choices: Choices = NO_CHOICES,
) -> dict[str, Any]:
    """Write train/, val/ and (if there is a test split) test/ under output_dir. Return the manifest.

    Existing files with the right content are not written again, so a second call finishes a stopped export.
    UserError: the folder holds something else, or an image cannot be decoded.
    """
    output_dir = Path(output_dir).expanduser()
    source = load_source(dataset, choices)
    print(source.describe(), flush=True)
    val_fraction = choose_val_fraction(source, val_fraction)
    settings = {
        "format_version": 1,
        "dataset": source.name,
        "revision": source.revision,
        "seed": seed,
        "val_fraction": val_fraction,
        "classes": {name: encode_class(name) for name in source.classes},
        "choices": choices.differences(NO_CHOICES) or None,
    }
    splits = ["train", "validation"]
    if "test" in source.splits:
        splits.append("test")
    parts = {split: select_rows(source, split, val_fraction=val_fraction, seed=seed) for split in splits}
    _refuse_other_content(output_dir, settings)
    cli.check_output_dir(output_dir)
    advice = "wait for it to end, or choose another --output-dir"
    with Lock([output_dir / LOCK], description=f"the export to {output_dir}", advice=advice):
        return _export(source, parts, output_dir, settings, num_workers, skip_bad_images)


def _export(
    source: Source,
    parts: dict[str, tuple[str, torch.Tensor]],
    output_dir: Path,
    settings: dict[str, Any],
    num_workers: int,
    skip_bad_images: bool,
) -> dict[str, Any]:
    """Write the files of `parts` (split -> its split in the source, and the rows), then the manifest."""
    for path in [*output_dir.glob(".*"), *output_dir.glob("*/*/.*")]:
        if OWN_FILES.fullmatch(path.name) and path.name != LOCK:
            path.unlink()  # a killed export has left it
    # If the export is stopped, this incomplete manifest stays. The next call then finishes the export.
    if not (output_dir / MANIFEST).exists():
        write_text(output_dir / MANIFEST, json.dumps(settings | {"complete": False}, indent=1))
    folders = settings["classes"]
    files: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}
    skipped: list[str] = []
    read_image = decoding.read_image
    if skip_bad_images:
        read_image = functools.partial(decoding.none_if_bad, decoding.read_image)
    num_images = sum(len(rows) for _, rows in parts.values())
    with Progress(num_images, "exporting") as progress:
        for split, (source_split, rows) in parts.items():
            names = [source.classes[label] for label in source.labels(source_split)[rows].tolist()]
            counted = Counter(names)
            counts[FOLDERS[split]] = {name: counted[name] for name in source.classes}
            images = source.encoded(source_split).map(read_image, rows.tolist(), num_workers)
            for name, row, image in zip(names, rows.tolist(), images, strict=True):
                if image is None:
                    skipped.append(source.splits[source_split].files[row] or f"row {row} of {source_split}")
                    counts[FOLDERS[split]][name] -= 1
                    continue
                relative = f"{FOLDERS[split]}/{folders[name]}/{row:06d}.png"
                buffer = io.BytesIO()
                image.save(buffer, format="PNG")
                files[relative] = _write_if_different(output_dir / relative, buffer.getvalue())
                progress.update(1)
    stale = sorted(_found(output_dir) - files.keys())
    if stale:
        raise UserError(
            f"{output_dir} holds {len(stale)} files that this export did not write, "
            f"such as {stale[0]}: remove them"
        )
    manifest = settings | {
        "complete": True,
        "read": source.to_json(),
        "counts": counts,
        "skipped": skipped,
        "files": files,
    }
    write_text(output_dir / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def _refuse_other_content(output_dir: Path, settings: dict[str, Any]) -> None:
    """UserError: the folder is neither empty nor an export with these settings."""
    if not output_dir.exists():
        return
    if output_dir.is_dir() and all(OWN_FILES.fullmatch(path.name) for path in output_dir.iterdir()):
        return
    # Manifests of earlier versions do not say the choices.
    old = {"choices": settings["choices"]} | read_manifest(output_dir)
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
        with named_errors(path):
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
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is broken ({error}): remove it and export again into an empty folder"
        ) from error
    is_ours = isinstance(manifest, dict) and (
        not manifest.get("complete") or isinstance(manifest.get("files"), dict)
    )
    if not is_ours:
        raise UserError(
            f"{path} is not a manifest of an export: remove it and export again into an empty folder"
        )
    return manifest


def verify_dataset(output_dir: str | Path) -> list[str]:
    """Compare the files with the manifest, and return a line for each file that differs. Write nothing.

    A line says whether the file is missing, extra, altered or undecodable. UserError: there is no manifest,
    or the export was not finished.
    """
    output_dir = Path(output_dir).expanduser()
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
            if name in found:
                problems += _check_file(output_dir / name, name, digest)
            else:
                problems.append(f"missing {name}")
            progress.update(1)
    return problems


def count_duplicates(output_dir: Path) -> dict[str, int]:
    """Count the images of val/ and test/ whose pixels are also in train/, of a verified export.

    Equal pixels give equal PNG files, because this program writes them all in one way.
    """
    files = read_manifest(output_dir)["files"]
    in_train = {digest for name, digest in files.items() if name.startswith("train/")}
    counted = Counter(
        name.partition("/")[0]
        for name, digest in files.items()
        if not name.startswith("train/") and digest in in_train
    )
    return dict(sorted(counted.items()))


def _found(output_dir: Path) -> set[str]:
    """Return the relative paths of all files in the folder, except the manifest and OWN_FILES."""
    paths = [path for path in output_dir.rglob("*") if not OWN_FILES.fullmatch(path.name)]
    names = {path.relative_to(output_dir).as_posix() for path in paths if not path.is_dir()}
    return names - {MANIFEST}


def _check_file(path: Path, name: str, digest: str) -> list[str]:
    """Return no line if the file has this SHA-256. Otherwise return one: "undecodable" or "altered"."""
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
        if args.dataset or args.val_fraction or Choices.of(vars(args)) != NO_CHOICES:
            raise UserError("--verify reads only the files of --output-dir: leave out the flags of the input")
        problems = verify_dataset(args.output_dir)
        if problems:
            print("\n".join(problems))
            return 1
        print(f"{args.output_dir} is complete: every file matches {MANIFEST}")
        for folder, count in count_duplicates(args.output_dir).items():
            print(f"{count} images in {folder}/ have the same pixels as an image in train/.")
        return 0
    manifest = export_to_imagefolder(
        args.dataset or "stl10",
        args.output_dir,
        val_fraction=args.val_fraction,
        seed=args.seed,
        num_workers=args.num_workers,
        skip_bad_images=args.skip_bad_images,
        choices=Choices.of(vars(args)),
    )
    totals = []
    for folder, count_by_class in manifest["counts"].items():
        totals.append(f"{sum(count_by_class.values()):,} in {folder}/")
    print(
        f"{args.output_dir}: {', '.join(totals)}; {len(manifest['classes'])} classes. "
        f"{MANIFEST} lists the SHA-256 of every file"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
