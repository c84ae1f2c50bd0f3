"""The trainer: builds a run from its configuration, steps it, saves it, resumes it."""

from __future__ import annotations

import functools
import json
import logging
import math
import signal
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffnext.data.records import open_subset
from diffnext.engine import checkpoint as checkpoints
from diffnext.engine.checkpoint import ResumePoint, RunFolder
from diffnext.engine.checkpoint_writer import CheckpointWriter, Snapshot, copy_tensors
from diffnext.engine.control import (
    Agreement,
    HeldSignal,
    StopRequests,
    TrainingError,
    TrainingStopped,
    is_lost_connection,
)
from diffnext.engine.data_check import count_training_examples
from diffnext.engine.engine_utils import get_param_groups, manual_seed
from diffnext.engine.model_ema import ModelEMA
from diffnext.engine.preflight import loss_weights
from diffnext.engine.reporting import Reporter, StepResult
from diffnext.engine.run_state import (
    UNIVERSAL_TAG,
    capture_random_state,
    make_engine_state,
    make_universal,
    restore_random_state,
)
from diffnext.engine.validation import Validator
from diffnext.pipelines.builder import build_pipeline, get_pipeline_path
from diffnext.pipelines.release_folder import LORA_FILE
from diffnext.utils.accelerate_utils import normalize_precision, precision_to_dtype
from diffnext.utils.omegaconf_utils import ConfigError, config_to_class, config_to_object
from diffnext.utils.profiler import Timer, get_progress
from diffnext.version import __version__

STATE_FORMAT = 2  # of trainer_state.json and what lies beside it


