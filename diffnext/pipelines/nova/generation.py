"""What the generating pipelines share: a call from its arguments to pictures, clips or latents.

Shapes: B samples, n prompts, C latent channels, h w latent size, T latent frames, F frames, H W
pixels.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import fields, replace
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import diffusers
import numpy as np
import torch
from accelerate.hooks import CpuOffload
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor

from diffnext.image_processor import VaeImageProcessor, full_precision
from diffnext.models.autoencoders.modeling_utils import TilingMixin
from diffnext.models.autoencoders.tiling import Tile
from diffnext.models.packed_linear import prepack_linears
from diffnext.models.quantization import quantize_blocks
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.nova.adapters import AdapterLoading
from diffnext.pipelines.nova.arguments import CallArguments
from diffnext.pipelines.nova.sampling import (
    GenerationRequest,
    GenerationRun,
    check_fit,
    generate_frames,
    own_precision,
)
from diffnext.pipelines.pipeline_utils import NOVAPipelineOutput, PipelineMixin, cosine_set_sizes
from diffnext.schedulers.denoising_run import DenoisingRun, Generators, predicts_flow
from diffnext.utils.arguments import build_checked
from diffnext.utils.messages import naming

__all__ = ["GenerationPipeline"]

logger = logging.getLogger(__name__)

StepCallback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]

_RUNS: set[PipelineRun] = set()  # the drawings in progress
_CALLING_BACK: ContextVar[PipelineRun | None] = ContextVar("calling back", default=None)
_OFFLOADING = threading.RLock()  # held while weights are in use that hooks move


class _LastShifts(threading.local):
    """The shift that a thread's last call gave each pipeline, and the scheduler that it is for."""

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[GenerationPipeline, tuple[Any, float]] = WeakKeyDictionary()


_LAST_SHIFTS = _LastShifts()


class PipelineRun(GenerationRun):
    """A drawing of a pipeline, which a callback may follow and the user stop.

    Args:
        pipeline: The pipeline that draws.
        arguments: The call's arguments.
        flow_shift: Timestep shift in force.
        num_frames: Latent frames T.
        num_sets: Sets of tokens of a frame that hold any.
    """

    def __init__(
        self,
        pipeline: GenerationPipeline,
        arguments: CallArguments,
        flow_shift: float | None,
        num_frames: int,
        num_sets: int,
    ) -> None:
        is_shown = not arguments.disable_progress_bar
        super().__init__(
            DenoisingRun(pipeline.scheduler, arguments.num_diffusion_steps, flow_shift),
            arguments.generator,
            None if arguments.callback_on_step_end is None else self._call_back,
            show_frames=is_shown and num_frames > 1,
            show_sets=is_shown and num_frames == 1,
            bar_options=getattr(pipeline, "_progress_bar_config", None),
        )
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.vae = pipeline.vae
        self.num_frames = num_frames
        self.callback: StepCallback = arguments.callback_on_step_end or (lambda *_: None)
        self.tensor_inputs = arguments.callback_on_step_end_tensor_inputs
        self.num_sets = num_sets

    def _call_back(self, frame: int, step: int, latents: Tensor) -> Tensor:
        """Show the user a frame, (B, C, h, w); returns the frame to continue with."""
        given = {"latents": latents} if "latents" in self.tensor_inputs else {}
        token = _CALLING_BACK.set(self)
        try:
            index = frame * self.num_sets + step
            result = self.callback(self.pipeline, index, frame, given)
        finally:
            _CALLING_BACK.reset(token)
        result = {} if result is None else result
        if not isinstance(result, dict):
            raise TypeError(
                f"callback_on_step_end must return a dict or None, got {type(result).__name__}"
            )
        if result.keys() - {"latents"}:
            raise ValueError(f"callback_on_step_end may return only 'latents', got {list(result)}")
        changed = {"latents": latents, **given, **result}["latents"]
        wanted, got = (
            f"{tuple(one.shape)}, {one.dtype}, on {one.device}"
            if isinstance(one, Tensor)
            else type(one).__name__
            for one in (latents, changed)
        )
        if got != wanted:
            raise ValueError(f"callback_on_step_end must return 'latents' of {wanted}, got {got}")
        return changed


