"""One model that draws for many visitors, one at a time.

Shapes: B samples, F frames, H W pixels.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.pipeline_utils import cosine_set_sizes
from diffnext.version import __version__

__all__ = ["MAX_SEED", "DrawRequest", "Stopped", "Studio", "choose_seed"]

MAX_SEED = 2**31 - 1
MAX_PROMPT_LENGTH = 2000  # characters; models read 256 tokens at most

Report = Callable[[int, int, str], None]


class Stopped(Exception):
    """The visitor stopped the drawing."""


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """What a visitor asks for, by the names of the pipeline's arguments.

    Attributes:
        prompt: What to draw.
        negative_prompt: What to avoid; may be empty.
        guidance_scale: Weight of the prompt.
        num_inference_steps: Sets of tokens a frame.
        num_diffusion_steps: Denoising steps a set.
        max_latent_length: Latent frames; 1 is a picture.
        motion_flow: Motion strength of videos; None for pictures.
        image: First frame, (H, W, 3) uint8 of the model's size, or None.

    Raises:
        ValueError: If there is no prompt, or it is too long.
    """

    prompt: str
    negative_prompt: str
    guidance_scale: float
    num_inference_steps: int
    num_diffusion_steps: int
    max_latent_length: int = 1
    motion_flow: float | None = None
    image: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("The prompt is empty.")
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative_prompt)):
            if len(text) > MAX_PROMPT_LENGTH:
                raise ValueError(
                    f"The {name} must have at most {MAX_PROMPT_LENGTH} characters, got {len(text)}."
                )

    def pipeline_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline."""
        arguments: dict[str, Any] = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "guidance_scale": self.guidance_scale,
            "num_inference_steps": self.num_inference_steps,
            "num_diffusion_steps": self.num_diffusion_steps,
            "max_latent_length": self.max_latent_length,
        }
        if self.motion_flow is not None:
            arguments["motion_flow"] = self.motion_flow
        if self.image is not None:
            arguments["image"] = self.image
        return arguments


class Studio:
    """Draws with one pipeline, for one visitor after the other.

    Args:
        pipe: The pipeline.
        model_name: For the files.
        output_dir: Folder that results are written to.
    """

    def __init__(self, pipe: NOVAPipeline, model_name: str, output_dir: Path) -> None:
        self.pipe = pipe
        self.model_name = model_name
        self.output_dir = output_dir
        self._pipe_lock = threading.Lock()
        self._stops: dict[str, threading.Event] = {}

    @property
    def pixel_size(self) -> tuple[int, int]:
        """Height and width of what the model draws."""
        size = self.pipe.transformer.config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def draw(
        self, visitor: str, request: DrawRequest, seeds: Sequence[int], report: Report
    ) -> np.ndarray:
        """Draw a sample for each seed; it depends on its own seed alone.

        Args:
            visitor: Who may stop it.
            request: What to draw.
            seeds: One a sample.
            report: Called as ``report(done, total, text)`` after each set of tokens.

        Returns:
            uint8 (B, H, W, 3) of a model of pictures, (B, F, H, W, 3) of a model of videos.

        Raises:
            Stopped: If the visitor stopped it.
            ValueError: If the model cannot do what is asked for.
        """
        stop = threading.Event()
        self._stops[visitor] = stop
        try:
            with self._pipe_lock:
                if stop.is_set():
                    raise Stopped
                samples = self._run(request, seeds, report, stop)
        finally:
            self._stops.pop(visitor, None)
        if stop.is_set():
            raise Stopped
        return samples

    def stop(self, visitor: str) -> None:
        """End the visitor's drawing after its current set of tokens, if there is one."""
        stop = self._stops.get(visitor)
        if stop is not None:
            stop.set()

    def close(self) -> None:
        """Stop all drawings and wait for the end of the one in progress."""
        for stop in list(self._stops.values()):
            stop.set()
        with self._pipe_lock:
            pass

    def _run(
        self, request: DrawRequest, seeds: Sequence[int], report: Report, stop: threading.Event
    ) -> np.ndarray:
        device = self.pipe._execution_device
        sets = self._sets_per_frame(request.num_inference_steps)
        total = sets * request.max_latent_length

        def follow(pipe: NOVAPipeline, step: int, frame: int, tensors: dict) -> dict:
            report(step + 1, total, f"latent frame {frame + 1} of {request.max_latent_length}")
            if stop.is_set():
                pipe._interrupt = True
            return {}

        result = self.pipe(
            **request.pipeline_arguments(),
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator(device).manual_seed(seed) for seed in seeds],
            output_type="np",
            disable_progress_bar=True,
            callback_on_step_end=follow,
        )
        return result["images"] if "images" in result else result["frames"]

    def _sets_per_frame(self, num_inference_steps: int) -> int:
        """Sets that hold a token: small frames have less of them than steps."""
        num_tokens = int(np.prod(self.pipe.transformer.config.image_base_size))
        return int(np.count_nonzero(cosine_set_sizes(num_inference_steps, num_tokens)))

    def describe(self, request: DrawRequest, seed: int) -> dict[str, Any]:
        """What one sample was made with, for its file.

        A picture that the video began with is named by the SHA-256 of its pixels.
        """
        parameters = request.pipeline_arguments()
        image = parameters.pop("image", None)
        if image is not None:
            parameters["image_sha256"] = hashlib.sha256(image.tobytes()).hexdigest()
        return {
            **parameters,
            "seed": seed,
            "model": self.model_name,
            "precision": str(self.pipe.dtype).removeprefix("torch."),
            "software": f"diffnext {__version__}",
        }

    def new_file(self, seed: int, suffix: str) -> Path:
        """An empty file, of a name of its own, for a result."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix, f"nova-{seed}-", self.output_dir)
        os.close(handle)
        return Path(name)


def choose_seed(seed: int, randomize_seed: bool) -> int:
    """The visitor's seed, or one by lot."""
    return int(np.random.default_rng().integers(MAX_SEED)) if randomize_seed else int(seed)
