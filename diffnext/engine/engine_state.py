"""The state of a run besides the published weights: engine, random numbers, position in the data.

``state/`` of a checkpoint holds

    trainer_state.json   step, layout, versions, and the size of every file of the checkpoint
    config.yaml          the configuration as the user gave it
    rank_<r>.pt          random states, data position and unreported steps of a process
    engine/              float32 masters and optimizer state

Without DeepSpeed ``engine/`` is a distributed checkpoint of PyTorch keyed by parameter names, which
any number of processes loads, sharded or not. DeepSpeed's own files fit one number of processes;
for another they are rewritten as a universal checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import shutil
import subprocess
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

ENGINE = "engine"
ZERO_TAG = "zero"
UNIVERSAL_TAG = "universal"

# A single process is no reason to warn. Not in a context, as threads write, too.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")

# Random numbers


def capture_random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of every generator a run draws from, as tensors and plain values.

    Args:
        device: Device of this process, whose generator is included.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": list(_listed(random.getstate())),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put every generator back to where :func:`capture_random_state` found it."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Leave no trace in the random states of a run, whatever happens inside."""
    state = capture_random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)


def _listed(state: tuple) -> Iterator[Any]:
    """Python's random state with its inner tuple as a list, which ``torch.load`` accepts."""
    for part in state:
        yield list(part) if isinstance(part, tuple) else part


# Engines


class EngineState(ABC):
    """Masters and optimizer state of the prepared model, whatever keeps them.

    Args:
        accelerator: The engine.
        model: Prepared model.
        optimizer: Prepared optimizer.
    """

    name: str

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer

    @abstractmethod
    def begin_save(self, folder: Path, asynchronous: bool) -> Callable[[], None]:
        """Take the state; collective.

        Args:
            folder: Existing folder to write to.
            asynchronous: Copy the state, so that training can go on before it is written.

        Returns:
            A function that waits until everything is written.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restore what :meth:`begin_save` wrote to a folder; collective."""

    @abstractmethod
    def masters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter with its whole float32 value; collective, one at a time."""

    def weights(self) -> dict[str, Tensor]:
        """Whole state dict of the model on the main process, empty elsewhere; collective."""
        return self.accelerator.unwrap_model(self.model).state_dict()

    @contextlib.contextmanager
    def _kept_options(self) -> Iterator[None]:
        """Keep learning rate, weight decay and such as configured, not as loaded."""
        options = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        yield
        for group, configured in zip(self.optimizer.param_groups, options, strict=True):
            group.update(configured)


class DistributedState(EngineState):
    """State under plain training, DDP and FSDP2."""

    name = "distributed"

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        super().__init__(accelerator, model, optimizer)
        self._torch_optimizer = optimizer.optimizer
        self._shards = accelerator.is_fsdp2
        self._group = None
        if accelerator.num_processes > 1:
            # Of its own, as a save in the background must not meet the training's collectives.
            self._group = torch.distributed.new_group(backend="gloo")

    def begin_save(self, folder: Path, asynchronous: bool) -> Callable[[], None]:
        """See :meth:`EngineState.begin_save`."""
        arguments = {"checkpoint_id": folder / ENGINE, "process_group": self._group}
        arguments["no_dist"] = self._group is None
        model, optimizer = get_state_dict(self.model, self._torch_optimizer)
        state = {"model": model, "optimizer": optimizer["state"]}
        if asynchronous:
            with _as_plain_errors():
                future = dcp.async_save(state, **arguments)
            return lambda: _finish(future.result)
        return lambda: _finish(functools.partial(dcp.save, state, **arguments))

    def load(self, folder: Path) -> None:
        """See :meth:`EngineState.load`.

        Raises:
            ValueError: If the saved masters are of another model.
        """
        model, optimizer = get_state_dict(self.model, self._torch_optimizer)
        reader = dcp.FileSystemReader(folder / ENGINE)
        saved = reader.read_metadata().state_dict_metadata
        missing = [name for name in model if f"model.{name}" not in saved]
        if missing:
            raise ValueError(f"the saved state lacks {missing[0]} and {len(missing) - 1} more")
        state = {"model": model, "optimizer": optimizer["state"]}
        with _as_plain_errors():
            dcp.load(
                state,
                storage_reader=reader,
                # A parameter that never had a gradient has no optimizer state.
                planner=DefaultLoadPlanner(allow_partial_load=True),
                process_group=self._group,
                no_dist=self._group is None,
            )
        set_model_state_dict(self.model, state["model"])
        with self._kept_options():
            set_optimizer_state_dict(
                self.model,
                self._torch_optimizer,
                {"state": state["optimizer"], "param_groups": optimizer["param_groups"]},
            )

    def masters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """See :meth:`EngineState.masters`."""
        for parameter in self.accelerator.unwrap_model(self.model).parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            yield parameter, whole

    def weights(self) -> dict[str, Tensor]:
        """See :meth:`EngineState.weights`."""
        if not self._shards:
            return super().weights()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.model, options=options)


def _finish(write: Callable[[], Any]) -> None:
    with _as_plain_errors():
        write()


@contextlib.contextmanager
def _as_plain_errors() -> Iterator[None]:
    """Make the errors of distributed checkpoints ordinary ones; they derive from BaseException."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"writing or reading the state failed on rank {rank}: {cause}") from error


