"""Pictures and clips of scenes, anti-aliased, from signed distances.

Shapes: F frames, S side in pixels.
"""

from __future__ import annotations

import math

import numpy as np
from numpy import ndarray

from shapes_world.scenes import BACKGROUNDS, COLORS, Clip, Item, Scene


def render_scene(scene: Scene, size: int = 64) -> ndarray:
    """Paint a scene; returns (S, S, 3) of uint8."""
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for item in scene.items:
        alpha = coverage(item, size)[..., None]
        canvas += alpha * (np.asarray(COLORS[item.color], np.float32) - canvas)
    return canvas.round().astype(np.uint8)


def render_clip(clip: Clip, num_frames: int = 17, size: int = 64) -> ndarray:
    """Paint a clip; returns (F, S, S, 3) of uint8."""
    times = np.linspace(0.0, 1.0, num_frames)
    return np.stack([render_scene(clip.at(float(time)), size) for time in times])


def coverage(item: Item, size: int) -> ndarray:
    """The share of every pixel that an item covers, (S, S) from 0 to 1."""
    places = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(places - item.center[0], places - item.center[1])
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    x, y = (x * cos + y * sin) / item.radius, (y * cos - x * sin) / item.radius
    depth = OUTLINES[item.shape](x, y) * item.radius * size
    return np.clip(0.5 + depth, 0, 1)


def _circle(x: ndarray, y: ndarray) -> ndarray:
    return 0.9 - np.hypot(x, y)


def _ring(x: ndarray, y: ndarray) -> ndarray:
    return 0.22 - np.abs(np.hypot(x, y) - 0.74)


def _square(x: ndarray, y: ndarray) -> ndarray:
    return 0.78 - np.maximum(np.abs(x), np.abs(y))


def _cross(x: ndarray, y: ndarray) -> ndarray:
    x, y = np.abs(x), np.abs(y)
    bars = np.maximum(np.minimum(0.95 - x, 0.3 - y), np.minimum(0.95 - y, 0.3 - x))
    return bars


def _triangle(x: ndarray, y: ndarray) -> ndarray:
    sides = [math.pi / 2 + k * 2 * math.pi / 3 for k in range(3)]
    return np.min([0.5 - x * math.cos(a) - y * math.sin(a) for a in sides], axis=0)


def _star(x: ndarray, y: ndarray, inner: float = 0.38) -> ndarray:
    """Five points: the distance to the edge from a tip to the notch beside it, by symmetry."""
    sector = math.pi / 5
    angle = np.arctan2(x, -y)  # from the upper tip
    angle = np.abs((angle + sector) % (2 * sector) - sector)
    radius = np.hypot(x, y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    tip, notch = (1.0, 0.0), (inner * math.cos(sector), inner * math.sin(sector))
    edge = (notch[0] - tip[0], notch[1] - tip[1])
    normal = np.array([edge[1], -edge[0]]) / math.hypot(*edge)
    return -((along - tip[0]) * normal[0] + (across - tip[1]) * normal[1])


# Depth inside the outline for coordinates in radii, positive inside.
OUTLINES = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "cross": _cross,
    "triangle": _triangle,
    "star": _star,
}
