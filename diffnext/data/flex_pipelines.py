"""Example pipelines: from a decoded record to its part of a batch."""

import functools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from diffnext.data.flex_transforms import ParseAnnotations, ParseLatents
from diffnext.data.record_format import RecordError


class Worker(ABC):
    """The example pipeline of a loader.

    Random choices are drawn from a generator of their own for each position of the stream of
    examples, so neither the number of processes nor a restart changes them.

    Attributes:
        seed: Seed of the random choices.
    """

    seed: int = 1337

    @abstractmethod
    def get_outputs(
        self, inputs: Mapping[str, Any], uniform: Callable[[], float] | None = None
    ) -> dict[str, list[Any]]:
        """Transform one example; see ``FeaturePipe.get_outputs``."""

    def process(self, example: Mapping[str, Any], position: int) -> dict[str, list[Any]]:
        """Transform the example that is number ``position`` of the stream."""
        return self.get_outputs(example, random.Random((self.seed << 64) + position).random)


class FeaturePipe:
    """Transforms cached latents, captions and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.parse_latents = ParseLatents()
        self.parse_annotations = ParseAnnotations()

    def get_outputs(
        self, inputs: Mapping[str, Any], uniform: Callable[[], float] | None = None
    ) -> dict[str, list[Any]]:
        """Transform one example.

        Args:
            inputs: Decoded record; see ``flex_transforms``. ``flow`` is its motion strength.
            uniform: Source of numbers in [0, 1), NumPy's global generator by default.

        Returns:
            Lists of one element: ``latents`` (array), ``prompt`` (label, or else caption) and, if
            the example has a flow, ``motion_flow`` (float).

        Raises:
            ValueError: If the example lacks latents, or both caption and label, an array does not
                fill its shape, or the flow is not finite.
        """
        latents = self.parse_latents(inputs)
        label, caption = self.parse_annotations(inputs, uniform)
        outputs: dict[str, list[Any]] = {
            "latents": [latents],
            "prompt": [caption if label is None else label],
        }
        if "flow" in inputs:
            if not math.isfinite(inputs["flow"]):
                raise ValueError(f"'flow' must be a finite number, got {inputs['flow']}")
            outputs["motion_flow"] = [inputs["flow"]]
        return outputs


class FeatureWorker(FeaturePipe, Worker):
    """Example pipeline of ``FeatureDataLoader``."""


def all_outputs(example: Mapping[str, Any], name: str) -> list[dict[str, list[Any]]]:
    """Everything that training may make of an example: with the short caption, and the long one.

    Args:
        example: Decoded record.
        name: What messages call the example.

    Raises:
        RecordError: If it lacks something or an array does not fill its shape.
    """
    pipe = FeaturePipe()
    try:
        return [pipe.get_outputs(example, functools.partial(float, draw)) for draw in (0.0, 0.9)]
    except (LookupError, TypeError, ValueError) as error:
        raise RecordError(f"{name}: {error}") from error
