"""Transforms of decoded records: latents, labels and captions.

Keys of an example:

    moments   bytes   VAE posterior mean and log-variance, float16, C order
    codes     bytes   VQ codes, int32, C order; used only if there are no moments
    shape     ints    shape of that array, without a batch dimension
    caption   str, or {"data": bytes, "shape": ints}: cached text states, float16, (L, D)
    text      the same, for a short caption; optional, may be empty
    label     int     class; optional
    flow      float   motion strength; optional
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from diffnext.data.record_format import Descriptor, RecordError

Caption: TypeAlias = str | np.ndarray

STATES: dict[str, Descriptor] = {"data": "BYTES", "shape": ["INT64"]}
FEATURE_TYPES: dict[str, list[Descriptor]] = {
    "moments": ["BYTES"],
    "codes": ["BYTES"],
    "shape": [["INT64"]],
    "caption": ["STRING", STATES],
    "text": ["STRING", STATES],
    "label": ["INT64"],
    "flow": ["FLOAT32", "INT64"],
}
MAX_DIMENSIONS = 8
LATENT_DTYPES: dict[str, np.dtype] = {"moments": np.dtype(np.float16), "codes": np.dtype(np.int32)}
TEXT_DTYPE = np.dtype(np.float16)
FIRST_SENTENCE = re.compile(r".*?[.!?](?=\s)")  # the dot stops at the end of the first line


def check_features(features: Mapping[str, Descriptor], name: str) -> None:
    """Check that the features of a dataset have the types that the transforms read.

    Args:
        features: Normalized descriptor.
        name: What messages call the dataset.

    Raises:
        RecordError: If a feature has another type.
    """
    for feature, allowed in FEATURE_TYPES.items():
        kind = features.get(feature)
        if kind is None or kind in allowed:
            continue
        if isinstance(kind, dict) and STATES in allowed and STATES.items() <= kind.items():
            continue
        expected = " or ".join(map(str, allowed))
        raise RecordError(f"{name}: feature {feature!r} must be {expected}, got {kind!r:.80}")


class Transform:
    """Base of the transforms."""

    @staticmethod
    def filter_outputs(*outputs: Any) -> Any:
        """Drop every None; return a single value as it is, several as a list."""
        kept = [output for output in outputs if output is not None]
        return kept[0] if len(kept) == 1 else kept


class ParseLatents(Transform):
    """Turns the bytes of ``moments``, or else of ``codes``, into an array."""

    def __call__(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Return the latents.

        Returns:
            Read-only view of the bytes in the shape of ``inputs["shape"]``; float16 moments or
            int32 codes.

        Raises:
            ValueError: If there are no latents or no shape, or the bytes do not fill the shape.
        """
        for name, dtype in LATENT_DTYPES.items():
            if name in inputs:
                if "shape" not in inputs:
                    raise ValueError(f"an example with {name!r} needs a 'shape'")
                return _view_array(name, inputs[name], inputs["shape"], dtype)
        raise ValueError(f"an example needs 'moments' or 'codes', got {sorted(inputs)}")


class ParseAnnotations(Transform):
    """Chooses between the long and the short caption, and finds the label.

    Args:
        short_prob: Probability of the short caption.
    """

    def __init__(self, short_prob: float = 0.5) -> None:
        self.short_prob = short_prob

    def __call__(
        self, inputs: Mapping[str, Any], uniform: Callable[[], float] | None = None
    ) -> tuple[int | None, Caption | None]:
        """Return the label and the caption.

        Args:
            inputs: An example; see the module.
            uniform: Source of numbers in [0, 1), NumPy's global generator by default. It is asked
                only if there is a choice: once, and never for a text caption beside a label.

        Returns:
            The label or None, and the caption: text, cached states (L, D), or None.

        Raises:
            ValueError: If there is neither a caption nor a label, or cached states do not fill
                their shape.
        """
        label = inputs.get("label")
        caption = inputs.get("caption")
        if caption is None and label is None:
            raise ValueError(f"an example needs a 'caption' or a 'label', got {sorted(inputs)}")
        uniform = np.random.random_sample if uniform is None else uniform
        if isinstance(caption, Mapping):
            return label, self._choose_states(caption, inputs.get("text"), uniform)
        if caption is None or label is not None:
            return label, caption
        return None, self._choose_text(caption, inputs.get("text"), uniform)

    def _choose_states(
        self, caption: Mapping[str, Any], text: Any, uniform: Callable[[], float]
    ) -> np.ndarray:
        has_text = isinstance(text, Mapping) and len(text.get("data", b"")) > 0
        if has_text and uniform() < self.short_prob:
            return _view_array("text", text["data"], text["shape"], TEXT_DTYPE)
        return _view_array("caption", caption["data"], caption["shape"], TEXT_DTYPE)

    def _choose_text(self, caption: str, text: Any, uniform: Callable[[], float]) -> str:
        has_text = isinstance(text, str) and len(text) > 0
        short_caption = text if has_text else first_sentence(caption)
        if short_caption and uniform() < self.short_prob:
            return short_caption
        return caption


def first_sentence(caption: str) -> str:
    """The short caption of an example that has none: the first sentence, or all of it."""
    match = FIRST_SENTENCE.match(caption)
    return match.group() if match else caption


def _view_array(name: str, data: bytes, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    if not 1 <= len(shape) <= MAX_DIMENSIONS or min(shape) < 0:
        raise ValueError(
            f"{name!r} must have a shape of 1 to {MAX_DIMENSIONS} sizes, none negative, got "
            f"{shape!r:.80}"
        )
    expected_bytes = math.prod(shape) * dtype.itemsize
    if len(data) != expected_bytes:
        raise ValueError(
            f"{name!r} of shape {tuple(shape)} must be stored as {dtype.name}, "
            f"{expected_bytes} bytes, but has {len(data)} bytes"
        )
    return np.frombuffer(data, dtype).reshape(shape)
