"""One run of training, from a configuration to its end, whichever way it ends."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from accelerate import Accelerator
from omegaconf import DictConfig

from diffnext.engine.control import EXIT_STOPPED, StopRequests, TrainingStopped
from diffnext.engine.data_check import count_training_examples
from diffnext.engine.dry_run import dry_run
from diffnext.engine.engine_utils import count_params, manual_seed
from diffnext.engine.preflight import check_config
from diffnext.engine.train_engine import Trainer, find_resume
from diffnext.utils.accelerate_utils import (
    RankLogger,
    build_accelerator,
    build_trackers,
    get_ddp_shards,
    set_logger,
)
from diffnext.utils.json_files import write_json
from diffnext.utils.omegaconf_utils import config_to_yaml, fill_defaults, save_config
from diffnext.utils.profiler import parse_duration

STATUS_FILE = "status.json"


def prepare_checkpoints(config: DictConfig) -> None:
    """Create the checkpoint folder and decide which checkpoint to continue from.

    The decision is written to ``experiment.resume_from_checkpoint`` (a path or "") and
    ``experiment.resume_iter``.

    Args:
        config: Training configuration, changed in place.
    """
    os.makedirs(os.path.join(config.experiment.output_dir, "checkpoints"), exist_ok=True)
    resume = find_resume(config)
    config.experiment.resume_from_checkpoint = "" if resume is None else str(resume.checkpoint)
    config.experiment.resume_iter = 0 if resume is None else resume.step
    saved_run_id = None if resume is None else resume.trainer_state.get("wandb_run_id")
    if saved_run_id and config.get("wandb") is not None and not config.wandb.get("run_id"):
        config.wandb.run_id = saved_run_id


def prepare_datasets(config: DictConfig, accelerator: Accelerator) -> None:
    """Tell the loader the size of the dataset and which shard of it belongs to this process.

    Args:
        config: Training configuration, changed in place.
        accelerator: Knows the processes.

    Raises:
        ValueError: If the dataset is none.
    """
    params = config.train_dataloader.params
    params.max_examples = count_training_examples(config)
    if params.get("shard_id") is None:
        params.update(get_ddp_shards(accelerator))


def prepare_seeds(config: DictConfig, accelerator: Accelerator) -> None:
    """Give each process its own seed and seed everything.

    Args:
        config: Training configuration, changed in place.
        accelerator: Knows the processes.
    """
    seed = config.training.seed
    config.training.gpu_id = accelerator.device.index
    config.training.seed = seed + accelerator.process_index
    manual_seed(seed, (accelerator.device, config.training.seed))


def run_train(
    config: DictConfig,
    accelerator: Accelerator,
    logger: RankLogger,
    user_config: DictConfig,
    stop: StopRequests,
) -> None:
    """Train until the configured step.

    Args:
        config: Prepared configuration.
        accelerator: Started accelerator.
        logger: Where to report.
        user_config: Configuration as given, to be saved with checkpoints.
        stop: Asked between steps whether to go on.

    Raises:
        TrainingStopped: If asked to stop early.
        TrainingError: If the run cannot go on.
    """
    done = config.experiment.resume_iter
    if done >= config.training.max_train_steps:
        logger.info(
            "Nothing to do: %s is at step %d and training.max_train_steps is %d",
            config.experiment.resume_from_checkpoint,
            done,
            config.training.max_train_steps,
        )
        return
    with contextlib.closing(Trainer(config, accelerator, logger, user_config, stop)) as trainer:
        logger.info("#Params: %.2fM", count_params(trainer.bare_model))
        if done > 0:
            logger.info("Resume from %s at step %d", config.experiment.resume_from_checkpoint, done)
        logger.info("Start training...")
        trainer.train_loop()


def write_status(config: DictConfig, status: str, message: str, exit_code: int) -> None:
    """Leave word of how a run ended: launchers turn every exit code but 0 into 1.

    Args:
        config: Training configuration.
        status: "running", "finished", "stopped" or "failed".
        message: Details.
        exit_code: Of the process.
    """
    content = {"status": status, "message": message, "exit_code": exit_code}
    write_json(Path(config.experiment.output_dir) / STATUS_FILE, content)


def train(config: DictConfig) -> None:
    """Set up the run that a configuration describes, and train.

    Args:
        config: Training configuration.
    """
    user_config = config
    config = fill_defaults(config)
    if config.training.dry_run:
        accelerator = build_accelerator(config)
        report = print if accelerator.is_main_process else _report_nothing
        sys.exit(0 if dry_run(config, accelerator, report) else 1)
    check_config(config)
    accelerator = build_accelerator(config, log_with="wandb")
    time_limit = parse_duration(config.training.get("time_limit"))
    try:
        with StopRequests(time_limit) as stop:
            logger = set_logger(config.experiment.output_dir, accelerator=accelerator)
            prepare_seeds(config, accelerator)
            prepare_checkpoints(config)
            prepare_datasets(config, accelerator)
            build_trackers(config, accelerator)
            logger.info("Config:\n%s", config_to_yaml(config))
            if accelerator.is_main_process:
                save_config(user_config, os.path.join(config.experiment.output_dir, "config.yaml"))
                write_status(config, "running", "", 0)
            run_train(config, accelerator, logger, user_config, stop)
    except BaseException as error:
        if accelerator.is_main_process:
            stopped = isinstance(error, TrainingStopped)
            code = EXIT_STOPPED if stopped else 1
            write_status(config, "stopped" if stopped else "failed", str(error), code)
        # Leave the process group alone: other processes may be waiting in it.
        for tracker in accelerator.trackers:
            tracker.finish()
        raise
    if accelerator.is_main_process:
        write_status(config, "finished", "", 0)
    accelerator.end_training()


def _report_nothing(text: str) -> None:
    """Keep ranks other than 0 silent."""
