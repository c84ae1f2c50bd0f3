"""Checks of a run's configuration, paths and data, done before anything is built."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from diffnext.engine.data_check import check_dataset, check_records, count_examples
from diffnext.engine.model_check import (
    check_base_folder,
    check_components,
    check_pipeline,
    check_transformer,
)
from diffnext.utils.config_check import look_up, resolve
from diffnext.utils.omegaconf_utils import (
    ConfigError,
    config_to_class,
    config_to_object,
    require_keys,
)
from diffnext.utils.profiler import parse_duration

__all__ = ["check_config", "count_examples", "find_problems", "loss_weights"]

REQUIRED_KEYS = (
    "experiment.output_dir",
    "pipeline.target",
    "pipeline.paths.pretrained_path",
    "optimizer.target",
    "lr_scheduler.target",
    "train_dataloader.params.dataset",
    "model.name",
    "training.max_train_steps",
    "training.seed",
)
TRACKERS = ("wandb", "tensorboard")


@dataclass(frozen=True)
class Rule:
    """What a value must be, if there is one.

    Attributes:
        requirement: In words, as they follow "must be".
        holds: Whether a value is that.
    """

    requirement: str
    holds: Callable[[Any], bool]


def _number_rule(requirement: str, test: Callable[[float], bool]) -> Rule:
    def holds(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value) and test(value)

    return Rule(requirement, holds)


def _count_rule(minimum: int) -> Rule:
    return Rule(
        f"a whole number of at least {minimum}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= minimum,
    )


NOT_EMPTY = Rule("a list with something in it", lambda value: len(value) > 0)
MASK_RATIOS = Rule(
    "least share, largest share and width, with 0 <= least < largest <= 1 and a width above 0",
    lambda value: len(value) == 3 and 0 <= value[0] < value[1] <= 1 and value[2] > 0,
)
POSITIVE = _number_rule("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = _number_rule("a finite number of at least 0", lambda value: value >= 0)

RULES = {
    "experiment.log_every": _count_rule(1),
    "experiment.save_every": _count_rule(1),
    "model.gradient_checkpointing": Rule("0, 1, 2 or 3", lambda value: value in range(4)),
    "model.loss_repeat": _count_rule(1),
    "model.mask_ratios": MASK_RATIOS,
    "model.lora.rank": _count_rule(1),
    "model.lora.alpha": POSITIVE,
    "model.lora.dropout": _number_rule("at least 0 and below 1", lambda value: 0 <= value < 1),
    "model.lora.target_modules": NOT_EMPTY,
    "optimizer.params.lr": NOT_NEGATIVE,
    "lr_scheduler.params.lr_max": NOT_NEGATIVE,
    "lr_scheduler.params.lr_min": NOT_NEGATIVE,
    "lr_scheduler.params.warmup_steps": _count_rule(0),
    "ema.params.decay": _number_rule("between 0 and 1", lambda value: 0 <= value <= 1),
    "ema.params.update_every": _count_rule(1),
    "checkpoint.keep_last": _count_rule(1),
    "checkpoint.keep_every": _count_rule(1),
    "validation.every": _count_rule(1),
    "validation.prompts": NOT_EMPTY,
    "validation.seeds": NOT_EMPTY,
    "validation.num_inference_steps": _count_rule(1),
    "validation.num_diffusion_steps": _count_rule(1),
    "validation.guidance_scale": NOT_NEGATIVE,
    "validation.max_latent_length": _count_rule(1),
    "training.max_train_steps": _count_rule(1),
    "training.batch_size": _count_rule(1),
    "training.gradient_accumulation_steps": _count_rule(1),
    "training.seed": _number_rule("at least 0 and below 2**32", lambda value: 0 <= value < 2**32),
    "training.max_grad_norm": POSITIVE,
}


def check_config(config: DictConfig) -> None:
    """Check what can be checked without building the model.

    Keys and types are checked by :func:`diffnext.utils.omegaconf_utils.get_config` before.

    Args:
        config: Training configuration with its defaults.

    Raises:
        ConfigError: Naming the first key whose value cannot work.
    """
    for stage in STAGES:
        for check in stage:
            check(config)


def find_problems(config: DictConfig) -> list[str]:
    """Do the checks of :func:`check_config`, and go on after one that fails.

    Args:
        config: Training configuration with its defaults.

    Returns:
        What keeps the run from starting, as far as one problem does not hide the next.
    """
    for stage in STAGES:
        problems = []
        for check in stage:
            try:
                check(config)
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            return problems
    return []


def check_values(config: DictConfig) -> None:
    """Check single values, and that none is missing that has no default.

    Raises:
        ConfigError: Naming the first key that is missing or cannot work.
    """
    values = resolve(config)
    require_keys(config, REQUIRED_KEYS)
    check_rules(values)


def check_rules(values: Mapping[str, Any]) -> None:
    """Check single values against what their types cannot say; null is what it means.

    Args:
        values: Training configuration as plain containers, resolved.

    Raises:
        ConfigError: Naming the first key with a value that cannot work.
    """
    for path, rule in RULES.items():
        value = look_up(values, path)[1]
        if value is not None and not rule.holds(value):
            raise ConfigError(f"{path} must be {rule.requirement}, got {value!r}")
    try:
        parse_duration(look_up(values, "training.time_limit")[1])
    except ValueError as error:
        raise ConfigError(f"training.time_limit: {error}") from error
    for name in values.get("tracking") or ():
        if name not in TRACKERS:
            raise ConfigError(f"tracking must name {' or '.join(TRACKERS)}, got {name!r}")


def check_learning_rate(config: DictConfig) -> None:
    """Build the schedule and ask it for its first and last rates.

    Raises:
        ConfigError: If it cannot be built, or a rate is no finite number of at least 0.
    """
    target = config.lr_scheduler.target
    try:
        schedule = config_to_object(config.lr_scheduler)
        rates = [schedule.lr_at(step) for step in (0, config.training.max_train_steps - 1)]
    except ConfigError as error:
        raise ConfigError(f"lr_scheduler.target: {error}") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ConfigError(f"lr_scheduler.params of {target}: {error}") from error
    for rate in rates:
        if not NOT_NEGATIVE.holds(rate):
            raise ConfigError(f"lr_scheduler.params of {target} lead to a learning rate of {rate}")


def check_optimizer(config: DictConfig) -> None:
    """Import the optimizer, and build those of PyTorch for a single number.

    Raises:
        ConfigError: If it cannot be built.
    """
    try:
        optimizer_class = config_to_class(config.optimizer)
    except ConfigError as error:
        raise ConfigError(f"optimizer.target: {error}") from error
    if not getattr(optimizer_class, "__module__", "").startswith("torch.optim"):
        return  # others may compile for minutes
    try:
        config_to_object(config.optimizer, params=[torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer.params of {config.optimizer.target}: {error}") from error


def check_output_dir(config: DictConfig) -> None:
    """Check that the output folder exists or can be made.

    Raises:
        ConfigError: If a file is in the way or the place is not writable.
    """
    output_dir = config.experiment.output_dir
    path = Path(output_dir).absolute()
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        raise ConfigError(f"experiment.output_dir={output_dir}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"experiment.output_dir={output_dir}: {existing} is not writable")


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


# The checks of a stage do not need each other; they need those of the stages before.
STAGES: tuple[tuple[Callable[[DictConfig], Any], ...], ...] = (
    (check_values,),
    (
        loss_weights,
        check_learning_rate,
        check_optimizer,
        check_output_dir,
        check_base_folder,
        check_pipeline,
        check_components,
        check_transformer,
        check_dataset,
    ),
    (check_records,),
)
