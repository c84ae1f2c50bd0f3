"""Starting accelerate, the log and the experiment tracker."""

from __future__ import annotations

import logging
import netrc
import os
import secrets
import sys
import time
from collections.abc import MutableMapping
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlparse

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import MultiProcessAdapter
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from omegaconf import DictConfig

from diffnext.utils.omegaconf_utils import ConfigError, flatten_omega_conf

logger = logging.getLogger(__name__)

_PRECISION_ALIASES = {"no": "no", "fp32": "no", "false": "no", "fp16": "fp16", "bf16": "bf16"}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class RankLogger(MultiProcessAdapter):
    """Accelerate's multi-process logger; only messages of other ranks name their rank."""

    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[object, MutableMapping[str, Any]]:
        """Add the rank where it matters, so that lines of rank 0 keep their plain form."""
        rank_message, kwargs = super().process(msg, kwargs)
        return (msg if self._should_log(main_process_only=True) else rank_message), kwargs


def normalize_precision(precision: str | bool | None) -> str:
    """Translate ``training.mixed_precision`` to accelerate's name.

    YAML reads an unquoted ``no`` as False, so that is accepted too.

    Args:
        precision: no, fp32, fp16 or bf16 in any letter case; False and None mean no.

    Returns:
        "no", "fp16" or "bf16".

    Raises:
        ConfigError: For any other value.
    """
    name = "no" if precision is None else str(precision).lower()
    if name not in _PRECISION_ALIASES:
        raise ConfigError(f"training.mixed_precision must be no, fp16 or bf16, got {precision!r}")
    return _PRECISION_ALIASES[name]


def precision_to_dtype(precision: str | bool | None = "bf16") -> torch.dtype:
    """Return the dtype of a precision name in any letter case; float32 unless fp16 or bf16."""
    return _DTYPES.get(str(precision).lower(), torch.float32)


def build_accelerator(
    config: DictConfig,
    log_with: str | None = None,
    deepspeed_log_lvl: str = "WARNING",
    **kwargs: Any,
) -> Accelerator:
    """Start accelerate for a training configuration.

    Args:
        config: Training configuration; its ``training`` section is read.
        log_with: Tracker that the run may start later, such as "wandb".
        deepspeed_log_lvl: Log level of DeepSpeed.
        **kwargs: Further arguments of ``Accelerator``.

    Raises:
        ConfigError: If the precision is unknown or does not work on this device.
    """
    precision = normalize_precision(config.training.get("mixed_precision"))
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=config.training.get("gradient_accumulation_steps", 1),
        log_with=log_with,
        **{**_cpu_launch_arguments(), **kwargs},
    )
    # On a CPU accelerate would silently train in float32 instead.
    if precision == "fp16" and not _supports_fp16(accelerator):
        raise ConfigError(
            f"training.mixed_precision=fp16 does not work on {accelerator.device}: use bf16 or no"
        )
    if accelerator.state.deepspeed_plugin is not None:
        _configure_deepspeed(accelerator, config, deepspeed_log_lvl)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        _configure_fsdp(accelerator)
    return accelerator


def _configure_fsdp(accelerator: Accelerator) -> None:
    """Shard on several CPU processes as well, where accelerate ignores the launch file.

    Raises:
        ConfigError: For the first version of FSDP.
    """
    state = accelerator.state
    if accelerator.num_processes == 1:
        return  # there is nothing to shard among
    if state.distributed_type == DistributedType.MULTI_CPU:
        PartialState().distributed_type = DistributedType.FSDP  # which accelerate reads again
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    if not accelerator.is_fsdp2:
        raise ConfigError("FSDP version 1 is not supported: set fsdp_version to 2")
    # Every process has loaded the weights, and accelerate's way to send them cannot send buffers.
    state.fsdp_plugin.cpu_ram_efficient_loading = False


def _supports_fp16(accelerator: Accelerator) -> bool:
    if accelerator.state.deepspeed_plugin is None:
        return accelerator.device.type != "cpu"
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().is_fp16_supported()


def _cpu_launch_arguments() -> dict[str, Any]:
    """Arguments that make accelerate join the processes of a launcher on a CPU-only machine.

    Without an accelerator it picks no backend by itself, and every process would train alone.
    """
    if "LOCAL_RANK" not in os.environ or torch.accelerator.is_available():
        return {}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return {"kwargs_handlers": [InitProcessGroupKwargs(backend="gloo")]}
    return {"cpu": True}


def _configure_deepspeed(accelerator: Accelerator, config: DictConfig, log_level: str) -> None:
    from deepspeed.utils import logger as deepspeed_logger

    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage == 3:
        raise ConfigError("DeepSpeed ZeRO stage 3 is not supported: use zero_stage 2")
    deepspeed_logger.setLevel(log_level)
    # DeepSpeed wants this number, but only derives a global batch size that nothing here reads.
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    # Accelerate drops the 0.0 of a launch file, and DeepSpeed would then clip to 1.0 by default.
    plugin.deepspeed_config.setdefault("gradient_clipping", 0.0)
    if config.training.get("max_grad_norm") is not None:
        plugin.deepspeed_config["gradient_clipping"] = float(config.training.max_grad_norm)


