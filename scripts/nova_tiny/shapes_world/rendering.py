"""Pictures and clips of scenes in soft light, anti-aliased, from signed distances.

Shapes: F frames, S side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy import ndarray

from shapes_world import scenes

LIGHT = (-0.6, -0.8)  # where it comes from
SHADOW = 0.12  # how much darker it is in the shadow of a shape
SHADOW_WAY = 0.025  # how far the shadow falls, of the picture
SHADOW_BLUR = 0.05
FALLOFF = 0.04  # how much the light differs between the middle and a corner
ROUNDING = 0.3  # how wide the rounded edge of a shape is, in radii
GLOSS = 0.28  # how much lighter, or darker, the rounded edge is


def draw_example(
    rng: np.random.Generator,
    categories: Sequence[str],
    size: int,
    num_frames: int | None = None,
    known_shapes: Sequence[str] = scenes.SHAPES,
) -> tuple[scenes.Description, ndarray, float]:
    """Draw a training picture or, of some frames, a clip.

    Returns:
        What it shows, its frames, (F, S, S, 3) of uint8, and the strength of the motion.
    """
    category = scenes.choose(rng, categories)
    if num_frames is None:
        description = scenes.draw_description(rng, category, known_shapes)
        return description, render_scene(scenes.draw_scene(rng, description), size)[None], 0.0
    description = scenes.draw_clip_description(rng, category, known_shapes)
    clip = scenes.draw_clip(rng, description)
    return description, render_clip(clip, num_frames, size), clip.flow


def render_scene(scene: scenes.Scene, size: int = 64) -> ndarray:
    """Paint a scene; returns (S, S, 3) of uint8."""
    x, y = places(size)
    light = 1 + FALLOFF * ((x - 0.5) * LIGHT[0] + (y - 0.5) * LIGHT[1]) / 0.7
    canvas = np.asarray(scenes.BACKGROUNDS[scene.background], np.float32) * light[..., None]
    for item in scene.items:
        canvas *= 1 - SHADOW * shadow(item, size)[..., None]
    for item in scene.items:
        depth = inside(item, size)
        color = np.asarray(scenes.COLORS[item.color], np.float32) * shading(item, depth)[..., None]
        canvas += cover(depth, size)[..., None] * (color - canvas)
    return canvas.round().clip(0, 255).astype(np.uint8)


def render_clip(clip: scenes.Clip, num_frames: int = 17, size: int = 64) -> ndarray:
    """Paint a clip; returns (F, S, S, 3) of uint8."""
    times = np.linspace(0.0, 1.0, num_frames)
    return np.stack([render_scene(clip.at(float(time)), size) for time in times])


def places(size: int) -> tuple[ndarray, ndarray]:
    """Where the middle of every pixel is, x and y, (S, S) from 0 to 1."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(line, line)
    return x, y


def inside(item: scenes.Item, size: int) -> ndarray:
    """How far every pixel is inside an item, (S, S), as a share of the picture; below 0 outside."""
    x, y = places(size)
    x, y = x - item.center[0], y - item.center[1]
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    x, y = (x * cos + y * sin) / item.radius, (y * cos - x * sin) / item.radius
    return OUTLINES[item.shape](x, y) * item.radius


def cover(depth: ndarray, size: int) -> ndarray:
    """The share of every pixel that is covered, (S, S) from 0 to 1."""
    return np.clip(0.5 + depth * size, 0, 1)


def coverage(item: scenes.Item, size: int) -> ndarray:
    """The share of every pixel that an item covers, (S, S) from 0 to 1."""
    return cover(inside(item, size), size)


def shadow(item: scenes.Item, size: int) -> ndarray:
    """How much of the light an item takes from the ground, (S, S) from 0 to 1."""
    x, y = item.center
    center = (x - SHADOW_WAY * LIGHT[0], y - SHADOW_WAY * LIGHT[1])
    thrown = scenes.Item(item.shape, item.color, item.radius, center, item.angle)
    return np.clip(0.5 + inside(thrown, size) / SHADOW_BLUR, 0, 1)


