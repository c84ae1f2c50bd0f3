"""Render the sample pictures and the sample video with numpy, Pillow and a seed.

    python scripts/nova_tiny/make_sample_assets.py --output assets
    python scripts/nova_tiny/make_sample_assets.py --output assets --only video

Coordinates are in picture heights: x from 0 to the aspect ratio, y from 0 (top) to 1 (bottom).
A canvas is (H, W, 3) float32 with values 0 to 255; a mask is (H, W) with values 0 to 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from numpy import ndarray
from PIL import Image, ImageDraw

Color = tuple[float, float, float]
Point = tuple[float, float]

PICTURE_SIZE = 1024
SUPERSAMPLING = 2
VIDEO_SIZE = (1024, 608)  # multiples of a macroblock; 808 x 480 after the guide's resize
VIDEO_FRAMES = 81
FRAMES_PER_SECOND = 30


# --- canvas -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """Coordinates of every pixel: x and y are (H, W), ``pixel`` is the size of one pixel."""

    x: ndarray
    y: ndarray
    pixel: float

    @classmethod
    def of_size(cls, width: int, height: int) -> View:
        """Cover a picture of ``width`` x ``height`` pixels."""
        rows = (np.arange(height, dtype=np.float32) + 0.5) / height
        columns = (np.arange(width, dtype=np.float32) + 0.5) / height
        x, y = np.meshgrid(columns, rows)
        return cls(x, y, 1.0 / height)

    def box(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
        """Index of the pixels inside a rectangle, which may reach over the border."""
        height, width = self.x.shape
        columns = np.clip(np.array([left, right]) / self.pixel, 0, width).astype(int)
        rows = np.clip(np.array([top, bottom]) / self.pixel, 0, height).astype(int)
        return slice(rows[0], rows[1] + 1), slice(columns[0], columns[1] + 1)

    def crop(self, box: tuple[slice, slice]) -> View:
        """Restrict the view to the pixels of ``box``."""
        return View(self.x[box], self.y[box], self.pixel)

    def inside(self, distance: ndarray) -> ndarray:
        """Mask of ``distance`` > 0 whose border is one pixel wide."""
        return np.clip(0.5 + distance / self.pixel, 0, 1)


def paint(canvas: ndarray, color: Color | ndarray, mask: ndarray) -> None:
    """Blend a color, or an (H, W, 3) picture, over the canvas in place."""
    canvas += (np.asarray(color, dtype=np.float32) - canvas) * mask[..., None]


def scaled(color: Color, factor: float) -> Color:
    """A darker or lighter color."""
    red, green, blue = color
    return red * factor, green * factor, blue * factor


def gradient(position: ndarray, stops: Sequence[tuple[float, Color]]) -> ndarray:
    """Interpolate colors linearly between stops; returns (..., 3)."""
    places = [place for place, _ in stops]
    channels = zip(*(color for _, color in stops), strict=True)
    return np.stack([np.interp(position, places, c) for c in channels], -1).astype(np.float32)


def polygon_mask(view: View, points: Sequence[Point], oversampling: int = 3) -> ndarray:
    """Anti-aliased mask of a polygon."""
    height, width = view.x.shape
    scale = oversampling / view.pixel
    mask = Image.new("L", (width * oversampling, height * oversampling))
    ImageDraw.Draw(mask).polygon([(x * scale, y * scale) for x, y in points], fill=255)
    return np.asarray(mask.resize((width, height), Image.Resampling.BOX), np.float32) / 255


# --- noise --------------------------------------------------------------------------------------


def value_noise(x: ndarray, y: ndarray, seed: int) -> ndarray:
    """Smooth noise in [0, 1] with one random value per unit square."""
    lattice = np.random.default_rng(seed).random((64, 64), dtype=np.float32)
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    u, v = x - column, y - row
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    corners = [[lattice[(row + j) % 64, (column + i) % 64] for i in (0, 1)] for j in (0, 1)]
    top = corners[0][0] + (corners[0][1] - corners[0][0]) * u
    bottom = corners[1][0] + (corners[1][1] - corners[1][0]) * u
    return top + (bottom - top) * v


def fractal_noise(x: ndarray, y: ndarray, seed: int, octaves: int = 5) -> ndarray:
    """Sum of octaves of value noise, in [0, 1]."""
    return sum_octaves(x, y, seed, octaves, lambda noise: noise)


def ridge_line(x: ndarray, seed: int, octaves: int = 7) -> ndarray:
    """Profile of a mountain range in [0, 1], with sharp peaks; x is (W,)."""
    return sum_octaves(x, np.zeros_like(x), seed, octaves, lambda noise: 1 - np.abs(2 * noise - 1))


def sum_octaves(
    x: ndarray, y: ndarray, seed: int, octaves: int, shape: Callable[[ndarray], ndarray]
) -> ndarray:
    """Sum of octaves of value noise, each brought into a shape, in [0, 1]."""
    total = np.zeros_like(x)
    for octave in range(octaves):
        scale = 2.0**octave
        total += shape(value_noise(x * scale, y * scale, seed + octave)) / (2 * scale)
    return total / (1 - 0.5**octaves)


# --- landscape ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Mood:
    """Light and colors of the landscape."""

    sky: Sequence[tuple[float, Color]]
    sun: Point
    sun_color: Color
    glow: float
    cloud: Color
    far: Color
    near: Color
    water: Color


HORIZON = 0.64
SUNSET = Mood(
    sky=[(0, (30, 38, 92)), (0.3, (112, 78, 138)), (0.5, (236, 128, 98)), (0.64, (255, 214, 142))],
    sun=(0.49, 0.455),
    sun_color=(255, 236, 190),
    glow=0.9,
    cloud=(255, 150, 112),
    far=(206, 128, 124),
    near=(24, 26, 52),
    water=(46, 34, 74),
)
MORNING = Mood(
    sky=[(0, (64, 134, 206)), (0.35, (136, 190, 232)), (0.64, (236, 240, 232))],
    sun=(1.25, 0.16),
    sun_color=(255, 250, 226),
    glow=0.5,
    cloud=(255, 255, 255),
    far=(156, 186, 212),
    near=(38, 84, 66),
    water=(24, 84, 112),
)


def draw_sky(canvas: ndarray, view: View, mood: Mood, time: float) -> None:
    """Paint the sky, the sun and drifting clouds."""
    canvas[:] = gradient(view.y, mood.sky)
    distance = np.hypot(view.x - mood.sun[0], view.y - mood.sun[1])
    paint(canvas, mood.sun_color, mood.glow * np.exp(-distance / 0.16))
    paint(canvas, mood.sun_color, view.inside(0.045 - distance))
    depth = 1.0 / (HORIZON + 0.12 - np.minimum(view.y, HORIZON))
    billow = fractal_noise(view.x * depth * 1.1 + 0.12 * time, depth * 2.4, seed=40)
    cover = np.clip((billow - 0.50) / 0.16, 0, 1) * np.clip((HORIZON - view.y) / 0.22, 0, 1)
    shade = np.clip(1.6 - 1.1 * billow, 0.7, 1)[..., None]
    paint(canvas, np.asarray(mood.cloud) * shade, 0.85 * cover)


def draw_mountains(canvas: ndarray, view: View, mood: Mood, camera: float) -> None:
    """Paint five ranges, each nearer, darker and faster under a moving camera."""
    far, near = np.array(mood.far), np.array(mood.near)
    for index in range(5):
        closeness = index / 4
        x = view.x[0] + camera * (0.15 + 0.55 * closeness) + 3.7 * index
        height = (0.34 - 0.25 * closeness) * ridge_line(x * (1.5 + 0.7 * index), 10 * index + 3)
        crest = HORIZON - 0.035 - height + 0.045 * closeness
        below = view.y - crest[None, :]
        relief = fractal_noise(x[None] * 14 + below * 9, below * 16, 70 + index, octaves=4) - 0.5
        mist = np.clip(below / (0.30 - 0.16 * closeness), 0, 1)[..., None]
        mist = mist * (0.62 - 0.4 * closeness)
        color = far + (near - far) * closeness**0.8 + relief[..., None] * (95 - 55 * closeness)
        color = color + (gradient(np.array(HORIZON), mood.sky) - color) * mist
        if index < 2:
            snow = np.clip((0.075 + 0.12 * relief - below) / 0.03, 0, 1)[..., None]
            snow_color = 0.5 * np.array([255.0, 250.0, 255.0]) + 0.5 * np.array(mood.cloud)
            color = color + (snow_color - color) * snow * 0.75
        paint(canvas, color, view.inside(below) * (view.y < HORIZON + 2 * view.pixel))


def draw_pine(canvas: ndarray, view: View, root: Point, height: float, color: Color) -> None:
    """Paint one pine whose tiers of branches narrow toward the top."""
    x, y = root
    box = view.box(x - 0.3 * height, y - height, x + 0.3 * height, y + 0.02)
    local = view.crop(box)
    if local.x.size == 0:
        return
    up = (y - local.y) / height
    tier = (up * 9 + 6 * (local.x - x) / height * np.sign(local.x - x)) % 1.0
    width = 0.24 * height * np.clip(1 - up, 0, 1) * (1.0 - 0.62 * tier)
    branches = np.where(up > 0.04, width, 0.02 * height)
    mask = local.inside(branches - np.abs(local.x - x)) * (up < 1)
    light = np.clip((local.x - x) / (0.25 * height), -1, 1)[..., None] * 14
    paint(canvas[box], np.asarray(color) + light, mask)


def draw_forest(canvas: ndarray, view: View, mood: Mood, camera: float) -> None:
    """Paint the row of trees on the far shore."""
    rng = np.random.default_rng(5)
    span = 3.2
    for place, size, tone in rng.random((260, 3)):
        x = (place * span - 0.75 * camera) % span - 0.1
        grove = value_noise(np.array([place * 14]), np.zeros(1), 8)[0]
        height = (0.02 + 0.05 * grove) * (0.6 + 0.7 * size)
        shade = scaled(mood.near, 0.7 + 0.5 * tone)
        draw_pine(canvas, view, (x, HORIZON + 0.004), height, shade)


def draw_lake(canvas: ndarray, view: View, mood: Mood, time: float) -> None:
    """Mirror everything above the horizon in rippling water."""
    height, width = view.x.shape
    first = int(HORIZON * height)
    x, y = view.x[first:], view.y[first:]
    depth = np.clip((y - HORIZON) / (1 - HORIZON), 0, 1)
    ripple = fractal_noise(x * 9 / (0.25 + depth), 90 * depth**0.55 + 1.4 * time, 90, octaves=3)
    swell = (ripple - 0.5) * (0.006 + 0.05 * depth)
    rows = np.clip((2 * HORIZON - y + swell) * height, 0, first - 1).astype(int)
    columns = np.clip((x + 0.35 * swell) * height, 0, width - 1).astype(int)
    mirrored = canvas[rows, columns] * (0.90 - 0.25 * depth[..., None])
    paint(mirrored, mood.water, 0.12 + 0.42 * depth)
    path = np.exp(-(((x - mood.sun[0]) / (0.03 + 0.11 * depth)) ** 2))
    sparkle = np.clip((ripple - 0.52) / 0.12, 0, 1)
    paint(mirrored, mood.sun_color, mood.glow * 0.8 * path * sparkle)
    canvas[first:] = mirrored


def draw_bank(canvas: ndarray, view: View, mood: Mood) -> None:
    """Paint the near bank: tall pines on the left, grass and reeds along the edge."""
    rng = np.random.default_rng(11)
    dark = scaled(mood.near, 0.55)
    crest = 0.90 + 0.10 * view.x[0] ** 0.7 + 0.02 * ridge_line(view.x[0] * 6, 33)
    blades = 0.022 * value_noise(view.x[0] * 260, np.zeros_like(view.x[0]), 31)
    paint(canvas, dark, view.inside(view.y - (crest - blades)[None, :]))
    for x, height in ((0.30, 0.30), (0.02, 0.62), (0.21, 0.44), (0.11, 0.74)):
        red, green, blue = (channel * rng.uniform(0.8, 1.2) for channel in dark)
        draw_pine(canvas, view, (x, 0.95), height, (red, green, blue))


def draw_birds(canvas: ndarray, view: View, mood: Mood) -> None:
    """Paint a few gulls as two arcs each."""
    for x, y, size in ((0.36, 0.22, 0.022), (0.41, 0.20, 0.016), (0.45, 0.235, 0.013)):
        u = np.linspace(-1, 1, 25)
        arc = -0.5 * np.abs(u) ** 0.5 * (1.15 - np.abs(u))
        upper = list(zip(x + size * u, y + size * arc, strict=True))
        lower = list(zip(x + size * u, y + size * (arc + 0.14 * (1 - np.abs(u))), strict=True))
        paint(canvas, mood.near, polygon_mask(view, upper + lower[::-1]))


def draw_balloon(canvas: ndarray, view: View, center: Point, radius: float) -> None:
    """Paint a striped hot-air balloon."""
    x, y = center
    box = view.box(x - 1.2 * radius, y - 1.2 * radius, x + 1.2 * radius, y + 2.2 * radius)
    local = view.crop(box)
    if local.x.size == 0:
        return
    u, v = (local.x - x) / radius, (local.y - y) / radius
    half_width = np.where(v < 0, np.sqrt(np.clip(1 - v * v, 0, 1)), np.clip(1 - 0.55 * v * v, 0, 1))
    envelope = local.inside((half_width - np.abs(u)) * radius) * (v < 1.15)
    gore = np.floor(np.arcsin(np.clip(u / np.maximum(half_width, 1e-3), -1, 1)) * 2.6 + 0.5) % 2
    color = np.where(gore[..., None] == 0, (226, 62, 48), (252, 214, 96))
    shading = np.clip(0.95 + 0.3 * u - 0.15 * v, 0.55, 1.15)[..., None]
    target = canvas[box]
    ropes = local.inside(0.012 * radius - np.abs(np.abs(u) - 0.32 + 0.16 * (v - 1)) * radius)
    paint(target, (60, 50, 44), ropes * ((v > 1) & (v < 1.75)))
    paint(target, np.clip(color * shading, 0, 255), envelope)
    basket = local.inside((0.17 - np.maximum(np.abs(u), np.abs(v - 1.82))) * radius)
    paint(target, (112, 72, 40), basket)


def draw_boat(canvas: ndarray, view: View, root: Point, size: float) -> None:
    """Paint a sailing boat and the reflection of its sails."""

    def place(points: Sequence[Point], flip: float = 1.0) -> list[Point]:
        return [(root[0] + size * x, root[1] + flip * size * y) for x, y in points]

    main_sail = [(0.03, -1.15), (0.03, -0.16), (0.52, -0.16)]
    fore_sail = [(-0.04, -1.02), (-0.04, -0.16), (-0.42, -0.16)]
    hull = [(-0.52, -0.12), (0.58, -0.12), (0.42, 0.05), (-0.38, 0.05)]
    for sail, color in ((main_sail, (250, 246, 236)), (fore_sail, (232, 92, 74))):
        paint(canvas, color, 0.35 * polygon_mask(view, place(sail, -0.75)))
        paint(canvas, color, polygon_mask(view, place(sail)))
    paint(canvas, (86, 50, 34), polygon_mask(view, place(hull)))


def landscape(view: View, mood: Mood, camera: float = 0.0, time: float = 0.0) -> ndarray:
    """Render sky, mountains, far shore and lake."""
    canvas = np.zeros((*view.x.shape, 3), np.float32)
    draw_sky(canvas, view, mood, time)
    draw_mountains(canvas, view, mood, camera)
    draw_forest(canvas, view, mood, camera)
    draw_lake(canvas, view, mood, time)
    return canvas


def render_sunset() -> ndarray:
    """Render the first picture: a lake between mountains at sunset."""
    size = PICTURE_SIZE * SUPERSAMPLING
    view = View.of_size(size, size)
    canvas = landscape(view, SUNSET)
    draw_birds(canvas, view, SUNSET)
    draw_bank(canvas, view, SUNSET)
    return canvas


def render_morning_frames() -> Iterator[ndarray]:
    """Render the video: the camera pans, a balloon rises, a boat crosses the lake."""
    view = View.of_size(*VIDEO_SIZE)
    for frame in range(VIDEO_FRAMES):
        progress = frame / (VIDEO_FRAMES - 1)
        canvas = landscape(view, MORNING, camera=0.45 * progress, time=3.0 * progress)
        sway = 0.008 * math.sin(9 * progress)
        draw_balloon(canvas, view, (0.50 - 0.10 * progress, 0.52 - 0.30 * progress), 0.085)
        draw_boat(canvas, view, (0.30 + 0.85 * progress, 0.80 + sway), 0.15)
        yield canvas


# --- reef ---------------------------------------------------------------------------------------


def draw_water_column(canvas: ndarray, view: View) -> None:
    """Paint water that darkens with depth, and rays of sunlight."""
    stops = [(0, (150, 236, 226)), (0.25, (40, 172, 196)), (0.7, (12, 84, 140)), (1, (8, 44, 96))]
    canvas[:] = gradient(view.y, stops)
    angle = np.arctan2(view.x - 0.66, view.y + 0.35)
    beams = fractal_noise(angle * 9 + 20, np.zeros_like(angle), 51, octaves=4)
    strength = np.clip((beams - 0.45) / 0.3, 0, 1) * np.clip(1 - view.y / 0.85, 0, 1)
    paint(canvas, (214, 255, 244), 0.55 * strength)


def draw_sea_bed(canvas: ndarray, view: View) -> None:
    """Paint hazy rocks behind and rippled sand in front."""
    for seed, top, color in ((3, 0.62, (22, 104, 152)), (17, 0.74, (20, 78, 118))):
        crest = top - 0.16 * (ridge_line(view.x[0] * 2.2 + seed, seed) - 0.4)
        relief = fractal_noise(view.x * 12, view.y * 12, seed, octaves=4)[..., None] - 0.5
        paint(canvas, np.array(color) + 60 * relief, view.inside(view.y - crest[None, :]))
    depth = np.clip((view.y - 0.84) / 0.16, 0, 1)
    bend = fractal_noise(view.x * 4, view.y * 9, 61, octaves=3)
    ripples = np.sin(130 * np.sqrt(depth + 0.02) + 14 * bend)[..., None]
    sand = gradient(depth, [(0, (96, 150, 160)), (1, (226, 204, 150))]) + 13 * ripples
    crest = 0.84 + 0.03 * np.sin(view.x[0] * 5 + 1)
    paint(canvas, sand, view.inside(view.y - crest[None, :]))


def grow_branches(
    rng: np.random.Generator, start: Point, angle: float, length: float, levels: int
) -> Iterator[tuple[Point, Point, int]]:
    """Yield the segments of a randomly forking coral, with the levels left above each."""
    end = (start[0] + length * math.sin(angle), start[1] - length * math.cos(angle))
    yield start, end, levels
    if levels == 0:
        return
    for side in (-1, 1) if levels % 3 else (-1, 0, 1):
        turn = side * rng.uniform(0.25, 0.55)
        shorter = length * rng.uniform(0.72, 0.9)
        yield from grow_branches(rng, end, angle + turn, shorter, levels - 1)


def draw_coral(canvas: ndarray, view: View, root: Point, size: float, color: Color) -> None:
    """Paint a branching coral, thick stems first, with a lit side."""
    rng = np.random.default_rng(int(1e4 * root[0]))
    segments = sorted(grow_branches(rng, root, 0.0, size, 6), key=lambda segment: -segment[2])
    for shift, brightness in ((0.0, 0.62), (-0.25, 1.0)):
        mask = Image.new("L", view.x.shape[::-1])
        pen = ImageDraw.Draw(mask)
        for start, end, level in segments:
            thickness = (0.003 + 0.0022 * level) * (1.0 if shift == 0 else 0.55)
            offset = shift * (0.003 + 0.0022 * level)
            line = [((x + offset) / view.pixel, y / view.pixel) for x, y in (start, end)]
            pen.line(line, fill=255, width=max(1, round(thickness / view.pixel)))
            radius = 0.5 * thickness / view.pixel
            x, y = line[1]
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        paint(canvas, scaled(color, brightness), np.asarray(mask, np.float32) / 255)


def draw_brain_coral(canvas: ndarray, view: View, center: Point, radius: float) -> None:
    """Paint a dome with a maze of grooves."""
    u, v = (view.x - center[0]) / radius, (view.y - center[1]) / radius
    warp = fractal_noise(u * 3 + 9, v * 3 + 9, 81, octaves=3)
    grooves = np.sin(46 * warp + 5 * u)[..., None]
    light = np.clip(0.85 - 0.45 * v - 0.2 * u, 0.3, 1.2)[..., None]
    color = (np.array([196, 150, 74]) + 34 * grooves) * light
    paint(canvas, color, view.inside((1 - np.hypot(u, 1.25 * v)) * radius))


def draw_sea_grass(canvas: ndarray, view: View) -> None:
    """Paint waving blades on both sides of the foreground."""
    rng = np.random.default_rng(23)
    for index in range(44):
        x = rng.uniform(-0.02, 0.17) if index % 2 else rng.uniform(0.86, 1.02)
        height = rng.uniform(0.16, 0.44) * (1.0 if index % 2 else 0.7)
        up = np.linspace(0, 1, 30)
        sway = x + 0.035 * up * np.sin(5 * up + rng.uniform(0, 6))
        half = 0.009 * (1 - up**2) + 0.0005
        y = 1.01 - height * up
        left = list(zip(sway - half, y, strict=True))
        right = list(zip(sway + half, y, strict=True))
        green = np.array([18, 92, 66]) + rng.uniform(0, 1) * np.array([60, 92, 20])
        paint(canvas, green, polygon_mask(view, left + right[::-1], oversampling=1))


def draw_fish(
    canvas: ndarray, view: View, center: Point, size: float, body: Color, stripe: Color, tilt: float
) -> None:
    """Paint a fish; a negative ``size`` makes it swim to the left."""
    reach = 1.9 * abs(size)
    box = view.box(center[0] - reach, center[1] - reach, center[0] + reach, center[1] + reach)
    local = view.crop(box)
    target = canvas[box]
    dx, dy = (local.x - center[0]) / size, (local.y - center[1]) / abs(size)
    u, v = dx * math.cos(tilt) + dy * math.sin(tilt), dy * math.cos(tilt) - dx * math.sin(tilt)
    profile = 0.56 * np.sqrt(np.clip(1 - u * u, 0, 1)) * (1 + 0.18 * u)
    tail = np.minimum(0.10 + 0.62 * (-0.82 - u), 0.45) - np.abs(v)
    fins = 0.30 - np.hypot(0.75 * (u + 0.12), np.abs(v) - 0.52)
    paint(target, stripe, local.inside(np.minimum(tail, u + 1.42) * abs(size)) * (u < -0.78))
    paint(target, stripe, local.inside(fins * abs(size)) * (u < 0.35))
    light = np.clip(0.98 - 0.55 * v, 0.6, 1.25)[..., None]
    bands = np.clip(3.2 * np.sin(5.2 * u + 1.2) - 1.2, 0, 1)[..., None]
    skin = (np.asarray(body) + (np.asarray(stripe) - np.asarray(body)) * bands) * light
    body_mask = local.inside((profile - np.abs(v)) * abs(size)) * (np.abs(u) < 1)
    paint(target, np.clip(skin, 0, 255), body_mask)
    eye = np.hypot(u - 0.62, v + 0.08)
    paint(target, (250, 250, 240), local.inside((0.115 - eye) * abs(size)))
    paint(target, (14, 16, 26), local.inside((0.068 - eye) * abs(size)))


def draw_bubbles(canvas: ndarray, view: View) -> None:
    """Paint rising bubbles: a thin bright ring and a highlight."""
    rng = np.random.default_rng(29)
    for _ in range(26):
        x, y, radius = 0.30 + 0.05 * rng.normal(), rng.uniform(0.08, 0.7), rng.uniform(0.003, 0.012)
        box = view.box(x - 2 * radius, y - 2 * radius, x + 2 * radius, y + 2 * radius)
        local = view.crop(box)
        distance = np.hypot(local.x - x, local.y - y)
        ring = local.inside(0.16 * radius - np.abs(distance - radius))
        away = np.hypot(local.x - x + 0.35 * radius, local.y - y + 0.35 * radius)
        spot = local.inside(0.3 * radius - away)
        paint(canvas[box], (220, 255, 255), np.maximum(0.75 * ring, 0.9 * spot))
        paint(canvas[box], (220, 255, 255), 0.12 * local.inside(radius - distance))


def draw_shoal(canvas: ndarray, view: View) -> None:
    """Paint a distant shoal and the large fish in front of it."""
    rng = np.random.default_rng(37)
    for _ in range(46):
        center = (0.36 + 0.15 * rng.normal(), 0.22 + 0.055 * rng.normal())
        size = rng.uniform(0.009, 0.017)
        draw_fish(canvas, view, center, size, (150, 214, 222), (84, 160, 190), 0)
    draw_fish(canvas, view, (0.66, 0.40), -0.125, (255, 146, 30), (252, 246, 236), 0.12)
    draw_fish(canvas, view, (0.27, 0.52), 0.085, (250, 222, 62), (44, 62, 140), -0.15)
    draw_fish(canvas, view, (0.80, 0.60), -0.060, (98, 116, 236), (246, 214, 90), -0.1)
    draw_fish(canvas, view, (0.47, 0.66), -0.048, (255, 146, 30), (252, 246, 236), 0.2)


def render_reef() -> ndarray:
    """Render the second picture: a coral reef."""
    size = PICTURE_SIZE * SUPERSAMPLING
    view = View.of_size(size, size)
    canvas = np.zeros((size, size, 3), np.float32)
    draw_water_column(canvas, view)
    draw_sea_bed(canvas, view)
    draw_coral(canvas, view, (0.24, 0.90), 0.062, (222, 84, 130))
    draw_coral(canvas, view, (0.62, 0.88), 0.050, (244, 140, 70))
    draw_brain_coral(canvas, view, (0.44, 1.0), 0.12)
    draw_coral(canvas, view, (0.80, 0.94), 0.066, (176, 96, 206))
    draw_shoal(canvas, view)
    draw_bubbles(canvas, view)
    draw_sea_grass(canvas, view)
    return canvas


# --- files --------------------------------------------------------------------------------------


def to_bytes(canvas: ndarray, seed: int, grain: float = 1.5) -> ndarray:
    """Round to uint8; a little grain keeps smooth gradients from banding."""
    noise = np.random.default_rng(seed).normal(0, grain, canvas.shape[:2])[..., None]
    return np.clip(canvas + noise + 0.5, 0, 255).astype(np.uint8)


def save_picture(canvas: ndarray, path: Path) -> None:
    """Reduce the supersampled canvas and write a JPEG."""
    picture = Image.fromarray(to_bytes(canvas, seed=1))
    picture = picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)
    picture.save(path, quality=90, optimize=True)


def save_video(frames: Iterator[ndarray], path: Path) -> None:
    """Encode frames as H.264."""
    options = ["-crf", "24", "-preset", "slow", "-threads", "1"]
    writer: Any = imageio.get_writer(
        path, fps=FRAMES_PER_SECOND, codec="libx264", quality=None, output_params=options
    )
    with writer:
        for index, frame in enumerate(frames):
            writer.append_data(to_bytes(frame, seed=index, grain=0.5))


def main() -> None:
    """Render the chosen assets into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("assets"), help="folder to write to")
    parser.add_argument("--only", choices=("image", "image2", "video"), help="render just this one")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.only in (None, "image"):
        save_picture(render_sunset(), args.output / "sample_image.jpg")
    if args.only in (None, "image2"):
        save_picture(render_reef(), args.output / "sample_image2.jpg")
    if args.only in (None, "video"):
        save_video(render_morning_frames(), args.output / "sample_video.mp4")


if __name__ == "__main__":
    main()
