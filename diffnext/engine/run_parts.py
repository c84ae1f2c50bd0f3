"""The parts of a run: pipeline, average, loader, and what its checkpoints have in common."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from diffnext.config.schema import LoraOptions, TrainConfig
from diffnext.config.targets import (
    ConfigError,
    config_to_class,
    config_to_object,
    target_parameters,
)
from diffnext.engine import snapshot as snapshots
from diffnext.engine.model_ema import ModelEMA
from diffnext.engine.resume import ResumePoint
from diffnext.engine.run_inputs import RunInputs
from diffnext.engine.snapshot import DamagedCheckpoint, Recipe, RunFolder
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.builder import build_pipeline, get_pipeline_path
from diffnext.pipelines.release_folder import INDEX_FILE
from diffnext.utils.accelerate_utils import get_ddp_shards, precision_to_dtype
from diffnext.utils.json_files import read_json

logger = logging.getLogger(__name__)


def build_training_pipeline(
    config: TrainConfig, inputs: RunInputs, accelerator: Accelerator, resume: ResumePoint | None
) -> Any:
    """Load the base folder, with the trained component from the checkpoint if there is one.

    The trained component is in float32, but under DeepSpeed, which keeps masters of its own.

    Raises:
        ConfigError: If the checkpoint is of another model.
    """
    dtypes = {"default": precision_to_dtype(config.training.mixed_precision)}
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        dtypes[snapshots.COMPONENT] = torch.float32
    pipeline = build_pipeline(
        get_pipeline_path(**inputs.paths),
        config_to_class(config.pipeline),
        dtype=dtypes,
        trust_remote_code=config.trust_remote_code,
    )
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


def load_trained(model: nn.Module, file: Path, lora: LoraOptions | None) -> None:
    """Load what a run has trained: the model's weights, or its adapters.

    Raises:
        ConfigError: If they are of another model.
    """
    try:
        tensors = snapshots.read_tensors(file)
        if lora is None:
            model.load_state_dict(tensors)
            return
        from diffnext.engine.lora import load_adapter

        load_adapter(cast(NOVATransformer3DModel, model), file, tensors)
    except (DamagedCheckpoint, RuntimeError) as error:
        raise ConfigError(f"the weights {file} do not fit the model: {error}") from error


def build_ema(config: TrainConfig, model: nn.Module, resume: ResumePoint | None) -> ModelEMA | None:
    """The average of the weights, None if it is off; to be built before anything is frozen."""
    if config.ema is None:
        return None
    ema = ModelEMA(model, **asdict(config.ema.params))
    if resume is not None and resume.ema_weights is not None:
        load_trained(ema.model, resume.ema_weights, config.model.lora)
    elif resume is not None:
        logger.warning("%s has no averaged weights: EMA starts from its weights", resume.checkpoint)
    return ema


def build_loader(config: TrainConfig, inputs: RunInputs, accelerator: Accelerator) -> Any:
    """Open the training examples of this process: the datasets without what is held out."""
    target = config.train_dataloader.target
    params = {**asdict(config.train_dataloader.params), "max_examples": inputs.num_train or None}
    if params["shard_id"] is None:
        params |= get_ddp_shards(accelerator)
    if any(facts.records is not None or facts.num_held_out for facts in inputs.datasets):
        params["dataset_getter"] = inputs.open_training
    taken = target_parameters(target) or params
    given = {name: value for name, value in params.items() if value is not None and name in taken}
    return config_to_object({"target": target, "params": given})


def make_recipe(
    config: TrainConfig,
    inputs: RunInputs,
    model: NOVATransformer3DModel,
    user_config: DictConfig | None,
) -> Recipe:
    """What all checkpoints of a run have in common."""
    base = inputs.base_folder
    index = (inputs.paths["module_dict"] or {}).get("model_index") or base / INDEX_FILE

    def write_trained(folder: Path, weights: Mapping[str, Tensor]) -> None:
        if config.model.lora is not None:
            from diffnext.engine.lora import write_adapter

            write_adapter(folder, model, weights)
            return
        arguments = json.loads(model.to_json_string())
        component = folder / config.model.name
        snapshots.write_component(component, arguments, weights, config.checkpoint.format)

    return Recipe(
        run=RunFolder(Path(config.experiment.output_dir), config.model.name),
        base_folder=base,
        components={
            name: folder
            for name, folder in inputs.components.items()
            if name != snapshots.COMPONENT and folder != base / name
        },
        index=read_json(index),
        config_yaml="" if user_config is None else OmegaConf.to_yaml(user_config),
        write_trained=write_trained,
        dtype=precision_to_dtype(config.training.mixed_precision),
    )


def trained_weights(config: TrainConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a model's weights, those that a checkpoint holds."""
    if config.model.lora is None:
        return dict(weights)
    from diffnext.engine.lora import adapter_weights

    return adapter_weights(weights)
