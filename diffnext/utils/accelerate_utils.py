"""Starting accelerate, the log and the experiment trackers."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import netrc
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, TypeAlias, cast
from urllib.parse import urlparse

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import MultiProcessAdapter
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
)
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError
from torch.distributed.fsdp import MixedPrecisionPolicy

from diffnext.config.load import flatten_omega_conf
from diffnext.config.schema import (
    KEEP,
    ExperimentConfig,
    Precision,
    TrainConfig,
    TrainingConfig,
    WandbConfig,
    iterate_schema,
)
from diffnext.config.targets import ConfigError
from diffnext.utils.profiler import parse_duration

logger = logging.getLogger(__name__)

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class RankLogger(MultiProcessAdapter):
    """Accelerate's multi-process logger; only messages of other ranks name their rank."""

    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[object, MutableMapping[str, Any]]:
        """Add the rank, except to lines of rank 0."""
        rank_message, kwargs = super().process(msg, kwargs)
        return (msg if self._should_log(main_process_only=True) else rank_message), kwargs


Logger: TypeAlias = logging.Logger | logging.LoggerAdapter


@contextlib.contextmanager
def warn_on_error(log: Logger, message: str, *args: object) -> Iterator[None]:
    """Turn an error inside into a warning, where an error must not end a run.

    Args:
        log: Where to warn.
        message: What was not done, with ``%`` placeholders; the error is added.
        *args: For the placeholders.
    """
    try:
        yield
    except Exception as error:
        log.warning(f"{message}: %s: %s", *args, type(error).__name__, error)


# Engines


def normalize_precision(precision: str | bool | None) -> str:
    """Translate ``training.mixed_precision`` to accelerate's name.

    YAML reads an unquoted ``no`` as False, which is accepted as well.

    Args:
        precision: no, fp32, fp16 or bf16 in any letter case; False and None mean no.

    Returns:
        "no", "fp16" or "bf16".

    Raises:
        ConfigError: For any other value.
    """
    try:
        return TypeAdapter[str](Precision).validate_python(precision)
    except ValidationError:
        rule = "training.mixed_precision must be no, fp16 or bf16"
        raise ConfigError(f"{rule}, got {precision!r}") from None


def precision_to_dtype(precision: str | bool | None = "bf16") -> torch.dtype:
    """Return the dtype of a precision name in any letter case; float32 unless fp16 or bf16."""
    return _DTYPES.get(str(precision).lower(), torch.float32)


def build_accelerator(
    config: TrainConfig | DictConfig,
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
    training = _section(config, "training", TrainingConfig)
    precision = normalize_precision(training.mixed_precision)
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=log_with,
        **_launch_arguments(training.process_group_timeout, **kwargs),
    )
    accelerator.gradient_accumulation_steps = training.gradient_accumulation_steps
    # On a CPU accelerate would silently train in float32 instead.
    if precision == "fp16" and not _supports_fp16(accelerator):
        raise ConfigError(
            f"training.mixed_precision=fp16 does not work on {accelerator.device}: use bf16 or no"
        )
    if accelerator.state.deepspeed_plugin is not None:
        _configure_deepspeed(accelerator, training.max_grad_norm, deepspeed_log_lvl)
    if _is_set("ACCELERATE_USE_FSDP") and accelerator.num_processes > 1:
        _configure_fsdp(accelerator)
    return accelerator


def _section(config: TrainConfig | DictConfig, name: str, schema: type) -> Any:
    """A section of a configuration; a library user's DictConfig may lack it, or keys of it."""
    section = getattr(config, name, None)
    if not isinstance(section, DictConfig):
        return section
    defaults = {item.path: item.default for item in iterate_schema(schema) if not item.required}
    given = OmegaConf.to_container(section, resolve=True)
    return SimpleNamespace(**{**defaults, **cast("dict[str, Any]", given)})


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _launch_arguments(
    timeout: str | None, kwargs_handlers: Sequence[KwargsHandler] = (), **kwargs: Any
) -> dict[str, Any]:
    """Arguments of ``Accelerator`` that make it join the processes of a launcher.

    Without a GPU accelerate picks no backend by itself, and every process would train alone.
    """
    seconds = parse_duration(timeout)
    group = InitProcessGroupKwargs(timeout=None if seconds is None else timedelta(seconds=seconds))
    if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
        if _is_set("ACCELERATE_USE_DEEPSPEED"):
            group.backend = "gloo"
            _skip_inference_kernel()
        else:
            kwargs = {"cpu": True, **kwargs}
    handlers = list(kwargs_handlers)
    if not any(isinstance(handler, InitProcessGroupKwargs) for handler in handlers):
        handlers.append(group)
    return {"kwargs_handlers": handlers, **kwargs}


