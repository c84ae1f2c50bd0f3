"""The trainer: steps a run, reports, saves and validates it."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffnext.config.load import parse
from diffnext.config.schema import TrainConfig
from diffnext.config.targets import config_to_object
from diffnext.engine import control, engine_state, run_parts, snapshot
from diffnext.engine.checkpoint_writer import CheckpointWriter, Snapshot
from diffnext.engine.engine_utils import get_param_groups, manual_seed
from diffnext.engine.reporting import Reporter, StepResult
from diffnext.engine.resume import LATEST, ResumePoint, describe_run
from diffnext.engine.run_inputs import RunInputs, open_inputs
from diffnext.engine.stepping import Outcome, Stepper, mean_by_name
from diffnext.engine.validation import Validator
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.utils.profiler import Timer, get_progress


@dataclass(frozen=True)
class OpenStep:
    """A step that was launched, and not looked at yet.

    Attributes:
        result: To be reported if it was applied.
        outcome: Tells whether it was.
        num_read: Examples of this process that were read by then.
    """

    result: StepResult
    outcome: Outcome
    num_read: int


class Trainer:
    """Trains the model of a pipeline.

    Without DeepSpeed the trained component is kept in float32 and the forward pass runs under
    autocast; under DeepSpeed it is in the training dtype and DeepSpeed keeps float32 masters.

    Args:
        config: Training configuration, merged or parsed.
        accelerator: From :func:`diffnext.utils.accelerate_utils.build_accelerator`.
        logger: Where the run reports.
        inputs: What the run reads; default: opened here.
        resume: Where to continue; default: at the start.
        run_id: Id of the run, written to its checkpoints.
        wandb_run_id: Id of the tracker's run, kept across resumes.
        user_config: Configuration as the user gave it, saved with checkpoints; default ``config``.
        stop: Asked between steps whether to continue; default: nobody stops the run.

    Raises:
        ConfigError: If the configuration cannot be built.
    """

    def __init__(
        self,
        config: TrainConfig | DictConfig,
        accelerator: Accelerator,
        logger: logging.Logger | logging.LoggerAdapter,
        inputs: RunInputs | None = None,
        resume: ResumePoint | None = None,
        run_id: str = "",
        wandb_run_id: str | None = None,
        user_config: DictConfig | None = None,
        stop: control.StopRequests | None = None,
    ) -> None:
        if user_config is None and isinstance(config, DictConfig):
            user_config = config
        self.config = parse(config, TrainConfig)
        self.accelerator = accelerator
        self.logger = logger
        self.inputs = open_inputs(self.config) if inputs is None else inputs
        self.run_id = run_id
        self.wandb_run_id = wandb_run_id
        self.stop = control.StopRequests() if stop is None else stop
        self.global_step = 0 if resume is None else resume.step
        self._saved_step = self.global_step  # nothing is new yet
        self._open_step: OpenStep | None = None
        self._num_read = 0

        # First, as it fails fastest. Its processes only start with the first batch.
        self.loader = run_parts.build_loader(self.config, self.inputs, accelerator)
        self._reader_deaths = control.HeldSignal(signal.SIGCHLD)
        self.agreement = control.Agreement(accelerator)
        self._prepare_model(resume)
        config_yaml = "" if user_config is None else OmegaConf.to_yaml(user_config)
        self.writer = CheckpointWriter(
            self.config,
            self.inputs,
            accelerator,
            self.bare_model,
            run_id,
            self.global_step,
            config_yaml,
            logger,
        )
        self.timer = Timer()
        self.reporter = Reporter(self.config, accelerator, logger)
        if resume is not None:
            failure = f"{resume.checkpoint} cannot be continued"
            self.agreement.together(lambda: self._restore(resume), failure)

    def _prepare_model(self, resume: ResumePoint | None) -> None:
        """Load the pipeline, and give model and optimizer to the engine."""
        config, inputs, accelerator = self.config, self.inputs, self.accelerator
        self.pipeline = run_parts.build_training_pipeline(config, inputs, accelerator, resume)
        self.ema = None
        if accelerator.is_main_process:
            self.ema = run_parts.build_ema(config, self.pipeline.model, resume)
        model = self.pipeline.prepare_model(config)
        if config.training.compile:
            model.compile_parts()
        self.optimizer = config_to_object(config.optimizer, params=get_param_groups(model))
        self.lr_scheduler = config_to_object(config.lr_scheduler)
        self.validator = Validator(config, inputs, accelerator, self.pipeline, self.logger)
        makes_videos = self.pipeline.model.config.video_base_size[0] > 1
        if makes_videos and any(facts.has_single_frames for facts in inputs.datasets):
            # The parts that read earlier frames get no gradient from a batch without any.
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.model, self.optimizer = accelerator.prepare(model, self.optimizer)
        self.stepper = Stepper(config, accelerator, self.pipeline, self.model, self.optimizer)
        if self.stepper.uses_deepspeed:
            # It would check gradients in fp16 only.
            self.model.optimizer.check_grad_overflow = True
        kind = engine_state.ZeroState if self.stepper.uses_deepspeed else engine_state.EngineState
        is_lora = config.model.lora is not None
        self.engine = kind(accelerator, self.model, self.optimizer, trained_only=is_lora)

    @property
    def bare_model(self) -> NOVATransformer3DModel:
        """The model without the wrappers of distributed training."""
        return self.stepper.bare_model

    # Stepping

    def train_loop(self) -> None:
        """Step until ``training.max_train_steps``, then log and save the rest.

        Raises:
            TrainingStopped: If asked to stop; the checkpoint is written.
            TrainingError: If the run cannot continue, on every process.
        """
        max_steps = self.config.training.max_train_steps
        self.accelerator.step = 0  # micro-batches are counted from a whole step
        self.reporter.rewind(self.global_step)
        try:
            with self._reader_deaths.held(), self.reporter.progress_bar(self.global_step):
                while self.global_step < max_steps:
                    with self.timer.tic_and_toc():
                        self.run_step(self.config.training.gradient_accumulation_steps)
                    self.global_step += 1
                    self.reporter.advance()
                    self._after_step(is_last=self.global_step == max_steps)
            self.writer.wait()
        except RuntimeError as error:
            if not control.is_lost_connection(error):
                raise
            raise control.ProcessLost(
                f"step {self.global_step} was cut short: another process of the run is gone. Its "
                "own message, or the launcher's, says why"
            ) from error

    def run_step(self, accum_steps: int) -> StepResult:
        """Do one optimizer step, unless a process was asked to stop.

        Whether it was applied is looked at in the next step, or before anything is reported or
        saved: it is left out if a loss or gradient is NaN or infinite.

        Args:
            accum_steps: Micro-batches whose gradients are averaged.

        Raises:
            TrainingError: If a process has no data, or if the step before was left out and
                ``training.on_nonfinite`` says stop.
            TrainingStopped: If asked to stop; the checkpoint is written.
        """
        batches = self._read_batches(accum_steps)
        lr = self._set_learning_rate()
        num_tokens = sum(self._count_tokens(batch) for batch in batches)
        metrics = mean_by_name([self.stepper.run_micro_batch(batch) for batch in batches])
        outcome = self.stepper.step_optimizer()
        result = StepResult(self.global_step, lr, metrics, outcome.norm, num_tokens)
        self._look_at_open_step()
        self._open_step = OpenStep(result, outcome, self._num_read)
        return result

    def _read_batches(self, count: int) -> list[dict[str, Any]]:
        """The batches of a step; one exchange tells whether every process has them."""

        def read() -> list[dict[str, Any]]:
            self.writer.raise_error()
            with self._reader_deaths.delivered():
                return [self.loader.next()[0] for _ in range(count)]

        position = self.loader.state_dict()
        batches, reasons = self.agreement.unless(
            self.stop.reason(), read, f"step {self.global_step} cannot start"
        )
        if reasons:
            if batches is not None:
                self.loader.load_state_dict(position)
            self._stop("; ".join(reasons))
        self._num_read += count * self.config.training.batch_size
        return batches

    def _look_at_open_step(self) -> None:
        """Report a step if it was applied; else name the culprit, which is collective."""
        step, self._open_step = self._open_step, None
        if step is None:
            return
        if step.outcome.is_applied():
            self.reporter.add(step.result)
        else:
            self._handle_nonfinite(step)

    def _handle_nonfinite(self, step: OpenStep) -> None:
        """Name the culprit and stop, or leave the step out; collective.

        In fp16 the scaler searches for the largest scale that does not overflow, so only NaN or
        infinity in a loss counts.

        Raises:
            TrainingError: If ``training.on_nonfinite`` says stop.
        """
        training = self.config.training
        culprit = None
        for name, value in step.result.metrics.items():
            if culprit is None and not math.isfinite(value.item()):
                count = training.batch_size * training.gradient_accumulation_steps
                examples = self.loader.describe_last(count, skip=self._num_read - step.num_read)
                culprit = f"{name} is {value.item()} on {examples}"
        culprits = self.agreement.collect(culprit)
        if not culprits and training.mixed_precision == "fp16":
            return
        if not culprits:
            culprits = [f"the gradient of {step.outcome.find_culprit()}"]
        text = f"step {step.result.step} is not finite: {'; '.join(culprits)}"
        if training.on_nonfinite == "skip":
            self.logger.warning("%s. This step is left out", text)
            return
        raise control.TrainingError(f"{text}. Nothing of this step was applied")

    def _count_tokens(self, batch: Mapping[str, Any]) -> int:
        """Latent tokens of a batch: frames x rows x columns of the image encoder's patches."""
        patch_size = self.bare_model.image_encoder.patch_embed.patch_size
        return sum(math.prod(m.shape[1:]) // patch_size**2 for m in batch["latents"])

    def _set_learning_rate(self) -> float:
        lr = self.lr_scheduler.lr_at(self.global_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
        return lr

    def _after_step(self, is_last: bool) -> None:
        """Log, average, save and validate at their intervals; the first three also at the end."""
        experiment, ema = self.config.experiment, self.config.ema
        if is_last or (self.global_step - 1) % experiment.log_every == 0:
            self._look_at_open_step()
            self.reporter.report()
        if self.global_step % (10 * experiment.log_every) == 0:
            max_steps = self.config.training.max_train_steps
            self.logger.info(get_progress(self.timer, self.global_step, max_steps))
        if ema is not None and (is_last or self.global_step % ema.params.update_every == 0):
            self.update_ema()
        if is_last or self.global_step % experiment.save_every == 0:
            with self.reporter.excluded_time():
                self.save()
        if self.validator.is_due(self.global_step):
            with self.reporter.excluded_time():
                self.validate()

    def _stop(self, reason: str) -> NoReturn:
        """End the run with a checkpoint.

        Raises:
            TrainingStopped: Always.
        """
        self.logger.info("Stopping at step %d: %s", self.global_step, reason)
        self.save()
        self.writer.wait()
        key = "experiment.resume_from_checkpoint"
        is_latest = self.config.experiment.resume_from_checkpoint == LATEST
        command = "the same command" if is_latest else f"the same command with {key}={LATEST}"
        text = f"stopped at step {self.global_step}: {reason}; {command} continues"
        raise control.TrainingStopped(text)

    def update_ema(self) -> None:
        """Move the average toward the master weights; every process takes part."""

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
        """Write the checkpoint of the current step, unless it is already written; collective.

        Raises:
            TrainingError: On every process, if any could not write.
        """
        if self.global_step == self._saved_step:
            return
        self._look_at_open_step()
        is_async = self.config.checkpoint.async_save

        def gather() -> dict[str, Tensor]:
            tensors = self.engine.tensors(copy=is_async)
            if self.ema is not None:
                self.ema.check()
            return tensors

        engine = self.agreement.together(gather, "the state could not be gathered")
        average = None
        if self.ema is not None:
            weights = run_parts.trained_weights(self.config, self.ema.model.state_dict())
            average = {n: v.detach().to("cpu", copy=is_async) for n, v in weights.items()}
        state = describe_run(
            self.config,
            self.inputs,
            step=self.global_step,
            num_processes=self.accelerator.num_processes,
            run_id=self.run_id,
            wandb_run_id=self.wandb_run_id,
        )
        rank_state = {
            "data": self.loader.state_dict(),
            "random": engine_state.capture_random_state(self.accelerator.device),
            "window": self.reporter.state_dict(),
            "scaler": self.engine.scaler_state(),
        }
        self.writer.write(
            Snapshot(state=state, rank_state=rank_state, engine=engine, average=average)
        )
        self._saved_step = self.global_step

    def _restore(self, resume: ResumePoint) -> None:
        """Restore engine, random states, data position and open reports as far as they fit.

        Raises:
            ValueError: If a file is damaged, or belongs to another model.
        """
        if resume.state is None:
            self._draw_fresh_random_numbers()
            self.logger.warning(
                "%s holds no optimizer state: continuing with its weights and step only. THE "
                "OPTIMIZER STATE IS RESET, and so are the random states",
                resume.checkpoint,
            )
            self.logger.warning("%s holds no data position: data restarts", resume.checkpoint)
            return
        self.engine.load(snapshot.read_tensors(resume.checkpoint / snapshot.ENGINE))
        num_saved = resume.state.num_processes
        is_same = num_saved == self.accelerator.num_processes
        rank = self.accelerator.process_index if is_same else 0
        saved = snapshot.read_rank(resume.checkpoint, rank)
        self._restore_data_position(saved["data"], num_saved)
        if is_same:
            engine_state.restore_random_state(saved["random"], self.accelerator.device)
            self.reporter.load_state_dict(saved["window"])
        else:
            self._draw_fresh_random_numbers()
        self.engine.load_scaler_state(saved["scaler"])

    def _draw_fresh_random_numbers(self) -> None:
        """Seed anew: the numbers of the first steps must not be drawn again."""
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
