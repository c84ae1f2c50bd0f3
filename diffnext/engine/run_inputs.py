"""The inputs of a run, its base folder and datasets: opened once, by one process, and checked.

:func:`open_inputs` finds everything that keeps a run from starting before it raises.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffnext.config.schema import TrainConfig
from diffnext.config.targets import ConfigError, config_to_object, import_target
from diffnext.data.flex_loaders import FeatureDataLoader, LoaderOptions
from diffnext.data.records import RecordDataset
from diffnext.engine.base_folder import (
    BaseFolder,
    TransformerFacts,
    inspect_transformer,
    open_base,
)
from diffnext.engine.dataset_facts import (
    DatasetFacts,
    open_datasets,
    wrong_prompt,
    wrong_records,
)
from diffnext.models.transformers.transformer_3d import check_prediction_type
from diffnext.pipelines.nova.pipeline_train_c2i import NOVATrainC2IPipeline
from diffnext.pipelines.nova.pipeline_train_t2i import NOVATrainT2IPipeline
from diffnext.pipelines.nova.pipeline_train_t2v import NOVATrainT2VPipeline

logger = logging.getLogger(__name__)

LOADER = "train_dataloader.params"
DATASET = f"{LOADER}.dataset"
HOLDOUT = "validation.holdout"
TRAINS_ON = {
    NOVATrainC2IPipeline: "classes",
    NOVATrainT2IPipeline: "texts",
    NOVATrainT2VPipeline: "texts",
}


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """The inputs of a run, found and checked by one process and sent to the others.

    Attributes:
        base_folder: Local folder of ``pipeline.paths.pretrained_path``.
        paths: Arguments of :func:`diffnext.pipelines.builder.get_pipeline_path`, all local.
        components: Where each component comes from; those left out are not in it.
        transformer: Arguments of the transformer: its config.json with the overlay.
        datasets: The training data.
        holdout: The held-out data if it is a folder of its own.
    """

    base_folder: Path
    paths: dict[str, Any]
    components: Mapping[str, Path]
    transformer: dict[str, Any]
    datasets: tuple[DatasetFacts, ...]
    holdout: tuple[DatasetFacts, ...]

    @property
    def num_train(self) -> int:
        """Examples to train on: the datasets without their held-out ends."""
        return sum(facts.num_train for facts in self.datasets)

    def open_training(self, path: str | os.PathLike[str]) -> RecordDataset:
        """The examples of a dataset to train on, for the loader."""
        facts = next(facts for facts in self.datasets if facts.folder == Path(path))
        return facts.open(stop=facts.num_train)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What could be found out about the inputs of a run.

    Attributes:
        base: None if there is no such folder on this machine.
        transformer: The model; without a base only what the configuration says.
        datasets: The training data, as far as it can be read.
        holdout: The held-out data if it is a folder of its own.
        problems: Everything that keeps the run from starting, a line each.
    """

    base: BaseFolder | None
    transformer: TransformerFacts
    datasets: tuple[DatasetFacts, ...]
    holdout: tuple[DatasetFacts, ...]
    problems: tuple[str, ...]

    def inputs(self) -> RunInputs | None:
        """The inputs of the run; None if there are problems or the base folder is not here."""
        if self.problems or self.base is None:
            return None
        return RunInputs(
            base_folder=self.base.folder,
            paths=self.base.paths,
            components=self.base.components,
            transformer=self.transformer.arguments,
            datasets=self.datasets,
            holdout=self.holdout,
        )


def open_inputs(config: TrainConfig, num_processes: int = 1) -> RunInputs:
    """Open and check what a run reads; a base folder on the Hub is downloaded.

    Args:
        config: Training configuration.
        num_processes: Processes that share the dataset.

    Raises:
        ConfigError: With a line for each problem.
    """
    findings = inspect_inputs(config, num_processes, download=True)
    inputs = findings.inputs()
    if inputs is None:
        raise ConfigError(*findings.problems)
    return inputs


def inspect_inputs(config: TrainConfig, num_processes: int = 1, download: bool = False) -> Findings:
    """Find out what a run reads, as far as possible, and everything that keeps it from starting.

    Args:
        config: Training configuration.
        num_processes: Processes that share the dataset.
        download: Whether to get a base folder from the Hub if it is not on this machine.
    """
    problems = [*_wrong_rates(config), *_wrong_output_dir(config.experiment.output_dir)]
    base = open_base(config, download, problems)
    model = inspect_transformer(config, base, problems)
    loader, holdout = config.train_dataloader, config.validation.holdout
    is_ours = import_target(loader.target) is FeatureDataLoader
    share = holdout if isinstance(holdout, float) else 0.0
    datasets = open_datasets(DATASET, loader.params.dataset, share, is_ours, problems)
    kept: tuple[DatasetFacts, ...] = ()
    if isinstance(holdout, str):
        kept = open_datasets(HOLDOUT, holdout, 0.0, True, problems)
    count = sum(facts.num_examples for facts in datasets)
    if share and count and not any(facts.num_held_out for facts in datasets):
        problems.append(f"{HOLDOUT}={holdout} keeps none of the {count} examples")
    if is_ours:
        problems += _wrong_shares(config, num_processes, datasets)
    problems += _wrong_validation(config, datasets, model, base)
    problems += _wrong_kind(config, model, base)
    for facts in (*datasets, *kept):
        problems += [f"{facts.key}: {line}" for line in wrong_records(config, facts, model, base)]
    return Findings(
        base=base,
        transformer=model,
        datasets=datasets,
        holdout=kept,
        problems=tuple(dict.fromkeys(problems)),
    )