def shading(item: scenes.Item, depth: ndarray) -> ndarray:
    """Brightness of an item with a rounded edge, (S, S), 1 where it is flat."""
    down, right = np.gradient(depth)
    length = np.maximum(np.hypot(right, down), 1e-6)
    facing = -(right * LIGHT[0] + down * LIGHT[1]) / length  # the edge's normal, towards the light
    slope = np.clip(1 - depth / (ROUNDING * item.radius), 0, 1)
    return 1 + GLOSS * facing * slope**2


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


def _disc(x: ndarray, y: ndarray, center: scenes.Point, radius: float) -> ndarray:
    return radius - np.hypot(x - center[0], y - center[1])


def _polygon(x: ndarray, y: ndarray, *corners: scenes.Point) -> ndarray:
    """A convex one; its corners are named clockwise."""
    depth = np.full_like(x, np.inf)
    for (left, top), (right, bottom) in zip(corners, (*corners[1:], corners[0]), strict=True):
        along, down = right - left, bottom - top
        side = (along * (y - top) - down * (x - left)) / math.hypot(along, down)
        depth = np.minimum(depth, side)
    return depth


def _box(x: ndarray, y: ndarray, left: float, top: float, right: float, bottom: float) -> ndarray:
    return _polygon(x, y, (left, top), (right, top), (right, bottom), (left, bottom))


def _heart(x: ndarray, y: ndarray) -> ndarray:
    lobes = _disc(np.abs(x), y, (0.4, -0.3), 0.46)
    return np.maximum(lobes, _polygon(x, y, (-0.82, -0.12), (0.82, -0.12), (0, 0.95)))


def _moon(x: ndarray, y: ndarray) -> ndarray:
    return np.minimum(_disc(x, y, (0, 0), 0.92), -_disc(x, y, (0.5, 0), 0.72))


def _arrow(x: ndarray, y: ndarray) -> ndarray:
    head = _polygon(x, y, (0.05, -0.75), (0.95, 0), (0.05, 0.75))
    return np.maximum(head, _box(x, y, -0.92, -0.26, 0.2, 0.26))


def _drop(x: ndarray, y: ndarray) -> ndarray:
    tip = _polygon(x, y, (0, -0.98), (0.52, 0.1), (-0.52, 0.1))
    return np.maximum(tip, _disc(x, y, (0, 0.32), 0.58))


def _bar(x: ndarray, y: ndarray) -> ndarray:
    return _box(x, y, -0.92, -0.33, 0.92, 0.33)


def _kite(x: ndarray, y: ndarray) -> ndarray:
    return _polygon(x, y, (0, -0.98), (0.6, -0.2), (0, 0.98), (-0.6, -0.2))


def _corner(x: ndarray, y: ndarray) -> ndarray:
    return np.maximum(_box(x, y, -0.75, -0.75, -0.2, 0.75), _box(x, y, -0.75, 0.2, 0.75, 0.75))


def _house(x: ndarray, y: ndarray) -> ndarray:
    roof = _polygon(x, y, (0, -0.95), (0.9, -0.1), (-0.9, -0.1))
    return np.maximum(roof, _box(x, y, -0.6, -0.3, 0.6, 0.78))


def _cloud(x: ndarray, y: ndarray) -> ndarray:
    puffs = np.maximum(_disc(np.abs(x), y, (0.5, 0.15), 0.42), _disc(x, y, (0, -0.15), 0.54))
    return np.maximum(puffs, _box(x, y, -0.5, 0.0, 0.5, 0.57))


def _flower(x: ndarray, y: ndarray) -> ndarray:
    return 0.66 + 0.24 * np.cos(5 * np.arctan2(x, -y)) - np.hypot(x, y)


def _bow(x: ndarray, y: ndarray) -> ndarray:
    return _polygon(np.abs(x), y, (-0.12, 0), (0.9, -0.66), (0.9, 0.66))


def _arch(x: ndarray, y: ndarray) -> ndarray:
    return np.minimum(0.26 - np.abs(np.hypot(x, y - 0.2) - 0.66), 0.35 - y)


# Depth inside the outline for coordinates in radii, positive inside.
OUTLINES = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "cross": _cross,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "moon": _moon,
    "arrow": _arrow,
    "drop": _drop,
    "bar": _bar,
    "kite": _kite,
    "corner": _corner,
    "house": _house,
    "cloud": _cloud,
    "flower": _flower,
    "bow": _bow,
    "arch": _arch,
}