def get_ddp_shards(accelerator: Accelerator) -> dict[str, int]:
    """Return the data shard of this process as loader arguments."""
    return {"shard_id": accelerator.process_index, "num_shards": accelerator.num_processes}


def build_trackers(config: DictConfig, accelerator: Accelerator) -> None:
    """Start the trackers named by ``tracking``; without it, wandb if there is such a section.

    One that cannot start is left out with a warning. Only the main process acts.

    Args:
        config: Training configuration.
        accelerator: Built with ``log_with="wandb"``.
    """
    names = config.get("tracking")
    if names is None:
        build_wandb(config, accelerator)
        return
    if "wandb" in names:
        if config.get("wandb") is None:
            config.wandb = {"run_id": None}
        build_wandb(config, accelerator)
    if "tensorboard" in names and accelerator.is_main_process:
        _start_tensorboard(config, accelerator)


def _start_tensorboard(config: DictConfig, accelerator: Accelerator) -> None:
    tracker = TensorBoardTracker(
        config.experiment.get("name") or "run",
        os.path.join(config.experiment.output_dir, "tensorboard"),
        purge_step=config.experiment.get("resume_iter") or None,  # drops what is done again
    )
    try:
        tracker.start()
        tracker.store_init_configuration(dict(flatten_omega_conf(config, resolve=True)))
    except Exception as error:  # a tracker must never end a training run
        logger.warning("tensorboard could not start, so it does not track this run: %s", error)
        return
    accelerator.trackers.append(tracker)


def build_wandb(config: DictConfig, accelerator: Accelerator) -> None:
    """Start Weights & Biases where the configuration asks for it.

    Only the main process of a configuration with a ``wandb`` section acts. Without the package
    there is a warning and no tracking; without a login the run is recorded offline. Nothing asks
    for input and nothing here ends a run. The run id is written back to ``wandb.run_id``.

    Args:
        config: Training configuration.
        accelerator: Built with ``log_with="wandb"``.
    """
    if config.get("wandb") is None or not accelerator.is_main_process:
        return
    if find_spec("wandb") is None:
        logger.warning("wandb is not installed, so this run is not tracked: pip install wandb")
        return
    configured_id = config.wandb.get("run_id")
    config.wandb.run_id = configured_id or secrets.token_hex(4)
    arguments = {
        "id": config.wandb.run_id,
        "name": config.experiment.get("name"),
        "resume": "allow" if configured_id else None,
        "config": dict(flatten_omega_conf(config, resolve=True)),
        "dir": os.environ.get("WANDB_DIR", config.experiment.output_dir),
    }
    if "WANDB_MODE" not in os.environ and not _wandb_login_exists():
        logger.warning("wandb has no login on this machine: recording offline (see `wandb sync`)")
        arguments["mode"] = "offline"
    project = config.experiment.get("project") or "diffnext"
    try:
        accelerator.init_trackers(project, init_kwargs={"wandb": arguments})
    except Exception as error:  # a tracker must never end a training run
        accelerator.trackers.clear()
        logger.warning("wandb could not start, so this run is not tracked: %s", error)


def _wandb_login_exists() -> bool:
    """Whether wandb would find credentials without asking for them."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def set_logger(
    output_dir: str | None = None,
    name: str = "diffnext",
    level: str = "INFO",
    accelerator: Accelerator | None = None,
) -> logging.Logger | RankLogger:
    """Send the log of the package to standard output and a file.

    A second call replaces the handlers of the first. Ranks other than 0 log errors only, whichever
    module they come from.

    Args:
        output_dir: Folder that gets ``logs/<YYYYmmdd_HHMMSS>.log`` from the main process.
        name: Logger to set up; modules below that name are included.
        level: Lowest level shown by the main process.
        accelerator: Tells which rank this is; without one the process is taken for the main one.

    Returns:
        The logger, as accelerate's multi-process adapter if there is an accelerator.
    """
    target = logging.getLogger(name)
    is_main = accelerator is None or accelerator.is_main_process
    target.setLevel(level if is_main else logging.ERROR)
    target.propagate = False
    for handler in list(target.handlers):
        target.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if output_dir is not None and is_main:
        handlers.append(logging.FileHandler(_log_file(output_dir), encoding="utf-8"))
    formatter = logging.Formatter(
        "%(asctime)s %(levelname)s %(filename)s:%(lineno)d] %(message)s", datefmt="%m/%d %H:%M:%S"
    )
    for handler in handlers:
        handler.setFormatter(formatter)
        target.addHandler(handler)
    return target if accelerator is None else RankLogger(target, {})


def _log_file(output_dir: str) -> str:
    """A new file name; a number is added if two runs start within the same second."""
    folder = os.path.join(output_dir, "logs")
    os.makedirs(folder, exist_ok=True)
    stem = os.path.join(folder, time.strftime("%Y%m%d_%H%M%S"))
    path = f"{stem}.log"
    number = 1
    while os.path.exists(path):
        path = f"{stem}_{number}.log"
        number += 1
    return path
