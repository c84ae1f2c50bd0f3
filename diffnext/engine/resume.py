"""Where a run continues: the main process finds and verifies the checkpoint, all use that one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch

from diffnext.config.schema import TrainConfig
from diffnext.config.targets import ConfigError
from diffnext.engine import snapshot
from diffnext.engine.dataset_facts import joint_fingerprint
from diffnext.engine.run_inputs import RunInputs
from diffnext.engine.snapshot import RunFolder, TrainerState
from diffnext.pipelines.release_folder import LORA_FILE
from diffnext.utils.json_files import FileError, read_json, same_value
from diffnext.version import __version__

LATEST = "latest"
KEY = "experiment.resume_from_checkpoint"


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """What a run continues from.

    Attributes:
        step: Completed steps.
        checkpoint: The checkpoint folder, as an absolute path.
        weights: File with the weights of the trained component.
        state: What the checkpoint says of the run; None if only its weights can be used.
        ema_weights: File with the averaged weights; None if there is none.
        notes: Warnings: newer checkpoints that cannot be used, and why.
    """

    step: int
    checkpoint: Path
    weights: Path
    state: TrainerState | None = None
    ema_weights: Path | None = None
    notes: tuple[str, ...] = ()


def find_resume_point(run: RunFolder, resume: str | None) -> ResumePoint | None:
    """Find the checkpoint to continue from, and check that no file of it is damaged.

    Args:
        run: Output folder of the run.
        resume: "latest" (the newest sound checkpoint of the run), a path, or "" for none. A path is
            a checkpoint folder or a bare folder of weights; its name, or the one above it, ends in
            the step number.

    Returns:
        The point, or None to start afresh.

    Raises:
        ConfigError: If a path does not exist, is damaged or has no step number, or if there are
            checkpoints of which none can be continued.
    """
    if resume == LATEST:
        return _find_latest(run)
    return _find_path(run, resume) if resume else None


def _find_path(run: RunFolder, resume: str) -> ResumePoint:
    path = Path(os.path.abspath(Path(resume).expanduser()))  # also removes a trailing slash
    if not path.is_dir():
        raise ConfigError(f"{KEY}={resume}: there is no folder {path}")
    try:
        if (path / run.model_name).is_dir() or (path / LORA_FILE).exists():
            return _inspect(run, path, _step_of(path))
        step = _step_of(path if re.search(r"-\d+$", path.name) else path.parent)
        return ResumePoint(step=step, checkpoint=path, weights=_find_readable(run, path, path))
    except (FileError, OSError) as error:
        raise ConfigError(f"{KEY}={resume}: {error}") from error


def _find_latest(run: RunFolder) -> ResumePoint | None:
    run_id = run.read_id()
    notes: list[str] = []
    for step in reversed(run.steps()):
        path = run.checkpoint(step).absolute()
        try:
            point = _inspect(run, path, step, tuple(notes))
        except (FileError, OSError) as error:
            notes.append(f"{path.name} is damaged and is not used: {error}")
            continue
        if run_id is None or point.state is None or point.state.run == run_id:
            return point
        notes.append(f"{path} is from another run and is not used")
    if notes:
        raise ConfigError(
            f"no checkpoint in {run.output_dir} can be continued: {'; '.join(notes)}. Choose "
            "another folder, or move them away to start afresh"
        )
    return None


def _inspect(
    run: RunFolder, checkpoint: Path, step: int, notes: tuple[str, ...] = ()
) -> ResumePoint:
    """Verify a checkpoint.

    Raises:
        FileError: If a file is damaged.
    """
    # The averages lie beside the checkpoint's own parent, whatever else the path contains.
    average = checkpoint.parent.parent / snapshot.EMA_CHECKPOINTS / checkpoint.name
    has_average = average.is_dir()
    state = snapshot.read_state(checkpoint)
    if state is not None:
        snapshot.verify(checkpoint, state, average)
        if state.step != step:
            raise FileError(f"{checkpoint} was written at step {state.step}")
        has_average = bool(state.average)  # another run may have left one there
    return ResumePoint(
        step=step,
        checkpoint=checkpoint,
        weights=_find_readable(run, checkpoint, checkpoint / run.model_name),
        state=state,
        ema_weights=run.find_trained(average) if has_average else None,
        notes=notes,
    )


def _find_readable(run: RunFolder, checkpoint: Path, folder: Path) -> Path:
    """The trained weights of a checkpoint.

    Raises:
        FileError: If there are none, or they cannot be read.
    """
    file = run.find_trained(checkpoint) or snapshot.find_weights(folder)
    if file is None:
        names = " or ".join(snapshot.WEIGHTS_FILES.values())
        hint = "" if folder.is_dir() else f", the folder of model.name={run.model_name}"
        raise FileError(f"there is no {names} in {folder}{hint}")
    snapshot.check_inside(checkpoint, file)
    snapshot.read_tensors(file)
    return file


def _step_of(path: Path) -> int:
    match = re.search(r"-(\d+)$", path.name)
    if match is None:
        raise ConfigError(
            f"{KEY}: the name of a checkpoint folder must end in its step, such as "
            f"checkpoint-5000, got {path}"
        )
    return int(match[1])


def find_mismatches(
    config: TrainConfig, inputs: RunInputs, resume: ResumePoint
) -> Iterator[tuple[str, bool]]:
    """Compare a run with the checkpoint that it continues from.

    Yields:
        A difference, in words that name both values, and whether the run can continue with it.
    """
    yield from ((text, False) for text in _other_model(config, inputs, resume))
    saved, name = resume.state, resume.checkpoint.name
    holdout = _describe_holdout(config, inputs)
    # Weights without a state may have been trained on everything.
    before = {} if saved is None else saved.holdout
    if before != holdout:
        yield (
            f"validation.holdout keeps {_in_words(holdout)} from training, but in {name} it was "
            f"{_in_words(before)}: the held-out loss would include examples that it has learnt. "
            "Keep the same, or start from its weights in a new folder",
            False,
        )
    if saved is None:
        return
    for key, old, new in (
        ("optimizer.target", saved.optimizer, config.optimizer.target),
        ("pipeline.target", saved.pipeline, config.pipeline.target),
    ):
        if old != new:
            yield (
                f"{key} is {new}, but {name} was written with {old}. To change it, start from its "
                "weights in a new folder",
                False,
            )
    schedule, dataset = _describe_schedule(config), joint_fingerprint(inputs.datasets)
    if saved.schedule != schedule:
        yield f"lr_scheduler was {saved.schedule}, from here on it is {schedule}", True
    if saved.dataset != dataset:
        yield f"the dataset was {saved.dataset}, from here on it is {dataset}", True


def _other_model(config: TrainConfig, inputs: RunInputs, resume: ResumePoint) -> Iterator[str]:
    """Compare the model, or its adapters, with the saved one."""
    is_lora = resume.weights.name == LORA_FILE
    if is_lora != (config.model.lora is not None):
        has = "has adapters" if is_lora else "has a whole model"
        wants = "trains adapters" if config.model.lora else "is not set: it trains the whole model"
        yield f"model.lora {wants}, but {resume.weights} {has}"
    config_file = resume.weights.parent / "config.json"
    if is_lora or not config_file.is_file():
        return
    written = read_json(config_file)
    for name, value in inputs.transformer.items():
        if name in written and not same_value(written[name], value):
            yield f"the model's {name} is {value}, but {config_file} has {written[name]}"


def describe_run(
    config: TrainConfig,
    inputs: RunInputs,
    *,
    step: int,
    num_processes: int,
    run_id: str,
    wandb_run_id: str | None,
) -> TrainerState:
    """What is written to a checkpoint of a run, for :func:`find_mismatches` and for people."""
    return TrainerState(
        step=step,
        num_processes=num_processes,
        run=run_id,
        precision=config.training.mixed_precision,
        optimizer=config.optimizer.target,
        pipeline=config.pipeline.target,
        schedule=_describe_schedule(config),
        dataset=joint_fingerprint(inputs.datasets),
        holdout=_describe_holdout(config, inputs),
        wandb_run_id=wandb_run_id,
        versions={
            "diffnext": __version__,
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
        },
    )


def _describe_holdout(config: TrainConfig, inputs: RunInputs) -> dict[str, Any]:
    """What is kept from training: a share of the datasets, or a dataset of its own."""
    holdout = config.validation.holdout
    if holdout is None:
        return {}
    if isinstance(holdout, str):
        return {"dataset": joint_fingerprint(inputs.holdout)}
    # In other datasets the same share is other examples.
    return {"share": holdout, "of": sorted(facts.fingerprint for facts in inputs.datasets)}


def _in_words(holdout: dict[str, Any]) -> str:
    if not holdout:
        return "nothing"
    if "dataset" in holdout:
        return f"the dataset {holdout['dataset']}"
    return f"the share {holdout['share']} of {', '.join(holdout.get('of', []))}"


def _describe_schedule(config: TrainConfig) -> dict[str, Any]:
    return {"target": config.lr_scheduler.target, **config.lr_scheduler.params}
