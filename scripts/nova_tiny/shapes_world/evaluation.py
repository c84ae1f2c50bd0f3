"""What evaluations ask of a model, and whether it drew that.

Shapes: F frames, S side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np
from numpy import ndarray

from shapes_world.detection import ANGLES, detect
from shapes_world import scenes

IDENTITY_SHARE = 0.9  # of the frames that must show the shapes of the prompt
MIN_SHIFT = 0.12  # of the picture, to count as moving
MIN_GROWTH = 1.1
MIN_TURN = math.radians(20)


@dataclass(frozen=True)
class Verdict:
    """How a drawing fits its prompt.

    Attributes:
        content: Whether the picture, or the first frame, shows what was asked for.
        agreement: Share of the frames that show the shapes of the prompt; None for pictures.
        identity: Whether nearly all frames do; None for pictures.
        motion: Whether the first shape moves as asked; None for pictures.
    """

    content: bool
    agreement: float | None = None
    identity: bool | None = None
    motion: bool | None = None

    @property
    def is_right(self) -> bool:
        """Whether everything is as asked."""
        return all(part is not False for part in (self.content, self.identity, self.motion))


def enumerate_descriptions(category: str) -> list[scenes.Description]:
    """Everything that an evaluation may ask for in a category."""
    mentions = [scenes.Mention(shape) for shape in scenes.SHAPES]
    colored = [scenes.Mention(shape, color) for shape, color in product(scenes.SHAPES, scenes.COLORS)]
    match category:
        case "single":
            return [scenes.Description((mention,)) for mention in mentions]
        case "colors":
            return [scenes.Description((mention,)) for mention in colored]
        case "two":
            return [scenes.Description(pair) for pair in permutations(mentions, 2)]
        case "position":
            pairs = permutations(mentions, 2)
            return [scenes.Description(p, relation=name) for p, name in product(pairs, scenes.RELATIONS)]
        case "counting":
            counts = range(2, scenes.MAX_COUNT + 1)
            return [scenes.Description((m,), count=n) for m, n in product(mentions + colored, counts)]
        case "attribution":
            pairs = permutations(colored, 2)
            return [
                scenes.Description((first, second))
                for first, second in pairs
                if first.shape != second.shape and first.color != second.color
            ]
    raise ValueError(f"unknown category {category!r}")


def select_descriptions(
    category: str, held_out: bool, number: int, seed: int, is_clip: bool = False
) -> list[scenes.Description]:
    """Draw descriptions of a category without replacement, and again when all were drawn.

    Args:
        category: One of ``CATEGORIES``, or of ``CLIP_CATEGORIES``.
        held_out: Whether to take combinations that training never saw.
        number: How many.
        seed: Of the random choice.
        is_clip: Whether they get motions.

    Returns:
        The descriptions; none if the category has none.
    """
    known = [d for d in enumerate_descriptions(category) if d.is_held_out == held_out]
    if is_clip:
        known = [replace(d, motion=m) for d, m in product(known, scenes.MOTIONS) if can_show(d, m)]
    if not known:
        return []
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(len(known)) for _ in range(math.ceil(number / len(known)))]
    return [known[index] for index in np.concatenate(rounds)[:number]]


def can_show(description: scenes.Description, motion: str) -> bool:
    """Whether the first shape's motion can be seen."""
    return motion != "turning" or description.mentions[0].shape not in scenes.ROUND


def judge(description: scenes.Description, frames: Sequence[ndarray] | ndarray) -> Verdict:
    """Compare what was drawn with what was asked for.

    Args:
        description: What was asked for.
        frames: One picture or the frames of a clip, each (S, S, 3) of uint8.
    """
    found = [detect(frame).items for frame in frames]
    content = description.fulfilled_by(found[0])
    if description.motion is None:
        return Verdict(content)
    agreement = float(np.mean([description.fulfilled_by(items) for items in found]))
    path = follow(description.mentions[0], found)
    return Verdict(
        content,
        agreement=agreement,
        identity=agreement >= IDENTITY_SHARE,
        motion=name_motion(path) == description.motion,
    )


def follow(mention: scenes.Mention, found: Sequence[Sequence[scenes.Item]]) -> list[scenes.Item]:
    """The shape that a mention means, in every frame where it was found."""
    matches = [[item for item in items if mention.admits(item)] for items in found]
    return [items[0] for items in matches if items]


def name_motion(path: Sequence[scenes.Item]) -> str | None:
    """The motion that describes best what a shape did; None if it stood still or got lost."""
    if len(path) < 2:
        return None
    way = [end - start for start, end in zip(path[0].center, path[-1].center, strict=True)]
    growth = path[-1].radius / path[0].radius
    turn = measure_turn(path)
    if math.hypot(*way) > MIN_SHIFT:
        moving = {name: m.shift for name, m in scenes.MOTIONS.items() if any(m.shift)}
        return max(moving, key=lambda name: float(np.dot(way, moving[name])))
    if max(growth, 1 / growth) > MIN_GROWTH:
        return "growing" if growth > 1 else "shrinking"
    return "turning" if turn > MIN_TURN else None


def measure_turn(path: Sequence[scenes.Item]) -> float:
    """Angle by which a shape turned in all, clockwise; steps are the smallest that fit."""
    period = math.radians(ANGLES[path[0].shape])
    steps = (end.angle - start.angle for start, end in zip(path, path[1:], strict=False))
    return sum((step + period / 2) % period - period / 2 for step in steps)
