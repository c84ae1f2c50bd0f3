"""The trainer: builds a run from its configuration, steps it, logs it, saves it, resumes it."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from diffnext.engine import checkpoint as checkpoints
from diffnext.engine.checkpoint import ResumePoint, RunFolder
from diffnext.engine.engine_utils import get_param_groups
from diffnext.engine.model_ema import ModelEMA
from diffnext.pipelines.builder import build_pipeline, get_pipeline_path
from diffnext.pipelines.release_folder import read_json, write_json
from diffnext.utils.accelerate_utils import normalize_precision, precision_to_dtype
from diffnext.utils.omegaconf_utils import ConfigError, config_to_class, config_to_object
from diffnext.utils.profiler import SmoothedValue, Timer, get_progress
from diffnext.version import __version__


@dataclass(frozen=True)
class StepResult:
    """One optimizer step of this process.

    Attributes:
        step: Steps completed before it.
        lr: Learning rate it used.
        metrics: Losses and metrics, averaged over its micro-batches; scalars on the device.
    """

    step: int
    lr: float
    metrics: dict[str, Tensor]


class Trainer:
    """Trains the model of a pipeline.

    Without DeepSpeed the trained component is kept in float32 and the forward pass runs under
    autocast; under DeepSpeed it is in the training dtype and DeepSpeed keeps float32 masters.

    Args:
        config: Training configuration, see :mod:`diffnext.utils.config_schema`.
        accelerator: From :func:`diffnext.utils.accelerate_utils.build_accelerator`.
        logger: Where the run reports.
        user_config: Configuration as the user gave it, saved with checkpoints; default ``config``.

    Raises:
        ConfigError: If the configuration cannot be built.
    """

    def __init__(
        self,
        config: DictConfig,
        accelerator: Accelerator,
        logger: logging.Logger | logging.LoggerAdapter,
        user_config: DictConfig | None = None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.logger = logger
        self.user_config = config.copy() if user_config is None else user_config
        self.precision = normalize_precision(config.training.get("mixed_precision"))
        self.dtype = precision_to_dtype(self.precision)
        self.run = RunFolder(Path(config.experiment.output_dir), config.model.name)
        self.checkpoint_format = _checkpoint_format(config)
        self.loss_weights = loss_weights(config)
        resume = find_resume(config)
        self.global_step = 0 if resume is None else resume.step

        # First, as it fails fastest. Its processes only start with the first batch.
        self.loader = config_to_object(config.train_dataloader)
        self.pipeline = self._build_pipeline(resume)
        self.ema = self._build_ema(resume)
        model = self.pipeline.configure_model(config)
        self.optimizer = config_to_object(config.optimizer, params=get_param_groups(model))
        self.lr_scheduler = config_to_object(config.lr_scheduler)
        self.model, self.optimizer = accelerator.prepare(model, self.optimizer)

        self.timer = Timer()
        self.window: list[StepResult] = []
        self.window_started = time.perf_counter()
        if resume is not None:
            self._restore_state(resume)

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed keeps the master weights."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def max_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.training.max_train_steps

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.model)

    # Building

    def _build_pipeline(self, resume: ResumePoint | None) -> Any:
        """Load the base folder, with the trained component from the checkpoint if there is one."""
        paths = OmegaConf.to_container(self.config.pipeline.paths, resolve=True)
        folder = get_pipeline_path(**paths)
        dtypes = {"default": self.dtype}
        if not self.uses_deepspeed:
            dtypes[checkpoints.COMPONENT] = torch.float32
        pipeline_class = config_to_class(self.config.pipeline)
        pipeline = build_pipeline(folder, pipeline_class, dtype=dtypes)
        if resume is not None:
            checkpoints.load_weights_into(pipeline.model, resume.weights)
        return pipeline.to(self.accelerator.device)

    def _build_ema(self, resume: ResumePoint | None) -> ModelEMA | None:
        """The average lives on the main process only, and starts before anything is frozen."""
        if not self.config.get("ema") or not self.accelerator.is_main_process:
            return None
        ema = ModelEMA(self.pipeline.model, **(self.config.ema.get("params") or {}))
        if resume is None:
            return ema
        if resume.ema_weights is not None:
            checkpoints.load_weights_into(ema.model, resume.ema_weights)
        else:
            self.logger.warning(
                "%s has no averaged weights: EMA starts from its weights", resume.checkpoint
            )
        return ema

    # Stepping

    def train_loop(self) -> None:
        """Step until ``training.max_train_steps``, then log and save what is left."""
        self.accelerator.step = 0  # micro-batches are counted from a whole step
        self.window_started = time.perf_counter()
        with self._progress_bar() as bar:
            while self.global_step < self.max_steps:
                with self.timer.tic_and_toc():
                    result = self.run_step(self.config.training.gradient_accumulation_steps)
                self.window.append(result)
                self.global_step += 1
                bar.update()
                self._after_step(bar, is_last=self.global_step == self.max_steps)

    def run_step(self, accum_steps: int) -> StepResult:
        """Do one optimizer step.

        Args:
            accum_steps: Micro-batches whose gradients are averaged.
        """
        lr = self._set_learning_rate()
        totals: dict[str, Tensor] = {}
        for _ in range(accum_steps):
            for name, value in self.run_model().items():
                totals[name] = totals.get(name, 0) + value / accum_steps
        return StepResult(step=self.global_step, lr=lr, metrics=dict(sorted(totals.items())))

    def run_model(self) -> dict[str, Tensor]:
        """Run one micro-batch forward and backward; step the optimizer after the last one.

        Returns:
            Outputs named after a loss or a metric, detached.
        """
        with self.accelerator.accumulate(self.model):
            outputs = self.model(self.loader.next()[0])
            self.accelerator.backward(_total_loss(outputs, self.loss_weights))
            max_norm = self.config.training.get("max_grad_norm")
            if max_norm is not None and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return _detach_metrics(outputs, self.accelerator.device)

    def _set_learning_rate(self) -> float:
        lr = self.lr_scheduler.lr_at(self.global_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
        return lr

    def _after_step(self, bar: tqdm, is_last: bool) -> None:
        """Log, average and save as the intervals ask; the last step does whatever is still due."""
        log_every = self.config.experiment.log_every
        if is_last or (self.global_step - 1) % log_every == 0:
            self.log_metrics(bar)
        if self.global_step % (10 * log_every) == 0:
            self.logger.info(get_progress(self.timer, self.global_step, self.max_steps))
        if is_last or self.global_step % self._ema_interval() == 0:
            self.update_ema()
        if is_last or self.global_step % self.config.experiment.save_every == 0:
            self.save()
            self.window_started = time.perf_counter()

    def _ema_interval(self) -> int:
        return OmegaConf.select(self.config, "ema.params.update_every") or 100

    def update_ema(self) -> None:
        """Move the average toward the master weights; every process takes part."""
        if not self.config.get("ema"):
            return
        masters = self._master_weights()
        if self.ema is not None:
            self.ema.update_from(masters)
        else:
            for _ in masters:  # gathering is collective
                pass

    def _master_weights(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its float32 value, one at a time."""
        if not self.uses_deepspeed:
            for parameter in self.bare_model.parameters():
                yield parameter, parameter
            return
        from deepspeed.utils import safe_get_full_fp32_param

        for parameter in self.bare_model.parameters():
            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            yield parameter, parameter if master is None else master

    # Reporting

    @contextlib.contextmanager
    def _progress_bar(self) -> Iterator[tqdm]:
        """A live bar on the main process; log lines pass above it."""
        is_terminal = sys.stderr.isatty()
        arguments = {
            "total": self.max_steps,
            "initial": self.global_step,
            "unit": "step",
            "dynamic_ncols": True,
            "disable": not self.config.training.get("progress_bar", True)
            or not self.accelerator.is_main_process,
            # In a file each refresh is one more line, so refresh seldom.
            "mininterval": 0.5 if is_terminal else 10.0,
        }
        with tqdm(**arguments) as bar, contextlib.ExitStack() as stack:
            if is_terminal and not bar.disable:
                logger = getattr(self.logger, "logger", self.logger)  # an adapter's own logger
                stack.enter_context(logging_redirect_tqdm([logger]))
            yield bar

    def log_metrics(self, bar: tqdm | None = None) -> None:
        """Report the steps since the last report: median and mean over them and all processes.

        Args:
            bar: Progress bar to update.
        """
        if not self.window:
            return
        last = self.window[-1]
        names = list(last.metrics)
        table = torch.stack([torch.stack(list(r.metrics.values())) for r in self.window])
        table = self.accelerator.reduce(table, reduction="mean").tolist()  # (steps, metrics)
        seconds = (time.perf_counter() - self.window_started) / len(self.window)
        self.logger.info("Iteration %d, lr = %.8f, time = %.2fs", last.step, last.lr, seconds)
        medians = {}
        for name, column in zip(names, zip(*table, strict=True), strict=True):
            values = SmoothedValue()
            for value in column:
                values.update(value)
            self.logger.info("    Train net output(%s): %s", name, values)
            medians[name] = values.median
        self._track({**medians, "lr": last.lr, "time": seconds}, last.step)
        if bar is not None:
            values = {name: f"{median:.4f}" for name, median in medians.items()}
            bar.set_postfix({**values, "lr": f"{last.lr:.2e}"}, refresh=False)
        self.window.clear()
        self.window_started = time.perf_counter()

    def _track(self, values: dict[str, float], step: int) -> None:
        """Hand values to the trackers; one that fails must not end the run."""
        try:
            self.accelerator.log(values, step=step)
        except Exception as error:
            self.logger.warning("the tracker did not take the values of step %d: %s", step, error)

    # Saving and resuming

    def save(self) -> None:
        """Write the checkpoint of the current step, unless it is already there."""
        final = self.run.checkpoint(self.global_step)
        if self.run.is_complete(final):
            self.logger.warning("%s exists already and is kept", final)
            return
        # No process may start writing while another still looks at what exists.
        self.accelerator.wait_for_everyone()
        temporary = checkpoints.temporary_folder(final)
        if self.accelerator.is_main_process:
            self.run.remove_leftovers()
            (temporary / checkpoints.STATE).mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._write_state(temporary / checkpoints.STATE)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._write_components(temporary, final)
        self.accelerator.wait_for_everyone()
        self.logger.info("Wrote snapshot to: %s", final)

    def _write_state(self, folder: Path) -> None:
        """Write what an exact resume needs besides the weights; every process takes part."""
        self.accelerator.save_state(str(folder))
        rank = self.accelerator.process_index
        write_json(folder / f"rank_{rank}.json", {"data": self.loader.state_dict()})
        if self.accelerator.is_main_process:
            OmegaConf.save(self.user_config, folder / "config.yaml")
            write_json(folder / checkpoints.TRAINER_STATE, self._describe_run())

    def _describe_run(self) -> dict[str, Any]:
        return {
            "step": self.global_step,
            **self._parallel_layout(),
            "wandb_run_id": OmegaConf.select(self.config, "wandb.run_id"),
            "versions": {
                "diffnext": __version__,
                "torch": torch.__version__,
                "accelerate": accelerate.__version__,
            },
        }

    def _parallel_layout(self) -> dict[str, Any]:
        """What must agree between saving and loading for the optimizer state to fit."""
        return {
            "num_processes": self.accelerator.num_processes,
            "deepspeed": self.uses_deepspeed,
            "precision": self.precision,
        }

    def _write_components(self, temporary: Path, final: Path) -> None:
        """Write the loadable folders; the checkpoint appears last, when all else is in place."""
        model = self.bare_model
        config = json.loads(model.to_json_string())
        base = self.config.pipeline.paths.pretrained_path
        weights = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in model.state_dict().items()
        }
        folders = [(temporary, final, weights)]
        if self.ema is not None:
            ema_final = self.run.ema_checkpoint(self.global_step)
            ema_temporary = checkpoints.temporary_folder(ema_final)
            folders.insert(0, (ema_temporary, ema_final, self.ema.model.state_dict()))
        name = self.run.model_name
        for folder, _, state in folders:
            checkpoints.write_component(folder / name, config, state, self.checkpoint_format)
            if name == checkpoints.COMPONENT:  # under another name no pipeline would find it
                checkpoints.write_base_reference(folder, base)
        for folder, published, _ in folders:
            checkpoints.publish(folder, published)
        keep_last = OmegaConf.select(self.config, "checkpoint.keep_last")
        if keep_last is not None:
            self.run.keep_newest(keep_last)

    def _restore_state(self, resume: ResumePoint) -> None:
        """Restore optimizer, masters, random states and data position as far as they fit."""
        reason = self._state_mismatch(resume)
        if reason is None:
            self.accelerator.load_state(str(resume.state))
        else:
            self.logger.warning(
                "%s: continuing from %s with its weights and step only. THE OPTIMIZER STATE IS "
                "RESET, and so are the random states",
                reason,
                resume.checkpoint,
            )
        self._restore_data_position(resume)

    def _state_mismatch(self, resume: ResumePoint) -> str | None:
        """Why the saved optimizer state cannot be used; None if it can."""
        if resume.state is None:
            return "the checkpoint holds no optimizer state"
        saved = resume.trainer_state
        layout = self._parallel_layout()
        if saved["deepspeed"] != layout["deepspeed"]:
            return f"saved {'with' if saved['deepspeed'] else 'without'} DeepSpeed"
        # Without DeepSpeed every process holds the whole state, so their number does not matter.
        names = ["num_processes", "precision"] if self.uses_deepspeed else []
        if "fp16" in (saved["precision"], layout["precision"]):
            names = [*names, "precision"]  # only fp16 has a gradient scaler
        for name in names:
            if saved[name] != layout[name]:
                return f"saved with {name} {saved[name]}, now {layout[name]}"
        return None

    def _restore_data_position(self, resume: ResumePoint) -> None:
        if resume.state is None:
            self.logger.warning("%s holds no data position: data restarts", resume.checkpoint)
            return
        saved = resume.trainer_state["num_processes"]
        if saved != self.accelerator.num_processes:
            self.logger.warning(
                "saved with %d processes, now %d: data restarts",
                saved,
                self.accelerator.num_processes,
            )
            return
        file = resume.state / f"rank_{self.accelerator.process_index}.json"
        try:
            self.loader.load_state_dict(read_json(file)["data"])
        except ValueError as error:
            self.logger.warning("data restarts, as its position does not fit: %s", error)

    def close(self) -> None:
        """Release the data loader and its workers."""
        self.loader.close()