def _wrong_rates(config: TrainConfig) -> Iterator[str]:
    """Try a step of the optimizer, and ask the schedule for its first and last rates."""
    optimizer, schedule = config.optimizer, config.lr_scheduler
    is_wrong = False
    # Other packages' optimizers may compile for minutes.
    if getattr(import_target(optimizer.target), "__module__", "").startswith("torch.optim"):
        try:
            weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
            groups = [{"params": [weights[0]]}, {"params": [weights[1]], "weight_decay": 0.0}]
            built = config_to_object(optimizer, params=groups)
            for weight in weights:
                weight.grad = torch.zeros(1)
            built.step()
        except (TypeError, ValueError, RuntimeError) as error:
            is_wrong = True
            yield f"optimizer.params of {optimizer.target}: {error}"
    name = f"lr_scheduler.params of {schedule.target}"
    try:
        rate_at = config_to_object(schedule).lr_at
        rates = [rate_at(step) for step in (0, config.training.max_train_steps - 1)]
        wrong = [rate for rate in rates if not (math.isfinite(rate) and rate >= 0)]
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        yield f"{name}: {error}"
        return
    is_same = is_wrong and schedule.params.get("lr_max") == optimizer.params.get("lr")
    if wrong and not is_same:
        yield f"{name} lead to a learning rate of {wrong[0]}, which must be finite and at least 0"


def _wrong_output_dir(output_dir: str) -> Iterator[str]:
    """Try in a temporary folder beside its place whether the output folder can be made."""
    if "\0" in output_dir:
        yield f"experiment.output_dir={output_dir!r} holds a NUL character"
        return
    path = Path(output_dir).absolute()
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        yield f"experiment.output_dir={output_dir}: {existing} is not a folder"
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".diffnext-", dir=existing) as probe:
            (Path(probe) / path.relative_to(existing)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        yield f"experiment.output_dir={output_dir} cannot be made or written to: {reason}"


def _wrong_shares(
    config: TrainConfig, num_processes: int, datasets: Sequence[DatasetFacts]
) -> Iterator[str]:
    """Check that every process has something to read."""
    params = config.train_dataloader.params
    shards = num_processes if params.shard_id is None else params.num_shards or 1
    shard_id = shards - 1 if params.shard_id is None else params.shard_id
    counts = [facts.num_train for facts in datasets]
    if not counts or 0 in counts:  # they cannot be read
        return
    try:
        options = LoaderOptions(shard_id=shard_id, num_shards=shards, seed=params.seed)
        orders = options.make_orders(counts)
    except ValueError as error:
        yield f"{LOADER}: {error}"
        return
    own = f"{LOADER}.batch_size is {params.batch_size}"
    for facts, order in zip(datasets, orders, strict=True):
        smallest = facts.num_train - order.shard_size * (order.num_shards - 1)
        if params.batch_size > smallest:
            logger.warning(
                "%s, but a process has only %d examples of %s, which repeat inside a batch",
                own,
                smallest,
                facts.folder,
            )
    if params.batch_size != config.training.batch_size:
        logger.warning("%s, but training.batch_size is %d", own, config.training.batch_size)


def _wrong_kind(
    config: TrainConfig, model: TransformerFacts, base: BaseFolder | None
) -> Iterator[str]:
    """Check that pipeline and scheduler can train the model."""
    target = config.pipeline.target
    trains = TRAINS_ON.get(import_target(target))
    reads = "texts" if model.sizes.get("text_token_dim") else "classes"
    if trains and "text_token_dim" in model.sizes and trains != reads:
        yield f"pipeline.target={target} trains on {trains}, but the model reads {reads}"
    try:
        check_prediction_type({} if base is None else base.read_config("scheduler"))
    except (ValueError, OSError) as error:
        yield f"the scheduler of {config.pipeline.paths.pretrained_path}: {error}"


def _wrong_validation(
    config: TrainConfig,
    datasets: Sequence[DatasetFacts],
    model: TransformerFacts,
    base: BaseFolder | None,
) -> Iterator[str]:
    """Check that there is something to validate, and that the prompts suit the model."""
    options = config.validation
    drawn = [prompt for facts in datasets for s in facts.samples for prompt in s.prompts]
    is_cached = bool(drawn) and all(isinstance(prompt, np.ndarray) for prompt in drawn)
    has_own = options.prompts is not None or options.holdout is not None
    if options.every is not None and is_cached and not has_own:
        yield (
            f"validation.every={options.every} has nothing to draw: the dataset has cached text "
            "states instead of captions; set validation.prompts or validation.holdout"
        )
    lines = (wrong_prompt("validation.prompts", p, model, base) for p in options.prompts or ())
    yield from itertools.islice(filter(None, lines), 1)
