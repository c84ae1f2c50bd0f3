"""Captions of descriptions, in varied wording."""

from __future__ import annotations

import numpy as np

from shapes_world.scenes import Description, Mention, choose

NUMBERS = ("no", "one", "two", "three", "four")
OPENINGS = (
    "{}",
    "{}",
    "a picture of {}",
    "an image of {}",
    "this picture shows {}",
    "there is {}",
    "a drawing of {}",
)
CLIP_OPENINGS = ("{}", "{}", "a video of {}", "a clip of {}", "this video shows {}")
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
BACKGROUND_WORDS = ("on a {} background", "before a {} background", "on {}")
MOTION_WORDS = {
    "moving left": ("moving left", "moving to the left", "sliding to the left"),
    "moving right": ("moving right", "moving to the right", "sliding to the right"),
    "moving up": ("moving up", "rising", "moving upwards"),
    "moving down": ("moving down", "falling", "moving downwards"),
    "turning": ("turning", "rotating", "turning around"),
    "growing": ("growing", "getting larger"),
    "shrinking": ("shrinking", "getting smaller"),
}


def write_prompt(description: Description) -> str:
    """The plain wording that evaluations ask with, such as "a red circle above a blue star"."""
    return _compose(description, relation=description.relation, motion=description.motion)


def write_caption(rng: np.random.Generator, description: Description) -> str:
    """Draw a wording that says everything, ending in a full stop."""
    relation = motion = None
    if description.relation is not None:
        relation = choose(rng, RELATION_WORDS[description.relation])
    if description.motion is not None:
        motion = choose(rng, MOTION_WORDS[description.motion])
    is_digit = rng.random() < 0.2
    phrase = _compose(description, relation, motion, is_digit)
    if description.background is not None:
        phrase += " " + choose(rng, BACKGROUND_WORDS).format(description.background)
    opening = choose(rng, OPENINGS if description.motion is None else CLIP_OPENINGS)
    if opening == "there is {}" and description.count > 1:
        opening = "there are {}"
    caption = opening.format(phrase)
    return caption[0].upper() + caption[1:] + "."


def _compose(
    description: Description,
    relation: str | None,
    motion: str | None,
    is_digit: bool = False,
) -> str:
    first = description.mentions[0]
    if description.count > 1:
        number = str(description.count) if is_digit else NUMBERS[description.count]
        phrase = f"{number} {_name(first, is_plural=True)}"
    else:
        phrase = _with_article(_name(first))
    if motion is not None:
        phrase += f" {motion}"
    if len(description.mentions) == 2:
        phrase += f" {relation or 'and'} {_with_article(_name(description.mentions[1]))}"
    return phrase


def _name(mention: Mention, is_plural: bool = False) -> str:
    words = [word for word in (mention.size, mention.color, mention.shape) if word]
    if is_plural:
        words[-1] += "es" if words[-1] == "cross" else "s"
    return " ".join(words)


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