def _skip_inference_kernel() -> None:
    """Keep DeepSpeed from compiling its all-reduce of a CPU, which only its inference calls.

    PyTorch guards the compiler's folder by a file: a process that is killed meanwhile leaves it
    behind, and every later run waits for it without end.
    """
    from deepspeed.ops import __compatible_ops__ as is_compatible

    is_compatible["deepspeed_shm_comm"] = False


def _supports_fp16(accelerator: Accelerator) -> bool:
    if accelerator.state.deepspeed_plugin is None:
        return accelerator.device.type != "cpu"
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().is_fp16_supported()


def _configure_deepspeed(
    accelerator: Accelerator, max_grad_norm: float | None, log_level: str
) -> None:
    from deepspeed.utils import logger as deepspeed_logger

    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage == 3:
        raise ConfigError("DeepSpeed ZeRO stage 3 is not supported: use zero_stage 2")
    deepspeed_logger.setLevel(log_level)
    # DeepSpeed asks for this number, but only derives a global batch size that nothing here reads.
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    plugin.deepspeed_config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
    # Accelerate drops the 0.0 of a launch file, and DeepSpeed would then clip to 1.0 by default.
    plugin.deepspeed_config.setdefault("gradient_clipping", 0.0)
    if max_grad_norm is not None:
        plugin.deepspeed_config["gradient_clipping"] = float(max_grad_norm)


