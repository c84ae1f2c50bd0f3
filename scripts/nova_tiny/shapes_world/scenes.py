"""Scenes and clips of coloured shapes, and the descriptions they are drawn from.

A description says what a caption demands. Training draws a description, then a scene that fulfils
it; the evaluation asks a model for a description and checks whether its picture fulfils it.

Lengths are shares of the picture's side; y grows downwards; angles are radians, clockwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

Color = tuple[int, int, int]
Point = tuple[float, float]

COLORS: dict[str, Color] = {
    "red": (215, 35, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 225, 40),
    "green": (40, 160, 60),
    "cyan": (40, 205, 220),
    "blue": (40, 75, 220),
    "purple": (135, 50, 180),
    "pink": (250, 140, 195),
}
BACKGROUNDS: dict[str, Color] = {
    "white": (245, 245, 245),
    "gray": (125, 125, 125),
    "black": (15, 15, 15),
    "cream": (250, 236, 205),
    "navy": (20, 24, 70),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
# Never asked for, and in all colours: they teach that any outline can have any colour.
MORE_SHAPES = (
    *("heart", "moon", "arrow", "drop", "bar", "kite"),
    *("corner", "house", "cloud", "flower", "bow", "arch"),
)
MIXED_SHAPES = (*SHAPES, *SHAPES, *MORE_SHAPES)  # as many of each kind
SIZES = {"small": 0.15, "medium": 0.18, "large": 0.21}  # radii
CLIP_SIZES = ("medium", "large")  # smaller shapes blur when they move
RELATIONS: dict[str, Point] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
CATEGORIES = ("single", "two", "counting", "colors", "position", "attribution")
CLIP_CATEGORIES = ("single", "two", "colors", "attribution")
MAX_COUNT = 4
MAX_TRIES = 10000  # at a clip
MARGIN = 0.03  # between shapes and the border
GAP = 0.06  # between shapes
GRID = 4  # centers lie on multiples of 1 / GRID, corners of tokens: few parts of shapes to learn

# Never in training pictures: a fifth of the pairs of colour and shape.
HELD_OUT_COLORINGS = frozenset(
    {
        ("red", "star"),
        ("orange", "circle"),
        ("yellow", "cross"),
        ("green", "triangle"),
        ("cyan", "square"),
        ("blue", "ring"),
        ("purple", "circle"),
        ("pink", "square"),
        ("red", "ring"),
        ("green", "star"),
    }
)
# Never in training captions in this order: a fifth of the ordered pairs of different shapes.
HELD_OUT_PAIRS = frozenset(
    {
        ("circle", "star"),
        ("square", "ring"),
        ("triangle", "cross"),
        ("star", "square"),
        ("ring", "triangle"),
        ("cross", "circle"),
    }
)


@dataclass(frozen=True)
class Item:
    """A shape in a picture.

    Attributes:
        shape: Name of the shape.
        color: Name of its colour.
        radius: Of the circle around it.
        center: Its place (x, y).
        angle: How far it is turned.
    """

    shape: str
    color: str
    radius: float
    center: Point
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A picture: a background and shapes that do not touch."""

    background: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Mention:
    """A shape as a caption names it; None leaves it open."""

    shape: str
    color: str | None = None
    size: str | None = None

    def admits(self, item: Item) -> bool:
        """Whether an item is meant; sizes are not measured."""
        return item.shape == self.shape and self.color in (None, item.color)


@dataclass(frozen=True)
class Motion:
    """What a shape does over a clip.

    Attributes:
        name: As captions say it.
        shift: Way from the first to the last frame.
        turn: Angle from the first to the last frame.
        growth: Factor of the radius from the first to the last frame.
    """

    name: str
    shift: Point = (0.0, 0.0)
    turn: float = 0.0
    growth: float = 1.0

    def apply(self, item: Item, time: float) -> Item:
        """The item at a time from 0, the first frame, to 1, the last one."""
        (x, y), (right, down) = item.center, self.shift
        return replace(
            item,
            center=(x + right * time, y + down * time),
            angle=item.angle + self.turn * time,
            radius=item.radius * self.growth**time,
        )


MOTIONS = {
    motion.name: motion
    for motion in (
        Motion("moving left", shift=(-0.25, 0.0)),
        Motion("moving right", shift=(0.25, 0.0)),
        Motion("moving up", shift=(0.0, -0.25)),
        Motion("moving down", shift=(0.0, 0.25)),
        Motion("turning", turn=math.pi / 4),
        Motion("growing", growth=1.2),
        Motion("shrinking", growth=1 / 1.2),
    )
}
ROUND = ("circle", "ring")  # one cannot see them turn
STRENGTHS = {1.0: 0.75, 2.0: 0.25}  # of motions, with their shares of clips
USUAL_FLOW = 5.0  # what pipelines take for a usual motion


