"""What the generating pipelines share: one run of the model, callbacks, decoding.

Shapes: B samples, C latent channels, T latent frames, h w latent size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from torch import Tensor

from diffnext.image_processor import OUTPUT_TYPES, VaeImageProcessor
from diffnext.models.autoencoders.modeling_utils import TilingMixin
from diffnext.models.autoencoders.tiling import Tile
from diffnext.models.packed_linear import prepack_linears
from diffnext.models.quantization import quantize_blocks
from diffnext.models.transformers.transformer_3d import GenerationMonitor
from diffnext.pipelines.pipeline_utils import NOVAPipelineOutput, cosine_set_sizes
from diffnext.schedulers.denoising_run import check_scheduler, predicts_flow

__all__ = ["GenerationPipelineMixin", "StepCallback"]

logger = logging.getLogger(__name__)

StepCallback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]

# Arguments of the apps and evaluation scripts that are theirs alone.
_TOLERATED_ARGUMENTS = {"seed", "randomize_seed", "progress", "num_images"}


class PipelineMonitor(GenerationMonitor):
    """Hands every step to a callback of the user, and stops when the pipeline is interrupted.

    Args:
        pipeline: The running pipeline.
        steps_per_frame: Sets of tokens of a frame.
        callback: See ``callback_on_step_end``; None for nobody.
        tensor_inputs: Names of what it is given.
    """

    def __init__(
        self,
        pipeline: Any,
        steps_per_frame: int,
        callback: StepCallback | None,
        tensor_inputs: Sequence[str],
    ) -> None:
        self.pipeline = pipeline
        self.steps_per_frame = steps_per_frame
        self.callback = callback
        self.tensor_inputs = tensor_inputs

    @property
    def is_stopped(self) -> bool:
        """Whether the user interrupted the pipeline."""
        return self.pipeline.interrupt

    def on_step(self, frame: int, step: int, latents: Tensor) -> Tensor:
        """Call the user; what comes back as ``latents`` replaces the frame."""
        if self.callback is None:
            return latents
        given = {"latents": latents} if "latents" in self.tensor_inputs else {}
        index = frame * self.steps_per_frame + step
        return (self.callback(self.pipeline, index, frame, given) or {}).get("latents", latents)


class GenerationPipelineMixin(CogVideoXLoraLoaderMixin):
    """Runs the model of a pipeline and decodes what it made.

    The methods for low-rank adapters (``load_lora_weights``, ``fuse_lora``, ...) are diffusers'
    own: those for any pipeline whose one trained component is called ``transformer``.
    """

    _callback_tensor_inputs = ["latents"]

    def _setup_generation(self) -> None:
        """Set what every generating pipeline has, at the end of its constructor."""
        self.image_processor = VaeImageProcessor()
        self.guidance_scale = 5.0
        self._interrupt = False
        self._first_scheduler = self.scheduler
        if self.transformer is not None:
            self.transformer.sample_scheduler = self.scheduler

    def compile(self, **options: Any) -> None:
        """Compile the model's blocks and its denoising step.

        The first samples then take minutes. It pays where launching operations is what takes the
        time: small batches on a GPU.

        Args:
            **options: Of ``torch.compile``, such as ``mode="reduce-overhead"`` for CUDA graphs.
        """
        self.transformer.compile_parts(**options)

    def prepack(self) -> None:
        """Lay out the model's weights for the processor: faster or not, by the processor's maker.

        Pictures stay the same up to rounding; the model takes twice its memory.

        Raises:
            ValueError: If the model is not of float32 on a CPU.
        """
        prepack_linears(self.transformer)

    def quantize(self, kind: str = "int8_dynamic") -> None:
        """Store the model's weights in a byte each, for good; pictures change a little.

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
        """Whether the run is to stop after its current step; callbacks set ``_interrupt``."""
        return self._interrupt

    def warn_unknown(self, names: set[str]) -> None:
        """Report arguments that nothing reads."""
        unknown = sorted(names - _TOLERATED_ARGUMENTS)
        if unknown:
            logger.warning("%s ignores unknown arguments: %s", type(self).__name__, unknown)

    def check_run(
        self, output_type: str, vae_batch_size: int, callback_on_step_end_tensor_inputs: Any
    ) -> None:
        """Check what every run needs.

        Raises:
            ValueError: If an argument or the scheduler cannot work.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        if vae_batch_size < 1:
            raise ValueError(f"vae_batch_size must be at least 1, got {vae_batch_size}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                "callback_on_step_end_tensor_inputs must be among "
                f"{self._callback_tensor_inputs}, got {sorted(unknown)}"
            )
        check_scheduler(self.scheduler)
        first = self._first_scheduler
        if first is not None and predicts_flow(first) != predicts_flow(self.scheduler):
            logger.warning(
                "%s is for models that predict the %s, but this one came with %s",
                type(self.scheduler).__name__,
                "flow" if predicts_flow(self.scheduler) else "noise",
                type(first).__name__,
            )

    def common_inputs(self, num_inference_steps: int, num_frames: int, is_silent: bool) -> dict:
        """Inputs of the model that every run has: the sets of tokens and the progress bars."""
        num_tokens = int(np.prod(self.transformer.config.image_base_size))
        return {
            "num_preds": cosine_set_sizes(num_inference_steps, num_tokens),
            "tqdm1": num_frames > 1 and not is_silent,
            "tqdm2": num_frames == 1 and not is_silent,
            "progress_bar_config": getattr(self, "_progress_bar_config", {}),
        }

    def start_run(
        self,
        inputs: dict[str, Any],
        callback: StepCallback | None,
        tensor_inputs: Sequence[str],
    ) -> dict[str, Any]:
        """Hand over the scheduler and forget interruptions; returns the inputs with a monitor."""
        self._interrupt = False
        self.transformer.sample_scheduler = self.scheduler
        steps = int(np.count_nonzero(inputs["num_preds"]))
        return {**inputs, "monitor": PipelineMonitor(self, steps, callback, tensor_inputs)}

    def generate(self, inputs: dict[str, Any]) -> Tensor:
        """Run the model.

        Returns:
            Latents, (B, C, T, h, w); fewer frames after an interruption, but a legal number.
        """
        x = self.transformer(inputs)["x"]
        if self.interrupt and isinstance(self.vae, TilingMixin):
            return x[:, :, : self.vae.legal_latent_length(x.size(2))]
        return x

    @torch.no_grad()
    def stream_frames(
        self, inputs: dict[str, Any], num_frames: int, vae_batch_size: int, output_type: str
    ) -> Iterator[Any]:
        """Run the model and decode each tile of the autoencoder once its latents exist.

        Args:
            inputs: Inputs of the model.
            num_frames: Latent frames T that will come.
            vae_batch_size: Samples decoded at once.
            output_type: As for the pipeline.

        Yields:
            The new frames of each tile, as the pipeline returns them.
        """
        frames = self.transformer.iterate_frames(inputs)
        held: list[Tensor] = []
        tiles = self._latent_tiles(num_frames)
        try:
            for index in range(len(tiles)):
                held.extend(self._frames_until(frames, tiles[index].end - len(held)))
                if self.interrupt:
                    tiles = self._latent_tiles(len(held), is_cut=True)[: len(tiles)]
                    if index >= len(tiles):
                        return
                tile = tiles[index]
                x = torch.stack(held[tile.start : tile.end], dim=2)
                yield self._present_tile(x, tile, vae_batch_size, output_type)
        finally:
            self.maybe_free_model_hooks()

    def _frames_until(self, frames: Iterator[Tensor], count: int) -> Iterator[Tensor]:
        """The next frames; each is made in a call of the model, which offload hooks see."""
        for _ in range(count):
            frame = self.transformer({"frames": frames})["x"]
            if frame is None:
                return
            yield frame

    def _latent_tiles(self, num_frames: int, is_cut: bool = False) -> list[Tile]:
        if not isinstance(self.vae, TilingMixin):
            return [Tile(0, num_frames, 0)]
        if is_cut:
            num_frames = self.vae.legal_latent_length(num_frames)
        return self.vae.latent_tiles(num_frames)

    def _present_tile(self, x: Tensor, tile: Tile, vae_batch_size: int, output_type: str) -> Any:
        if output_type == "latent":
            shared = self.vae.latent_ovr_t if isinstance(self.vae, TilingMixin) else 0
            return x[:, :, shared if tile.start else 0 :]
        x = self.image_processor.decode_latents(self.vae, x, vae_batch_size)
        x = x[:, :, tile.drop :] if x.ndim == 5 else x
        return self.image_processor.postprocess(x, output_type)

    def decode(self, x: Tensor, vae_batch_size: int, output_type: str) -> Tensor:
        """Pixels of latents, or the latents themselves when those are asked for."""
        if output_type == "latent":
            return x
        return self.image_processor.decode_latents(self.vae, x, vae_batch_size)

    def package(self, x: Tensor, name: str, output_type: str, return_dict: bool) -> Any:
        """Convert pixels and name them, or put them into a tuple."""
        result = self.image_processor.postprocess(x, output_type)
        return NOVAPipelineOutput(**{name: result}) if return_dict else (result,)
