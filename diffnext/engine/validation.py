"""Watching a run: samples of fixed prompts, and the loss on held-out examples.

Samples go to ``<output_dir>/validation/step-<N>/``: ``raw`` and ``ema``, as ``.png`` or, for
videos, ``.mp4``; rows are prompts, columns are seeds. The random states of the run stay as they
are, and no failure of the samples ends it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from diffnext.config.schema import TrainConfig
from diffnext.data.flex_loaders import FeatureDataLoader
from diffnext.engine.control import Agreement, TrainingError
from diffnext.engine.dataset_facts import DatasetFacts
from diffnext.engine.engine_state import preserved_random_state
from diffnext.engine.engine_utils import manual_seed
from diffnext.engine.model_ema import copy_module
from diffnext.engine.run_inputs import RunInputs
from diffnext.engine.stepping import detach_metrics, mean_by_name
from diffnext.utils.accelerate_utils import Logger, precision_to_dtype, warn_on_error
from diffnext.utils.export_utils import export_to_image, export_to_video

FOLDER = "validation"
MAX_BATCHES = 64  # of a process in one held-out loss
DATASET_PROMPTS = 4  # drawn when none are configured
GAP = 2  # pixels between the pictures of a grid


class Validator:
    """Validates a run at intervals.

    Args:
        config: Training configuration; its ``validation`` section has the settings.
        inputs: The datasets with their held-out examples.
        accelerator: Has the processes and trackers.
        pipeline: The training pipeline, whose components are used. Its model is not yet prepared
            for the engine, which may shard it.
        logger: Where to report.
    """

    def __init__(
        self,
        config: TrainConfig,
        inputs: RunInputs,
        accelerator: Accelerator,
        pipeline: Any,
        logger: Logger,
    ) -> None:
        self.options = config.validation
        self.batch_size = config.training.batch_size
        self.dtype = precision_to_dtype(config.training.mixed_precision)
        self.folder = Path(config.experiment.output_dir) / FOLDER
        self.inputs = inputs
        self.accelerator = accelerator
        self.pipeline = pipeline
        self.logger = logger
        self.agreement = Agreement(accelerator)
        self._is_sharded = accelerator.is_fsdp2
        self._whole: nn.Module | None = None
        if self._is_sharded and accelerator.is_main_process:
            self._whole = copy_module(pipeline.model, with_weights=False)

    def is_due(self, step: int) -> bool:
        """Whether to validate after a step."""
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
            torch.no_grad(),  # so that the parts compiled for training are not used
        ):
            weights: dict[str, Any] = {}
            if self._is_sharded:  # whole in the main memory of the main process; collective
                options = StateDictOptions(full_state_dict=True, cpu_offload=True)
                weights = get_model_state_dict(model, options=options)
            if self.accelerator.is_main_process:
                self._sample(step, model, weights, average)
            self.agreement.collect(None)  # wait here, where there is no time limit
            return self._holdout_losses(model)

    # Samples: only the main process draws, so a failure leaves no process waiting

    def _sample(
        self, step: int, model: nn.Module, weights: dict[str, Any], average: nn.Module | None
    ) -> None:
        with warn_on_error(self.logger, "no samples at step %d", step):
            if self._prompts:
                if self._whole is not None:
                    model = self._place(self._whole, weights, self.dtype)
                self._save(step, "raw", self._draw(model))
        with warn_on_error(self.logger, "no samples of the average at step %d", step):
            if self._prompts and average is not None:
                placed = self._place(average, average.state_dict())
                self._save(step, "ema", self._draw(placed))

    def _place(
        self, model: nn.Module, weights: dict[str, Any], dtype: torch.dtype | None = None
    ) -> nn.Module:
        """A model with these weights on the device; weights that are there already are shared."""
        placed = copy_module(model, with_weights=False)
        placed.load_state_dict(weights, assign=True)
        return placed.to(self.accelerator.device, dtype)

    @functools.cached_property
    def _prompts(self) -> Sequence[Any]:
        """The configured prompts, or the first distinct ones of the (first) dataset."""
        if self.options.prompts is not None:
            return self.options.prompts
        with contextlib.closing(self.inputs.datasets[0].open()) as records:
            examples = [records[index] for index in range(min(len(records), 64))]
        found = [example.get("label", example.get("caption")) for example in examples]
        if any(isinstance(prompt, dict) for prompt in found):
            self.logger.warning("no samples: the captions are cached; set validation.prompts")
            return []
        return list(dict.fromkeys(found))[:DATASET_PROMPTS]

    def _draw(self, model: nn.Module) -> np.ndarray:
        """Draw every prompt with every seed.

        Returns:
            uint8, (F, H, W, 3): one grid, or one per frame.
        """
        device = self.accelerator.device
        pipeline = self.pipeline.make_generation_pipeline(model, self._decoder)
        arguments = {
            "num_inference_steps": self.options.num_inference_steps,
            "num_diffusion_steps": self.options.num_diffusion_steps,
            "guidance_scale": self.options.guidance_scale,
            "disable_progress_bar": True,
            "output_type": "np",
        }
        video_length = self.pipeline.model.config.video_base_size[0]
        num_latents = self.options.max_latent_length or video_length
        if num_latents > 1:
            arguments["max_latent_length"] = num_latents
        columns = []
        for seed in self.options.seeds:
            generators = [torch.Generator(device).manual_seed(seed) for _ in self._prompts]
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                output = pipeline(list(self._prompts), generator=generators, **arguments)
            drawn = output.frames if output.images is None else output.images[:, None]
            columns.append(np.asarray(drawn))  # (prompts, F, H, W, 3)
        return make_grid(np.stack(columns, axis=1))

    @functools.cached_property
    def _decoder(self) -> nn.Module:
        """The autoencoder, in float32 on a CPU, where half precision takes minutes."""
        vae = self.pipeline.vae
        return copy.deepcopy(vae).float() if self.accelerator.device.type == "cpu" else vae

    def _save(self, step: int, name: str, frames: np.ndarray) -> None:
        folder = self.folder / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        if len(frames) == 1:
            export_to_image(frames[0], str(folder / f"{name}.png"))
        else:
            export_to_video(list(frames), str(folder / f"{name}.mp4"))
        middle = frames[len(frames) // 2]
        for tracker in self.accelerator.trackers:
            tracker.log_images({f"{FOLDER}/{name}": middle[None]}, step=step - 1)

    # Loss

    def _holdout_losses(self, model: nn.Module) -> dict[str, float]:
        """Losses on held-out examples, the same noise and masks each time."""
        try:
            # Reading may fail on one process; the model, which may be sharded, comes after it.
            batches = self.agreement.together(self._read_holdout, "no held-out loss")
        except TrainingError as error:
            self.logger.warning("%s", error)
            return {}
        if not batches:
            return {}
        manual_seed(0, (self.accelerator.device, self.accelerator.process_index))
        found = []
        for batch in batches:
            with self.accelerator.autocast():
                outputs = model(self.pipeline.preprocess(batch))
            found.append(detach_metrics(outputs, self.accelerator.device))
        means = mean_by_name(found)
        reduced = self.accelerator.reduce(torch.stack(list(means.values())), reduction="mean")
        losses = dict(zip(means, reduced.tolist(), strict=True))
        for name, value in losses.items():
            self.logger.info("    Validation(%s): %.4f", name, value)
        return {f"{FOLDER}/{name}": value for name, value in losses.items()}

    def _read_holdout(self) -> list[dict[str, Any]]:
        """The first held-out examples of this process; as many on every process."""
        parts = [(facts, 0, facts.num_examples) for facts in self.inputs.holdout] or [
            (facts, facts.num_train, facts.num_examples)
            for facts in self.inputs.datasets
            if facts.num_held_out
        ]
        limit = MAX_BATCHES // max(len(parts), 1) or 1
        return [batch for part in parts for batch in self._read_part(*part, limit)]

    def _read_part(
        self, facts: DatasetFacts, start: int, stop: int, limit: int
    ) -> list[dict[str, Any]]:
        """At most ``limit`` batches of the examples ``start`` to ``stop`` of a dataset."""
        count = stop - start
        shards = self.accelerator.num_processes
        share = {"shard_id": self.accelerator.process_index, "num_shards": shards}
        loader = FeatureDataLoader(
            facts.folder,
            dataset_getter=lambda path: facts.open(start, stop),
            batch_size=min(self.batch_size, count),
            shuffle=False,
            **(share if count >= shards**2 else {}),  # few examples are read by every process
        )
        with loader:
            num_batches = -(-loader.shard_size // self.batch_size)
            return [loader.next()[0] for _ in range(min(limit, num_batches))]


def make_grid(pictures: np.ndarray) -> np.ndarray:
    """Lay pictures or videos out in a grid.

    Args:
        pictures: uint8, (rows, columns, F, H, W, 3).

    Returns:
        uint8, (F, grid height, grid width, 3), white gaps between the pictures.
    """
    gaps = [(0, 0)] * 3 + [(0, GAP), (0, GAP), (0, 0)]
    rows = [np.concatenate(row, axis=2) for row in np.pad(pictures, gaps, constant_values=255)]
    return np.concatenate(rows, axis=1)[:, :-GAP, :-GAP]
