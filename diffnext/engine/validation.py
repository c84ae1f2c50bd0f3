"""Looking at a run while it goes on: samples of fixed prompts, and the loss on held-out examples.

Samples go to ``<output_dir>/validation/step-<N>/``: ``raw`` and ``ema``, as ``.png`` or, for
videos, ``.mp4``; rows are prompts, columns are seeds. Nothing here moves the random states of the
run.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from diffnext.data.flex_loaders import FeatureDataLoader
from diffnext.data.records import RecordDataset, open_subset
from diffnext.engine.data_check import count_holdout
from diffnext.engine.engine_utils import manual_seed
from diffnext.engine.run_state import preserved_random_state
from diffnext.utils.config_schema import ValidationConfig
from diffnext.utils.export_utils import export_to_image, export_to_video

FOLDER = "validation"
MAX_BATCHES = 64  # of a process in one held-out loss
DATASET_PROMPTS = 4  # drawn when none are configured
GAP = 2  # pixels between the pictures of a grid


class Validator:
    """Validates a run at intervals.

    Args:
        config: Training configuration; its ``validation`` section has the settings.
        accelerator: Knows processes and trackers.
        pipeline: The training pipeline, whose components are used.
        logger: Where to report.
    """

    def __init__(
        self,
        config: DictConfig,
        accelerator: Accelerator,
        pipeline: Any,
        logger: logging.Logger | logging.LoggerAdapter,
    ) -> None:
        section = config.get("validation")
        options = OmegaConf.to_container(section, resolve=True) if section else {}
        self.options = ValidationConfig(**options)
        self.accelerator = accelerator
        self.pipeline = pipeline
        self.logger = logger
        self.dataset = config.train_dataloader.params.dataset
        self.batch_size = config.training.batch_size
        self.folder = Path(config.experiment.output_dir) / FOLDER
        self._vae: nn.Module | None = None

    def is_due(self, step: int) -> bool:
        """Whether to validate after so many steps."""
        return self.options.every is not None and step % self.options.every == 0

    def run(self, step: int, model: nn.Module, average: nn.Module | None) -> dict[str, float]:
        """Draw samples and compute the held-out loss; collective.

        Args:
            step: Completed steps.
            model: The model being trained, without wrappers.
            average: Its average, on the main process if there is one.

        Returns:
            The held-out losses by name.
        """
        with (
            preserved_random_state(self.accelerator.device),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),  # few calls, of many kinds
        ):
            was_training = model.training
            self._sample(step, model, average)
            model.train(was_training)
            return self._holdout_losses(model)

    # Samples

    def _sample(self, step: int, model: nn.Module, average: nn.Module | None) -> None:
        """Draw and save; a failure of the samples is no reason to end the training."""
        # A sharded model needs every process, even to look at it.
        if not (self.accelerator.is_main_process or self.accelerator.is_fsdp2):
            return
        try:
            prompts = self._prompts()
            if not prompts:
                return
            self._save(step, "raw", self._draw(model, prompts))
            if average is not None:
                self._save(step, "ema", self._draw_average(average, prompts))
        except Exception as error:
            self.logger.warning("no samples at step %d: %s: %s", step, type(error).__name__, error)

    def _prompts(self) -> list[str] | list[int]:
        """The configured prompts, or the first different ones of the dataset."""
        if self.options.prompts is not None:
            return self.options.prompts
        records = RecordDataset(self.dataset)
        found = [
            example.get("label", example.get("caption"))
            for example in (records[index] for index in range(min(len(records), 64)))
        ]
        records.close()
        if any(isinstance(prompt, dict) for prompt in found):
            self.logger.warning("no samples: the captions are cached; set validation.prompts")
            return []
        return list(dict.fromkeys(found))[:DATASET_PROMPTS]

    def _draw_average(self, average: nn.Module, prompts: Sequence[Any]) -> np.ndarray:
        """Draw with the averaged weights, which may be kept in main memory."""
        home = next(average.parameters()).device
        average.to(self.accelerator.device)
        try:
            return self._draw(average, prompts)
        finally:
            average.to(home)

    def _draw(self, model: nn.Module, prompts: Sequence[Any]) -> np.ndarray:
        """Draw every prompt with every seed.

        Returns:
            uint8, (F, H, W, 3): one grid, or one a frame.
        """
        device = self.accelerator.device
        dtype = self._dtype()
        pipeline = self.pipeline.make_generation_pipeline(model, self._decoder())
        arguments = {
            "num_inference_steps": self.options.num_inference_steps,
            "num_diffusion_steps": self.options.num_diffusion_steps,
            "guidance_scale": self.options.guidance_scale,
            "disable_progress_bar": True,
            "output_type": "np",
        }
        num_latents = self._num_latents(model)
        if num_latents > 1:
            arguments["max_latent_length"] = num_latents
        columns = []
        for seed in self.options.seeds:
            generators = [torch.Generator(device).manual_seed(seed) for _ in prompts]
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = pipeline(list(prompts), generator=generators, **arguments)
            drawn = output.frames if output.images is None else output.images[:, None]
            columns.append(np.asarray(drawn))  # (prompts, F, H, W, 3)
        return make_grid(np.stack(columns, axis=1))

    def _num_latents(self, model: nn.Module) -> int:
        return self.options.max_latent_length or model.config.video_base_size[0]

    def _dtype(self) -> torch.dtype:
        return self.pipeline.vae.dtype  # loaded in the training dtype

    def _decoder(self) -> nn.Module:
        """The autoencoder, in float32 on a CPU, where half precision takes minutes."""
        if self._vae is None:
            vae = self.pipeline.vae
            on_cpu = self.accelerator.device.type == "cpu"
            self._vae = copy.deepcopy(vae).float() if on_cpu else vae
        return self._vae

    def _save(self, step: int, name: str, frames: np.ndarray) -> None:
        if not self.accelerator.is_main_process:
            return
        folder = self.folder / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        if len(frames) == 1:
            export_to_image(frames[0], str(folder / f"{name}.png"))
        else:
            export_to_video(list(frames), str(folder / f"{name}.mp4"))
        middle = frames[len(frames) // 2]
        for tracker in self.accelerator.trackers:
            # TensorBoard has to be told the order of the axes.
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({f"{FOLDER}/{name}": middle[None]}, step=step - 1, **options)

    # Loss

    def _holdout_losses(self, model: nn.Module) -> dict[str, float]:
        """Losses on held-out examples, the same noise and masks each time."""
        loader = self._open_holdout()
        if loader is None:
            return {}
        batches = min(MAX_BATCHES, -(-loader.shard_size // self.batch_size))
        rank = self.accelerator.process_index
        manual_seed(0, (self.accelerator.device, rank))
        sums: dict[str, Tensor] = {}
        with loader:
            for _ in range(batches):
                for name, value in model(self.pipeline.preprocess(loader.next()[0])).items():
                    if "loss" in name:
                        sums[name] = sums.get(name, 0) + value.detach().float().mean() / batches
        values = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="mean")
        losses = dict(zip(sums, values.tolist(), strict=True))
        for name, value in losses.items():
            self.logger.info("    Validation(%s): %.4f", name, value)
        return {f"{FOLDER}/{name}": value for name, value in losses.items()}

    def _open_holdout(self) -> FeatureDataLoader | None:
        """The held-out examples of this process, or None if none are configured."""
        holdout = self.options.holdout
        if holdout is None:
            return None
        folder, getter = holdout, None
        with RecordDataset(self.dataset if isinstance(holdout, float) else holdout) as records:
            count = len(records)
        if isinstance(holdout, float):
            held_out = count_holdout(holdout, count)
            getter = functools.partial(open_subset, start=count - held_out, stop=count)
            folder, count = self.dataset, held_out
        shards = self.accelerator.num_processes
        share = {"shard_id": self.accelerator.process_index, "num_shards": shards}
        return FeatureDataLoader(
            folder,
            dataset_getter=getter,
            batch_size=min(self.batch_size, count),
            shuffle=False,
            **(share if count >= shards**2 else {}),  # few examples are read by every process
        )


def make_grid(pictures: np.ndarray) -> np.ndarray:
    """Lay pictures or videos out in a grid.

    Args:
        pictures: uint8, (rows, columns, F, H, W, 3).

    Returns:
        uint8, (F, grid height, grid width, 3), white gaps between the pictures.
    """
    rows, columns, frames, height, width, channels = pictures.shape
    shape = (frames, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels)
    grid = np.full(shape, 255, dtype=np.uint8)
    for row, column in itertools.product(range(rows), range(columns)):
        top = row * (height + GAP)
        left = column * (width + GAP)
        grid[:, top : top + height, left : left + width] = pictures[row, column]
    return grid
