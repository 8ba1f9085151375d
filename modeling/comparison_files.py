"""Compare evaluated checkpoints: write the page and the CSV files, and return the terminal's lines."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from modeling import comparison_text, cost, page
from modeling.analysis import analyse
from modeling.answers import Answers, Model, summarize
from modeling.compare import compare
from modeling.cost import Cost, Costs, Speed, forward_flops, measure_speed
from modeling.data.images import Images
from modeling.engine import Predictions
from modeling.files import write_text
from modeling.models import count_parameters
from modeling.run.curves import read_records
from modeling.stats.classes import class_scores

# What a command writes of all its checkpoints together.
COMPARISON_FILES = (
    "comparison.html",
    "pairs.csv",
    "class_metrics.csv",
    "label_suspects.csv",
    "model_comparison.txt",
)


@dataclass
class Candidate:
    """One evaluated checkpoint: its model in eval mode, its images, and its predictions for them.

    dataset is a name, followed by @ and the revision if it has one. images_sha256 is the digest of the split
    (`division.split_digest`).
    """

    name: str
    path: Path
    header: dict[str, Any]
    model: nn.Module
    images: Images
    predictions: Predictions
    dataset: str
    split: str
    images_sha256: str


def keep_older_comparison(traces: Path) -> None:
    """Move the comparison of an earlier command to a folder of its own, and say where."""
    older = [traces / name for name in COMPARISON_FILES if (traces / name).exists()]
    if older:
        folder = traces / "previous" / datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        folder.mkdir(parents=True)
        for path in older:
            path.rename(folder / path.name)
        print(f"The comparison of an earlier command is now in {folder}")


def write_comparison(traces: Path, candidates: Sequence[Candidate], accelerator: Accelerator) -> list[str]:
    """Write comparison.html, pairs.csv, class_metrics.csv and label_suspects.csv.

    Return the terminal's lines.
    """
    comparison = compare([summarize_candidate(candidate) for candidate in candidates])
    costs = measure_costs(candidates, accelerator)
    shared = comparison.shared
    images = next(one.images for one in candidates if one.name == shared.models[0].name)
    position_of_row = {row: position for position, row in enumerate(images.rows.tolist())}
    positions = [position_of_row[row] for row in shared.rows.tolist()]
    analysis = analyse(
        comparison,
        costs,
        digests=list(images.subset(torch.tensor(positions)).pixel_digests()),
        curves=read_curves(candidates),
    )
    html = page.render(
        analysis,
        lambda row: picture(images, position_of_row[row]),
        footer=f"Measured on {costs.conditions}.",
    )
    write_text(traces / "comparison.html", html)
    write_text(traces / "pairs.csv", comparison_text.pairs_csv(comparison))
    scores = class_scores(shared.right, shared.labels, best=0)
    write_text(traces / "class_metrics.csv", comparison_text.class_metrics_csv(comparison, scores))
    suspects = comparison_text.label_suspects_csv(analysis.suspects, shared.classes, images.file_of)
    write_text(traces / "label_suspects.csv", suspects)
    size = len(html.encode()) / 1e6
    return [
        *comparison_text.terminal_lines(comparison, costs),
        f"Open {traces / 'comparison.html'} ({size:.1f} MB, needs no network)",
    ]


def summarize_candidate(candidate: Candidate) -> Model:
    """Reduce a checkpoint's predictions. UserError: its logits are NaN or infinite."""
    answers = Answers(
        name=candidate.name,
        path=candidate.path,
        header=candidate.header,
        dataset=candidate.dataset,
        split=candidate.split,
        images_sha256=candidate.images_sha256,
        classes=candidate.header["classes"],
        rows=candidate.predictions.rows.numpy(),
        labels=candidate.predictions.labels.numpy(),
        log_probabilities=candidate.predictions.log_probabilities.numpy(),
    )
    return summarize(answers)


def measure_costs(candidates: Sequence[Candidate], accelerator: Accelerator) -> Costs:
    """Measure the speed of all models in turns, if there is one process. Compute the other costs."""
    sizes = [candidate.header["preprocessing"]["image_size"] for candidate in candidates]
    device = accelerator.device
    speeds: list[Speed | None] = [None] * len(candidates)
    why_no_speed = ""
    if accelerator.num_processes > 1:
        why_no_speed = "several processes share the machine"
    else:
        with accelerator.autocast():
            speeds = measure_speed(
                [candidate.model for candidate in candidates],
                sizes,
                device=device,
                round_seconds=cost.ROUND_SECONDS,
            )
    by_name = {}
    for candidate, size, speed in zip(candidates, sizes, speeds, strict=True):
        by_name[candidate.name] = Cost(
            parameters=count_parameters(candidate.model)[0],
            gflops=forward_flops(candidate.model, size) / 1e9,
            file_bytes=candidate.path.stat().st_size,
            train_seconds=candidate.header.get("clock", {}).get("train_seconds"),
            speed=speed,
        )
    hardware = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    conditions = f"{hardware}, {torch.get_num_threads()} threads, precision {accelerator.mixed_precision}"
    return Costs(by_name=by_name, conditions=conditions, why_no_speed=why_no_speed)


def picture(images: Images, position: int) -> Image.Image:
    """The image at a position, as it was decoded."""
    pixels, _ = images.gather(torch.tensor([position]))  # (1, 3, H, W) uint8
    return Image.fromarray(pixels[0].permute(1, 2, 0).numpy())


def read_curves(candidates: Sequence[Candidate]) -> dict[str, list[tuple[int, float]]]:
    """Read the validation accuracy of each epoch, if metrics.jsonl is still where train.py wrote it."""
    curves = {}
    for candidate in candidates:
        run = candidate.header["arguments"]["run_name"]
        log = candidate.path.parent.parent / "runs" / run / "metrics.jsonl"
        if candidate.path.parent.name != "checkpoints" or not log.is_file():
            continue
        epochs = read_records(log, "epoch")
        if epochs:
            curves[candidate.name] = [(record["epoch"], record["validation_accuracy"]) for record in epochs]
    return curves