def find_resume(config: DictConfig) -> ResumePoint | None:
    """Find the checkpoint that a configuration continues from.

    Args:
        config: Training configuration; its ``experiment`` section is read.

    Raises:
        ConfigError: If an explicit checkpoint cannot be used.
    """
    run = RunFolder(Path(config.experiment.output_dir), config.model.name)
    return checkpoints.find_resume_point(run, config.experiment.get("resume_from_checkpoint"))


def _checkpoint_format(config: DictConfig) -> str:
    file_format = OmegaConf.select(config, "checkpoint.format") or "safetensors"
    if file_format not in checkpoints.WEIGHTS_FILES:
        names = " or ".join(checkpoints.WEIGHTS_FILES)
        raise ConfigError(f"checkpoint.format must be {names}, got {file_format!r}")
    return file_format


def loss_weights(config: DictConfig) -> dict[str, float]:
    """Weights of the losses by the names they have among a model's outputs.

    Args:
        config: Training configuration; ``model.loss_weights`` is read.

    Raises:
        ConfigError: If a weight is no number of at least 0, or both are 0.
    """
    given = OmegaConf.select(config, "model.loss_weights") or {}
    weights = {}
    for key, name in (("t2i", "loss_t2i"), ("i2v", "loss_i2i")):
        value = given.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ConfigError(
                f"model.loss_weights.{key} must be a number of at least 0, got {value}"
            )
        weights[name] = float(value)
    if not any(weights.values()):
        raise ConfigError("model.loss_weights are all 0: nothing would be trained")
    return weights


def _total_loss(outputs: Mapping[str, Any], weights: Mapping[str, float]) -> Tensor:
    """Sum the losses among a model's outputs; those without a weight count once.

    Raises:
        ValueError: If none of them can be trained on.
    """
    losses = [
        value * weights.get(name, 1.0)
        for name, value in outputs.items()
        if "loss" in name and isinstance(value, Tensor) and value.requires_grad
    ]
    if not losses:
        raise ValueError(f"the model returned no trainable loss, only {sorted(outputs)}")
    return sum(losses[1:], losses[0])


def _detach_metrics(outputs: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Pick losses and metrics; they stay on the device until they are reported."""
    return {
        name: torch.as_tensor(value, device=device).detach().float().mean()
        for name, value in outputs.items()
        if "loss" in name or "metric" in name
    }
