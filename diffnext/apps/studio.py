"""One model that draws for many visitors, one drawing after the other.

Shapes: B samples, C latent channels, h w latent size, F frames, H W pixels.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from pydantic import dataclasses as checked
from torch import Tensor

from diffnext.models.text_encoders.encoding import count_tokens
from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.pipeline_utils import cosine_set_sizes
from diffnext.utils.arguments import CHECKED, AtLeastOne, Finite
from diffnext.version import __version__

__all__ = ["DrawRequest", "Drawing", "Snapshot", "Studio"]

MAX_WAITING = 20
PREVIEW_PAUSE = 0.3  # seconds
PREVIEW_SHARE = 4  # drawing takes at least this many times as long as previews
NOT_DRAWN = 0.8  # light grey, where pixels are -1 to 1


@checked.dataclass(frozen=True, kw_only=True, config=CHECKED)
class DrawRequest:
    """What a visitor asks for, by the names of the pipeline's arguments.

    Attributes:
        prompt: What to draw.
        negative_prompt: What to avoid; may be empty.
        guidance_scale: Weight of the prompt.
        num_inference_steps: Sets of tokens per frame.
        num_diffusion_steps: Denoising steps per set.
        max_latent_length: Latent frames; 1 is a picture.
        motion_flow: Motion strength of videos; None for pictures.
        image: First frame, (H, W, 3) uint8 of the model's size, or None.
    """

    prompt: str
    negative_prompt: str
    guidance_scale: Finite
    num_inference_steps: AtLeastOne
    num_diffusion_steps: AtLeastOne
    max_latent_length: AtLeastOne = 1
    motion_flow: Finite | None = None
    image: np.ndarray | None = None

    def pipeline_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The progress of a drawing.

    Attributes:
        ahead: Drawings that come before it.
        done: Sets of tokens that are drawn, of all frames.
        total: Sets of tokens of the whole drawing.
        clips: What there is to see, uint8 (B, F, H, W, 3); None if nothing is new. Tokens that
            are not drawn yet are grey.
        seconds_left: About how long it takes from here; None if that is not known yet.
    """

    ahead: int = 0
    done: int = 0
    total: int = 0
    clips: np.ndarray | None = None
    seconds_left: float | None = None


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The result of a request.

    Attributes:
        done: Sets of tokens that are drawn, of all frames.
        total: As many as were asked for; more than ``done`` if it was stopped.
        clips: uint8 (B, F, H, W, 3).
    """

    done: int
    total: int
    clips: np.ndarray


@dataclass(eq=False)
class Job:
    """A drawing that waits or is in progress.

    Attributes:
        visitor: Who may stop it.
        stop: Set to end it.
        news: Its snapshots, then None.
        future: The work itself.
    """

    visitor: str
    stop: threading.Event = field(default_factory=threading.Event)
    news: SimpleQueue[Snapshot | Drawing | None] = field(default_factory=SimpleQueue)
    future: Future[None] = field(default_factory=Future)


class Studio:
    """Draws with one pipeline, for one visitor after the other.

    Args:
        pipe: The pipeline.
        model_name: For the files.

    Raises:
        ValueError: If the pipeline lacks a component.
    """

    def __init__(self, pipe: NOVAPipeline, model_name: str) -> None:
        missing = [name for name, part in pipe.components.items() if part is None]
        if missing:
            raise ValueError(f"{model_name} has no {' and no '.join(missing)} to draw with")
        self.pipe = pipe
        self.model_name = model_name
        self._worker = ThreadPoolExecutor(1, "studio")
        self._jobs: list[Job] = []  # the first one is in progress
        self._lock = threading.Lock()

    @property
    def pixel_size(self) -> tuple[int, int]:
        """Height and width of what the model draws."""
        size = self.pipe.transformer.config["image_size"]
        return (size, size) if isinstance(size, int) else tuple(size)

    def count_tokens(self, text: str, name: str = "prompt") -> int:
        """Tokens of a prompt.

        Args:
            text: The prompt.
            name: For the message.

        Raises:
            ValueError: If the prompt is longer than the model reads.
        """
        count = count_tokens(self.pipe.tokenizer, text, self.pipe.text_encoder)
        most = self.pipe.tokenizer_max_length
        if most is not None and count > most:
            raise ValueError(f"The {name} has {count} tokens, the model reads {most}: shorten it.")
        return count

    def draw(
        self, visitor: str, request: DrawRequest, seeds: Sequence[int]
    ) -> Iterator[Snapshot | Drawing]:
        """Draw a sample for each seed; it depends on its own seed alone.

        Args:
            visitor: Who may stop it.
            request: What to draw.
            seeds: One per sample.

        Yields:
            Snapshots of its progress, and the result last; there is none if it was stopped while
            it waited.

        Raises:
            ValueError: If the model cannot draw this, or too many visitors are waiting.
        """
        if not request.prompt.strip():
            raise ValueError("The prompt is empty.")
        self.count_tokens(request.prompt)
        self.count_tokens(request.negative_prompt, "negative prompt")
        job = Job(visitor)
        with self._lock:
            if len(self._jobs) > MAX_WAITING:
                raise ValueError(f"{MAX_WAITING} others are waiting: please try again later.")
            job.news.put(Snapshot(ahead=len(self._jobs)))
            self._jobs.append(job)
            job.future = self._worker.submit(self._run, job, request, seeds)
        job.future.add_done_callback(lambda _: self._leave(job))
        try:
            while (snapshot := job.news.get()) is not None:
                yield snapshot
        finally:
            job.stop.set()
        if not job.future.cancelled():
            job.future.result()  # raises what went wrong

    def stop(self, visitor: str) -> None:
        """Take the visitor's drawing out of the queue, or end it after its current set."""
        for job in list(self._jobs):
            if job.visitor == visitor:
                job.stop.set()
                job.future.cancel()

    def close(self) -> None:
        """Stop all drawings and wait for the end of the one in progress."""
        for job in list(self._jobs):
            job.stop.set()
        self._worker.shutdown(cancel_futures=True)

    def _leave(self, job: Job) -> None:
        """End a job, and tell the others that they are one place nearer."""
        with self._lock:
            begin = self._jobs.index(job)
            self._jobs.remove(job)
            for ahead in range(begin, len(self._jobs)):
                self._jobs[ahead].news.put(Snapshot(ahead=ahead))
        job.news.put(None)

    def _run(self, job: Job, request: DrawRequest, seeds: Sequence[int]) -> None:
        if job.stop.is_set():
            return
        device = self.pipe._execution_device
        num_tokens = int(np.prod(self.pipe.transformer.config["image_base_size"]))
        sizes = cosine_set_sizes(request.num_inference_steps, num_tokens)
        sets = int(np.count_nonzero(sizes))  # small frames have fewer of them than steps
        total = sets * request.max_latent_length
        times: list[float] = []
        last = Snapshot()
        next_preview = 0.0

        def follow(pipe: NOVAPipeline, step: int, frame: int, tensors: dict[str, Tensor]) -> None:
            nonlocal last, next_preview
            done = step + 1
            clips = left = None
            times.append(time.monotonic())
            if len(times) > 1:
                left = (times[-1] - times[0]) / (len(times) - 1) * (total - done)
            if job.stop.is_set():
                pipe._interrupt = True
            if times[-1] >= next_preview or (job.stop.is_set() and frame == 0):
                clips = self._preview(tensors["latents"])
                end = time.monotonic()
                next_preview = end + max(PREVIEW_PAUSE, PREVIEW_SHARE * (end - times[-1]))
            last = Snapshot(done=done, total=total, clips=clips, seconds_left=left)
            job.news.put(last)

        pixels = self.pipe(
            **request.pipeline_arguments(),
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator(device).manual_seed(seed) for seed in seeds],
            output_type="np",
            disable_progress_bar=True,
            callback_on_step_end=follow,
            return_dict=False,
        )[0]
        clips = pixels[:, None] if pixels.ndim == 4 else pixels
        if last.done < sets and last.clips is not None:  # stopped in the first frame
            clips = last.clips
        job.news.put(Drawing(done=last.done, total=total, clips=clips))

    def _preview(self, latents: Tensor) -> np.ndarray:
        """The frame being drawn, by itself: latents (B, C, h, w) to uint8 (B, 1, H, W, 3)."""
        hidden = (latents == 0).all(dim=1, keepdim=True).float()
        pixels = self.pipe.image_processor.decode_latents(self.pipe.vae, latents)  # (B, 3, H, W)
        hidden = torch.nn.functional.interpolate(hidden, list(pixels.shape[-2:]))
        pixels = pixels.masked_fill(hidden.bool(), NOT_DRAWN)
        return self.pipe.image_processor.postprocess(pixels, "np")[:, None]

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