def _configure_fsdp(accelerator: Accelerator) -> None:
    """Shard on CPU processes as well, where accelerate ignores the launch file; reduce in float32.

    Raises:
        ConfigError: For the first version of FSDP.
    """
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        PartialState().distributed_type = DistributedType.FSDP  # which accelerate reads again
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if not accelerator.is_fsdp2:
        raise ConfigError("FSDP version 1 is not supported: set fsdp_version to 2")
    # Every process has loaded the weights, and accelerate's way to send them cannot send buffers.
    state.fsdp_plugin.cpu_ram_efficient_loading = False
    # Accelerate would reduce gradients, and round the losses, to the training dtype.
    dtype = precision_to_dtype(accelerator.mixed_precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    state.fsdp_plugin.mixed_precision_policy = policy


def get_ddp_shards(accelerator: Accelerator) -> dict[str, int]:
    """Return the data shard of this process as loader arguments."""
    return {"shard_id": accelerator.process_index, "num_shards": accelerator.num_processes}


# Trackers


def _guarded(method: str) -> Callable[..., None]:
    """A tracker's method whose errors are not raised."""

    def call(self: SafeTracker, *args: Any, **kwargs: Any) -> None:
        try:
            getattr(self.inner, method)(*args, **kwargs)
        except Exception as error:
            if not self.has_failed:
                self.has_failed = True
                reason = f"{type(error).__name__}: {error}"
                logger.warning("%s failed, so it may lack parts of this run: %s", self.name, reason)

    return call


class SafeTracker(GeneralTracker):
    """A tracker that never ends a run: its first error is a warning, later ones are ignored.

    Args:
        tracker: The tracker, which is not yet started.
    """

    def __init__(self, tracker: GeneralTracker) -> None:
        self.name = tracker.name
        self.inner = tracker
        self.has_failed = False

    @property
    def tracker(self) -> Any:
        """What the tracker's own package calls a run."""
        return self.inner.tracker

    def start(self) -> None:
        """Begin tracking; the only call whose errors are raised."""
        self.inner.start()

    store_init_configuration = _guarded("store_init_configuration")
    log = _guarded("log")
    log_images = _guarded("log_images")
    finish = _guarded("finish")


class _TensorBoard(TensorBoardTracker):
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Hand over pictures by name: uint8, (N, H, W, 3)."""
        super().log_images(values, step=step, dataformats="NHWC", **kwargs)


def build_trackers(
    config: TrainConfig | DictConfig,
    accelerator: Accelerator,
    run_id: str | None = None,
    first_step: int = 0,
) -> str | None:
    """Start the trackers named by ``tracking``; without it, wandb if there is such a section.

    One that cannot start is left out with a warning. Only the main process acts.

    Args:
        config: Training configuration.
        accelerator: Gets the trackers.
        run_id: Run of Weights & Biases to continue, unless the configuration names one.
        first_step: Step that the run begins at; the records of it and later steps are replaced.

    Returns:
        The id of the run of Weights & Biases; None if there is none.
    """
    names = getattr(config, "tracking", None)
    if names is None:
        return build_wandb(config, accelerator, run_id)
    if "tensorboard" in names and accelerator.is_main_process:
        _start_tensorboard(config, accelerator, first_step)
    return _start_wandb(config, accelerator, run_id) if "wandb" in names else None


def build_wandb(
    config: TrainConfig | DictConfig, accelerator: Accelerator, run_id: str | None = None
) -> str | None:
    """Start Weights & Biases if the configuration has a ``wandb`` section.

    Only the main process acts. Without the package there is a warning and no tracking; without a
    login the run is recorded offline. Nothing asks for input and nothing here ends a run.

    Args:
        config: Training configuration. In a DictConfig, the id is written to ``wandb.run_id``.
        accelerator: Gets the tracker.
        run_id: Run to continue, unless the configuration names one.

    Returns:
        The id of the run; None if there is none.
    """
    if _section(config, "wandb", WandbConfig) is None:
        return None
    return _start_wandb(config, accelerator, run_id)


def _start_tensorboard(
    config: TrainConfig | DictConfig, accelerator: Accelerator, first_step: int
) -> None:
    experiment = _section(config, "experiment", ExperimentConfig)
    tracker = _TensorBoard(
        experiment.name or "run",
        os.path.join(experiment.output_dir, "tensorboard"),
        purge_step=first_step or None,
    )
    if _start(tracker, accelerator):
        accelerator.trackers[-1].store_init_configuration(_describe(config))


def _start_wandb(
    config: TrainConfig | DictConfig, accelerator: Accelerator, run_id: str | None
) -> str | None:
    if not accelerator.is_main_process:
        return None
    if find_spec("wandb") is None:
        logger.warning("wandb is not installed, so this run is not tracked: pip install wandb")
        return None
    experiment = _section(config, "experiment", ExperimentConfig)
    section = _section(config, "wandb", WandbConfig)
    known_id = (section and section.run_id) or run_id
    run_id = known_id or secrets.token_hex(4)
    if isinstance(config, DictConfig):
        OmegaConf.update(config, "wandb.run_id", run_id)
    arguments = {
        "id": run_id,
        "name": experiment.name,
        "resume": "allow" if known_id else None,
        "config": _describe(config),
        "dir": os.environ.get("WANDB_DIR", experiment.output_dir),
    }
    if "WANDB_MODE" not in os.environ and not _wandb_login_exists():
        logger.warning("wandb has no login on this machine: recording offline (see `wandb sync`)")
        arguments["mode"] = "offline"
    _start(WandBTracker(experiment.project or "diffnext", **arguments), accelerator)
    return run_id


def _start(tracker: GeneralTracker, accelerator: Accelerator) -> bool:
    """Start a tracker and give it to the accelerator; returns whether it worked."""
    safe = SafeTracker(tracker)
    with warn_on_error(logger, "%s could not start, so it does not track this run", tracker.name):
        safe.start()
        accelerator.trackers.append(safe)
    return safe in accelerator.trackers


def _describe(config: TrainConfig | DictConfig) -> dict[str, Any]:
    """A whole configuration as dotted keys and values that every tracker takes."""
    merged = config
    if isinstance(merged, TrainConfig):
        tree = asdict(merged, dict_factory=_without_keep)
        merged = OmegaConf.create(json.loads(json.dumps(tree)))  # with lists for tuples
    leaves = flatten_omega_conf(merged, resolve=True)
    return {key: str(value) if isinstance(value, list | dict) else value for key, value in leaves}


def _without_keep(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if value is not KEEP}


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

    A second call replaces the handlers of the first. Ranks other than 0 log only errors.

    Args:
        output_dir: Folder that gets ``logs/<YYYYmmdd_HHMMSS>.log`` from the main process.
        name: Logger to set up; modules below that name are included.
        level: Lowest level shown by the main process.
        accelerator: Tells which rank this is; without one it is the main process.

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
    formatter = logging.Formatter(
        "%(asctime)s %(levelname)s %(filename)s:%(lineno)d] %(message)s", datefmt="%m/%d %H:%M:%S"
    )

    def add(handler: logging.Handler) -> None:
        handler.setFormatter(formatter)
        target.addHandler(handler)

    add(logging.StreamHandler(sys.stdout))
    if output_dir is not None and is_main:
        with warn_on_error(target, "there is no log file"):
            add(logging.FileHandler(_log_file(output_dir), encoding="utf-8"))
    return target if accelerator is None else RankLogger(target, {})


def _log_file(output_dir: str) -> str:
    """A new file name; a number is added if two runs start within the same second."""
    folder = os.path.join(output_dir, "logs")
    os.makedirs(folder, exist_ok=True)
    stem = os.path.join(folder, time.strftime("%Y%m%d_%H%M%S"))
    names = itertools.chain([f"{stem}.log"], (f"{stem}_{n}.log" for n in itertools.count(1)))
    return next(name for name in names if not os.path.exists(name))
