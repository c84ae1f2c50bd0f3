"""One run of training, from the command line to its end."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf

from diffnext.config.load import Draft, config_to_yaml, parse_for_rank, read_config
from diffnext.config.schema import TrainConfig
from diffnext.config.targets import ConfigError
from diffnext.engine.control import EXIT_STOPPED, Agreement, StopRequests, TrainingStopped
from diffnext.engine.dry_run import dry_run
from diffnext.engine.engine_utils import count_params, manual_seed
from diffnext.engine.output_lock import locked
from diffnext.engine.reporting import METRICS_FILE
from diffnext.engine.resume import LATEST, ResumePoint, find_mismatches, find_resume_point
from diffnext.engine.run_inputs import RunInputs, inspect_inputs, open_inputs
from diffnext.engine.snapshot import COMPONENT, RunFolder
from diffnext.engine.train_engine import Trainer
from diffnext.utils.accelerate_utils import (
    build_accelerator,
    build_trackers,
    set_logger,
    warn_on_error,
)
from diffnext.utils.folders import STATUS_FILE
from diffnext.utils.json_files import write_json, write_whole
from diffnext.utils.profiler import parse_duration


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the main process has decided for all.

    Attributes:
        inputs: What the run reads.
        resume: Where it continues; None for a fresh start.
        run_id: Id of the run, by which it finds its own checkpoints.
        notes: Warnings.
    """

    inputs: RunInputs
    resume: ResumePoint | None
    run_id: str
    notes: tuple[str, ...]


def train(argv: Sequence[str]) -> None:
    """Set up the run that a command line describes, and train.

    Args:
        argv: Arguments, see :func:`diffnext.config.load.get_config`.

    Raises:
        ConfigError: Naming everything that keeps the run from starting.
        TrainingStopped: If asked to stop early.
        TrainingError: If the run cannot continue.
    """
    user_config, config = load(argv)
    if config.training.dry_run:
        accelerator = build_accelerator(config)
        sys.exit(0 if dry_run(config, accelerator, print) else 1)
    with contextlib.ExitStack() as stack:
        time_limit = parse_duration(config.training.time_limit)
        stop = stack.enter_context(StopRequests(time_limit).listening())
        accelerator = build_accelerator(config)
        agreement = Agreement(accelerator)
        start = agreement.decide(lambda: _decide(config, accelerator, stack))
        if accelerator.process_index:
            config = parse_for_rank(user_config, accelerator.process_index)
        with _leaving_word(Path(config.experiment.output_dir), start.run_id, accelerator):
            _train(config, user_config, accelerator, start, stop)


def load(argv: Sequence[str]) -> tuple[DictConfig, TrainConfig]:
    """Merge file and command line, and parse the result.

    If it has errors, but not in the sections that name the inputs, the inputs are checked as well:
    all errors are printed at once.

    Raises:
        ConfigError: Naming each error.
    """
    user_config, origins = read_config(argv)
    draft = Draft(user_config, TrainConfig, origins)
    if not draft.problems:
        return user_config, draft.build()
    sound = draft.sound_part(
        needed=("model", "pipeline", "train_dataloader", "validation"),
        stand_ins={"experiment.output_dir": ".", "training.max_train_steps": 1},
    )
    problems = list(draft.problems)
    if sound is not None and os.environ.get("RANK", "0") == "0":  # the one that prints them
        found = inspect_inputs(sound, int(os.environ.get("WORLD_SIZE", 1))).problems
        sections = {path.partition(".")[0] for path in draft.unsound}
        problems += [p for p in found if p.partition(".")[0] not in sections]
    raise ConfigError(*problems)


