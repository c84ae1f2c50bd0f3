"""The parts of a run: pipeline, average, loader."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import Tensor, nn

from diffnext.config.schema import LoraOptions, TrainConfig
from diffnext.config.targets import (
    ConfigError,
    config_to_class,
    config_to_object,
    target_parameters,
)
from diffnext.engine.base_folder import BASE
from diffnext.engine.model_ema import ModelEMA
from diffnext.engine.resume import ResumePoint
from diffnext.engine.run_inputs import RunInputs
from diffnext.engine.snapshot import COMPONENT, read_tensors
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.builder import build_pipeline, get_pipeline_path
from diffnext.utils.accelerate_utils import get_ddp_shards, precision_to_dtype
from diffnext.utils.component_files import reading
from diffnext.utils.json_files import FileError

logger = logging.getLogger(__name__)


def build_training_pipeline(
    config: TrainConfig, inputs: RunInputs, accelerator: Accelerator, resume: ResumePoint | None
) -> Any:
    """Load the base folder, with the trained component from the checkpoint if there is one.

    The trained component is in float32, except under DeepSpeed, which keeps masters of its own.

    Raises:
        ConfigError: If the base folder cannot be loaded, its tokenizer is not its text encoder's,
            or the checkpoint belongs to another model.
    """
    dtypes = {"default": precision_to_dtype(config.training.mixed_precision)}
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        dtypes[COMPONENT] = torch.float32
    cls = config_to_class(config.pipeline)
    try:
        with reading(inputs.base_folder, cls.__name__):
            pipeline = build_pipeline(
                get_pipeline_path(**inputs.paths),
                cls,
                dtype=dtypes,
                trust_remote_code=config.trust_remote_code,
            )
    except (FileError, OSError, MemoryError) as error:
        raise ConfigError(f"{BASE}={config.pipeline.paths.pretrained_path}: {error}") from error
    _check_vocabulary(pipeline, config.pipeline.paths.pretrained_path)
    lora = config.model.lora
    if lora is not None:
        from diffnext.engine.lora import add_lora

        add_lora(pipeline.model, lora)
    if resume is not None:
        load_trained(pipeline.model, resume.weights, lora)
    pipeline.to(accelerator.device)
    if lora is not None:
        # Adapters start at random, and FSDP2 would join the shards of different ones.
        broadcast([p.data for p in pipeline.model.parameters() if p.requires_grad])
    return pipeline


def _check_vocabulary(pipeline: Any, base: str) -> None:
    tokenizer, encoder = (getattr(pipeline, name, None) for name in ("tokenizer", "text_encoder"))
    if tokenizer is None or encoder is None:
        return
    highest, size = max(tokenizer.get_vocab().values()), encoder.config.vocab_size
    if highest >= size:
        raise ConfigError(
            f"{BASE}={base}: the tokenizer gives tokens up to {highest}, which its text encoder, "
            f"of {size} tokens, does not have"
        )


def load_trained(model: nn.Module, file: Path, lora: LoraOptions | None) -> None:
    """Load what a run has trained: the model's weights, or its adapters.

    Raises:
        ConfigError: If they belong to another model.
    """
    try:
        tensors = read_tensors(file)
        if lora is None:
            model.load_state_dict(tensors)
            return
        from diffnext.engine.lora import load_adapter

        load_adapter(cast(NOVATransformer3DModel, model), file, tensors)
    except (FileError, RuntimeError) as error:
        raise ConfigError(f"the weights {file} do not fit the model: {error}") from error


def build_ema(config: TrainConfig, model: nn.Module, resume: ResumePoint | None) -> ModelEMA | None:
    """The average of the weights, None if it is off. Build it before anything is frozen."""
    if config.ema is None:
        return None
    ema = ModelEMA(model, **asdict(config.ema.params))
    if resume is not None and resume.ema_weights is not None:
        load_trained(ema.model, resume.ema_weights, config.model.lora)
    elif resume is not None:
        logger.warning("%s has no averaged weights: EMA starts from its weights", resume.checkpoint)
    return ema


def build_loader(config: TrainConfig, inputs: RunInputs, accelerator: Accelerator) -> Any:
    """Open the training examples of this process: the datasets without held-out examples."""
    target = config.train_dataloader.target
    params = {**asdict(config.train_dataloader.params), "max_examples": inputs.num_train or None}
    if params["shard_id"] is None:
        params |= get_ddp_shards(accelerator)
    if any(facts.records is not None or facts.num_held_out for facts in inputs.datasets):
        params["dataset_getter"] = inputs.open_training
    taken = target_parameters(target) or params
    given = {name: value for name, value in params.items() if value is not None and name in taken}
    return config_to_object({"target": target, "params": given})


def trained_weights(config: TrainConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a model's weights that a checkpoint holds: all, or its adapters."""
    is_whole = config.model.lora is None
    return {name: value for name, value in weights.items() if is_whole or ".lora_" in name}