class Trainer:
    """Trains the model of a pipeline.

    Without DeepSpeed the trained component is kept in float32 and the forward pass runs under
    autocast; under DeepSpeed it is in the training dtype and DeepSpeed keeps float32 masters.

    Args:
        config: Training configuration, see :mod:`diffnext.utils.config_schema`.
        accelerator: From :func:`diffnext.utils.accelerate_utils.build_accelerator`.
        logger: Where the run reports.
        user_config: Configuration as the user gave it, saved with checkpoints; default ``config``.
        stop: Asked between steps whether to go on; default: nobody stops the run.

    Raises:
        ConfigError: If the configuration cannot be built.
    """

    def __init__(
        self,
        config: DictConfig,
        accelerator: Accelerator,
        logger: logging.Logger | logging.LoggerAdapter,
        user_config: DictConfig | None = None,
        stop: StopRequests | None = None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.logger = logger
        self.user_config = config.copy() if user_config is None else user_config
        self.stop = StopRequests() if stop is None else stop
        self.precision = normalize_precision(config.training.get("mixed_precision"))
        self.dtype = precision_to_dtype(self.precision)
        self.run = RunFolder(Path(config.experiment.output_dir), config.model.name)
        self.loss_weights = loss_weights(config)
        self.adapters = import_adapters(config)
        resume = find_resume(config)
        self.global_step = 0 if resume is None else resume.step

        # First, as it fails fastest. Its processes only start with the first batch.
        self.loader = build_loader(config)
        self._reader_deaths = HeldSignal(signal.SIGCHLD)
        self.pipeline = self._build_pipeline(resume)
        self.ema = self._build_ema(resume)
        model = self.pipeline.prepare_model(config)
        if config.training.get("compile"):
            model.compile_parts()
        self.optimizer = config_to_object(config.optimizer, params=get_param_groups(model))
        self.lr_scheduler = config_to_object(config.lr_scheduler)
        self.agreement = Agreement(accelerator)
        universal_state = self._prepare_universal_state(resume)
        self.model, self.optimizer = accelerator.prepare(model, self.optimizer)
        if self.uses_deepspeed:
            # Else it checks gradients in fp16 only. A step that is not finite is left out.
            self.model.optimizer.check_grad_overflow = True
        self.engine = make_engine_state(accelerator, self.model, self.optimizer)
        self.writer = CheckpointWriter(
            self.run,
            accelerator,
            self.engine,
            asynchronous=bool(OmegaConf.select(config, "checkpoint.async_save")),
            keep_last=OmegaConf.select(config, "checkpoint.keep_last"),
            keep_every=OmegaConf.select(config, "checkpoint.keep_every"),
            logger=logger,
        )
        self.validator = Validator(config, accelerator, self.pipeline, logger)
        self.timer = Timer()
        self.reporter = Reporter(config, accelerator, logger)
        if resume is not None:
            self._restore_state(resume, universal_state)

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
        if self.adapters is not None:
            self.adapters.add_lora(pipeline.model, self.config.model.lora)
        if resume is not None:
            self._load_trained(pipeline.model, resume.weights)
        return pipeline.to(self.accelerator.device)

    def _load_trained(self, model: nn.Module, file: Path) -> None:
        """Load what a run has trained: the model's weights, or its adapters."""
        has_adapters = file.name == LORA_FILE
        if has_adapters != (self.adapters is not None):
            raise ConfigError(
                f"model.lora is {self.config.model.get('lora')}, but {file} is of a run "
                f"{'with' if has_adapters else 'without'} LoRA"
            )
        if self.adapters is None:
            checkpoints.load_weights_into(model, file)
        else:
            self.adapters.load_adapter(model, file)

    def _build_ema(self, resume: ResumePoint | None) -> ModelEMA | None:
        """The average lives on the main process only, and starts before anything is frozen."""
        if not self.config.get("ema") or not self.accelerator.is_main_process:
            return None
        ema = ModelEMA(self.pipeline.model, **(self.config.ema.get("params") or {}))
        if resume is None:
            return ema
        if resume.ema_weights is not None:
            self._load_trained(ema.model, resume.ema_weights)
        else:
            self.logger.warning(
                "%s has no averaged weights: EMA starts from its weights", resume.checkpoint
            )
        return ema

    # Stepping

    def train_loop(self) -> None:
        """Step until ``training.max_train_steps``, then log and save what is left.

        Raises:
            TrainingStopped: If asked to stop; the checkpoint is written.
            TrainingError: If the run cannot go on, on every process.
        """
        self.accelerator.step = 0  # micro-batches are counted from a whole step
        self.reporter.rewind(self.global_step)
        try:
            with self._reader_deaths.held(), self.reporter.progress_bar(self.global_step):
                while self.global_step < self.max_steps:
                    self._stop_if_asked()
                    self._advance()
            self.writer.wait()
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            raise TrainingError(
                f"step {self.global_step} was cut short: another process of the run is gone. Its "
                "own message, or that of the launcher, says why"
            ) from error

    def _advance(self) -> None:
        """Do one step and all that is due after it."""
        with self.timer.tic_and_toc():
            result = self.run_step(self.config.training.gradient_accumulation_steps)
        self.global_step += 1
        self.reporter.add(result)
        self._after_step(is_last=self.global_step == self.max_steps)

    def run_step(self, accum_steps: int) -> StepResult:
        """Do one optimizer step.

        Args:
            accum_steps: Micro-batches whose gradients are averaged.

        Raises:
            TrainingError: If a process has no data, or if the step is not finite and
                ``training.on_nonfinite`` says stop.
        """
        batches = self.agreement.together(
            lambda: self._read_batches(accum_steps), f"step {self.global_step} cannot start"
        )
        lr = self._set_learning_rate()
        num_tokens = sum(self._count_tokens(batch) for batch in batches)
        totals: dict[str, Tensor] = {}
        for batch in batches:
            for name, value in self._run_forward_backward(batch).items():
                totals[name] = totals.get(name, 0) + value / accum_steps
        metrics = dict(sorted(totals.items()))
        norm, applied = self._step_optimizer(metrics)
        return StepResult(self.global_step, lr, metrics, norm, num_tokens, applied)

    def _read_batches(self, count: int) -> list[dict[str, Any]]:
        error = self.writer.take_error()
        if error is not None:
            raise error
        with self._reader_deaths.delivered():
            return [self.loader.next()[0] for _ in range(count)]

    def _run_forward_backward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run one micro-batch; returns its losses and metrics, detached."""
        with self.accelerator.autocast():
            inputs = self.pipeline.preprocess(batch)
        with self.accelerator.accumulate(self.model):
            outputs = self.model(inputs)
            # Under DeepSpeed this also steps the optimizer after the last micro-batch.
            self.accelerator.backward(_total_loss(outputs, self.loss_weights))
        return _detach_metrics(outputs, self.accelerator.device)

    def _step_optimizer(self, metrics: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
        """Clip the gradients and step, unless something is not finite.

        Returns:
            The norm of the gradients before clipping, and whether the step was applied; the latter
            is the same on every process, as the gradients are.
        """
        if self.uses_deepspeed:  # which has stepped already, unless the gradients overflowed
            norm = torch.as_tensor(self.model.get_global_grad_norm(), device=self.model.device)
            applied = not self.optimizer.step_was_skipped
        else:
            norm = self._clip_gradients()
            applied = math.isfinite(norm.item())
            if applied or self.precision == "fp16":  # whose scaler must see what overflows
                self.optimizer.step()
        if not applied:
            self._handle_nonfinite(metrics)
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach().float(), applied

    def _clip_gradients(self) -> Tensor:
        """Return the norm of all gradients; scale them down to ``max_grad_norm`` if configured."""
        self.accelerator.unscale_gradients(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        max_norm = self.config.training.get("max_grad_norm")
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def _handle_nonfinite(self, metrics: Mapping[str, Tensor]) -> None:
        """Name what is not finite and stop, or leave the step out; collective.

        In fp16 the scaler searches for the largest scale that does not overflow, so that only a
        loss that is not finite counts.

        Raises:
            TrainingError: If ``training.on_nonfinite`` says stop.
        """
        name = _find_nonfinite(metrics)
        message = None if name is None else f"{name} on {self._describe_last_examples()}"
        culprits = self.agreement.collect(message)
        if not culprits and self.precision == "fp16":
            return
        if not culprits:
            culprits = [f"the gradient of {self._find_nonfinite_gradient()}"]
        text = f"step {self.global_step} is not finite: {'; '.join(culprits)}"
        if self.config.training.get("on_nonfinite", "stop") == "skip":
            self.logger.warning("%s. This step is left out", text)
            return
        raise TrainingError(f"{text}. Nothing of this step was applied")

    def _find_nonfinite_gradient(self) -> str:
        for name, parameter in self.bare_model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return name
        return "a parameter"  # DeepSpeed has dropped the gradients by now

    def _describe_last_examples(self) -> str:
        count = self.config.training.batch_size * self.config.training.gradient_accumulation_steps
        return f"examples {self.loader.last_examples(count)} of the dataset"

    def _count_tokens(self, batch: Mapping[str, Any]) -> int:
        """Latent tokens of a batch: frames x rows x columns of the image encoder's patches."""
        latents = batch["latents"]
        patch_size = self.bare_model.image_encoder.patch_embed.patch_size
        return sum(math.prod(moments.shape[1:]) // patch_size**2 for moments in latents)

    def _set_learning_rate(self) -> float:
        lr = self.lr_scheduler.lr_at(self.global_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
        return lr

    def _after_step(self, is_last: bool) -> None:
        """Log, average and save as the intervals ask; the last step does whatever is still due."""
        log_every = self.config.experiment.log_every
        if is_last or (self.global_step - 1) % log_every == 0:
            self.reporter.report()
        if self.global_step % (10 * log_every) == 0:
            self.logger.info(get_progress(self.timer, self.global_step, self.max_steps))
        if is_last or self.global_step % self._ema_interval() == 0:
            self.update_ema()
        if is_last or self.global_step % self.config.experiment.save_every == 0:
            with self.reporter.excluded_time():
                self.save()
        if self.validator.is_due(self.global_step):
            with self.reporter.excluded_time():
                self.validate()

    def _stop_if_asked(self) -> None:
        """End the run with a checkpoint if any process was asked to; collective.

        Raises:
            TrainingStopped: If so.
        """
        reasons = self.agreement.collect(self.stop.reason())
        if not reasons:
            return
        reason = "; ".join(reasons)
        self.logger.info("Stopping at step %d: %s", self.global_step, reason)
        self.save()
        self.writer.wait()
        raise TrainingStopped(f"stopped at step {self.global_step}: {reason}")

    def _ema_interval(self) -> int:
        return OmegaConf.select(self.config, "ema.params.update_every") or 100

    def update_ema(self) -> None:
        """Move the average toward the master weights; every process takes part.

        Raises:
            TrainingError: On every process, if a weight is not finite.
        """
        if not self.config.get("ema"):
            return

        def move() -> None:
            masters = self.engine.masters()
            if self.ema is not None:
                self.ema.update_from(masters)
            else:
                for _ in masters:  # gathering is collective
                    pass

        self.agreement.together(move, f"the average of step {self.global_step} is not updated")

    def validate(self) -> None:
        """Draw samples and report the held-out loss; every process takes part."""
        average = None if self.ema is None else self.ema.model
        losses = self.validator.run(self.global_step, self.bare_model, average)
        if losses:
            self.reporter.track(losses, self.global_step - 1)

    # Saving and resuming

    def save(self) -> None:
        """Write the checkpoint of the current step, unless it is already there; collective.

        Raises:
            TrainingError: On every process, if any could not write.
        """
        self.writer.wait()
        final = self.run.checkpoint(self.global_step)
        exists = final.is_dir() and self.run.find_damage(final) is None
        # No process may start writing while another still looks at what exists.
        if self.agreement.collect("exists" if exists else None):
            self.logger.warning("%s exists already and is kept", final)
            return
        self.writer.write(self._take_snapshot())

    def _take_snapshot(self) -> Snapshot:
        """Everything of this process but the engine's state; collective."""
        weights = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in self.engine.weights().items()
        }
        average = None if self.ema is None else self.ema.model.state_dict()
        if self.writer.asynchronous and self.accelerator.is_main_process:
            weights = copy_tensors(weights)
            average = None if average is None else copy_tensors(average)
        return Snapshot(
            step=self.global_step,
            rank_state=self._rank_state(),
            trainer_state=self._describe_run(),
            write_weights=self._component_writer(weights, with_config=True),
            write_average=None if average is None else self._component_writer(average),
        )

    def _component_writer(
        self, weights: Mapping[str, Tensor], with_config: bool = False
    ) -> Callable[[Path], None]:
        """A function that makes a folder with these weights loadable as a pipeline."""
        write_trained = self._trained_writer(weights)
        name = self.run.model_name

        def write(folder: Path) -> None:
            write_trained(folder)
            if name == checkpoints.COMPONENT:  # under another name no pipeline would find it
                paths = self.config.pipeline.paths
                checkpoints.complete_pipeline(
                    folder, paths.pretrained_path, paths.get("module_dict") or {}
                )
            if with_config:
                OmegaConf.save(self.user_config, folder / checkpoints.STATE / "config.yaml")

        return write

    def _trained_writer(self, weights: Mapping[str, Tensor]) -> Callable[[Path], None]:
        """A function that writes the model, or its adapters, to a folder."""
        if not self.accelerator.is_main_process:
            return lambda folder: None
        if self.adapters is not None:
            metadata = self.adapters.adapter_metadata(self.bare_model)
            adapters = self.adapters.adapter_weights(self.bare_model, weights)
            write_adapter = self.adapters.write_adapter
            return lambda folder: write_adapter(folder, adapters, metadata)
        config = json.loads(self.bare_model.to_json_string())
        file_format = OmegaConf.select(self.config, "checkpoint.format") or "safetensors"
        name = self.run.model_name
        return lambda folder: checkpoints.write_component(
            folder / name, config, weights, file_format
        )

    def _rank_state(self) -> dict[str, Any]:
        """What only this process knows."""
        scaler = self.accelerator.scaler
        return {
            "data": self.loader.state_dict(),
            "random": capture_random_state(self.accelerator.device),
            "window": self.reporter.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def _describe_run(self) -> dict[str, Any]:
        return {
            "format": STATE_FORMAT,
            "step": self.global_step,
            "num_processes": self.accelerator.num_processes,
            "engine": self.engine.name,
            "precision": self.precision,
            "wandb_run_id": OmegaConf.select(self.config, "wandb.run_id"),
            "versions": {
                "diffnext": __version__,
                "torch": torch.__version__,
                "accelerate": accelerate.__version__,
            },
        }

    def _prepare_universal_state(self, resume: ResumePoint | None) -> Path | None:
        """Rewrite DeepSpeed's state if it was saved by another number of processes; collective.

        Returns:
            Folder of the rewritten state; None if there was nothing to do.
        """
        if resume is None or not self.uses_deepspeed or self._find_mismatch(resume) is not None:
            return None
        if resume.trainer_state["num_processes"] == self.accelerator.num_processes:
            return None
        target = self.run.output_dir / checkpoints.CHECKPOINTS / f".{UNIVERSAL_TAG}"

        def convert() -> None:
            if self.accelerator.is_main_process:
                make_universal(resume.state, target)

        try:
            self.agreement.together(convert, "the optimizer state could not be converted")
        except TrainingError as error:
            self._warn_of_reset(resume, str(error))
            return None
        plugin = self.accelerator.state.deepspeed_plugin
        plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
        return target

    def _restore_state(self, resume: ResumePoint, universal_state: Path | None) -> None:
        """Restore engine, random states, data position and open reports as far as they fit."""
        mismatch = self._find_mismatch(resume)
        same_processes = resume.trainer_state.get("num_processes") == self.accelerator.num_processes
        if mismatch is not None:
            self._warn_of_reset(resume, mismatch)
        elif universal_state is not None:
            self.engine.load(universal_state)
        elif same_processes or not self.uses_deepspeed:
            self.engine.load(resume.state)
        if mismatch is not None or not same_processes:
            self._draw_fresh_random_numbers()
        if resume.state is None or not self._is_current_format(resume):
            self.logger.warning("%s holds no data position: data restarts", resume.checkpoint)
            return
        rank = self.accelerator.process_index if same_processes else 0
        rank_file = resume.state / f"rank_{rank}.pt"
        state = torch.load(rank_file, map_location="cpu", weights_only=True)
        self._restore_data_position(state["data"], resume.trainer_state["num_processes"])
        if mismatch is None and same_processes:
            restore_random_state(state["random"], self.accelerator.device)
            self.reporter.load_state_dict(state["window"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _warn_of_reset(self, resume: ResumePoint, reason: str) -> None:
        self.logger.warning(
            "%s: continuing from %s with its weights and step only. THE OPTIMIZER STATE IS RESET, "
            "and so are the random states",
            reason,
            resume.checkpoint,
        )

    def _is_current_format(self, resume: ResumePoint) -> bool:
        return resume.trainer_state.get("format") == STATE_FORMAT

    def _find_mismatch(self, resume: ResumePoint) -> str | None:
        """Why the saved optimizer state cannot be used; None if it can."""
        saved = resume.trainer_state
        if resume.state is None:
            return "the checkpoint holds no optimizer state"
        if not self._is_current_format(resume):
            return f"the checkpoint's state is of format {saved.get('format', 1)}"
        engine = "deepspeed" if self.uses_deepspeed else "distributed"
        if saved["engine"] != engine:
            return f"saved {'without' if self.uses_deepspeed else 'with'} DeepSpeed"
        if self.uses_deepspeed and saved["precision"] != self.precision:
            return f"saved with precision {saved['precision']}, now {self.precision}"
        return None

    def _draw_fresh_random_numbers(self) -> None:
        """Seed anew, so that the numbers of the first steps are not drawn once more."""
        seeds = np.random.SeedSequence([self.config.training.seed, self.global_step])
        seed = int(seeds.generate_state(1)[0])
        manual_seed(seed, (self.accelerator.device, seed))

    def _restore_data_position(self, saved: Mapping[str, Any], saved_processes: int) -> None:
        """Continue in the data; with other processes, after as many examples in all."""
        now = self.accelerator.num_processes
        if saved_processes != now:
            consumed = saved["consumed"] * saved_processes // now
            saved = {**self.loader.state_dict(), "consumed": consumed}
            self.logger.warning(
                "saved with %d processes, now %d: each continues after %d examples, in the order "
                "of its new shard",
                saved_processes,
                now,
                consumed,
            )
        try:
            self.loader.load_state_dict(saved)
        except ValueError as error:
            self.logger.warning("data restarts, as its position does not fit: %s", error)

    def close(self) -> None:
        """Finish the checkpoint being written; release the data loader and its workers."""
        try:
            self.writer.wait()
        finally:
            self.loader.close()


def import_adapters(config: DictConfig) -> ModuleType | None:
    """The module for low-rank adapters if the configuration wants them, else None.

    Raises:
        ConfigError: If peft is missing.
    """
    if not config.model.get("lora"):
        return None
    if find_spec("peft") is None:
        raise ConfigError("model.lora needs the package peft: pip install peft")
    from diffnext.engine import lora

    return lora


def build_loader(config: DictConfig) -> Any:
    """Open the training examples: the dataset without what validation holds out."""
    holdout = OmegaConf.select(config, "validation.holdout")
    if not isinstance(holdout, float):
        return config_to_object(config.train_dataloader)
    stop = count_training_examples(config)
    getter = functools.partial(open_subset, start=0, stop=stop)
    return config_to_object(config.train_dataloader, dataset_getter=getter)


def find_resume(config: DictConfig) -> ResumePoint | None:
    """Find the checkpoint that a configuration continues from.

    Args:
        config: Training configuration; its ``experiment`` section is read.

    Raises:
        ConfigError: If an explicit checkpoint cannot be used.
    """
    run = RunFolder(Path(config.experiment.output_dir), config.model.name)
    return checkpoints.find_resume_point(run, config.experiment.get("resume_from_checkpoint"))


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


def _find_nonfinite(metrics: Mapping[str, Tensor]) -> str | None:
    """The first metric that is not finite, with its value; None if all are."""
    for name, value in metrics.items():
        if not math.isfinite(value.item()):
            return f"{name} is {value.item()}"
    return None