def _decide(config: TrainConfig, accelerator: Accelerator, stack: contextlib.ExitStack) -> Start:
    """Open what the run reads, take the output folder and choose where to continue.

    Raises:
        ConfigError: If the run cannot begin.
    """
    output_dir = Path(config.experiment.output_dir)
    inputs = open_inputs(config, accelerator.num_processes)
    stack.enter_context(locked(output_dir))
    run = RunFolder(output_dir, config.model.name)
    resume = find_resume_point(run, config.experiment.resume_from_checkpoint)
    notes: list[str] = []
    if resume is not None:
        notes += resume.notes
        differences = list(find_mismatches(config, inputs, resume))
        problems = [text for text, can_continue in differences if not can_continue]
        if problems:
            raise ConfigError(*problems)
        notes += [text for text, _ in differences]
    elif run.steps():
        notes.append(
            f"{output_dir} has checkpoints of another run, up to step {run.steps()[-1]}: this one "
            "starts afresh and leaves them alone, but moves away those in its way"
        )
    for name, values in (inputs.paths["module_config"] or {}).items():
        if values and name != COMPONENT:
            notes.append(
                f"pipeline.paths.module_config.{name} holds for this run only: whoever draws with "
                f"its checkpoints gets the {name} of the base folder as it is there"
            )
    run_id = None
    if resume is not None and config.experiment.resume_from_checkpoint == LATEST:
        run_id = run.read_id() or (resume.state and resume.state.run)
    else:  # a run of its own, even if it goes back to an earlier checkpoint
        run.set_aside(output_dir / METRICS_FILE)
    run_id = run_id or secrets.token_hex(8)
    return Start(inputs=inputs, resume=resume, run_id=run_id, notes=tuple(notes))


@contextlib.contextmanager
def _leaving_word(output_dir: Path, run_id: str, accelerator: Accelerator) -> Iterator[None]:
    """Say in ``status.json`` how the run ends: launchers turn every exit code but 0 into 1."""

    def write(status: str, message: str = "", exit_code: int = 0) -> None:
        if accelerator.is_main_process:
            content = {"run": run_id, "status": status, "message": message}
            with contextlib.suppress(OSError):
                write_json(output_dir / STATUS_FILE, {**content, "exit_code": exit_code})

    write("running")
    try:
        yield
    except BaseException as error:
        is_stop = isinstance(error, TrainingStopped)
        write("stopped" if is_stop else "failed", str(error), EXIT_STOPPED if is_stop else 1)
        # Leave the process group alone: other processes may be waiting in it.
        for tracker in accelerator.trackers:
            with contextlib.suppress(Exception):
                tracker.finish()
        raise
    write("finished")
    accelerator.end_training()


def _train(
    config: TrainConfig,
    user_config: DictConfig,
    accelerator: Accelerator,
    start: Start,
    stop: StopRequests,
) -> None:
    """Set up log, seeds and trackers, and step to the end."""
    output_dir, max_steps = config.experiment.output_dir, config.training.max_train_steps
    resume = start.resume
    first_step = 0 if resume is None else resume.step
    logger = set_logger(output_dir, accelerator=accelerator)
    for note in start.notes:
        logger.warning("%s", note)
    rank_seed = config.training.seed
    manual_seed(rank_seed - accelerator.process_index, (accelerator.device, rank_seed))
    saved_id = None if resume is None or resume.state is None else resume.state.wandb_run_id
    wandb_run_id = build_trackers(config, accelerator, saved_id, first_step=first_step)
    logger.info("Config:\n%s", OmegaConf.to_yaml(user_config))
    if accelerator.is_main_process:
        with warn_on_error(logger, "config.yaml is not written"):
            write_whole(Path(output_dir) / "config.yaml", [config_to_yaml(user_config)])
    if resume is not None and first_step >= max_steps:
        text = "Nothing to do: %s is at step %d and training.max_train_steps is %d"
        logger.info(text, resume.checkpoint, first_step, max_steps)
        return
    trainer = Trainer(
        config,
        accelerator,
        logger,
        inputs=start.inputs,
        resume=resume,
        run_id=start.run_id,
        wandb_run_id=wandb_run_id,
        user_config=user_config,
        stop=stop,
    )
    with contextlib.closing(trainer):
        logger.info("#Params: %.2fM", count_params(trainer.bare_model))
        if resume is not None:
            logger.info("Resume from %s at step %d", resume.checkpoint, resume.step)
        logger.info("Start training...")
        trainer.train_loop()
