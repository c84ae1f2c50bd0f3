"""Finds the shapes of a picture: what differs from the background, by colour and outline.

Shapes: S side in pixels.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy import ndarray

from shapes_world.rendering import coverage
from shapes_world.scenes import BACKGROUNDS, COLORS, SIZES, Item, Scene

MIN_DIFFERENCE = 0.4  # of a pixel from the background, of the way to the nearest colour
MIN_AREA = 0.006  # of the picture; the smallest shape covers 0.02
TEMPLATE_SIZE = 24
ANGLES = {"square": 90, "cross": 90, "triangle": 120, "star": 72, "circle": 1, "ring": 1}


def detect(picture: ndarray) -> Scene:
    """Find the background and the shapes of a picture.

    Shapes that touch count as one: the shape they look most like together.

    Args:
        picture: (S, S, 3) of uint8.
    """
    pixels = picture.astype(np.float32)
    background = nearest_color(border_color(pixels), BACKGROUNDS)
    mask = foreground(pixels)
    labels, number = label_components(mask)
    items = []
    for index in range(1, number + 1):
        component = labels == index
        if component.sum() >= MIN_AREA * component.size:
            items.append(classify(pixels, component))
    return Scene(background, tuple(items))


def border_color(pixels: ndarray) -> ndarray:
    """Median colour of the outermost pixels."""
    rows = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    return np.median(np.concatenate(rows), axis=0)


def foreground(pixels: ndarray) -> ndarray:
    """Pixels that are nearer to a shape's colour than to the background, (S, S)."""
    background = border_color(pixels)
    palette = np.array(list(COLORS.values()), np.float32)
    ways = palette - background
    # How far along the way from the background to the nearest colour of the palette.
    nearest = np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(-1)
    along = ((pixels - background) * ways[nearest]).sum(-1) / (ways[nearest] ** 2).sum(-1)
    return along > MIN_DIFFERENCE


def nearest_color(color: ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """Name of the colour that is nearest."""
    return min(palette, key=lambda name: float(np.linalg.norm(color - np.array(palette[name]))))


def label_components(mask: ndarray) -> tuple[ndarray, int]:
    """Number the connected parts of a mask from 1; neighbours share an edge.

    Returns:
        (S, S) of numbers, 0 outside, and how many there are.
    """
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes the largest number around, until all parts are of one
        padded = np.pad(labels, 1)
        around = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        grown = np.where(mask, np.max([labels, *around], axis=0), 0)
        if (grown == labels).all():
            break
        labels = grown
    names, numbered = np.unique(labels, return_inverse=True)
    numbered = numbered.reshape(labels.shape)
    has_outside = names[0] == 0
    return numbered + (0 if has_outside else 1), len(names) - has_outside


def classify(pixels: ndarray, component: ndarray) -> Item:
    """Name colour and outline of a connected part of the foreground."""
    size = component.shape[0]
    rows, columns = np.nonzero(component)
    color = nearest_color(np.median(pixels[inner(component)], axis=0), COLORS)
    center = ((columns.mean() + 0.5) / size, (rows.mean() + 0.5) / size)
    shape, angle, radius = best_outline(component)
    return Item(shape, color, radius, center, angle)


def inner(mask: ndarray) -> ndarray:
    """A mask without its outermost pixels, or as it is where nothing would be left."""
    padded = np.pad(mask, 1)
    kept = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return kept if kept.any() else mask


def best_outline(component: ndarray) -> tuple[str, float, float]:
    """The outline, its angle and its radius that overlap best with a part of the foreground."""
    size = component.shape[0]
    normalized = normalize(component.astype(np.float32))
    names, angles, areas, templates = outline_templates()
    overlap = np.minimum(templates, normalized).sum((1, 2))
    union = np.maximum(templates, normalized).sum((1, 2))
    best = int((overlap / union).argmax())
    radius = math.sqrt(component.sum() / areas[best]) / size
    return names[best], angles[best], radius


def normalize(mask: ndarray) -> ndarray:
    """A mask moved to its center and scaled to one spread, (TEMPLATE_SIZE, TEMPLATE_SIZE)."""
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]]
    total = mask.sum()
    row, column = (rows * mask).sum() / total, (columns * mask).sum() / total
    spread = math.sqrt((((rows - row) ** 2 + (columns - column) ** 2) * mask).sum() / total)
    steps = (np.arange(TEMPLATE_SIZE) + 0.5) / TEMPLATE_SIZE * 2 - 1
    reach = 2.1 * max(spread, 0.5)
    return sample(mask, row + steps * reach, column + steps * reach)


def sample(mask: ndarray, rows: ndarray, columns: ndarray) -> ndarray:
    """Interpolate linearly on a grid of rows and columns; 0 outside."""
    for positions in (rows, columns):  # along rows, then along columns
        padded = np.pad(mask, ((1, 1), (0, 0)))
        places = np.clip(positions + 1, 0, len(padded) - 1.001)
        low = places.astype(int)
        share = (places - low)[:, None]
        mask = (padded[low] * (1 - share) + padded[low + 1] * share).T
    return mask


@functools.cache
def outline_templates() -> tuple[list[str], list[float], list[float], ndarray]:
    """Names, angles, areas in squared radii and normalized masks of all outlines."""
    names, angles, areas, masks = [], [], [], []
    size = 64
    for shape, period in ANGLES.items():
        for angle in np.deg2rad(np.arange(0, period, 6)):
            for radius in (SIZES["small"], SIZES["large"]):
                mask = coverage(Item(shape, "red", radius, (0.5, 0.5), float(angle)), size)
                names.append(shape)
                angles.append(float(angle))
                areas.append(float(mask.sum()) / (radius * size) ** 2)
                masks.append(normalize((mask > MIN_DIFFERENCE).astype(np.float32)))
    return names, angles, areas, np.stack(masks)