@dataclass(frozen=True)
class Clip:
    """A scene whose items move.

    Attributes:
        scene: At the beginning.
        motions: One per item; None keeps it still.
        strength: How far the motions go; 1 is usual.
    """

    scene: Scene
    motions: tuple[Motion | None, ...]
    strength: float = 1.0

    def at(self, time: float) -> Scene:
        """The scene at a time from 0 to 1."""
        items = tuple(
            item if motion is None else motion.apply(item, self.strength * time)
            for item, motion in zip(self.scene.items, self.motions, strict=True)
        )
        return Scene(self.scene.background, items)

    @property
    def flow(self) -> float:
        """Motion strength as models get it; 5 is usual."""
        return USUAL_FLOW * self.strength


@dataclass(frozen=True)
class Description:
    """What a caption demands of a picture or clip.

    Attributes:
        mentions: The shapes named: one, of which there are ``count``, or two.
        count: How many of a single mention.
        relation: Where the first mention is, seen from the second; None leaves it open.
        background: Named background.
        motion: What the (first) shape does; only in clips.
    """

    mentions: tuple[Mention, ...]
    count: int = 1
    relation: str | None = None
    background: str | None = None
    motion: str | None = None

    @property
    def is_held_out(self) -> bool:
        """Whether training never saw one of its combinations."""
        colorings = {(m.color, m.shape) for m in self.mentions}
        shapes = tuple(m.shape for m in self.mentions)
        return bool(colorings & HELD_OUT_COLORINGS) or shapes in HELD_OUT_PAIRS

    def expand(self) -> tuple[Mention, ...]:
        """One mention for each shape of the picture."""
        return self.mentions * self.count

    def fulfilled_by(self, items: Sequence[Item]) -> bool:
        """Whether a picture shows exactly these shapes, in this relation."""
        wanted = self.expand()
        if len(items) != len(wanted):
            return False
        if len(wanted) != 2 or self.count > 1:
            return all(self.mentions[0].admits(item) for item in items)
        return any(
            wanted[0].admits(first)
            and wanted[1].admits(second)
            and (self.relation is None or place_of(first, second) == self.relation)
            for first, second in (items, items[::-1])
        )


def place_of(first: Item, second: Item) -> str:
    """The relation that describes best where the first item is, seen from the second."""
    way = [a - b for a, b in zip(first.center, second.center, strict=True)]
    return max(RELATIONS, key=lambda name: np.dot(way, RELATIONS[name]))


def allowed_colors(shape: str) -> list[str]:
    """Colours that a shape has in training pictures."""
    return [color for color in COLORS if (color, shape) not in HELD_OUT_COLORINGS]


# --- random choice -------------------------------------------------------------------------------


def choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Draw one of some names."""
    return options[int(rng.integers(len(options)))]


def draw_description(
    rng: np.random.Generator, category: str, known_shapes: Sequence[str] = SHAPES
) -> Description:
    """Draw a training description, in which nothing is held out.

    Args:
        rng: Source of randomness.
        category: One of ``CATEGORIES``.
        known_shapes: What there may be.
    """
    shapes = [choose(rng, known_shapes)]
    if category in ("two", "position", "attribution"):
        others = [s for s in known_shapes if s != shapes[0] and (shapes[0], s) not in HELD_OUT_PAIRS]
        shapes.append(choose(rng, others))
    is_colored = category in ("colors", "attribution") or (
        category in ("counting", "position") and rng.random() < 0.6
    )
    is_sized = category in ("single", "colors") and rng.random() < 0.3
    mentions = tuple(
        Mention(
            shape,
            color=choose(rng, allowed_colors(shape)) if is_colored else None,
            size=choose(rng, list(SIZES)) if is_sized else None,
        )
        for shape in shapes
    )
    return Description(
        mentions,
        count=int(rng.integers(1, MAX_COUNT + 1)) if category == "counting" else 1,
        relation=choose(rng, list(RELATIONS)) if category == "position" else None,
        background=choose(rng, list(BACKGROUNDS)) if rng.random() < 0.4 else None,
    )


def draw_scene(
    rng: np.random.Generator,
    description: Description,
    sizes: Sequence[str] = tuple(SIZES),
) -> Scene:
    """Draw a picture that fulfils a description, without held-out colours of what it leaves open.

    Of two shapes without a relation the one named first comes first as one reads: row by row.

    Args:
        rng: Source of randomness.
        description: May have held-out combinations.
        sizes: For shapes whose size the description leaves open.
    """
    shared = choose(rng, allowed_colors(description.mentions[0].shape))
    wanted = description.expand()
    colors = [
        mention.color
        or (shared if description.count > 1 else choose(rng, allowed_colors(mention.shape)))
        for mention in wanted
    ]
    while True:
        radii = _draw_radii(rng, wanted, sizes)
        centers = _place(rng, radii, description.relation)
        if centers is None:
            continue
        if len(description.mentions) == 1 or description.relation or _in_reading_order(centers):
            break
    items = tuple(
        Item(mention.shape, color, radius, center)
        for mention, color, radius, center in zip(wanted, colors, radii, centers, strict=True)
    )
    return Scene(description.background or choose(rng, list(BACKGROUNDS)), items)


def name_colors(rng: np.random.Generator, description: Description) -> Description:
    """Draw the colours that a description leaves open."""
    mentions = tuple(
        mention
        if mention.color
        else replace(mention, color=choose(rng, allowed_colors(mention.shape)))
        for mention in description.mentions
    )
    return replace(description, mentions=mentions)


def _draw_radii(
    rng: np.random.Generator, wanted: Sequence[Mention], sizes: Sequence[str]
) -> list[float]:
    largest = {1: 3, 2: 2}.get(len(wanted), 1)
    names = [name for name in list(SIZES)[:largest] if name in sizes]
    shared = choose(rng, names)
    is_count = wanted[0] == wanted[-1]
    sizes = [mention.size or (shared if is_count else choose(rng, names)) for mention in wanted]
    return [SIZES[size] for size in sizes]


def _place(
    rng: np.random.Generator, radii: Sequence[float], relation: str | None, tries: int = 50
) -> list[Point] | None:
    """Places where nothing touches, or None if none was found."""
    for _ in range(tries):
        centers = [_draw_center(rng, radius) for radius in radii]
        if relation is not None and not _are_related(centers, relation):
            continue
        pairs = [(i, j) for i, j in product(range(len(radii)), repeat=2) if i < j]
        if all(math.dist(centers[i], centers[j]) > radii[i] + radii[j] + GAP for i, j in pairs):
            return centers
    return None


def _in_reading_order(centers: Sequence[Point]) -> bool:
    """Whether places follow each other as one reads, row by row."""
    return list(centers) == sorted(centers, key=lambda center: (center[1], center[0]))


def _draw_center(rng: np.random.Generator, radius: float) -> Point:
    lowest = math.ceil((radius + MARGIN) * GRID)
    x, y = rng.integers(lowest, GRID - lowest, size=2, endpoint=True) / GRID
    return float(x), float(y)


def _are_related(centers: Sequence[Point], relation: str) -> bool:
    """Whether the first center is clearly on that side of the second."""
    across, down = (a - b for a, b in zip(*centers, strict=True))
    along = np.dot((across, down), RELATIONS[relation])
    aside = abs(across) + abs(down) - abs(along)
    return along > 0 and aside < 0.5 * along


def draw_clip_description(
    rng: np.random.Generator, category: str, known_shapes: Sequence[str] = SHAPES
) -> Description:
    """Draw a training description of a clip; its first shape moves in a way that can be seen.

    Args:
        rng: Source of randomness.
        category: One of ``CLIP_CATEGORIES``.
        known_shapes: What there may be.
    """
    description = draw_description(rng, category, known_shapes)
    mentions = tuple(replace(mention, size=None) for mention in description.mentions)
    names = [name for name in MOTIONS if name != "turning" or mentions[0].shape not in ROUND]
    return replace(description, mentions=mentions, motion=choose(rng, names))


def draw_clip(
    rng: np.random.Generator, description: Description, strength: float | None = None
) -> Clip:
    """Draw a clip that fulfils a description; the first shape moves, the others are still.

    Args:
        rng: Source of randomness.
        description: With a motion.
        strength: Of the motion; one of ``STRENGTHS`` that there is room for, at random, when None.

    Raises:
        ValueError: If there seems to be no room for the motion.
    """
    assert description.motion is not None
    motion = MOTIONS[description.motion]
    for _ in range(MAX_TRIES):
        scene = draw_scene(rng, description, sizes=CLIP_SIZES)
        motions = (motion, *[None] * (len(scene.items) - 1))
        clip = Clip(scene, motions, strength or draw_strength(rng))
        if _is_legal(clip.at(0.0)) and _is_legal(clip.at(0.5)) and _is_legal(clip.at(1.0)):
            return clip
    raise ValueError(
        f"no clip of {description} at strength {strength or list(STRENGTHS)} in {MAX_TRIES} tries"
    )


def draw_strength(rng: np.random.Generator) -> float:
    """Draw one of ``STRENGTHS``."""
    return float(rng.choice(list(STRENGTHS), p=list(STRENGTHS.values())))


def _is_legal(scene: Scene) -> bool:
    """Whether everything is inside the picture, of a size to see, and apart."""
    items = scene.items
    inside = all(
        MARGIN + item.radius <= position <= 1 - MARGIN - item.radius
        for item in items
        for position in item.center
    )
    sized = all(0.09 <= item.radius <= 0.32 for item in items)
    apart = all(
        math.dist(a.center, b.center) > a.radius + b.radius + GAP / 2
        for index, a in enumerate(items)
        for b in items[:index]
    )
    return inside and sized and apart