class GenerationPipeline(AdapterLoading, PipelineMixin):
    """Draws with NOVA, from texts or classes.

    Components are read at the moment of a call, and a call leaves nothing on them or here, so calls
    in several threads, and of pipelines that share components, do not affect each other.

    The methods for low-rank adapters (``load_lora_weights``, ``fuse_lora``, ...) come from
    :class:`~diffnext.pipelines.nova.adapters.AdapterLoading`.
    """

    _callback_tensor_inputs = ["latents"]

    transformer: NOVATransformer3DModel
    scheduler: Any
    vae: Any

    def _set_up(self) -> None:
        """Set what every generating pipeline has, at the end of its constructor."""
        self.image_processor = VaeImageProcessor()
        self._comes_with_flow = None if self.scheduler is None else predicts_flow(self.scheduler)

    # Settings

    def compile(self, cuda_graphs: bool = False, **options: Any) -> None:
        """Compile the image encoder's blocks and the denoising step.

        The first sample of every batch size, with and without guidance, then takes a while; later
        ones reuse its graphs for any prompt, seed and guidance scale. It pays where launching
        operations takes most of the time: small batches on a GPU.

        On a CPU, without options, drawings of at most 64 rows of tokens are traced instead, and
        then run without Python.

        Args:
            cuda_graphs: Also record them as CUDA graphs, which the host replays with one call each
                per set of tokens. Recording runs each of them three times, and buffers take
                memory.
            **options: Options of ``torch.compile``, such as ``mode="max-autotune-no-cudagraphs"``.

        Raises:
            ValueError: For options that cannot work, with the reason.
        """
        device = get_module_execution_device(self.transformer)
        if cuda_graphs and device.type != "cuda":
            raise ValueError(f"cuda_graphs=True needs a model on a GPU, this one is on {device}")
        self.transformer.compile_drawing(**options)
        if cuda_graphs:
            self.transformer.capture_drawing()

    def prepack(self) -> None:
        """Lay out the weights for the processor's matrix kernels; faster on some processors.

        Pictures stay the same up to rounding; the model takes twice its memory.

        Raises:
            ValueError: If the model is not in float32 on a CPU.
        """
        prepack_linears(self.transformer)

    def quantize(self, kind: str = "int8_dynamic") -> None:
        """Store each weight in a byte, which cannot be undone; pictures change a little.

        Args:
            kind: "int8_dynamic", "int8" or "float8"; see
                :func:`diffnext.models.quantization.quantize_blocks`.

        Raises:
            ValueError: If the kind is unknown.
            ImportError: If torchao is not installed.
        """
        quantize_blocks(self.transformer, kind)

    @property
    def interrupt(self) -> bool:
        """Whether this pipeline's drawing stops: in a callback its own, elsewhere any of them."""
        return any(run.is_stopped for run in self._current_runs())

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        """Stop drawings: in a callback its own, elsewhere all of this pipeline."""
        for run in self._current_runs():
            run.is_stopped = bool(value)

    def _current_runs(self) -> list[PipelineRun]:
        calling = _CALLING_BACK.get()
        if calling is not None and calling.pipeline is self:
            return [calling]
        return [run for run in list(_RUNS) if run.pipeline is self]

    # Drawing

    @contextmanager
    def _turn(self, transformer: NOVATransformer3DModel | None) -> Iterator[None]:
        """Let one call at a time use weights that hooks move; without hooks, nobody waits.

        Autocast is off inside for a model in half precision.

        Raises:
            RuntimeError: In a callback of a drawing that would lose its weights.
        """
        calling = _CALLING_BACK.get()
        if isinstance(getattr(calling and calling.transformer, "_hf_hook", None), CpuOffload):
            raise RuntimeError(
                "a callback cannot draw while whole models are offloaded, as the drawing that "
                "calls it needs its own: draw after it, or use enable_sequential_cpu_offload"
            )
        parts = self.components.values()
        is_offloaded = hasattr(self, "_offload_device") or any(
            hasattr(part, "_hf_hook") for part in parts
        )
        with (
            _OFFLOADING if is_offloaded else nullcontext(),
            nullcontext() if transformer is None else own_precision(transformer),
        ):
            yield

    @torch.no_grad()
    def draw(self, arguments: CallArguments) -> NOVAPipelineOutput | tuple[Any]:
        """Draw the pictures or videos of a call.

        Raises:
            ValueError: If arguments contradict each other or the model.
        """
        scheduler = self.scheduler
        with self._turn(self.transformer):
            try:
                frames, run = self.prepare(arguments)
                done = list(self._followed(frames, run))
                if run.is_stopped and isinstance(run.vae, TilingMixin):
                    done = done[: run.vae.legal_latent_length(len(done))]
                x = self._decode(torch.stack(done, dim=2), arguments, run.vae)
            finally:
                self.maybe_free_model_hooks()
        if arguments.flow_shift is not None:
            _LAST_SHIFTS.of[self] = (scheduler, arguments.flow_shift)
        result = self.image_processor.postprocess(x, arguments.output_type)
        if not arguments.return_dict:
            return (result,)
        return NOVAPipelineOutput(**{self._name_of(x): result})

    @torch.no_grad()
    def draw_pieces(self, arguments: CallArguments) -> Iterator[Any]:
        """Draw the video of a call, tile by tile of the autoencoder.

        Arguments are checked and prompts encoded right away; drawing begins with the first piece.

        Returns:
            An iterator over the new frames of each tile, in the form of ``output_type``.

        Raises:
            ValueError: If arguments contradict each other or the model.
        """
        with self._turn(self.transformer):
            frames, run = self.prepare(arguments)
        return self._pieces(arguments, frames, run)

    @torch.no_grad()
    def _pieces(
        self, arguments: CallArguments, frames: Iterator[Tensor], run: PipelineRun
    ) -> Iterator[Any]:
        held: list[Tensor] = []
        tiles = latent_tiles(run.vae, run.num_frames)
        try:
            with closing(self._followed(frames, run)) as followed:
                for index in range(len(tiles)):
                    with self._turn(run.transformer):
                        held.extend(islice(followed, tiles[index].end - len(held)))
                        if run.is_stopped:
                            tiles = latent_tiles(run.vae, len(held), is_cut=True)[: len(tiles)]
                            if index >= len(tiles):
                                return
                        piece = self._present(held, tiles[index], arguments, run.vae)
                    yield piece
                    if run.is_stopped:
                        return
        finally:
            with self._turn(run.transformer):
                self.maybe_free_model_hooks()

    @staticmethod
    def _followed(frames: Iterator[Tensor], run: PipelineRun) -> Generator[Tensor, None, None]:
        """The frames of a drawing, which can be interrupted while it lasts."""
        _RUNS.add(run)
        try:
            yield from frames
        finally:
            _RUNS.discard(run)

    def prepare(self, arguments: CallArguments) -> tuple[Iterator[Tensor], PipelineRun]:
        """Check a call, and encode its prompts and first frames.

        Returns:
            The latent frames, which are drawn as they are asked for, and the drawing.

        Raises:
            ValueError: If arguments contradict each other or the components.
        """
        num_frames = self.check_inputs(arguments)
        is_guided = arguments.guidance_scale > 1
        prompts = self._parse_prompts(arguments, is_guided)
        num_prompts = len(prompts) // (2 if is_guided else 1)
        samples = num_prompts * arguments.num_images_per_prompt
        sizes = cosine_set_sizes(
            arguments.num_inference_steps, int(np.prod(self.transformer.config["image_base_size"]))
        )
        flow_shift = arguments.flow_shift
        if flow_shift is None:  # this thread's last one, if it was for this scheduler
            scheduler, last = _LAST_SHIFTS.of.get(self, (None, None))
            flow_shift = last if scheduler is self.scheduler else None
        run = PipelineRun(self, arguments, flow_shift, num_frames, int(np.count_nonzero(sizes)))
        pixels = self._given_pixels(arguments)
        self._check_firsts(arguments, pixels, num_prompts, num_frames)
        has_motion = self.transformer.motion_embed is not None
        request = build_checked(
            GenerationRequest,
            {
                "latent_shape": (samples, *self.transformer.image_encoder.latent_shape),
                "num_preds": sizes,
                "max_latent_length": num_frames,
                "max_context_frames": arguments.max_context_frames,
                "motion_flow": arguments.motion_flow if has_motion else None,
                "fps": arguments.fps,
                "latents": arguments.latents or (),
                "guidance": arguments.guidance,
            },
        )
        check_fit(self.transformer, request, run)
        # Everything is checked: only now do the components begin to work.
        condition = self._encode_prompts(prompts, arguments.num_images_per_prompt)
        request = replace(request, prompt=condition)
        if pixels is not None:
            frames = self._encode_pixels(pixels, samples, arguments.generator)
            request = replace(request, latents=tuple(frames))
        return generate_frames(self.transformer, request, run), run

    def _parse_prompts(self, arguments: CallArguments, is_guided: bool) -> Any:
        """Checked prompts and, with guidance, those to avoid below them."""
        raise NotImplementedError

    def _encode_prompts(self, prompts: Any, num_images_per_prompt: int) -> Tensor:
        """What the model reads for parsed prompts, each of them repeated."""
        raise NotImplementedError

    # Checks

    def check_inputs(self, arguments: CallArguments) -> int:
        """Check the arguments against the components, before any work is done.

        Returns:
            The number of latent frames of the result.

        Raises:
            ValueError: Naming the rule and the value.
        """
        for name in ("transformer", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(f"the pipeline has no {name}: give it one to draw with")
        needs_vae = arguments.output_type != "latent" or self._has_pixels(arguments)
        if needs_vae and not all(hasattr(self.vae, name) for name in ("unscale_", "decode")):
            raise ValueError(
                "images and videos need an autoencoder of this package as vae, got "
                f"{type(self.vae).__name__}; output_type='latent' does without"
            )
        if arguments.image is not None and arguments.video is not None:
            raise ValueError("a video begins with an image or with a video, got both")
        if arguments.image is None and arguments.video is None:
            reason = "is for image or video, and none is given"
            check_unused(arguments, reason, "pixel_range", "resize_mode")
        for name, wanted in zip(("height", "width"), self._pixel_size(), strict=True):
            value = getattr(arguments, name)
            if value not in (None, wanted):
                raise ValueError(f"the model makes pictures of {name} {wanted}, got {value}")
        if self.transformer.motion_embed is None:
            reason = "is for models of videos, which this is not"
            check_unused(arguments, reason, "motion_flow", "fps", "max_context_frames")
        if self._comes_with_flow not in (None, predicts_flow(self.scheduler)):
            logger.warning(
                "%s is for models that predict the %s, but this one came with another kind",
                type(self.scheduler).__name__,
                "flow" if predicts_flow(self.scheduler) else "noise",
            )
        return self._check_length(arguments)

    def _check_length(self, arguments: CallArguments) -> int:
        length, num_frames = arguments.max_latent_length, arguments.num_frames
        if not self._makes_videos():
            asked = {
                "max_latent_length": length > 1,
                "num_frames": (num_frames or 1) > 1,
                "image": arguments.image is not None,
                "video": arguments.video is not None,
                "latents": bool(arguments.latents),
            }
            used = [name for name, is_used in asked.items() if is_used]
            if used:
                raise ValueError(
                    f"{used[0]} is for videos, but this is an image model: leave it out or use a "
                    "video checkpoint"
                )
            return 1
        if not isinstance(self.vae, TilingMixin):  # absent, or with unknown lengths
            if num_frames is not None:
                raise ValueError(
                    f"num_frames={num_frames} needs a video autoencoder of this package, not "
                    f"{type(self.vae).__name__}: use max_latent_length"
                )
            return length
        if num_frames is not None:
            with naming("num_frames"):
                wanted = self.vae.latent_length(num_frames)
            if length not in (1, wanted):
                raise ValueError(
                    f"num_frames={num_frames} is {wanted} latent frames, but max_latent_length "
                    f"is {length}: give one of them"
                )
            return wanted
        if arguments.output_type != "latent":
            with naming("max_latent_length"):
                self.vae.latent_tiles(length)
        return length

    @staticmethod
    def _has_pixels(arguments: CallArguments) -> bool:
        has_any = arguments.image is not None or arguments.video is not None
        return has_any and not arguments.latents

    def _makes_videos(self) -> bool:
        is_image_vae = isinstance(self.vae, diffusers.AutoencoderKL)
        return self.transformer.config["video_base_size"][0] > 1 and not is_image_vae

    def _pixel_size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        size = self.transformer.config["image_size"]
        return (size, size) if isinstance(size, int) else tuple(size)

    # First frames

    def _given_pixels(self, arguments: CallArguments) -> Tensor | None:
        """The picture or clip to begin with, (n, 3, H, W) or (n, 3, F, H, W), if there is one."""
        if not self._has_pixels(arguments):
            return None
        options = (*self._pixel_size(), arguments.resize_mode, arguments.pixel_range)
        if arguments.video is not None:
            return self.image_processor.preprocess_video(arguments.video, *options)
        return self.image_processor.preprocess(arguments.image, *options)

    def _check_firsts(
        self, arguments: CallArguments, pixels: Tensor | None, num_prompts: int, num_frames: int
    ) -> None:
        """Check that there are as many pictures as needed, and that they leave frames to draw."""
        name = "image" if arguments.video is None else "video"
        given = 0 if pixels is None else 1
        if arguments.latents:
            name, given = "latents", len(arguments.latents)
        elif pixels is not None and pixels.ndim == 5:
            with naming(name):
                given = self.vae.latent_length(pixels.size(2))
        if pixels is not None and len(pixels) not in (1, num_prompts):
            raise ValueError(
                f"{name} must be one for all prompts or one per prompt, got {len(pixels)} for "
                f"{num_prompts} prompts"
            )
        if given >= num_frames:
            raise ValueError(
                f"{name}: {given} latent frames are given, which leaves none of {num_frames} to "
                "draw: ask for a longer video"
            )

    def prepare_latents(
        self,
        image: Any = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Sequence[Tensor] | None = None,
        resize_mode: str = "crop",
    ) -> list[Tensor]:
        """The latent frames a video begins with: those given, the encoded image, or none.

        Args:
            image: As for :meth:`encode_image`.
            num_images_per_prompt: Samples to make of the image.
            generator: As for :meth:`encode_image`.
            latents: Scaled latent frames, (B, C, h, w) each.
            resize_mode: As for :meth:`encode_image`.
        """
        if latents is not None:
            return list(latents)
        if image is None:
            return []
        return [self.encode_image(image, num_images_per_prompt, generator, resize_mode)]

    @torch.no_grad()
    def encode_image(
        self,
        image: Any,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        resize_mode: str = "crop",
        pixel_range: tuple[float, float] | None = None,
    ) -> Tensor:
        """Pictures as a scaled latent frame.

        Args:
            image: One picture or several, see ``VaeImageProcessor.preprocess``.
            num_images_per_prompt: Samples to make of them, a multiple of their number.
            generator: Source of the posterior sample; with a list, each sample draws its own.
            resize_mode: What happens to pictures of another size than the model's.
            pixel_range: Values of black and white, see ``VaeImageProcessor.preprocess``.

        Returns:
            (num_images_per_prompt, C, h, w), the samples of one picture together.

        Raises:
            ValueError: If there are more pictures than samples, or they do not divide them.
        """
        size = self._pixel_size()
        pixels = self.image_processor.preprocess(image, *size, resize_mode, pixel_range)
        return self._encode_pixels(pixels, num_images_per_prompt, generator)[0]

    def _encode_pixels(
        self, pixels: Tensor, batch_size: int, generator: Generators
    ) -> list[Tensor]:
        """Scaled latent frames, (batch_size, C, h, w) each; pixels are repeated as needed."""
        repeats, rest = divmod(batch_size, len(pixels))
        if rest or repeats == 0:
            raise ValueError(
                f"num_images_per_prompt must be a multiple of the {len(pixels)} pictures, got "
                f"{batch_size}"
            )
        with full_precision(self.vae) as dtype:
            pixels = pixels.to(device=get_module_execution_device(self.vae), dtype=dtype)
            posterior = self.vae.encode(pixels).latent_dist
        if isinstance(generator, list):
            moments = posterior.parameters.repeat_interleave(repeats, dim=0)
            x = self.vae.scale_(self.vae.latent_dist(moments).sample(generator))
        else:
            x = self.vae.scale_(posterior.sample(generator)).repeat_interleave(repeats, dim=0)
        return list(x.unbind(2)) if x.ndim == 5 else [x]

    # Results

    def _present(
        self, held: Sequence[Tensor], tile: Tile, arguments: CallArguments, vae: Any
    ) -> Any:
        """The new frames of a tile, as the pipeline returns them."""
        x = torch.stack(list(held[tile.start : tile.end]), dim=2)
        if arguments.output_type == "latent":
            shared = vae.latent_ovr_t if isinstance(vae, TilingMixin) else 0
            return x[:, :, shared if tile.start else 0 :]
        x = self._decode(x, arguments, vae)
        x = x[:, :, tile.drop :] if x.ndim == 5 else x
        return self.image_processor.postprocess(x, arguments.output_type)

    def _decode(self, x: Tensor, arguments: CallArguments, vae: Any) -> Tensor:
        """Pixels of latents, or the latents themselves when those are asked for."""
        if arguments.output_type == "latent":
            return x
        return self.image_processor.decode_latents(vae, x, arguments.vae_batch_size)

    def _name_of(self, x: Tensor) -> str:
        """The field of the output that holds pixels or latents."""
        return "images" if x.ndim == 4 else "frames"


def check_unused(arguments: CallArguments, reason: str, *names: str) -> None:
    """Raise if an argument that nothing would use has another value than its default."""
    defaults = {field.name: field.default for field in fields(arguments)}
    for name in names:
        value = getattr(arguments, name)
        if value != defaults[name]:
            raise ValueError(f"{name}={value!r} {reason}")


def latent_tiles(vae: Any, num_frames: int, is_cut: bool = False) -> list[Tile]:
    """The tiles that latent frames are decoded in, one where the autoencoder has none.

    Args:
        vae: Any autoencoder, or None.
        num_frames: Latent frames.
        is_cut: Whether to leave out frames that do not fill a last tile.
    """
    if not isinstance(vae, TilingMixin):
        return [Tile(0, num_frames, 0)]
    return vae.latent_tiles(vae.legal_latent_length(num_frames) if is_cut else num_frames)