class DeepSpeedState(EngineState):
    """State under DeepSpeed ZeRO, in its own files."""

    name = "deepspeed"

    def begin_save(self, folder: Path, asynchronous: bool) -> Callable[[], None]:
        """See :meth:`EngineState.begin_save`."""
        engine = self.model
        if not asynchronous:
            engine.save_checkpoint(str(folder / ENGINE), tag=ZERO_TAG)
            return lambda: None
        direct = engine.checkpoint_engine
        deferred = _deferring(direct)
        engine.checkpoint_engine = deferred
        try:
            engine.save_checkpoint(str(folder / ENGINE), tag=ZERO_TAG)
        finally:
            engine.checkpoint_engine = direct
        return deferred.write

    def load(self, folder: Path) -> None:
        """See :meth:`EngineState.load`."""
        is_universal = self.model.load_universal_checkpoint()
        tag = UNIVERSAL_TAG if is_universal else ZERO_TAG
        with self._kept_options():
            self.model.load_checkpoint(str(folder / ENGINE), tag=tag)

    def masters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """See :meth:`EngineState.masters`."""
        from deepspeed.utils import safe_get_full_fp32_param

        for parameter in self.accelerator.unwrap_model(self.model).parameters():
            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            yield parameter, parameter if master is None else master


def _deferring(direct: Any) -> Any:
    """DeepSpeed's file writer, but one that takes copies and writes them later."""
    deferred = copy.copy(direct)
    pending: list[tuple[Any, str]] = []

    def keep(state_dict: Any, path: str) -> None:
        pending.append((_copy_to_memory(state_dict), path))

    def write() -> None:
        for state_dict, path in pending:
            direct.save(state_dict, path)

    deferred.save = keep
    deferred.write = write
    return deferred


def _copy_to_memory(value: Any) -> Any:
    """Copy the tensors of nested containers to main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)({key: _copy_to_memory(item) for key, item in value.items()})
    if type(value) in (list, tuple):
        return type(value)(_copy_to_memory(item) for item in value)
    return copy.deepcopy(value)


def make_universal(folder: Path, target: Path) -> None:
    """Rewrite DeepSpeed's state for any number of processes.

    Args:
        folder: ``state/`` of a checkpoint written under DeepSpeed.
        target: Folder to create, of the same layout.

    Raises:
        OSError: If DeepSpeed's converter fails.
    """
    shutil.rmtree(target, ignore_errors=True)
    (target / ENGINE).mkdir(parents=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(folder / ENGINE / ZERO_TAG)]
    command += ["--output_folder", str(target / ENGINE / UNIVERSAL_TAG)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    # As a process of its own, because it prints and starts a pool of processes.
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"DeepSpeed could not convert {folder}: {last_line}")


def make_engine_state(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> EngineState:
    """The kind of state that fits the engine; collective."""
    uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    kind = DeepSpeedState if uses_deepspeed else DistributedState
    return kind(accelerator, model, optimizer)
