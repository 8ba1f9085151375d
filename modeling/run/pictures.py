"""Pictures for the tracker, as arrays (H, W, 3) uint8: training images, and a confusion matrix."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from modeling.data.resize import Preprocessing

MOST_IMAGES = 64
GAP = 2  # pixels between images
GRID_SIDE = 900  # pixels, at most about that
SMALLEST_SIDE = 64  # pixels: smaller images are enlarged
MOST_NUMBERED = 30  # classes: with more the matrix has no numbers and no names
CELL, MARGIN = 34, 116  # pixels
LONGEST_NAME = 14  # letters


def image_grid(x: torch.Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """Lay out the model's inputs (B, 3, S, S) in a square, with the normalisation undone."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    pixels = x[:MOST_IMAGES].float().cpu() * std + mean
    pixels = (255 * pixels.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()  # (B, S, S, 3)
    zoom = max(1, SMALLEST_SIDE // pixels.shape[1])
    pixels = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    count, side = len(pixels), pixels.shape[1]
    across = math.ceil(math.sqrt(count))
    across = max(1, min(across, GRID_SIDE // side))
    down = min(math.ceil(count / across), across)
    grid = np.full((down * (side + GAP) - GAP, across * (side + GAP) - GAP, 3), 255, dtype=np.uint8)
    for number in range(min(count, across * down)):
        top, left = (place * (side + GAP) for place in divmod(number, across))
        grid[top : top + side, left : left + side] = pixels[number]
    return grid


def confusion_picture(labels: np.ndarray, predicted: np.ndarray, classes: list[str]) -> np.ndarray:
    """Draw the confusion matrix: a row is a true class, a column a predicted one, blue its share."""
    count = len(classes)
    matrix = np.zeros((count, count), dtype=np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    white, blue = np.array([255, 255, 255]), np.array([8, 48, 107])
    colours = (white + shares[..., None] ** 0.5 * (blue - white)).astype(np.uint8)
    if count > MOST_NUMBERED:
        zoom = max(1, GRID_SIDE // count)
        return colours.repeat(zoom, axis=0).repeat(zoom, axis=1)

    side = MARGIN + count * CELL
    picture = Image.new("RGB", (side, side), "white")
    cells = Image.fromarray(colours).resize((count * CELL, count * CELL), Image.Resampling.NEAREST)
    picture.paste(cells, (MARGIN, MARGIN))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "." for name in classes]
    heads = Image.new("RGB", (MARGIN, count * CELL), "white")  # the names of the columns, lying
    draw_heads = ImageDraw.Draw(heads)
    for number, name in enumerate(names):
        draw_heads.text((6, number * CELL + CELL // 2), name, fill="black", font=font, anchor="lm")
        middle = MARGIN + number * CELL + CELL // 2
        draw.text((MARGIN - 6, middle), name, fill="black", font=font, anchor="rm")
        for predicted_number, value in enumerate(matrix[number].tolist()):
            at = (MARGIN + predicted_number * CELL + CELL // 2, middle)
            fill = "white" if shares[number, predicted_number] > 0.25 else "black"
            if value:
                draw.text(at, str(value), fill=fill, font=font, anchor="mm")
    picture.paste(heads.transpose(Image.Transpose.ROTATE_90), (MARGIN, 0))
    draw.text((6, 6), "rows: true", fill="gray", font=font)
    draw.text((6, 22), "columns: predicted", fill="gray", font=font)
    return np.asarray(picture)
